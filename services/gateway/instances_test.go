package gateway_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"dayfly.dev/bus"
	"dayfly.dev/bus/natsd"
	"dayfly.dev/bus/natstest"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
)

// The templates of these tests.
var templateFiles = map[string]string{
	"web.yaml":    "image: busybox\ncommand: [httpd]\nports: [{name: web, port: 8080}]\nttl: 10m\nmax_ttl: 30m\nextensions: 2\n",
	"pwn.yaml":    "image: busybox\nports: [{name: sh, port: 9, protocol: tcp}]\nvalues: {flag: {env: FLAG}, note: {path: note.txt, optional: true}}\nsecrets: [{env: ADMIN, value: hunter2}]\n",
	"ssh.yaml":    "image: busybox\nports: [{name: ssh, port: 22, protocol: tcp}, {name: web, port: 80}]\nconnection: \"ssh -p {ssh.port} ctf@{ssh.host} # {web.url}\"\n",
	"shared.yaml": "image: busybox\nshared: true\nports: [{name: web, port: 8080}]\n",
}

// site is a world whose gateways have templates.
type site struct {
	*world
	dir   string
	ports gateway.PortRange // for its gateways
}

func newSite(t testing.TB, cfg gateway.Config) site {
	s := site{world: newStore(t), dir: t.TempDir(), ports: portRange(t, 128)}
	for name, text := range templateFiles {
		s.write(name, text)
	}
	s.api = s.gateway(cfg)
	return s
}

func (s site) write(name, text string) {
	s.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o644); err != nil {
		s.Fatal(err)
	}
}

// gateway starts another one.
func (s site) gateway(cfg gateway.Config) api {
	s.Helper()
	return s.gatewayOn(natstest.Connect(s.TB, s.nats), cfg)
}

func (s site) gatewayOn(conn *bus.Conn, cfg gateway.Config) api {
	s.Helper()
	if cfg.TCP.From == 0 {
		cfg.TCP = s.ports
		cfg.TCP.To -= 64
	}
	if cfg.Policy.MaxTTL == 0 {
		cfg.Policy = schemas.DefaultPolicy()
	}
	templates, err := gateway.OpenTemplates(s.dir, cfg.Policy)
	if err != nil {
		s.Fatal(err)
	}
	a := newAPIOf(s.TB, conn, cfg, templates)
	a.TB = s.TB
	return a
}

func (r reply) instance(t testing.TB, status int) schemas.Instance {
	t.Helper()
	var i schemas.Instance
	if err := schemas.Decode(r.body, &i); r.status != status || err != nil || i.Task == "" {
		t.Fatalf("%d, want an instance and %d (%v): %s", r.status, status, err, r.body)
	}
	return i
}

func (a api) begin(path, body string, status int) schemas.Instance {
	a.Helper()
	return a.do("PUT", "/v1/instances/"+path, body).instance(a, status)
}

// end ends a running task as its worker would.
func (s site) end(id schemas.TaskID) {
	s.Helper()
	s.report(id, schemas.PhaseEnded, &schemas.End{By: schemas.EndedStop, Exit: &schemas.Exit{Code: 143}})
}

func TestAnOwnerHasOneInstance(t *testing.T) {
	s := newSite(t, gateway.Config{})
	first := s.begin("web/ada", "", 201)
	if first.Template != "web" || first.Owner != "ada" || first.State != schemas.Queued || len(first.Endpoints) != 1 ||
		first.Connection != first.Endpoints[0].URL || first.RenewalsLeft == nil || *first.RenewalsLeft != 2 {
		t.Fatalf("%+v", first)
	}
	if again := s.begin("web/ada", "{}", 200); again.Task != first.Task {
		t.Errorf("a second task: %+v", again)
	}
	if other := s.begin("web/bob", "", 201); other.Task == first.Task || other.Endpoints[0].Host == first.Endpoints[0].Host {
		t.Errorf("bob has ada's: %+v", other)
	}
	task := s.task(first.Task)
	if task.Instance == nil || task.Spec.Labels["template"] != "web" || task.Spec.Labels["owner"] != "ada" || task.Spec.TTL.Std() != 10*time.Minute {
		t.Errorf("%+v", task)
	}
	s.run(first.Task)
	running := s.get("/v1/instances/web/ada?wait=running&timeout=5s").instance(t, 200)
	if running.State != schemas.Running || !running.Ready || running.SecondsLeft < 590 || running.ExpiresAt.IsZero() {
		t.Errorf("%+v", running)
	}
	ending := s.do("DELETE", "/v1/instances/web/ada", "").instance(t, 200)
	if !ending.Canceling || ending.Task != first.Task {
		t.Errorf("%+v", ending)
	}
	next := make(chan schemas.Instance)
	go func() {
		defer close(next)
		r, err := s.try("PUT", "/v1/instances/web/ada", "")
		if err != nil {
			t.Error(err)
			return
		}
		next <- r.instance(t, 201)
	}()
	s.end(first.Task)
	second := <-next
	if second.Task <= first.Task || second.Endpoints[0] != first.Endpoints[0] {
		t.Errorf("the address changed: %+v, %+v", first, second)
	}
	gone := s.get("/v1/instances/web/nobody").want(t, 404, schemas.CodeNotFound)
	if !strings.Contains(gone.Detail, "PUT") {
		t.Error(gone.Detail)
	}
	s.do("PUT", "/v1/instances/none/ada", "").want(t, 404, schemas.CodeNotFound)
	s.do("PUT", "/v1/instances/*/ada", "").want(t, 404, schemas.CodeNotFound)
	s.get("/v1/instances/web.x/ada").want(t, 404, schemas.CodeNotFound)
	s.do("PUT", "/v1/instances/web/ada?wait=done", "").want(t, 400, schemas.CodeInvalidQuery)
}

func TestOwnersAreAnyText(t *testing.T) {
	s := newSite(t, gateway.Config{})
	seen := map[schemas.TaskID]string{}
	for _, owner := range []string{"ada", "Ada", ".", "..", "a/b", "a%2Fb", "a b", "team+1@x", "日本", "*", ">", "a.b", "shared", strings.Repeat("é", 64)} {
		path := url.PathEscape(owner)
		if strings.Trim(owner, ".") == "" {
			path = strings.ReplaceAll(owner, ".", "%2E")
		}
		i := s.begin("web/"+path, "", 201)
		if i.Owner != owner || seen[i.Task] != "" {
			t.Errorf("%q is %q, with the task of %q", owner, i.Owner, seen[i.Task])
		}
		seen[i.Task] = owner
		if got := s.get("/v1/instances/web/"+path).instance(t, 200); got.Task != i.Task {
			t.Errorf("%q: %+v", owner, got)
		}
		var list schemas.InstanceList
		if err := schemas.Decode(s.get("/v1/instances?template=web&owner="+url.QueryEscape(owner)).body, &list); err != nil || len(list.Items) != 1 || list.Items[0].Owner != owner {
			t.Errorf("%q: %v %+v", owner, err, list)
		}
	}
	for _, path := range []string{"%00", "%0A", "%FF", strings.Repeat("a", 129), "%C2%85"} {
		s.do("PUT", "/v1/instances/web/"+path, "").want(t, 422, schemas.CodeInvalidValue)
	}
	all, cursor := 0, ""
	for {
		var list schemas.InstanceList
		if err := schemas.Decode(s.get("/v1/instances?limit=5&cursor="+cursor).body, &list); cursor == "" {
			err = schemas.Decode(s.get("/v1/instances?limit=5").body, &list)
			if err != nil {
				t.Fatal(err)
			}
		} else if err != nil {
			t.Fatal(err)
		}
		all += len(list.Items)
		if cursor = list.NextCursor; cursor == "" {
			break
		}
	}
	if all != len(seen) {
		t.Errorf("pages hold %d of %d", all, len(seen))
	}
	s.get("/v1/instances?cursor=!!").want(t, 400, schemas.CodeInvalidQuery)
}

func TestAHundredPutsThroughTwoGatewaysMakeOneTask(t *testing.T) {
	s := newSite(t, gateway.Config{})
	other := s.gateway(gateway.Config{TCP: gateway.PortRange{Host: s.ports.Host, From: s.ports.From + 64, To: s.ports.To}})
	for round := range 3 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		made, tasks := 0, map[schemas.TaskID]bool{}
		for n := range 100 {
			wg.Go(func() {
				a := s.api
				if n%2 == 1 {
					a = other
				}
				r, err := a.try("PUT", fmt.Sprintf("/v1/instances/web/team%d", round), "")
				var i schemas.Instance
				if err == nil {
					err = schemas.Decode(r.body, &i)
				}
				mu.Lock()
				defer mu.Unlock()
				if err != nil || r.status != 200 && r.status != 201 {
					t.Errorf("%v %d %s", err, r.status, r.body)
				}
				if r.status == 201 {
					made++
				}
				tasks[i.Task] = true
			})
		}
		wg.Wait()
		if made != 1 || len(tasks) != 1 {
			t.Errorf("made %d, tasks %v", made, tasks)
		}
	}
	var list schemas.TaskList
	if err := schemas.Decode(s.get("/v1/tasks?label=template=web").body, &list); err != nil || len(list.Items) != 3 {
		t.Errorf("%v, %d tasks", err, len(list.Items))
	}
}

func TestValuesGoToTheWorkerAndNowhereElse(t *testing.T) {
	const flag = "CTF{do-not-tell}"
	s := newSite(t, gateway.Config{})
	e := s.do("PUT", "/v1/instances/pwn/ada", "{}").want(t, 422, schemas.CodeInvalidValue)
	if e.Field != "values.flag" {
		t.Errorf("%+v", e)
	}
	s.do("PUT", "/v1/instances/pwn/ada", `{"values":{"flag":"x","flug":"`+flag+`"}}`).want(t, 422, schemas.CodeUnknownField)
	e = s.do("PUT", "/v1/instances/pwn/ada", `{"values":{"flag":"a\nb`+flag+`"}}`).want(t, 422, schemas.CodeInvalidValue)
	if e.Field != "values.flag.value" && e.Field != "values.flag" {
		t.Errorf("%+v", e)
	}
	s.do("PUT", "/v1/instances/pwn/ada", `{"values":{"flag":"`+strings.Repeat("x", 60<<10)+`"}}`).want(t, 413, schemas.CodeTooLarge)
	r := s.do("PUT", "/v1/instances/pwn/ada", `{"values":{"flag":"`+flag+`","note":"`+flag+`"}}`)
	i := r.instance(t, 201)
	rec, err := s.records.Get(deadline(t), string(i.Task))
	if err != nil {
		t.Fatal(err)
	}
	given := chosen(t, rec.Value)
	order := schemas.NewOrder(given, 1, given.Assignment(), time.Now())
	if order.Spec == nil || order.Spec.Env["FLAG"] != flag || order.Spec.Env["ADMIN"] != "hunter2" || len(order.Spec.Files) != 1 || order.Spec.Files[0].Content != flag || len(order.Spec.Secrets) != 0 {
		t.Errorf("the worker gets %+v", order.Spec)
	}
	s.run(i.Task)
	shown := string(r.body)
	look := func(paths ...string) {
		for _, path := range paths {
			r := s.get(path)
			if r.status != 200 {
				t.Errorf("%s: %d %s", path, r.status, r.body)
			}
			shown += string(r.body)
		}
	}
	look("/v1/instances/pwn/ada", "/v1/instances", "/v1/tasks/"+string(i.Task), "/v1/tasks", "/v1/templates", "/v1/templates/pwn", "/v1/events?follow=0", "/v1/tasks/"+string(i.Task)+"/events?follow=0", "/ui/tasks/"+string(i.Task), "/ui/")
	s.end(i.Task)
	look("/v1/tasks/" + string(i.Task))
	shown += s.logs.String()
	if rec, err = s.records.Get(deadline(t), string(i.Task)); err != nil {
		t.Fatal(err)
	}
	b, _ := schemas.Encode(rec.Value)
	shown += string(b)
	for _, secret := range []string{flag, "hunter2"} {
		if i := strings.Index(shown, secret); i >= 0 {
			t.Errorf("%s is shown: …%s…", secret, shown[max(0, i-100):i])
		}
	}
	if !strings.Contains(shown, `"env":"FLAG"`) {
		t.Error("where a secret goes may be shown")
	}
}

// chosen is the record once it has a worker.
func chosen(t *testing.T, r schemas.Record) schemas.Record {
	n, err := schemas.Next(r, schemas.Choose{Meta: meta("placer"), Worker: "w1", Epoch: "e1"})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRenewalsAreCountedAndBounded(t *testing.T) {
	s := newSite(t, gateway.Config{ExtendWait: time.Millisecond})
	patch := func(body string) reply { return s.do("PATCH", "/v1/instances/web/ada", body) }
	patch(`{"renew":true}`).want(t, 404, schemas.CodeNotFound)
	i := s.begin("web/ada", `{"ttl":"1m"}`, 201)
	patch(`{}`).want(t, 422, schemas.CodeInvalidValue)
	patch(`{"renew":true,"ttl":"5m"}`).want(t, 422, schemas.CodeInvalidValue)
	patch(`{"ttl":"1ms"}`).want(t, 422, schemas.CodeInvalidValue)
	if same := patch(`{"renew":true}`).instance(t, 200); *same.RenewalsLeft != 2 {
		t.Errorf("what moves nothing costs nothing: %+v", same)
	}
	s.run(i.Task)
	if r := patch(`{"ttl":"20m"}`).instance(t, 202); *r.RenewalsLeft != 1 || r.SecondsLeft < 1190 {
		t.Errorf("%+v", r)
	}
	if r := patch(`{"renew":true}`).instance(t, 202); *r.RenewalsLeft != 1 || r.SecondsLeft < 1190 {
		t.Errorf("it has more time already: %+v", r)
	}
	if r := patch(`{"ttl":"2h"}`).instance(t, 202); *r.RenewalsLeft != 0 || r.SecondsLeft > 1800 || r.SecondsLeft < 1790 {
		t.Errorf("not beyond max_ttl: %+v", r)
	}
	patch(`{"ttl":"2h"}`).want(t, 422, schemas.CodeNotAllowed)
	s.do("DELETE", "/v1/instances/web/ada", "").instance(t, 200)
	patch(`{"renew":true}`).want(t, 409, schemas.CodeStateConflict)
	s.end(i.Task)
	patch(`{"renew":true}`).want(t, 409, schemas.CodeStateConflict)

	bob := s.begin("web/bob", `{"ttl":"5s"}`, 201)
	s.run(bob.Task)
	for _, ttl := range []string{"1m", "2m"} {
		s.do("PATCH", "/v1/instances/web/bob", `{"ttl":"`+ttl+`"}`).instance(t, 202)
	}
	s.do("PATCH", "/v1/instances/web/bob", `{"ttl":"3m"}`).want(t, 409, schemas.CodeRenewals)

	s.beat(beat("w1", 4, 4<<30))
	until(t, "the worker is known", func() bool { return s.get("/v1/workers/w1").status == 200 })
	s.do("POST", "/v1/workers/w1/drain", "{}")
	eve := s.begin("web/eve", "", 201)
	s.run(eve.Task)
	s.do("PATCH", "/v1/instances/web/eve", `{"ttl":"20m"}`).want(t, 409, schemas.CodeDraining)
}

func TestASharedInstanceIsForAll(t *testing.T) {
	s := newSite(t, gateway.Config{})
	s.do("PUT", "/v1/instances/shared/bob", `{"values":{"flag":"x"}}`).want(t, 422, schemas.CodeUnknownField)
	ada := s.begin("shared/ada", "", 201)
	bob := s.begin("shared/bob", "", 200)
	if ada.Task != bob.Task || !bob.Shared || bob.Owner != "bob" {
		t.Errorf("%+v %+v", ada, bob)
	}
	e := s.do("DELETE", "/v1/instances/shared/bob", "").want(t, 409, schemas.CodeShared)
	if e.Task != ada.Task {
		t.Errorf("%+v", e)
	}
	if task := s.task(ada.Task); task.Spec.Labels["owner"] != "" || task.Spec.Labels["template"] != "shared" {
		t.Errorf("%+v", task.Spec.Labels)
	}
}

func TestAnInstanceKeepsItsTCPPort(t *testing.T) {
	s := newSite(t, gateway.Config{})
	first := s.begin("ssh/ada", "", 201)
	port := first.Endpoints[0].Port
	if want := fmt.Sprintf("ssh -p %d ctf@localhost # %s", port, first.Endpoints[1].URL); first.Connection != want {
		t.Errorf("%s, want %s", first.Connection, want)
	}
	for range 5 {
		i := s.get("/v1/instances/ssh/ada").instance(t, 200)
		s.run(i.Task)
		s.end(i.Task)
		if next := s.begin("ssh/ada", "", 201); next.Endpoints[0].Port != port || next.Connection != first.Connection {
			t.Fatalf("%+v, then %+v", first, next)
		}
	}
	pwn := s.begin("pwn/ada", `{"values":{"flag":"x"}}`, 201)
	if want := fmt.Sprintf("nc localhost %d", pwn.Endpoints[0].Port); pwn.Connection != want {
		t.Errorf("%s, want %s", pwn.Connection, want)
	}
}

func TestAnEntryGoesWithItsRecord(t *testing.T) {
	s := newSite(t, gateway.Config{Retention: time.Second, KeyGrace: time.Second, OpTimeout: time.Second, InstanceSweep: 50 * time.Millisecond})
	entries := bus.NewTable(s.conn, schemas.BucketInstances, bus.JSON[schemas.InstanceEntry](nil))
	s.begin("web/ada", "", 201)
	s.do("DELETE", "/v1/instances/web/ada", "").instance(t, 200)
	gone := func(owner string) func() bool {
		return func() bool {
			_, err := entries.Get(deadline(t), schemas.InstanceKey("web", owner))
			return errors.Is(err, bus.ErrNotFound)
		}
	}
	until(t, "the entry of a task whose record is gone goes", gone("ada"))
	until(t, "the list is empty", func() bool { return strings.Contains(string(s.get("/v1/instances").body), `"items":[]`) })

	// A gateway that died between entry and record.
	id, err := schemas.NewTaskIDAfter("", time.Now(), strings.NewReader(strings.Repeat("x", 10)))
	if err != nil {
		t.Fatal(err)
	}
	left := schemas.InstanceEntry{Template: "web", Owner: "bob", Task: id, At: time.Now()}
	if _, err := entries.Create(deadline(t), schemas.InstanceKey("web", "bob"), left, ""); err != nil {
		t.Fatal(err)
	}
	until(t, "an entry whose record never comes goes", gone("bob"))
	s.stop() // it would find this one old at once
	if _, err := entries.Create(deadline(t), schemas.InstanceKey("web", "bob"), left, ""); err != nil {
		t.Fatal(err)
	}
	s.api = s.gateway(gateway.Config{}) // which does not find the entry old
	if i := s.begin("web/bob", "", 201); i.Task != id {
		t.Errorf("who finds an entry makes its record: %+v", i)
	}

	st, err := s.conn.JS.Stream(deadline(t), bus.StreamOf(schemas.BucketInstances))
	if err != nil {
		t.Fatal(err)
	}
	m, err := st.GetLastMsgForSubject(deadline(t), "$KV."+schemas.BucketInstances+"."+schemas.InstanceKey("web", "ada"))
	if err == nil && m.Header.Get(jetstream.MsgTTLHeader) == "" {
		t.Error("the mark of a deleted entry stays for ever")
	}
}

// What makes a record may be on its way for longer than anybody waits for it, such as in a
// server that is stopped: when it arrives, the owner has no other instance.
func TestARecordThatArrivesLateIsNoSecondInstance(t *testing.T) {
	const opTimeout = 500 * time.Millisecond
	s := newSite(t, gateway.Config{KeyGrace: time.Millisecond, OpTimeout: opTimeout, InstanceSweep: 5 * time.Millisecond, TemplatesEvery: 5 * time.Millisecond})
	p := newProxy(t, strings.TrimPrefix(s.nats.URL(), "nats://"))
	conn, err := bus.Connect(deadline(t), bus.Config{Name: "proxied", URL: "nats://" + p.addr, User: natsd.CoreUser, Password: natstest.Password})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	slow := s.gatewayOn(conn, gateway.Config{OpTimeout: opTimeout, InstanceSweep: time.Hour, TCP: gateway.PortRange{Host: "127.0.0.1", From: 21064, To: 21127}})
	slow.begin("web/bob", "", 201)
	record := "PUB $KV." + schemas.BucketTasks + "."
	p.hold.Store(&record)
	slow.do("PUT", "/v1/instances/web/ada", "").want(t, 503, schemas.CodeUnknownOutcome)
	<-p.held
	entries := bus.NewTable(s.conn, schemas.BucketInstances, bus.JSON[schemas.InstanceEntry](nil))
	entry, err := entries.Get(deadline(t), schemas.InstanceKey("web", "ada"))
	if err != nil {
		t.Fatal(err)
	}
	wanted := bus.NewTable(s.conn, schemas.BucketImages, bus.JSON[schemas.WantedImages](nil))
	for began, n := time.Now(), 0; time.Since(began) < 3*opTimeout; n++ { // the fault lasts
		image := fmt.Sprintf("busybox:%d", n)
		s.write("big.yaml", "image: "+image+"\nprepull: true\n")
		until(t, "it was looked for what belongs to nobody", func() bool { // what comes after that says so
			e, err := wanted.Get(deadline(t), schemas.KeyWanted)
			return err == nil && len(e.Value.Items) == 1 && e.Value.Items[0].Image == image
		})
	}
	var i schemas.Instance
	until(t, "the owner has an instance", func() bool {
		r := s.do("PUT", "/v1/instances/web/ada", "")
		return r.status == 201 && schemas.Decode(r.body, &i) == nil
	})
	if i.Task != entry.Value.Task {
		t.Errorf("it is %s, while %s is under way", i.Task, entry.Value.Task)
	}
	close(p.release)
	until(t, "the record has arrived", func() bool { return slow.do("PUT", "/v1/instances/web/eve", "").status == 201 }) // behind it
	var list schemas.TaskList
	if err := schemas.Decode(s.get("/v1/tasks?label=owner=ada").body, &list); err != nil || len(list.Items) != 1 {
		t.Errorf("the owner has %d tasks (%v): %+v", len(list.Items), err, list.Items)
	}
}

// Where no gateway saw the record of an instance go, its entry still names that.
func TestARecordThatWentIsNotMadeAgain(t *testing.T) {
	s := newSite(t, gateway.Config{InstanceSweep: time.Hour})
	id, err := schemas.NewTaskID(time.Now(), strings.NewReader(strings.Repeat("x", 10)))
	if err != nil {
		t.Fatal(err)
	}
	e, err := s.records.Create(deadline(t), string(id), schemas.Record{ID: id, State: schemas.Completed}, "")
	if err == nil {
		err = s.records.Delete(deadline(t), string(id), e.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	entries := bus.NewTable(s.conn, schemas.BucketInstances, bus.JSON[schemas.InstanceEntry](nil))
	if _, err := entries.Create(deadline(t), schemas.InstanceKey("web", "ada"), schemas.InstanceEntry{Template: "web", Owner: "ada", Task: id, At: time.Now()}, ""); err != nil {
		t.Fatal(err)
	}
	if i := s.begin("web/ada", "", 201); i.Task <= id {
		t.Errorf("%s, after %s was over", i.Task, id)
	}
}

// Whatever went wrong before: of two tasks of one instance one ends.
func TestASecondTaskOfAnInstanceIsCanceled(t *testing.T) {
	s := newSite(t, gateway.Config{InstanceSweep: 20 * time.Millisecond})
	i := s.begin("web/ada", "", 201)
	rec, err := s.records.Get(deadline(t), string(i.Task))
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []time.Time{time.Now().Add(-time.Hour), time.Now().Add(time.Hour)} {
		id, err := schemas.NewTaskID(at, strings.NewReader(strings.Repeat("y", 10)))
		if err != nil {
			t.Fatal(err)
		}
		late := rec.Value
		late.ID = id
		if _, err := s.records.Create(deadline(t), string(id), late, ""); err != nil {
			t.Fatal(err)
		}
		until(t, "the second is canceled", func() bool { return s.task(id).State == schemas.Canceled })
	}
	if s.task(i.Task).State != schemas.Queued {
		t.Error("the first was canceled")
	}
	// An entry that is gone comes back.
	entries := bus.NewTable(s.conn, schemas.BucketInstances, bus.JSON[schemas.InstanceEntry](nil))
	key := schemas.InstanceKey("web", "ada")
	e, err := entries.Get(deadline(t), key)
	if err == nil {
		err = entries.Delete(deadline(t), key, e.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the entry is back", func() bool {
		e, err := entries.Get(deadline(t), key)
		return err == nil && e.Value.Task == i.Task
	})
}

func TestAnOwnerMayHaveSoMany(t *testing.T) {
	s := newSite(t, gateway.Config{MaxPerOwner: 2})
	var wg sync.WaitGroup
	var mu sync.Mutex
	codes := map[int]int{}
	for _, path := range []string{"web/ada", "ssh/ada", "shared/ada", "web/bob"} {
		wg.Go(func() {
			r, err := s.try("PUT", "/v1/instances/"+path, "")
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
			}
			codes[r.status]++
		})
	}
	wg.Wait()
	if codes[201] != 4 {
		t.Fatalf("%v", codes)
	}
	e := s.do("PUT", "/v1/instances/pwn/ada", `{"values":{"flag":"x"}}`).want(t, 409, schemas.CodeOwnerLimit)
	if !strings.Contains(e.Detail, "ssh, web") {
		t.Error(e.Detail)
	}
	s.begin("web/ada", "", 200)
	s.do("DELETE", "/v1/instances/web/ada", "").instance(t, 200)
	s.begin("pwn/ada", `{"values":{"flag":"x"}}`, 201)
}

func TestTemplatesAreReadAgain(t *testing.T) {
	s := newSite(t, gateway.Config{TemplatesEvery: 10 * time.Millisecond})
	list := func() (l schemas.TemplateList) {
		if err := schemas.Decode(s.get("/v1/templates").body, &l); err != nil {
			t.Fatal(err)
		}
		return l
	}
	if l := list(); len(l.Items) != 4 || len(l.Faults) != 0 || l.Items[0].Name != "pwn" || l.Digest == "" {
		t.Fatalf("%+v", l)
	}
	ada := s.begin("web/ada", "", 201)
	s.write("web.yaml", "image: busybox\nports: [{name: web, port: 8080}]\nttl: 2h\nmax_ttl: 1h\n")
	until(t, "the fault is told", func() bool { return len(list().Faults) == 1 })
	f := list().Faults[0]
	if f.File != "web.yaml" || f.Line != 4 || f.Column != 10 || f.Field != "max_ttl" {
		t.Errorf("%+v", f)
	}
	if !strings.Contains(s.logs.String(), `"line":4`) {
		t.Error("the log does not tell")
	}
	if ready, checks := s.health.Run(t.Context()); !ready || !strings.Contains(fmt.Sprint(checks), "web.yaml:4:10: max_ttl") {
		t.Errorf("%v %+v", ready, checks)
	}
	if n := gauge(t, s.reg, "dayfly_template_faults"); n != 1 {
		t.Errorf("%v faults in the metrics", n)
	}
	if i := s.begin("web/bob", "", 201); s.task(i.Task).Spec.TTL.Std() != 10*time.Minute {
		t.Error("what was right before does not hold")
	}
	s.write("web.yaml", "image: busybox:2\nports: [{name: web, port: 8080}]\n")
	until(t, "it holds", func() bool { return len(list().Faults) == 0 })
	if i := s.begin("web/eve", "", 201); s.task(i.Task).Spec.Image != "busybox:2" {
		t.Error("the new one does not hold")
	}
	if err := os.Remove(filepath.Join(s.dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	until(t, "it is gone", func() bool { return s.get("/v1/templates/web").status == 404 })
	if i := s.begin("web/ada", "", 200); i.Task != ada.Task {
		t.Errorf("the instance went with its template: %+v", i)
	}
	s.do("PUT", "/v1/instances/web/zoe", "").want(t, 404, schemas.CodeNotFound)
	s.do("DELETE", "/v1/instances/web/ada", "").instance(t, 200)
}

// Files of templates hold secrets: what is shown of them is the same at gateways of a site,
// and no hash with which guesses could be tested.
func TestDigestsOfTemplatesTestNoGuess(t *testing.T) {
	s := newSite(t, gateway.Config{})
	list := func(a api) (l schemas.TemplateList) {
		if err := schemas.Decode(a.get("/v1/templates").body, &l); err != nil || l.Digest == "" {
			t.Fatal(err, l)
		}
		return l
	}
	here, beside, elsewhere := list(s.api), list(s.gateway(gateway.Config{})), list(newSite(t, gateway.Config{}).api)
	if here.Digest != beside.Digest || here.Digest == elsewhere.Digest {
		t.Errorf("%s, beside it %s, at another site %s", here.Digest, beside.Digest, elsewhere.Digest)
	}
	plain := sha256.New()
	for i, v := range here.Items {
		sum := sha256.Sum256([]byte(templateFiles[v.Name+".yaml"]))
		short := hex.EncodeToString(sum[:8])
		fmt.Fprintf(plain, "%s %s\n", v.Name, short)
		if v.Digest == short || v.Digest != beside.Items[i].Digest || v.Digest == elsewhere.Items[i].Digest {
			t.Errorf("%s: %s, beside it %s, at another site %s", v.Name, v.Digest, beside.Items[i].Digest, elsewhere.Items[i].Digest)
		}
		if one := s.get("/v1/templates/" + v.Name); !strings.Contains(string(one.body), v.Digest) {
			t.Errorf("%s", one.body)
		}
	}
	all := hex.EncodeToString(plain.Sum(nil)[:8])
	until(t, "it is ready", func() bool {
		_, checks := s.health.Run(t.Context())
		return strings.Contains(fmt.Sprint(checks), here.Digest)
	})
	_, checks := s.health.Run(t.Context())
	for where, said := range map[string]string{"list": here.Digest, "log": s.logs.String(), "readyz": fmt.Sprint(checks)} {
		if strings.Contains(said, all) {
			t.Errorf("%s has the plain digest", where)
		}
	}
	n, err := strconv.ParseUint(all[:12], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	if got := gauge(t, s.reg, "dayfly_templates_digest"); got == float64(n) || got == 0 {
		t.Errorf("the metric is %v", got)
	}
}

func TestWorkersHoldTheImagesOfTemplates(t *testing.T) {
	s := newSite(t, gateway.Config{TemplatesEvery: 10 * time.Millisecond, InstanceSweep: 10 * time.Millisecond})
	wanted := bus.NewTable(s.conn, schemas.BucketImages, bus.JSON[schemas.WantedImages](nil))
	want := func(list string) {
		t.Helper()
		until(t, "workers hold "+list, func() bool {
			e, err := wanted.Get(deadline(t), schemas.KeyWanted)
			said := ""
			for _, i := range e.Value.Items {
				said += i.Image + " " + i.By + " " + i.Constraints["zone"] + ";"
			}
			return said == list && (err == nil || list == "")
		})
	}
	s.write("web.yaml", "image: busybox\nprepull: true\nconstraints: {zone: a}\n")
	s.write("big.yaml", "image: registry.lan/big:1\nprepull: true\n")
	want("busybox template:web a;registry.lan/big:1 template:big ;")
	if err := os.Remove(filepath.Join(s.dir, "big.yaml")); err != nil {
		t.Fatal(err)
	}
	want("busybox template:web a;")
	s.write("web.yaml", "image: busybox\n")
	want("")
}

func TestWithoutTemplatesThereAreNoInstances(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	if e := w.do("PUT", "/v1/instances/web/ada", "").want(t, 404, schemas.CodeNotFound); !strings.Contains(e.Detail, "--templates") {
		t.Error(e.Detail)
	}
	if r := w.get("/v1/templates"); string(r.body) != `{"items":[],"digest":""}` {
		t.Errorf("%s", r.body)
	}
}

// gauge reads one without labels.
func gauge(t *testing.T, reg *prometheus.Registry, name string) float64 {
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no %s", name)
	return 0
}
