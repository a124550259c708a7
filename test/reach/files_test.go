package reach

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// tarOf makes an archive.
func tarOf(t testing.TB, entries ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		body := h.PAXRecords["body"]
		h.PAXRecords = nil
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		h.Size = int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func file(name, body string) tar.Header {
	return tar.Header{Name: name, PAXRecords: map[string]string{"body": body}}
}

// read gets a file or the names in a folder's archive.
func (s *site) read(id schemas.TaskID, path string) (string, error) {
	d, err := s.GetFiles(deadline(s), id, path)
	if err != nil {
		return "", err
	}
	defer d.Close()
	if !d.Archive {
		b, err := io.ReadAll(d)
		if int64(len(b)) != d.Size {
			err = errors.Join(err, fmt.Errorf("%d bytes, announced were %d", len(b), d.Size))
		}
		return string(b), err
	}
	var names []string
	for r := tar.NewReader(d); ; {
		h, err := r.Next()
		if err == io.EOF {
			_, err = io.Copy(io.Discard, d)
			return strings.Join(names, " "), err
		}
		if err != nil {
			return "", err
		}
		names = append(names, h.Name)
	}
}

func TestFiles(t *testing.T) {
	s := start(t)
	for name, image := range map[string]string{"an image with a shell": s.shell, "an image without one": s.scratch} {
		t.Run(name, func(t *testing.T) {
			id := s.run(image, nil)
			for _, body := range []string{"", "x", strings.Repeat("dayfly", 100_000)} {
				done, err := s.PutFile(deadline(t), id, "/tmp/sub/one", strings.NewReader(body), int64(len(body)), 0o750)
				if err != nil || done != (schemas.FilesDone{Path: "/tmp/sub/one", Entries: 1, Bytes: int64(len(body))}) {
					t.Fatalf("%+v, %v", done, err)
				}
				if got, err := s.read(id, "/tmp/sub/one"); got != body || err != nil {
					t.Errorf("%d bytes came back, %v", len(got), err)
				}
			}
			if _, err := s.PutArchive(deadline(t), id, "/tmp/sub", tarOf(t, file("a/b", "1"), file("c", "2"), tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "a/b"})); err != nil {
				t.Fatal(err)
			}
			if got, err := s.read(id, "/tmp/sub"); err != nil || strings.Join(strings.Fields(got), " ") == "" {
				t.Errorf("%s, %v", got, err)
			}
			list, err := s.ListFiles(deadline(t), id, "/tmp/sub")
			var names []string
			for _, f := range list.Items {
				names = append(names, fmt.Sprintf("%s:%s:%s", f.Name, f.Type, f.Mode))
			}
			if want := "a:folder:0755 c:file:0755 l:link:0777 one:file:0750"; err != nil || strings.Join(names, " ") != want || list.More {
				t.Errorf("%v, %v", names, err)
			}
			_, err = s.DeleteFiles(deadline(t), id, "/tmp/sub", false)
			refusedAs(t, "a folder with something in it", err, 422, schemas.CodeInvalidValue)
			if done, err := s.DeleteFiles(deadline(t), id, "/tmp/sub", true); err != nil || done.Entries != 6 {
				t.Errorf("%+v, %v", done, err)
			}
			_, err = s.read(id, "/tmp/sub")
			refusedAs(t, "what was deleted", err, 404, schemas.CodeNotFound)
		})
	}
}

func TestFilesThatAreRefused(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, nil)
	s.sh(id, "ln -s /etc /tmp/etc; ln -s / /tmp/root; mkdir /tmp/d; echo 1 > /tmp/d/x; mknod /tmp/fifo p; ln -s /bin/busybox /tmp/d/out; mknod /tmp/d/pipe p")
	put := func(path string) error {
		_, err := s.PutFile(deadline(t), id, path, strings.NewReader("x"), 1, 0)
		return err
	}
	unpack := func(archive *bytes.Buffer) error {
		_, err := s.PutArchive(deadline(t), id, "/tmp/in", archive)
		return err
	}
	get := func(path string) error {
		_, err := s.read(id, path)
		return err
	}
	many := func() *bytes.Buffer {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := range 100_001 {
			_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(i), Mode: 0o600})
		}
		_ = w.Close()
		return &b
	}
	device := func(kind byte) *bytes.Buffer {
		return tarOf(t, tar.Header{Typeflag: kind, Name: "dev", Devmajor: 1, Devminor: 3})
	}
	half := tarOf(t, file("a", strings.Repeat("x", 10_000)))
	half.Truncate(5000)
	over := create(t, s.Client, s.shell, func(spec *schemas.Spec) { spec.Command = []string{"true"} }).ID
	if _, err := s.Wait(deadline(t), over); err != nil {
		t.Fatal(err)
	}
	_, overErr := s.ListFiles(deadline(t), over, "/tmp")
	_, noneErr := s.ListFiles(deadline(t), "t-01jd0000000000000000000000", "/tmp")
	bomb := io.LimitReader(zeros{}, 100<<20)
	_, bombErr := s.PutFile(deadline(t), id, "/task/output/bomb", bomb, 100<<20, 0)
	for name, c := range map[string]struct {
		err    error
		status int
		code   schemas.Code
	}{
		"a path that climbs":         {put("/tmp/../etc/x"), 422, schemas.CodeInvalidValue},
		"a read-only place":          {put("/etc/x"), 403, schemas.CodePermission},
		"the input of the task":      {put("/task/input/x"), 403, schemas.CodePermission},
		"a device":                   {put("/dev/null/x"), 422, schemas.CodeInvalidValue},
		"through a link":             {put("/tmp/etc/x"), 422, schemas.CodeInvalidValue},
		"a folder as a file":         {put("/tmp/d"), 422, schemas.CodeInvalidValue},
		"no name":                    {put("/tmp/"), 422, schemas.CodeInvalidValue},
		"get through a link":         {get("/tmp/root/etc"), 422, schemas.CodeInvalidValue},
		"get a link":                 {get("/tmp/etc"), 422, schemas.CodeInvalidValue},
		"get a device":               {get("/dev/null"), 422, schemas.CodeInvalidValue},
		"get a fifo":                 {get("/tmp/fifo"), 422, schemas.CodeInvalidValue},
		"get what climbs":            {get("../../etc"), 422, schemas.CodeInvalidValue},
		"get nothing":                {get("/tmp/none"), 404, schemas.CodeNotFound},
		"get below a file":           {get("/bin/busybox/x"), 422, schemas.CodeInvalidValue},
		"a name that climbs":         {unpack(tarOf(t, file("ok", "1"), file("../x", "1"))), 422, schemas.CodeBadArchive},
		"an absolute name":           {unpack(tarOf(t, file("ok", "1"), file("/x", "1"))), 422, schemas.CodeBadArchive},
		"a link that leads out":      {unpack(tarOf(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "../../x"})), 422, schemas.CodeBadArchive},
		"a link to an absolute name": {unpack(tarOf(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/etc"})), 422, schemas.CodeBadArchive},
		"below a link":               {unpack(tarOf(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "x"}, file("l/y", "1"))), 422, schemas.CodeBadArchive},
		"a hard link to nothing":     {unpack(tarOf(t, tar.Header{Typeflag: tar.TypeLink, Name: "l", Linkname: "etc"})), 422, schemas.CodeBadArchive},
		"a character device":         {unpack(device(tar.TypeChar)), 422, schemas.CodeBadArchive},
		"a block device":             {unpack(device(tar.TypeBlock)), 422, schemas.CodeBadArchive},
		"a fifo":                     {unpack(device(tar.TypeFifo)), 422, schemas.CodeBadArchive},
		"a name twice":               {unpack(tarOf(t, file("a", "1"), file("b", "1"), file("a", "2"))), 422, schemas.CodeBadArchive},
		"no archive":                 {unpack(bytes.NewBufferString(strings.Repeat("no", 1000))), 422, schemas.CodeBadArchive},
		"half an archive":            {unpack(half), 422, schemas.CodeBadArchive},
		"too deep":                   {unpack(tarOf(t, file(strings.Repeat("d/", 100)+"x", "1"))), 413, schemas.CodeTooLarge},
		"more than there are inodes": {unpack(many()), 507, schemas.CodeNoSpace},
		"too much":                   {bombErr, 507, schemas.CodeNoSpace},
		"a task that is over":        {overErr, 409, schemas.CodeStateConflict},
		"no task":                    {noneErr, 404, schemas.CodeNotFound},
	} {
		refusedAs(t, name, c.err, c.status, c.code)
	}
	if out := s.sh(id, "ls -A /task/output /tmp/in 2>/dev/null; ls -A /tmp").Stdout; strings.Contains(out, "ok") || strings.Contains(out, ".dayfly") || strings.Contains(out, "bomb") {
		t.Errorf("something is left: %s", out)
	}
	d, err := s.GetFiles(deadline(t), id, "/tmp/d")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := io.Copy(io.Discard, d); err != nil {
		t.Fatal(err)
	}
	if k := d.Skipped(); len(k.Skipped) != 2 {
		t.Errorf("what was left out: %+v", k)
	}
	for name, c := range map[string]struct {
		method, query, kind string
		status              int
	}{
		"no path":           {"GET", "", "", 400},
		"a kind of its own": {"PUT", "path=/tmp/x", "text/plain", 415},
		"no kind":           {"PUT", "path=/tmp/x", "", 415},
		"a bad mode":        {"PUT", "path=/tmp/x&mode=999", "application/octet-stream", 400},
		"setuid":            {"PUT", "path=/tmp/x&mode=4755", "application/octet-stream", 400},
		"a mode of many":    {"PUT", "path=/tmp/x&mode=755", "application/x-tar", 400},
		"a NUL":             {"GET", "path=%2ftmp%00", "", 400},
	} {
		req, err := http.NewRequestWithContext(deadline(t), c.method, s.up.URL+"/v1/tasks/"+string(id)+"/files?"+c.query, nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.kind != "" {
			req.Header.Set("Content-Type", c.kind)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != c.status {
			t.Errorf("%s: %d, want %d", name, res.StatusCode, c.status)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// A body that breaks off changes nothing, and a file that does is seen to.
func TestFilesThatBreakOff(t *testing.T) {
	s := start(t)
	id := s.run(s.shell, nil)
	s.sh(id, "echo old > /tmp/x")
	path := s.up.URL + "/v1/tasks/" + string(id) + "/files?path=" + url.QueryEscape("/tmp/x")
	r, w := io.Pipe()
	req, err := http.NewRequestWithContext(deadline(t), "PUT", path, r)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/octet-stream")
	ended := make(chan error, 1)
	go func() {
		res, err := http.DefaultClient.Do(req)
		if err == nil {
			res.Body.Close()
		}
		ended <- err
	}()
	if _, err := w.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	until(t, "it is gathered", func() error {
		out := s.sh(id, "ls -A /tmp").Stdout
		return want(strings.Contains(out, ".dayfly-put"), "%s", out)
	})
	_ = w.CloseWithError(errors.New("gone"))
	if <-ended == nil {
		t.Error("an answer to half a body")
	}
	until(t, "nothing is left of it", func() error {
		out := s.sh(id, "ls -A /tmp; cat /tmp/x").Stdout
		return want(out == "x\nold\n", "%s", out)
	})

	s.sh(id, "head -c 20000000 /dev/zero > /task/output/long")
	d, err := s.GetFiles(deadline(t), id, "/task/output/long")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := io.ReadFull(d, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Cancel(deadline(t), id, nil); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, d); err == nil {
		t.Errorf("%d bytes without an error", n)
	}
}

// pattern is bytes that follow from their place.
type pattern struct{ r *rand.ChaCha8 }

func (p pattern) Read(b []byte) (int, error) { return p.r.Read(b) }

func newPattern(seed byte) pattern { return pattern{rand.NewChaCha8([32]byte{seed})} }

// A folder with nearly as many entries as there may be goes in and comes out. One with
// more breaks off.
func TestAFolderWithManyFiles(t *testing.T) {
	const most = 99_000
	s := start(t)
	id := s.run(s.shell, func(spec *schemas.Spec) {
		spec.Resources.Memory = 768 << 20
		spec.Tmpfs = map[string]schemas.Size{"/many": 512 << 20}
	})
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for i := range most {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%d/%d", i/1000, i), Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.PutArchive(long(t), id, "/many/set", &archive); err != nil {
		t.Fatal(err)
	}
	get := func() (files int, err error) {
		t.Helper()
		d, err := s.GetFiles(long(t), id, "/many/set")
		if err != nil {
			return 0, err
		}
		defer d.Close()
		for r := tar.NewReader(d); ; files++ {
			h, err := r.Next()
			if err == io.EOF {
				return files, nil
			}
			if err != nil {
				return files, err
			}
			if h.Typeflag == tar.TypeDir {
				files--
			}
		}
	}
	if n, err := get(); n != most || err != nil {
		t.Errorf("%d files came out, %v", n, err)
	}
	s.sh(id, "mkdir /many/set/more; cd /many/set/more; touch $(seq 1000)")
	if n, err := get(); err == nil || n > 0 || !strings.Contains(err.Error(), "one by one") {
		t.Errorf("%d files came out of more than may be: %v", n, err)
	}
	if list, err := s.ListFiles(long(t), id, "/many/set/0"); err != nil || len(list.Items) != 1000 {
		t.Errorf("%d in a list, %v", len(list.Items), err)
	}
	if done, err := s.DeleteFiles(long(t), id, "/many/set", true); err != nil || done.Entries < most+1000 {
		t.Errorf("%+v, %v", done, err)
	}
}

// Half a gigabyte goes in and comes out, alone and in an archive, and no process holds it.
func TestFilesThatAreLarge(t *testing.T) {
	s := start(t)
	const size = 500 << 20
	id := s.run(s.shell, func(spec *schemas.Spec) {
		spec.Resources.Memory = 1200 << 20
		spec.Tmpfs = map[string]schemas.Size{"/big": 1100 << 20}
	})
	heap := make(chan float64, 1)
	watching, stop := context.WithCancel(context.Background())
	go func() {
		most := 0.0
		for watching.Err() == nil {
			most = max(most, metric(t, s.up.Admin, "go_memstats_heap_inuse_bytes", ""))
			select {
			case <-watching.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
		heap <- most
	}()
	before := metric(t, s.up.Admin, "go_memstats_heap_inuse_bytes", "")
	sum := md5.New()
	began := time.Now()
	in := io.TeeReader(io.LimitReader(newPattern(1), size), sum)
	if _, err := s.PutFile(long(t), id, "/big/a", in, size, 0); err != nil {
		t.Fatal(err)
	}
	t.Logf("put: %.0f MB/s", size/1e6/time.Since(began).Seconds())
	began = time.Now()
	d, err := s.GetFiles(long(t), id, "/big")
	if err != nil {
		t.Fatal(err)
	}
	archive := tar.NewReader(d)
	got := md5.New()
	for {
		h, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "big/a" {
			if _, err := io.Copy(got, archive); err != nil {
				t.Fatal(err)
			}
		}
	}
	d.Close()
	t.Logf("get: %.0f MB/s", size/1e6/time.Since(began).Seconds())
	if !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
		t.Error("other bytes came back")
	}
	stop()
	if most := <-heap; most > before+96<<20 {
		t.Errorf("the heap of all services grew from %.0f to %.0f MiB", before/(1<<20), most/(1<<20))
	} else {
		t.Logf("heap of all services: %.0f, at the most %.0f MiB", before/(1<<20), most/(1<<20))
	}
}

func long(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}
