//go:build page

// Package page looks at dayfly's pages in a real Chromium.
package page

import (
	"bytes"
	"context"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"iter"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/rs/zerolog"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent/fakeruntime"
	"dayfly.dev/test/stack"
)

const tasks = 2000

// site is a running dayfly and a browser that looks at it.
type site struct {
	testing.TB
	url     string
	browser context.Context

	mu    sync.Mutex
	wrong []string // under mu: what the console said
}

func start(t *testing.T) *site {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	st, err := stack.Start(ctx, stack.Options{Dir: t.TempDir(), Agents: 3, Logger: zerolog.Nop(), Runtime: fakeruntime.Config{
		Host: schemas.Host{OS: "linux", Arch: "amd64", CPUs: 16, Memory: 64 << 30, Slots: 900, Engine: "fake"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Stop(); err != nil {
			t.Error(err)
		}
	})
	allocator, cancelAllocator := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.NoSandbox, chromedp.DisableGPU, chromedp.WindowSize(1160, 860), chromedp.WSURLReadTimeout(time.Minute))...)
	s := &site{TB: t, url: st.URL}
	var cancelBrowser context.CancelFunc
	s.browser, cancelBrowser = chromedp.NewContext(allocator)
	var console sync.WaitGroup
	t.Cleanup(func() {
		if err := chromedp.Cancel(s.browser); err != nil {
			t.Error("end the browser:", err)
		}
		cancelBrowser()
		cancelAllocator()
		console.Wait()
	})
	if err := chromedp.Do(s.browser); err != nil { // the browser lives as long as this context
		t.Fatal(err)
	}
	messages := chromedp.Console(s.browser)
	console.Go(func() { s.listen(messages) })
	return s
}

// listen keeps what a page should never say: errors, and what its policy forbade.
func (s *site) listen(messages iter.Seq2[chromedp.ConsoleMessage, error]) {
	for m, err := range messages {
		if err != nil {
			return
		}
		s.mu.Lock()
		s.wrong = append(s.wrong, m.String()+" "+m.URL)
		s.mu.Unlock()
	}
}

func (s *site) heard() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.wrong)
}

func (s *site) do(steps ...chromedp.Action[chromedp.Void]) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.browser, time.Minute)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		s.Fatal(err)
	}
}

// set runs a command of the browser's.
func set[P, R any](s *site, command cdp.Command[P, R], params P) {
	s.Helper()
	if _, err := chromedp.Call(s.browser, command, params); err != nil {
		s.Fatal(err)
	}
}

// ask evaluates an expression.
func ask[T any](s *site, expression string) T {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.browser, time.Minute)
	defer cancel()
	value, err := chromedp.Run(ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		s.Fatal(expression, err)
	}
	return value
}

// until asks until an expression is true in the page, over navigations too.
func (s *site) until(expression string) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.browser, time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		is, err := chromedp.Run(ctx, chromedp.Evaluate[bool](expression))
		if is {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			s.Fatalf("never came true: %s: %v\n%s", expression, err, ask[string](s, "document.body.innerText.slice(0, 2000)"))
		}
	}
}

// run is one part of the test.
func (s *site) run(name string, part func(t *testing.T)) {
	whole := s.TB
	defer func() { s.TB = whole }()
	whole.(*testing.T).Run(name, func(t *testing.T) {
		s.TB = t
		part(t)
	})
}

func (s *site) open(path string) {
	s.Helper()
	s.do(chromedp.Navigate(s.url + path))
	s.until(`document.getElementById("connection").textContent === "live"`)
}

// mark leaves something in the page that a reload would take away.
func (s *site) mark() { ask[bool](s, `window.marked = true`) }

func (s *site) stayed() {
	s.Helper()
	if !ask[bool](s, `window.marked === true`) {
		s.Error("the page was loaded again")
	}
}

func (s *site) press(keys string) {
	s.Helper()
	s.do(chromedp.KeyEvent(keys, func(k *input.DispatchKeyEventParams) {
		if k.Type == input.DispatchKeyEventTypeKeyDown {
			k.Type = input.DispatchKeyEventTypeRawKeyDown // as a keyboard does: what the page prevents then types nothing
		}
	}))
}

// shoot keeps a picture in docs/screenshots, where SCREENSHOTS is set.
func (s *site) shoot(name string) {
	s.Helper()
	if os.Getenv("SCREENSHOTS") == "" {
		return
	}
	for _, scheme := range []string{"light", "dark"} {
		set(s, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
		picture, err := chromedp.Run(s.browser, chromedp.CaptureScreenshot())
		if err != nil {
			s.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join("../../docs/screenshots", name+"-"+scheme+".png"), small(s, picture), 0o644); err != nil {
			s.Fatal(err)
		}
	}
}

// small makes a picture of the 256 colours that it has the most of.
func small(t testing.TB, picture []byte) []byte {
	from, err := png.Decode(bytes.NewReader(picture))
	if err != nil {
		t.Fatal(err)
	}
	count := map[color.Color]int{}
	for y := range from.Bounds().Dy() {
		for x := range from.Bounds().Dx() {
			count[from.At(x, y)]++
		}
	}
	palette := color.Palette(slices.SortedFunc(maps.Keys(count), func(a, b color.Color) int { return count[b] - count[a] }))
	palette = palette[:min(256, len(palette))]
	nearest := map[color.Color]uint8{}
	for c := range count {
		nearest[c] = uint8(palette.Index(c))
	}
	to := image.NewPaletted(from.Bounds(), palette)
	for y := range from.Bounds().Dy() {
		for x := range from.Bounds().Dx() {
			to.SetColorIndex(x, y, nearest[from.At(x, y)])
		}
	}
	var b bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&b, to); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (s *site) send(method, path, body string) schemas.Task {
	s.Helper()
	req, err := http.NewRequestWithContext(s.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		s.Fatal(err)
	}
	defer res.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(res.Body); err != nil {
		s.Fatal(err)
	}
	var task schemas.Task
	if err := schemas.Decode(b.Bytes(), &task); err != nil || res.StatusCode >= 300 {
		s.Fatalf("%s %s: %d %s", method, path, res.StatusCode, b.Bytes())
	}
	return task
}

// create makes a task of a command.
func (s *site) create(image, command, more string) schemas.Task {
	s.Helper()
	words, err := schemas.Encode(strings.Fields(command))
	if err != nil {
		s.Fatal(err)
	}
	return s.send("POST", "/v1/tasks", fmt.Sprintf(`{"image":%q,"command":%s,"resources":{"cpus":0.02,"memory":"64MiB"}%s}`, image, words, more))
}

// load makes n tasks, sixteen at a time: of twenty, one ends well, one fails, the others stay.
func (s *site) load(n int) {
	s.Helper()
	var group sync.WaitGroup
	defer group.Wait()
	next := make(chan int)
	defer close(next)
	for range 16 {
		group.Go(func() {
			for i := range next {
				judge := fmt.Sprintf(`,"labels":{"contest":"spring","user":"u%03d"}`, i%97)
				switch i % 20 {
				case 7:
					s.create("judge/python:3.13", "exit 0", judge)
				case 13:
					s.create("judge/cpp:14", "exit 3", judge)
				default:
					s.create("ctf/web-100", "sleep 6h", fmt.Sprintf(`,"labels":{"team":"t%02d"},"ttl":"8h"`, i%40))
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
}

// count is what a tab says.
func count(tab string) string {
	return fmt.Sprintf(`Number(document.querySelector(".tabs .%s b").textContent)`, tab)
}

func TestPage(t *testing.T) {
	s := start(t)
	s.load(tasks)
	s.open("/ui/")
	s.run("counts are right and the list is paged", func(t *testing.T) {
		s.until(count("running") + " === 1800")
		for tab, want := range map[string]int{"all": tasks, "live": 1800, "completed": 100, "failed": 100, "queued": 0} {
			if got := ask[int](s, count(tab)); got != want {
				t.Errorf("%s: %d, want %d", tab, got, want)
			}
		}
		seen := map[string]bool{}
		for pages := 1; ; pages++ {
			for _, id := range ask[[]string](s, `Array.from(document.querySelectorAll(".list .id"), (a) => a.textContent)`) {
				seen[id] = true
			}
			if !ask[bool](s, `Boolean(document.querySelector(".pager [rel=next]"))`) {
				t.Logf("%d pages", pages)
				break
			}
			s.do(chromedp.Navigate(ask[string](s, `document.querySelector(".pager [rel=next]").href`)))
		}
		if len(seen) != tasks {
			t.Errorf("the pages show %d tasks, want %d", len(seen), tasks)
		}
	})
	s.run("it is painted soon", func(t *testing.T) {
		s.open("/ui/")
		s.until(`performance.getEntriesByName("first-contentful-paint").length > 0`)
		t.Logf("first contentful paint after %.0f ms, of which %.0f ms until the page was there; %d elements",
			ask[float64](s, `performance.getEntriesByName("first-contentful-paint")[0].startTime`),
			ask[float64](s, `performance.getEntriesByType("navigation")[0].responseEnd`), ask[int](s, `document.querySelectorAll("*").length`))
		s.shoot("tasks")
	})
	s.run("a task that comes and changes is seen doing so", func(t *testing.T) {
		s.mark()
		task := s.create("ctf/pwn-300", "sleep 6h", "")
		row := fmt.Sprintf(`document.querySelector("#%s .state").textContent`, task.ID)
		s.until(fmt.Sprintf(`document.getElementById(%q) && %s === "running"`, task.ID, row))
		s.until(count("running") + " === 1801")
		s.send("DELETE", "/v1/tasks/"+string(task.ID), "")
		s.until(row + ` === "canceled"`)
		s.until(count("running") + " === 1800 && " + count("canceled") + " === 1")
		s.stayed()
	})
	s.run("the list is walked, filtered and opened by keys", func(t *testing.T) {
		s.press("jjk" + kb.ArrowDown)
		if got := ask[int](s, `Array.from(document.querySelectorAll("[data-row]")).indexOf(document.activeElement)`); got != 1 {
			t.Errorf("row %d has the focus, want 1", got)
		}
		if !ask[bool](s, `document.activeElement.matches(":focus-visible")`) {
			t.Error("the focus is not visible")
		}
		s.press("?")
		s.until(`document.getElementById("help").open`)
		s.press(kb.Escape)
		s.until(`!document.getElementById("help").open`)
		s.press("/")
		s.press("team=t05 web" + kb.Enter)
		s.until(`location.search.includes("team") && document.querySelectorAll(".list tbody tr").length === 50`)
	})
	s.run("a task is followed", func(*testing.T) { followed(s) })
	s.run("a worker is drained by keys", func(t *testing.T) {
		s.open("/ui/")
		s.press("w")
		s.until(`location.pathname === "/ui/workers" && document.querySelectorAll(".workers li").length === 3`)
		s.until(`document.getElementById("connection").textContent === "live"`)
		s.mark()
		state := `document.querySelector("#w0001 .state").textContent`
		s.press("jj" + kb.Enter)
		s.until(state + ` === "draining"`)
		s.until(`document.activeElement.textContent === "Undrain"`)
		s.shoot("workers")
		s.press(kb.Enter)
		s.until(state + ` === "ready"`)
		s.stayed()
	})
	s.run("a burst is drawn a few times a second", func(t *testing.T) {
		s.open("/ui/")
		s.mark()
		ask[bool](s, `(function frame(at) {
			window.gap = Math.max(window.gap ?? 0, at - (window.last ?? at));
			window.last = at;
			requestAnimationFrame(frame);
		})(performance.now()) === undefined`)
		all, began := ask[int](s, count("all")), time.Now()
		s.load(500)
		s.until(count("all") + fmt.Sprintf(" === %d", all+500))
		t.Logf("500 tasks in %v, %d drawings, and at most %.0f ms between two frames", time.Since(began).Round(time.Millisecond),
			ask[int](s, `performance.getEntriesByType("resource").filter((e) => e.name === location.href).length`), ask[float64](s, `window.gap`))
		s.stayed()
	})
	s.run("a phone has room for it", func(t *testing.T) {
		s.do(chromedp.EmulateViewport(390, 844, chromedp.EmulateMobile))
		for _, path := range []string{"/ui/", "/ui/workers", "/ui/?state=failed"} {
			s.open(path)
			if got := ask[int](s, `document.documentElement.scrollWidth`); got > 390 {
				t.Errorf("%s is %d wide", path, got)
			}
		}
		s.open("/ui/")
		s.shoot("phone")
		s.do(chromedp.ResetViewport())
	})
	s.run("without scripts it shows the same", func(t *testing.T) {
		set(s, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
		s.do(chromedp.Navigate(s.url + "/ui/?state=failed"))
		if got := ask[int](s, `document.querySelectorAll(".list tbody tr").length`); got != 100 {
			t.Errorf("%d rows, want 100", got)
		}
		s.do(chromedp.Navigate(s.url + "/ui/workers"))
		if ask[bool](s, `document.querySelector(".workers button").checkVisibility()`) {
			t.Error("a button is shown that can do nothing")
		}
		set(s, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{})
	})
	for _, text := range s.heard() {
		t.Error(text)
	}
	s.open("/ui/")
	ask[bool](s, `Boolean(document.body.appendChild(Object.assign(document.createElement("script"), {textContent: "window.foreign = true"})))`)
	until(t, "the console tells of what the policy forbids", func() bool {
		return strings.Contains(strings.Join(s.heard(), ""), "Content Security Policy")
	})
	if ask[bool](s, `window.foreign === true`) {
		t.Error("an inline script ran")
	}
}

// until polls for a fact outside of the page.
func until(t testing.TB, what string, fact func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	end := time.After(30 * time.Second)
	for !fact() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("never came true:", what)
		}
	}
}

// followed looks at one task from waiting to its end, on one page.
func followed(s *site) {
	for _, w := range []string{"w0000", "w0001", "w0002"} {
		s.drain(w, "drain")
	}
	task := s.waiting()
	s.open("/ui/tasks/" + string(task.ID))
	s.until(`document.querySelector(".lead").textContent.includes("drain")`)
	s.until(`document.querySelectorAll(".why tr").length === 3`)
	s.shoot("waiting")
	s.mark()
	s.until(`document.querySelector(".logstate").textContent === "follows live"`)
	for _, w := range []string{"w0000", "w0001", "w0002"} {
		s.drain(w, "undrain")
	}
	s.until(`document.querySelector(".lead .state").textContent === "running"`)
	s.until(`new TextEncoder().encode(document.querySelector(".log").textContent).length === 4000`)
	s.until(`(log => log.scrollHeight > log.clientHeight && log.scrollTop + log.clientHeight > log.scrollHeight - 24)(document.querySelector("pre.log"))`)

	s.press("e")
	s.press("4")
	s.press(kb.Tab + kb.Enter)
	s.until(`document.querySelector(".timeline").textContent.includes("extend") && /3h 59m|4h/.test(document.querySelector(".lead").textContent)`)
	s.shoot("task")
	s.press("c")
	s.until(`document.getElementById("confirm").open`)
	s.press(kb.Escape)
	s.until(`!document.getElementById("confirm").open`)
	s.press("c")
	s.until(`document.getElementById("confirm").open`)
	s.press(kb.Tab + kb.Enter)
	s.until(`document.querySelector(".lead .state").textContent === "canceled"`)
	s.until(`document.querySelector(".logstate").textContent === "complete" && !document.querySelector(".actions")`)
	s.stayed()
}

// waiting makes a task that waits. The placer may hear of the drains a little later than
// their answers came, so the first may still find a worker.
func (s *site) waiting() schemas.Task {
	s.Helper()
	for {
		task := s.create("judge/python:3.13", "log 4000 6h", `,"labels":{"contest":"spring","user":"u042"}`)
		for task.State == schemas.Queued && task.Why == nil {
			task = s.send("GET", "/v1/tasks/"+string(task.ID), "")
		}
		if task.State == schemas.Queued && len(task.Why.Workers) == 3 {
			return task
		}
		s.send("DELETE", "/v1/tasks/"+string(task.ID), "")
	}
}

func (s *site) drain(worker, verb string) {
	s.Helper()
	res, err := http.Post(s.url+"/v1/workers/"+worker+"/"+verb, "application/json", strings.NewReader("{}"))
	if err != nil {
		s.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		s.Fatal(verb, res.Status)
	}
}
