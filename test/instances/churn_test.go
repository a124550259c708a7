package instances

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// Owners in the churn.
const owners = 500

// churn is what the owners have seen.
type churn struct {
	site
	mu    sync.Mutex
	hosts map[string]string               // under mu: by owner
	did   map[string]int                  // under mu: answers by method and code
	tasks map[schemas.TaskID]schemas.Task // all that there ever were
}

// Five hundred owners start, renew, look at and end their instances at random, through two
// gateways of which one is killed again and again. No owner ever has two at a time, each
// keeps its hostname, and when all have gone nothing is left.
func TestOwnersComeAndGo(t *testing.T) {
	c := &churn{hosts: map[string]string{}, did: map[string]int{}, tasks: map[schemas.TaskID]schemas.Task{}, site: start(t, harness.SiteOptions{
		Gateways: 2, Placers: 2, Reapers: 2, Agents: 4, Fake: true, Scale: 0.2, Sync: "default",
		AgentArgs:   []string{"--slots", "1000", "--cpus", "10000", "--memory", "10TiB"},
		ServiceArgs: []string{"--retention", "1m", "--log-level", "warn"},
	}, map[string]string{"web": `image: any
command: [sleep, 10m]
ports: [{name: web, port: 8000}, {name: api, port: 8001}]
resources: {cpus: 0.01, memory: 8MiB}
ttl: 8s
max_ttl: 1m
extensions: 3
timeouts: {stop: 0s}
values: {flag: {env: FLAG}}
`})}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var all sync.WaitGroup
	all.Go(func() {
		defer stop()
		<-time.After(churnFor)
		if err := harness.Poll(within(t, 3*patience), c.came); err != nil { // on a slow machine it takes longer
			t.Error(err)
		}
	})
	for n := range 16 {
		all.Go(func() {
			for ctx.Err() == nil {
				c.act(n)
			}
		})
	}
	all.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Second):
				_, _ = c.collect(n % 2) // which may have been killed
			}
		}
	})
	all.Go(func() { // kills come too
		for n := 0; ctx.Err() == nil; n++ {
			select {
			case <-ctx.Done():
			case <-time.After(churnFor / 6):
				victims := []*harness.Process{c.Gateway[n%2], c.Reaper[n%2], c.Placer[n%2]}
				for _, p := range victims {
					p.Kill()
				}
				for _, p := range victims {
					if err := errors.Join(p.Start(within(t, 3*patience)), p.Ready(within(t, 3*patience))); err != nil {
						t.Error(err)
					}
				}
			}
		}
	})
	all.Wait()
	c.mu.Lock()
	t.Logf("%d owners had instances; answers: %v", len(c.hosts), c.did)
	c.mu.Unlock()

	c.over()
	c.neverTwo()
	c.nothingIsLeft()
}

// came says whether most owners have.
func (c *churn) came() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.hosts) < owners*9/10 {
		return fmt.Errorf("only %d owners came", len(c.hosts))
	}
	return nil
}

// act is what one owner does.
func (c *churn) act(n int) {
	owner := fmt.Sprintf("team %d/ß", rand.IntN(owners))
	path := "web/" + url.PathEscape(owner)
	method, body := "PUT", any(map[string]any{"values": map[string]string{"flag": owner}})
	switch p := rand.IntN(10); {
	case p < 2:
		method, body = "DELETE", nil
	case p < 4:
		method, body = "PATCH", map[string]any{"renew": true}
	case p < 5:
		method, body = "GET", nil
	}
	i, status, err := c.ask(n%2, method, path, body)
	said := fmt.Sprint(method, " ", status)
	var e *schemas.Error
	if errors.As(err, &e) {
		said += " " + string(e.Code)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.did[said]++
	switch {
	case err == nil:
		if i.Owner != owner || i.Template != "web" {
			c.t.Errorf("%s of %s is of %+v", method, owner, i)
		}
		if len(i.Endpoints) == 0 {
			return // over
		}
		host := i.Endpoints[0].Host + " " + i.Endpoints[1].Host
		if was := c.hosts[owner]; was != "" && was != host {
			c.t.Errorf("%s was at %s and is at %s", owner, was, host)
		}
		c.hosts[owner] = host
	case e == nil, e.Status == 503: // of a gateway that was killed
	case slices.Contains([]schemas.Code{schemas.CodeNotFound, schemas.CodeStateConflict, schemas.CodeTooLate, schemas.CodeRenewals, schemas.CodeNotAllowed, schemas.CodeEnding}, e.Code):
	default:
		c.t.Errorf("%s: %v", method, err)
	}
}

// collect takes in all tasks that a gateway knows, and says how many are not over. Records
// are kept for a minute, so the churn asks again and again.
func (c *churn) collect(gateway int) (live int, err error) {
	query := "?limit=1000"
	for {
		var page schemas.TaskList
		if err := c.Call(within(c.t, patience), gateway, "GET", "/v1/tasks"+query, nil, &page); err != nil {
			return 0, err
		}
		for _, t := range page.Items {
			if !t.State.Final() {
				live++
			}
			c.tasks[t.ID] = t
		}
		if page.NextCursor == "" {
			return live, nil
		}
		query = "?limit=1000&cursor=" + page.NextCursor
	}
}

// over waits until all tasks are final.
func (c *churn) over() {
	c.t.Helper()
	err := harness.Poll(within(c.t, time.Minute+patience), func() error {
		live, err := c.collect(0)
		if err == nil && live > 0 {
			err = fmt.Errorf("%d tasks are not over", live)
		}
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

// neverTwo checks that of one owner's tasks each was accepted after the end of the one
// before.
func (c *churn) neverTwo() {
	of := map[string][]schemas.Task{}
	for _, t := range c.tasks {
		if t.Instance == nil {
			c.t.Errorf("%s is no instance", t.ID)
			continue
		}
		of[t.Instance.Owner] = append(of[t.Instance.Owner], t)
	}
	for owner, list := range of {
		slices.SortFunc(list, func(a, b schemas.Task) int { return strings.Compare(string(a.ID), string(b.ID)) })
		for i := 1; i < len(list); i++ {
			if before, next := list[i-1], list[i]; next.Timings.Accepted.Before(before.Timings.Ended) {
				c.t.Errorf("%s had %s until %s, and %s from %s on", owner, before.ID, before.Timings.Ended, next.ID, next.Timings.Accepted)
			}
		}
	}
	c.t.Logf("%d tasks of %d owners", len(c.tasks), len(of))
}

// nothingIsLeft waits for the records to go, and the entries with them.
func (c *churn) nothingIsLeft() {
	for n := range c.Gateway {
		err := harness.Poll(within(c.t, 2*time.Minute), func() error {
			var list schemas.InstanceList
			if err := c.Call(within(c.t, patience), n, "GET", "/v1/instances?limit=1000", nil, &list); err != nil {
				return err
			}
			var text string
			if _, err := harness.Request(within(c.t, patience), http.DefaultTransport, "GET", c.Gateway[n].Addrs.Admin+"/metrics", "", nil, &text); err != nil {
				return err
			}
			wants := []string{"dayfly_instances_open 0\n"}
			if untilGone {
				wants = append(wants, `dayfly_view_keys{bucket="instances",service="gateway"} 0`, `dayfly_view_keys{bucket="tasks",service="gateway"} 0`)
			}
			for _, want := range wants {
				if !strings.Contains(text, want) {
					at := strings.Index(text, strings.Fields(want)[0])
					return fmt.Errorf("gateway %d: want %s, have %.120s; %d are listed", n, want, text[max(0, at):], len(list.Items))
				}
			}
			return nil
		})
		if err != nil {
			c.t.Error(err)
		}
	}
}
