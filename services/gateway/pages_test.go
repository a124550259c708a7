package gateway_test

import (
	"strings"
	"testing"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway"
	"dayfly.dev/services/gateway/ui"
)

// page asks for a page as a browser does.
func (a api) page(status int, path string) string {
	a.Helper()
	r := a.get(path, "Accept", "text/html,*/*;q=0.8")
	if r.status != status || r.header.Get("Content-Type") != "text/html; charset=utf-8" || r.header.Get("Content-Security-Policy") != ui.Policy {
		a.Fatalf("%s: %d %v %s", path, r.status, r.header, r.body)
	}
	return string(r.body)
}

func has(t testing.TB, page string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(page, text) {
			t.Errorf("the page does not have %q:\n%s", text, page)
		}
	}
}

func TestPages(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	has(t, w.page(200, "/ui/"), "There is no task yet")
	has(t, w.page(200, "/ui/workers"), "There is no worker yet")

	w.beat(beat("w1", 4, 8<<30))
	runs := w.create(`{"image":"registry/python:3","command":["sh","-c","<script>alert(1)</script>"],"labels":{"owner":"a&b"}}`)
	w.run(runs.ID)
	failed := w.create(spec)
	w.run(failed.ID)
	end := ended(3, 5, 0)
	end.Stdout = "out</pre>"
	w.report(failed.ID, schemas.PhaseEnded, end)
	until(t, "the list shows both states", func() bool {
		page := w.page(200, "/ui/")
		return strings.Contains(page, `class="running">running <b>1</b>`) && strings.Contains(page, `class="failed">failed <b>1</b>`)
	})
	page := w.page(200, "/ui/")
	has(t, page, "&lt;script&gt;alert(1)&lt;/script&gt;", "owner=a&amp;b", "exit 3", `<a href="/ui/" class="all" aria-current="page">all <b>2</b>`)

	for query, shown := range map[string][2]bool{
		"state=running": {true, false}, "q=python": {true, false}, "q=busybox": {false, true}, "q=owner": {}, "q=owner%3Da%26b": {true, false},
		"q=worker:w1+python": {true, false}, "q=worker:w2": {}, "q=" + string(failed.ID[20:]): {false, true},
	} {
		page := w.page(200, "/ui/?"+query)
		if got := [2]bool{strings.Contains(page, string(runs.ID)), strings.Contains(page, string(failed.ID))}; got != shown {
			t.Errorf("%s shows %v, want %v", query, got, shown)
		}
	}

	has(t, w.page(200, "/ui/tasks/"+string(runs.ID)), "It runs on w1", `action="/v1/tasks/`+string(runs.ID)+`/extend"`, `data-events="/v1/tasks/`)
	page = w.page(200, "/ui/tasks/"+string(failed.ID))
	has(t, page, "with exit code 3", `data-events=""`, "out&lt;/pre&gt;")
	if strings.Contains(page, "<form method=\"post\"") {
		t.Error("a task that is over can be changed")
	}
	if page := w.page(200, "/ui/workers"); strings.Contains(page, "GPU") {
		t.Error("a worker without GPUs shows some")
	}
	devices := beat("w1", 4, 8<<30)
	devices.Host.GPUs = 2
	w.beat(devices)
	until(t, "the GPUs are shown", func() bool { return strings.Contains(w.page(200, "/ui/workers"), "0 of 2") })
	has(t, w.page(200, "/ui/workers"), "0.5 of 4", "256MiB of 8GiB", `action="/v1/workers/w1/drain"`)
	w.do("POST", "/v1/workers/w1/drain", "{}")
	has(t, w.page(200, "/ui/workers"), `action="/v1/workers/w1/undrain"`)
	has(t, w.page(200, "/ui/tasks/"+string(runs.ID)), "it gets no more time")

	has(t, w.page(404, "/ui/tasks/t-01jd0000000000000000000000"), "there is no such task")
	has(t, w.page(400, "/ui/?q=a%3Db%3D&q=c"), "stands there twice")
	if r := w.get("/ui/assets/page.js"); r.status != 200 || r.header.Get("Content-Type") != "text/javascript; charset=utf-8" {
		t.Errorf("%d %v", r.status, r.header)
	} else if again := w.get("/ui/assets/page.js", "If-None-Match", r.header.Get("ETag")); again.status != 304 {
		t.Errorf("unchanged asset: %d", again.status)
	}
	w.get("/ui/assets/none.js").want(t, 404, schemas.CodeNotFound)
	if r := w.get("/", "Accept", "text/html"); r.status != 303 || r.header.Get("Location") != "/ui/" {
		t.Errorf("a browser at /: %d %v", r.status, r.header)
	}
	w.get("/").want(t, 404, schemas.CodeNotFound)
}

// Pages of other sites cannot change anything, whatever they make a browser send.
func TestForeignPages(t *testing.T) {
	w := newWorld(t, gateway.Config{})
	task := w.create(spec)
	for what, header := range map[string][]string{
		"another site":           {"Sec-Fetch-Site", "cross-site"},
		"another port":           {"Sec-Fetch-Site", "same-site"},
		"an old browser":         {"Origin", "http://evil.example"},
		"a frame without origin": {"Origin", "null"},
	} {
		t.Run(what, func(t *testing.T) {
			for _, r := range []reply{
				w.do("POST", "/v1/tasks", spec, header...),
				w.do("DELETE", "/v1/tasks/"+string(task.ID), "", header...),
				w.do("POST", "/v1/workers/w1/drain", "{}", header...),
			} {
				r.want(t, 403, schemas.CodeCrossOrigin)
			}
			if r := w.get("/v1/tasks", header...); r.status != 200 {
				t.Errorf("reading: %d", r.status)
			}
		})
	}
	for what, header := range map[string][]string{
		"our page":              {"Sec-Fetch-Site", "same-origin", "Origin", w.url},
		"our page, old browser": {"Origin", w.url},
		"a person":              {"Sec-Fetch-Site", "none"},
	} {
		if r := w.do("POST", "/v1/tasks", spec, header...); r.status != 201 {
			t.Errorf("%s: %d %s", what, r.status, r.body)
		}
	}
}
