package shim_test

import (
	"crypto/rand"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/client/clienttest"
	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// serve answers POST /tasks and POST /one of a protocol of its own on a small dayfly.
func serve(t *testing.T, cfg shim.Config) (*clienttest.Server, string) {
	t.Helper()
	dayfly := clienttest.Start(t)
	c, err := client.New(dayfly.URL, client.WithRetryFor(0))
	if err != nil {
		t.Fatal(err)
	}
	s := shim.New(c, cfg, shim.Protocol{
		Name: "test",
		Fail: func(w http.ResponseWriter, p shim.Problem) { _ = shim.Answer(w, p.Status, p) },
		Fields: map[string]string{
			"image": "picture", "resources.memory": "space", "resources": "limits",
		},
	})
	type body struct {
		Picture string              `json:"picture"`
		Name    string              `json:"name"`
		Command []string            `json:"command"`
		Limits  schemas.Resources   `json:"limits"`
		Mounts  *schemas.Mounts     `json:"mounts"`
		N       shim.Number         `json:"n"`
		Raw     shim.Raw            `json:"raw"`
		Labels  map[string]struct{} `json:"labels"`
	}
	s.Handle("POST /tasks", func(w http.ResponseWriter, r *http.Request) error {
		var b body
		if err := shim.Read(w, r, &b); err != nil {
			return err
		}
		spec := s.Spec(map[string]string{"test.name": b.Name})
		spec.Image, spec.Resources, spec.Mounts = b.Picture, b.Limits, b.Mounts
		made, err := s.Client.Create(r.Context(), spec, client.CreateOptions{})
		if err != nil {
			return err
		}
		return shim.Answer(w, 201, made.Spec.Labels)
	})
	s.Handle("POST /one", func(w http.ResponseWriter, r *http.Request) error {
		var b body
		if err := shim.Read(w, r, &b, shim.Lenient, shim.AnyCase); err != nil {
			return err
		}
		one, err := s.One(map[string]string{"test.name": b.Name})
		if err != nil {
			return err
		}
		spec := s.Spec(one.Labels)
		spec.Image, spec.Command = "busybox", b.Command
		made, fresh, err := one.Ensure(r.Context(), spec)
		if err != nil {
			return err
		}
		return shim.Answer(w, 200, map[string]any{"id": made.ID, "made": fresh})
	})
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	return dayfly, h.URL
}

func ask(t *testing.T, method, url, body string, header ...string) (int, string, http.Header) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		if req.Header.Set(header[i], header[i+1]); header[i] == "Host" {
			req.Host = header[i+1]
		}
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b), res.Header
}

func TestWhoIsLetIn(t *testing.T) {
	_, url := serve(t, shim.Config{Token: "a secret of some length", Hosts: []string{"shim.example"}})
	bearer := []string{"Authorization", "Bearer a secret of some length"}
	for name, c := range map[string]struct {
		header []string
		want   int
	}{
		"no token":              {nil, 401},
		"a wrong token":         {[]string{"Authorization", "Bearer a secret of some lengtH"}, 401},
		"another scheme":        {[]string{"Authorization", "Basic a secret of some length"}, 401},
		"the token":             {bearer, 201},
		"a name of ours":        {append([]string{"Host", "shim.example:8090"}, bearer...), 201},
		"a name of another":     {append([]string{"Host", "evil.example"}, bearer...), 421},
		"a page of ours":        {append([]string{"Sec-Fetch-Site", "same-origin"}, bearer...), 201},
		"a page of another":     {append([]string{"Sec-Fetch-Site", "cross-site"}, bearer...), 403},
		"an origin of another":  {append([]string{"Origin", "https://evil.example"}, bearer...), 403},
		"a name below loopback": {append([]string{"Host", "t.localhost"}, bearer...), 421},
	} {
		t.Run(name, func(t *testing.T) {
			if status, body, _ := ask(t, "POST", url+"/tasks", `{"picture": "busybox"}`, c.header...); status != c.want {
				t.Errorf("%d %s, not %d", status, body, c.want)
			}
		})
	}
}

func TestWhatIsWrongHasTheProtocolsNames(t *testing.T) {
	_, url := serve(t, shim.Config{})
	for name, c := range map[string]struct {
		method, path, body string
		status             int
		want               string
	}{
		"a field of a spec":         {"POST", "/tasks", `{"picture": "Not An Image"}`, 422, `"Field":"picture"`},
		"a field below one":         {"POST", "/tasks", `{"picture": "x", "limits": {"pids": -1}}`, 422, `"Field":"limits.pids"`},
		"a field with its own name": {"POST", "/tasks", `{"picture": "x", "limits": {"memory": 1}}`, 422, `"Field":"space"`},
		"a field without one":       {"POST", "/tasks", `{"picture": "x", "mounts": {"input": "/in"}}`, 422, `"Field":"mounts"`},
		"an unknown field":          {"POST", "/tasks", `{"secret": 1}`, 422, `"Field":"secret"`},
		"a wrong type":              {"POST", "/tasks", `{"picture": 1}`, 422, `"Field":"picture"`},
		"a number that is none":     {"POST", "/tasks", `{"picture": "x", "n": "NaN"}`, 422, `"Field":"n"`},
		"a number without an end":   {"POST", "/tasks", `{"picture": "x", "n": "-inf"}`, 422, `"Field":"n"`},
		"no JSON":                   {"POST", "/tasks", `{`, 400, `"Field":""`},
		"too much":                  {"POST", "/tasks", strings.Repeat(" ", 1<<20+1), 413, "1MiB"},
		"another path":              {"POST", "/other", `{}`, 404, "no such path"},
		"another method":            {"GET", "/tasks", ``, 405, "takes POST"},
		"a name with a newline":     {"POST", "/one", `{"name": "a\nb"}`, 422, "name: must be"},
		"no name":                   {"POST", "/one", `{}`, 422, "name: must be"},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, h := ask(t, c.method, url+c.path, c.body)
			if status != c.status || !strings.Contains(body, c.want) {
				t.Errorf("%d %s, not %d with %s", status, body, c.status, c.want)
			}
			if status == 405 && h.Get("Allow") != "POST" {
				t.Errorf("Allow is %q", h.Get("Allow"))
			}
		})
	}
}

func TestNoGateway(t *testing.T) {
	dayfly, url := serve(t, shim.Config{})
	dayfly.Intercept(func(w http.ResponseWriter, _ *http.Request) bool { panic(http.ErrAbortHandler) })
	if status, body, _ := ask(t, "POST", url+"/tasks", `{"picture": "busybox"}`); status != 503 || !strings.Contains(body, "no gateway") {
		t.Errorf("%d %s", status, body)
	}
}

func TestLabelsSayWhoseATaskIs(t *testing.T) {
	_, url := serve(t, shim.Config{})
	status, body, _ := ask(t, "POST", url+"/tasks", `{"picture": "busybox", "name": "n", "n": "0.5", "raw": {"any": [1]}}`)
	if want := `{"shim":"test","test.name":"n"}` + "\n"; status != 201 || body != want {
		t.Errorf("%d %s, not %s", status, body, want)
	}
}

func TestTheOneTaskOfAName(t *testing.T) {
	dayfly, url := serve(t, shim.Config{})
	c, err := client.New(dayfly.URL)
	if err != nil {
		t.Fatal(err)
	}
	once := func(body string) (id string, made bool) {
		t.Helper()
		status, said, _ := ask(t, "POST", url+"/one", body)
		var v struct {
			ID   string `json:"id"`
			Made bool   `json:"made"`
		}
		if err := schemas.Decode([]byte(said), &v); err != nil || status != 200 {
			t.Fatal(status, said, err)
		}
		return v.ID, v.Made
	}
	first, made := once(`{"name": "a", "command": ["hold"]}`)
	if !made {
		t.Error("the first is not made")
	}
	if again, made := once(`{"Name": "a", "command": ["hold"], "unknown": 1}`); made || again != first {
		t.Errorf("%s (made %t), not %s again", again, made, first)
	}
	if other, made := once(`{"name": "b", "command": ["hold"]}`); !made || other == first {
		t.Error("another name has the same task")
	}
	if again, made := once(`{"name": "a", "command": ["exit:0"]}`); made || again != first {
		t.Errorf("%s (made %t), not %s, whatever it is to be", again, made, first)
	}
	for range 3 {
		dayfly.Release(schemas.TaskID(first))
		if _, err := c.Wait(t.Context(), schemas.TaskID(first)); err != nil {
			t.Fatal(err)
		}
		next, made := once(`{"name": "a", "command": ["hold"]}`)
		if !made || next == first {
			t.Fatalf("%s (made %t) after %s, which is over", next, made, first)
		}
		first = next
	}
}

// A key may stand for a task that is not in the list: it is asked for until it is known
// what became of it, and no other is made beside it.
func TestATaskThatSomebodyElseMakesIsWaitedFor(t *testing.T) {
	for name, c := range map[string]struct {
		appears int    // with the first so many requests for the key it is not there yet
		command string // of the task; "": it never comes, and is given up
		want    bool   // it is the one
	}{
		"it is there":        {0, "hold", true},
		"it comes":           {3, "hold", true},
		"it is over":         {1, "exit:0", false},
		"it was never there": {3, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			dayfly, url := serve(t, shim.Config{})
			theirs, err := schemas.NewTaskID(time.Now(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			var mu sync.Mutex
			var keys []string // under mu: of the requests
			appear := func() {
				spec, err := schemas.ParseSpec([]byte(`{"image": "busybox", "labels": {"shim": "test", "test.name": "a"}}`), schemas.DefaultPolicy())
				if err != nil {
					t.Error(err)
				}
				r := schemas.NewRecord(theirs, spec, schemas.DefaultPolicy(), schemas.Meta{At: time.Now()})
				if c.command == "exit:0" {
					r.State, r.EndedAt = schemas.Completed, time.Now()
				}
				dayfly.Seed(r)
			}
			dayfly.Intercept(func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != "/v1/tasks" {
					return false
				}
				if r.Method == http.MethodGet { // a view that is behind
					_ = shim.Answer(w, 200, schemas.TaskList{Items: []schemas.Task{}})
					return true
				}
				mu.Lock()
				defer mu.Unlock()
				keys = append(keys, r.Header.Get("Idempotency-Key"))
				if keys[len(keys)-1] != keys[0] {
					return false
				}
				if len(keys) > c.appears {
					if c.command == "" {
						clienttest.Fail(w, schemas.Error{Status: 410, Code: schemas.CodeKeyExpired})
						return true
					}
					if len(keys) == c.appears+1 {
						appear()
					}
				}
				clienttest.Fail(w, schemas.Error{Status: 422, Code: schemas.CodeKeyReused, Task: theirs})
				return true
			})
			status, said, _ := ask(t, "POST", url+"/one", `{"name": "a", "command": ["hold"]}`)
			var v struct {
				ID   schemas.TaskID `json:"id"`
				Made bool           `json:"made"`
			}
			if err := schemas.Decode([]byte(said), &v); err != nil || status != 200 {
				t.Fatal(status, said, err)
			}
			if (v.ID == theirs) != c.want || v.Made == c.want {
				t.Errorf("%+v, while %s was on its way", v, theirs)
			}
			mu.Lock()
			defer mu.Unlock()
			if n := len(slices.Compact(slices.Clone(keys))); c.want && n != 1 || !c.want && n != 2 {
				t.Errorf("it asked with %d keys", n)
			}
		})
	}
}
