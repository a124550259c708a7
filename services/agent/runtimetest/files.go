package runtimetest

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/files"
)

// serve does a request to its end. A nil input is cut off; whole says that it is all.
func serve(t *testing.T, a agent.Attempt, r files.Request, in []byte, whole bool) (files.Result, []byte) {
	t.Helper()
	p, err := a.Files(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if r.Framed() {
		go func() {
			_, _ = p.Stdin().Write(in)
			if whole {
				_ = p.Stdin().Close()
			} else if raw, ok := p.(interface{ CutOff() error }); ok {
				_ = raw.CutOff()
			}
		}()
	}
	var said bytes.Buffer
	errs := make(chan error, 1)
	go func() {
		_, err := io.Copy(&said, p.Stderr())
		errs <- err
	}()
	out, err := io.ReadAll(p.Stdout())
	if err != nil {
		t.Fatal(err)
	}
	if err := <-errs; err != nil {
		t.Fatal(err)
	}
	exit := exited(t, p)
	var res files.Result
	if err := json.Unmarshal(said.Bytes(), &res); err != nil || exit.Code != res.ExitCode() {
		t.Fatalf("%s: exit %+v, %q: %v", r.Op, exit, said.String(), err)
	}
	return res, out
}

type file struct {
	name, body string
	mode       int64
	kind       byte
	link       string
}

func archive(t *testing.T, list ...file) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range list {
		h := &tar.Header{Name: f.name, Mode: f.mode, Typeflag: f.kind, Linkname: f.link, Size: int64(len(f.body))}
		if f.kind == 0 {
			h.Typeflag = tar.TypeReg
		}
		if f.mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(f.body)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// contents gives what an archive has: "name mode body", "name -> target", "name/".
func contents(t *testing.T, b []byte) (list []string) {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if err == io.EOF {
			slices.Sort(list)
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case h.Typeflag == tar.TypeSymlink:
			list = append(list, h.Name+" -> "+h.Linkname)
		case h.Typeflag == tar.TypeDir:
			list = append(list, h.Name)
		case len(body) > 100:
			list = append(list, h.Name+" long")
		default:
			list = append(list, h.Name+" "+h.FileInfo().Mode().Perm().String()+" "+string(body))
		}
	}
}

func listed(t *testing.T, a agent.Attempt, path string) (names []string) {
	t.Helper()
	res, out := serve(t, a, files.Request{Op: files.List, Path: path}, nil, false)
	if res.Code != "" {
		t.Fatalf("list %s: %+v", path, res)
	}
	for l := range strings.Lines(string(out)) {
		var e files.Entry
		if err := json.Unmarshal([]byte(l), &e); err != nil {
			t.Fatal(err)
		}
		names = append(names, e.Name+":"+e.Type)
	}
	return names
}

func same(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\ngot  %q\nwant %q", what, got, want)
	}
}

func filesAround(t *testing.T, b *bench) {
	a := b.sleeping(t)
	put := func(path string, in []byte) files.Result {
		t.Helper()
		res, _ := serve(t, a, files.Request{Op: files.Put, Path: path}, in, true)
		return res
	}
	get := func(path string) []string {
		t.Helper()
		res, out := serve(t, a, files.Request{Op: files.Get, Path: path}, nil, false)
		if res.Code != "" || len(res.Skipped) > 0 {
			t.Errorf("get %s: %+v", path, res)
		}
		return contents(t, out)
	}
	set := archive(t, file{name: "./", kind: tar.TypeDir}, file{name: "bin/", kind: tar.TypeDir, mode: 0o555}, file{name: "bin/run", body: "go", mode: 0o4711},
		file{name: "bin/again", kind: tar.TypeSymlink, link: "run"}, file{name: "deep/er/x", body: "x", mode: 0o600}, file{name: "bin/hard", kind: tar.TypeLink, link: "bin/run"})
	if res := put("/task/output/app/v1", set); res.Code != "" || res.Entries != 6 || res.Bytes != 3 {
		t.Errorf("%+v", res)
	}
	want := []string{"v1/", "v1/bin/", "v1/bin/again -> run", "v1/bin/hard -rwx--x--x go", "v1/bin/run -rwx--x--x go", "v1/deep/", "v1/deep/er/", "v1/deep/er/x -rw------- x"}
	same(t, "a new folder", get("/task/output/app/v1"), want)
	// Into a folder that has something: what is there stays, or is replaced.
	if res := put("/task/output/app/v1", archive(t, file{name: "deep/er/x", body: "new", mode: 0o644}, file{name: "deep/y", body: "y", mode: 0o644})); res.Code != "" {
		t.Errorf("%+v", res)
	}
	same(t, "in the same folder", get("/task/output/app/v1/deep"), []string{"deep/", "deep/er/", "deep/er/x -rw-r--r-- new", "deep/y -rw-r--r-- y"})
	same(t, "a list", listed(t, a, "/task/output/app/v1"), []string{"bin:folder", "deep:folder"})
	same(t, "a list of a file", listed(t, a, "/task/output/app/v1/deep/y"), []string{"y:file"})

	res, _ := serve(t, a, files.Request{Op: files.Write, Path: "/tmp/new/one.txt", Mode: 0o4640}, []byte("one"), true)
	if res.Code != "" || res.Bytes != 3 {
		t.Errorf("%+v", res)
	}
	same(t, "one file", get("/tmp/new/one.txt"), []string{"one.txt -rw-r----- one"})
	if res, _ = serve(t, a, files.Request{Op: files.Write, Path: "/tmp/new/one.txt"}, []byte("two"), true); res.Code != "" {
		t.Errorf("%+v", res)
	}
	same(t, "another in its place", get("/tmp/new"), []string{"new/", "new/one.txt -rw-r--r-- two"})

	if res, _ = serve(t, a, files.Request{Op: files.Delete, Path: "/task/output/app"}, nil, false); res.Code != "" && b.Files {
		t.Logf("a folder that its owner may not change: %+v", res)
	}
	if res, _ = serve(t, a, files.Request{Op: files.Delete, Path: "/tmp/new"}, nil, false); res.Code != "" || res.Entries != 2 {
		t.Errorf("%+v", res)
	}
	same(t, "what is left", listed(t, a, "/tmp"), nil)
	for op, want := range map[files.Op]files.Code{files.Get: files.NotFound, files.List: files.NotFound, files.Delete: files.NotFound} {
		if res, _ := serve(t, a, files.Request{Op: op, Path: "/tmp/new/one.txt"}, nil, false); res.Code != want || res.Message == "" {
			t.Errorf("%s of what is gone: %+v", op, res)
		}
	}
}

// What cannot be done whole leaves nothing, and what was there as it was.
func filesNothing(t *testing.T, b *bench) {
	a := b.sleeping(t)
	keep := archive(t, file{name: "a", body: "old a", mode: 0o644}, file{name: "m/b", body: "old b", mode: 0o644}, file{name: "z/", kind: tar.TypeDir})
	if res, _ := serve(t, a, files.Request{Op: files.Put, Path: "/tmp/set"}, keep, true); res.Code != "" {
		t.Fatalf("%+v", res)
	}
	before := []string{"set/", "set/a -rw-r--r-- old a", "set/m/", "set/m/b -rw-r--r-- old b", "set/z/"}
	good := file{name: "a", body: "new", mode: 0o644}
	many := make([]file, 20)
	for i := range many {
		many[i] = file{name: strings.Repeat("x", i+1), body: "1"}
	}
	whole := archive(t, good, file{name: "n", body: strings.Repeat("n", 5000)})
	for name, c := range map[string]struct {
		in    []byte
		whole bool
		code  files.Code
	}{
		"cut off in a file":               {whole[:2000], false, files.CutOff},
		"cut off between two":             {whole[:1024], false, files.CutOff},
		"cut off after the last":          {whole, false, files.CutOff},
		"an archive that ends too soon":   {whole[:2000], true, files.BadArchive},
		"no archive":                      {bytes.Repeat([]byte("no archive "), 100), true, files.BadArchive},
		"a name that leads out":           {archive(t, good, file{name: "../a"}), true, files.BadArchive},
		"a name that leads out later":     {archive(t, good, file{name: "m/../../a"}), true, files.BadArchive},
		"an absolute name":                {archive(t, good, file{name: "/tmp/a"}), true, files.BadArchive},
		"the same name twice":             {archive(t, good, good), true, files.BadArchive},
		"a device":                        {archive(t, good, file{name: "d", kind: tar.TypeBlock}), true, files.BadArchive},
		"a fifo":                          {archive(t, good, file{name: "f", kind: tar.TypeFifo}), true, files.BadArchive},
		"a link out":                      {archive(t, good, file{name: "l", kind: tar.TypeSymlink, link: "../../etc"}), true, files.BadArchive},
		"an absolute link":                {archive(t, good, file{name: "l", kind: tar.TypeSymlink, link: "/etc"}), true, files.BadArchive},
		"below a link":                    {archive(t, good, file{name: "l", kind: tar.TypeSymlink, link: "."}, file{name: "l/x"}), true, files.BadArchive},
		"a hard link out":                 {archive(t, good, file{name: "h", kind: tar.TypeLink, link: "../../etc/passwd"}), true, files.BadArchive},
		"a hard link to nothing":          {archive(t, good, file{name: "h", kind: tar.TypeLink, link: "nothing"}), true, files.BadArchive},
		"too many":                        {archive(t, many...), true, files.TooMany},
		"too large":                       {archive(t, file{name: "a", body: strings.Repeat("x", 20_000)}), true, files.TooLarge},
		"too deep":                        {archive(t, good, file{name: strings.Repeat("d/", 65) + "x"}), true, files.TooDeep},
		"a file in the place of a folder": {archive(t, good, file{name: "m", body: "x"}), true, files.Exists},
		"a folder in the place of a file": {archive(t, file{name: "m/b/", kind: tar.TypeDir}, good), true, files.Exists},
		"a conflict at the very end":      {archive(t, good, file{name: "m/b", body: "new"}, file{name: "m/c", body: "new"}, file{name: "z", body: "no"}), true, files.Exists},
	} {
		res, _ := serve(t, a, files.Request{Op: files.Put, Path: "/tmp/set", Entries: 10, Bytes: 10_000}, c.in, c.whole)
		if res.Code != c.code || res.Message == "" {
			t.Errorf("%s: %+v", name, res)
		}
		_, out := serve(t, a, files.Request{Op: files.Get, Path: "/tmp/set"}, nil, false)
		same(t, name, contents(t, out), before)
		same(t, name, listed(t, a, "/tmp"), []string{"set:folder"})
	}
	res, _ := serve(t, a, files.Request{Op: files.Write, Path: "/tmp/set/a"}, []byte("half of"), false)
	if res.Code != files.CutOff {
		t.Errorf("a file that is cut off: %+v", res)
	}
	if res, _ := serve(t, a, files.Request{Op: files.Write, Path: "/tmp/set/m"}, []byte("x"), true); res.Code != files.IsADirectory {
		t.Errorf("a file in the place of a folder: %+v", res)
	}
	if res, _ := serve(t, a, files.Request{Op: files.Put, Path: "/tmp/set/a/b"}, keep, true); res.Code != files.NotADirectory {
		t.Errorf("below a file: %+v", res)
	}
	for path, code := range map[string]files.Code{"": files.BadPath, "/tmp/../etc": files.BadPath, "/tmp/x\x00y": files.BadPath} {
		for _, op := range []files.Op{files.Put, files.Write, files.Get, files.List, files.Delete} {
			if res, _ := serve(t, a, files.Request{Op: op, Path: path}, nil, true); res.Code != code {
				t.Errorf("%s %q: %+v", op, path, res)
			}
		}
	}
	_, out := serve(t, a, files.Request{Op: files.Get, Path: "/tmp/set"}, nil, false)
	same(t, "in the end", contents(t, out), before)
}

// left waits until a folder has n names, hidden ones too.
func left(t *testing.T, a agent.Attempt, dir string, n int) {
	t.Helper()
	late := time.Now().Add(patience)
	for {
		var out strings.Builder
		if _, err := agent.Execute(t.Context(), a, agent.Command{Argv: []string{"/bin/ls", dir}}, &out, nil); err != nil {
			t.Fatal(err)
		}
		if strings.Count(out.String(), "\n") == n {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("%s has %q, not %d", dir, out.String(), n)
		}
	}
}

func filesGivenUp(t *testing.T, b *bench) {
	if !b.Files {
		t.Skip("has no processes")
	}
	a := b.sleeping(t)
	begun := func(n int) agent.Foreground {
		t.Helper()
		p, err := a.Files(t.Context(), files.Request{Op: files.Write, Path: "/tmp/f"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Stdin().Write(make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
		left(t, a, "/tmp", n)
		return p
	}
	if err := begun(1).Close(); err != nil { // the client went away
		t.Error(err)
	}
	left(t, a, "/tmp", 0)
	p := begun(1)
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	exited(t, p)
	_ = p.Close()
	left(t, a, "/tmp", 0) // one that tidies up follows it
	if res, _ := serve(t, a, files.Request{Op: files.Write, Path: "/tmp/g"}, []byte("x"), true); res.Code != "" {
		t.Errorf("%+v", res)
	}
	left(t, a, "/tmp", 1)
	if b.Reopen == nil {
		return
	}
	begun(2)
	b.Runtime = b.Reopen(t)
	list, err := b.Runtime.Recover(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d attempts, %v", len(list), err)
	}
	a = list[0]
	t.Cleanup(func() { _ = a.Remove(context.Background()) })
	b.permit(t, time.Hour)
	until(t, a, up)
	left(t, a, "/tmp", 1)
	same(t, "after the agent is gone", listed(t, a, "/tmp"), []string{"g:file"})
}

// pattern gives n bytes that no two places have in common.
type pattern struct{ at, n int64 }

func (p *pattern) Read(b []byte) (int, error) {
	if p.at >= p.n {
		return 0, io.EOF
	}
	b = b[:min(int64(len(b)), p.n-p.at)]
	for i := range b {
		at := p.at + int64(i)
		b[i] = byte(at>>(8*(at%4))) ^ byte(at*7)
	}
	p.at += int64(len(b))
	return len(b), nil
}

func filesLarge(t *testing.T, b *bench) {
	if !b.Files {
		t.Skip("has no tmpfs")
	}
	const n = 500_000_000
	req := b.request(t, "sleep", "1h")
	req.Spec.Resources.Disk, req.Spec.Resources.Memory = 512<<20, 560<<20 // the files count in it
	a := b.start(t, req)
	begin := time.Now()
	p, err := a.Files(t.Context(), files.Request{Op: files.Write, Path: "/task/output/large"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(p.Stdin(), &pattern{n: n}); err != nil {
		t.Fatal(err)
	}
	if err := p.Stdin().Close(); err != nil {
		t.Fatal(err)
	}
	said, _ := io.ReadAll(p.Stderr())
	if exit := exited(t, p); exit.Code != 0 {
		t.Fatalf("%+v, %s", exit, said)
	}
	_ = p.Close()
	in := time.Since(begin)
	begin = time.Now()
	p, err = a.Files(t.Context(), files.Request{Op: files.Get, Path: "/task/output"})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	r := tar.NewReader(p.Stdout())
	for {
		h, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "output/large" && h.Size == n {
			break
		}
	}
	want, got, expect := &pattern{n: n}, make([]byte, 64<<10), make([]byte, 64<<10)
	for at := int64(0); at < n; {
		k, err := io.ReadFull(r, got)
		_, _ = io.ReadFull(want, expect[:k])
		if !bytes.Equal(got[:k], expect[:k]) || k == 0 {
			t.Fatalf("at %d: %v", at, err)
		}
		at += int64(k)
	}
	_, _ = io.Copy(io.Discard, p.Stdout())
	if exit := exited(t, p); exit.Code != 0 {
		t.Errorf("%+v", exit)
	}
	t.Logf("%d MB in within %s, out within %s, with what it takes to make and compare them", n/1_000_000, in, time.Since(begin))
}

func filesSandbox(t *testing.T, b *bench) {
	if !b.Files {
		t.Skip("has no sandbox")
	}
	req := b.request(t, "sleep", "1h")
	req.Spec.Resources.Disk = 1 << 20
	a := b.start(t, req)
	var out strings.Builder
	if exit, err := agent.Execute(t.Context(), a, agent.Command{Argv: []string{"/bin/guest", "things", "/tmp/things"}}, &out, nil); err != nil || exit.Code != 0 {
		t.Fatalf("%+v, %v, %s", exit, err, out.String())
	}
	res, got := serve(t, a, files.Request{Op: files.Get, Path: "/tmp/things"}, nil, false)
	same(t, "a folder with all kinds", contents(t, got), []string{"things/", "things/folder/", "things/folder/deeper/",
		"things/folder/deeper/file -rw-r----- inside\n", "things/folder/link -> deeper/file", "things/sparse long"})
	var skipped []string
	for _, s := range res.Skipped {
		skipped = append(skipped, s.Path)
	}
	slices.Sort(skipped)
	same(t, "left out", skipped, []string{"things/fifo", "things/out", "things/secret", "things/socket", "things/up", "things/within"})
	if res, _ := serve(t, a, files.Request{Op: files.Get, Path: "/tmp/things", Bytes: 10_000}, nil, false); res.Code != files.TooLarge {
		t.Errorf("more than may go: %+v", res)
	}
	if res, _ := serve(t, a, files.Request{Op: files.Get, Path: "/tmp/things", Entries: 3}, nil, false); res.Code != files.TooMany {
		t.Errorf("more entries than may go: %+v", res)
	}
	same(t, "a list", listed(t, a, "/tmp/things"), []string{"fifo:other", "folder:folder", "out:link", "secret:file", "socket:other", "sparse:file", "up:link", "within:link"})
	for name, c := range map[string]struct {
		r    files.Request
		code files.Code
	}{
		"through a link":          {files.Request{Op: files.Get, Path: "/tmp/things/within/deeper/file"}, files.IsALink},
		"a link":                  {files.Request{Op: files.Get, Path: "/tmp/things/out"}, files.IsALink},
		"a list through a link":   {files.Request{Op: files.List, Path: "/tmp/things/up"}, files.IsALink},
		"a put through a link":    {files.Request{Op: files.Write, Path: "/tmp/things/within/new"}, files.IsALink},
		"a fifo":                  {files.Request{Op: files.Get, Path: "/tmp/things/fifo"}, files.Failed},
		"a device":                {files.Request{Op: files.Get, Path: "/dev/zero"}, files.Failed},
		"what may not be read":    {files.Request{Op: files.Get, Path: "/tmp/things/secret"}, files.Permission},
		"what the kernel makes":   {files.Request{Op: files.Get, Path: "/proc/version"}, files.Permission},
		"the root file system":    {files.Request{Op: files.Write, Path: "/etc/new"}, files.ReadOnly},
		"the input":               {files.Request{Op: files.Write, Path: "/task/input/new"}, files.ReadOnly},
		"more than there is room": {files.Request{Op: files.Write, Path: "/task/output/large"}, files.NoSpace},
		"a mount":                 {files.Request{Op: files.Delete, Path: "/tmp"}, files.Permission},
		"the root":                {files.Request{Op: files.Delete, Path: "/"}, files.Permission},
		"what is read-only":       {files.Request{Op: files.Delete, Path: "/etc/passwd"}, files.ReadOnly},
	} {
		res, _ := serve(t, a, c.r, make([]byte, 2<<20), true)
		if res.Code != c.code {
			t.Errorf("%s: %+v", name, res)
		}
	}
	same(t, "what is left", listed(t, a, "/task/output"), nil)
	if res, _ := serve(t, a, files.Request{Op: files.Delete, Path: "/tmp/things/within"}, nil, false); res.Code != "" {
		t.Errorf("%+v", res)
	}
	same(t, "behind a deleted link", listed(t, a, "/tmp/things/folder"), []string{"deeper:folder", "link:link"})
	// Relative to the working directory, which is / in this image.
	same(t, "a relative path", listed(t, a, "tmp"), []string{"things:folder"})
}
