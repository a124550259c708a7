package test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

func artifactList(t *testing.T, s *site, id schemas.TaskID) (list schemas.ArtifactList) {
	t.Helper()
	if err := s.Call(s.ctx, "GET", "/v1/tasks/"+string(id)+"/artifacts", nil, &list); err != nil {
		t.Fatal(err)
	}
	return list
}

func artifact(t *testing.T, up *harness.Up, id schemas.TaskID, name string) (*http.Response, []byte) {
	t.Helper()
	resp, err := http.Get(up.URL + "/v1/tasks/" + string(id) + "/artifacts/" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, b
}

func hashOf(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// TestArtifacts lets real tasks leave files, in a container that nobody trusts, and takes
// them by every way that there is.
func TestArtifacts(t *testing.T) {
	image := testImage(t)
	up := newUp(t, "--allow", "entrypoint,tmpfs,mounts")
	s := newSite(t, image, up)

	t.Run("litter is skipped and listed, and never followed", func(t *testing.T) {
		task := s.ends(s.post(map[string]any{"resources": map[string]any{"memory": "128MiB", "disk": "64MiB"}}, "litter").ID, schemas.Completed, schemas.ReasonExit)
		list := artifactList(t, s, task.ID)
		var names []string
		for _, a := range list.Items {
			names = append(names, a.Name)
		}
		long := strings.Repeat("l", 255)
		if want := []string{"a-honest.txt", "closed/inside", long, "sparse", "z/y/below"}; !slices.Equal(names, want) {
			t.Errorf("kept %q, want %q", names, want)
		}
		if len(task.Artifacts) != 5 || task.Artifacts[0].SHA256 != hashOf([]byte("honest\n")) || task.ArtifactSum.Count != 5 {
			t.Errorf("the task says %+v %+v", task.Artifacts, task.ArtifactSum)
		}
		skipped := map[string]string{}
		for _, l := range list.Skipped {
			skipped[l.Name] = l.Why
		}
		for name, why := range map[string]string{"passwd": "link", "shadow": "link", "root": "link", "self": "link", "fifo": "pipe", "socket": "socket", "twin": "another name",
			"sparse2": "too large", `"bell\a\nname"`: "name", `"caf\xe9"`: "name", "deep" + strings.Repeat("/d", 64): "too many folders"} {
			if !strings.Contains(skipped[name], why) {
				t.Errorf("%s: %q, want %q", name, skipped[name], why)
			}
			delete(skipped, name)
		}
		if len(skipped) > 0 || !list.Sum.Truncated || list.Sum.Skipped != 11 {
			t.Errorf("also skipped: %v; %+v", skipped, list.Sum)
		}
		resp, body := artifact(t, up, task.ID, "closed/inside")
		if resp.StatusCode != 200 || string(body) != "inside\n" || resp.Header.Get("X-Content-Type-Options") != "nosniff" ||
			resp.Header.Get("Content-Type") != "application/octet-stream" || resp.Header.Get("ETag") != `"`+hashOf(body)+`"` ||
			!strings.HasPrefix(resp.Header.Get("Content-Disposition"), "attachment") {
			t.Errorf("%s %v %q", resp.Status, resp.Header, body)
		}
		for _, name := range []string{"passwd", "root/etc/passwd", "nothing", "closed", "twin", "%2e%2e/x"} {
			if resp, body := artifact(t, up, task.ID, name); resp.StatusCode != 404 {
				t.Errorf("%s: %s %.200s", name, resp.Status, body)
			}
		}
	})

	t.Run("an archive has them all, and a client gets them", func(t *testing.T) {
		task := s.ends(s.post(nil, "leave", "3", "300000").ID, schemas.Completed, schemas.ReasonExit)
		resp, err := http.Get(up.URL + "/v1/tasks/" + string(task.ID) + "/artifacts?archive=1")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var got []string
		r := tar.NewReader(resp.Body)
		for h, err := r.Next(); err != io.EOF; h, err = r.Next() {
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprint(h.Name, len(b)))
		}
		if want := []string{"output/0", "output/file-00000300000", "output/file-00001300000", "output/file-00002300000"}; !slices.Equal(got, want) {
			t.Errorf("the archive has %q", got)
		}
		dir := filepath.Join(t.TempDir(), "results")
		out := dayfly(t, up, "artifacts", "get", string(task.ID), "--to", dir)
		if b, err := os.ReadFile(filepath.Join(dir, "file-00002")); err != nil || string(b) != strings.Repeat("c", 300000) {
			t.Errorf("%v %s", err, out)
		}
		one := filepath.Join(t.TempDir(), "one")
		dayfly(t, up, "artifacts", "get", string(task.ID), "file-00001", "--to", one)
		if b, err := os.ReadFile(one); err != nil || string(b) != strings.Repeat("b", 300000) {
			t.Error(err)
		}
		if list := dayfly(t, up, "artifacts", string(task.ID)); !strings.Contains(list, "file-00002") || !strings.Contains(list, hashOf(bytes.Repeat([]byte("a"), 300000))) {
			t.Errorf("the list is %s", list)
		}
		dir = filepath.Join(t.TempDir(), "run")
		dayfly(t, up, "run", "--artifacts", dir, image, "leave", "2", "10")
		if b, err := os.ReadFile(filepath.Join(dir, "file-00001")); err != nil || string(b) != "bbbbbbbbbb" {
			t.Error(err)
		}
	})

	t.Run("whatever ends a task, its artifacts are kept", func(t *testing.T) {
		for how, end := range map[string]func(schemas.Task) schemas.State{
			"canceled": func(task schemas.Task) schemas.State {
				if err := s.Call(s.ctx, "GET", "/v1/tasks/"+string(task.ID)+"/artifacts", nil, nil); err == nil || !strings.Contains(err.Error(), "state_conflict") {
					t.Errorf("while it runs: %v", err)
				}
				s.until(task.ID, func(task schemas.Task) bool { return task.State == schemas.Running })
				if err := s.Call(s.ctx, "DELETE", "/v1/tasks/"+string(task.ID)+"?grace=0s", nil, nil); err != nil {
					t.Fatal(err)
				}
				return schemas.Canceled
			},
			"expired": func(schemas.Task) schemas.State { return schemas.Expired },
		} {
			ttl := "5m"
			if how == "expired" {
				ttl = "5s"
			}
			task := s.post(map[string]any{"ttl": ttl, "timeouts": map[string]any{"stop": "0s"}}, "leave", "2", "5", "1h")
			s.wrote(task.ID, "ready")
			want := end(task)
			task = s.until(task.ID, func(task schemas.Task) bool { return task.State.Final() })
			if task.State != want || len(task.Artifacts) != 2 || task.ArtifactSum.Truncated {
				t.Errorf("%s: %s with %+v", how, task.State, task.ArtifactSum)
			}
		}
	})

	t.Run("a restarted task has them once, at its very end", func(t *testing.T) {
		task := s.post(map[string]any{"restart": map[string]any{"policy": "always", "max": 2, "backoff": "100ms"}}, "leave", "1", "5")
		task = s.ends(task.ID, schemas.Completed, schemas.ReasonExit)
		if task.Restarts != 2 || task.ArtifactSum == nil || task.ArtifactSum.Count != 1 {
			t.Errorf("after %d restarts: %+v", task.Restarts, task.ArtifactSum)
		}
	})

	t.Run("the folders may be elsewhere", func(t *testing.T) {
		task := s.post(map[string]any{"mounts": map[string]any{"input": "/srv/in", "output": "/srv/out"}, "env": map[string]any{"OUTPUT": "/srv/out"},
			"files": []any{map[string]any{"path": "a.txt", "content": "hello"}}}, "leave", "1", "5", "1h")
		s.wrote(task.ID, "ready")
		var ran schemas.ExecResult
		if err := s.Call(s.ctx, "POST", "/v1/tasks/"+string(task.ID)+"/exec", map[string]any{"command": []string{"/bin/cat", "/srv/in/a.txt"}}, &ran); err != nil || ran.Stdout != "hello" {
			t.Errorf("%+v %v", ran, err)
		}
		if err := s.Call(s.ctx, "DELETE", "/v1/tasks/"+string(task.ID), nil, nil); err != nil {
			t.Fatal(err)
		}
		task = s.until(task.ID, func(task schemas.Task) bool { return task.State.Final() })
		if len(task.Artifacts) != 1 || task.Artifacts[0].Name != "file-00000" {
			t.Errorf("%+v %+v", task.Artifacts, task.ArtifactSum)
		}
	})

	t.Run("a full folder is no space inside, and nothing outside", func(t *testing.T) {
		task := s.ends(s.post(map[string]any{"resources": map[string]any{"memory": "64MiB", "disk": "1MiB"}}, "fill", "/task/output/full").ID, schemas.Completed, schemas.ReasonExit)
		if len(task.Artifacts) != 1 || task.Artifacts[0].Size != 1<<20 || task.ArtifactSum.Truncated {
			t.Errorf("%+v %+v, %s", task.Artifacts, task.ArtifactSum, task.Stdout)
		}
	})

	t.Run("very many files", func(t *testing.T) {
		task := s.ends(s.post(map[string]any{"ttl": "2m", "resources": map[string]any{"memory": "1GiB", "disk": "512MiB", "cpus": 1}}, "leave", "100000", "3").ID, schemas.Completed, schemas.ReasonExit)
		if sum := task.ArtifactSum; sum == nil || sum.Count != schemas.MaxArtifacts || sum.Skipped < 90_000 || !sum.Truncated || sum.Why != schemas.ArtifactsCount || len(task.Artifacts) != schemas.MaxInlineArtifacts {
			t.Errorf("%+v", task.ArtifactSum)
		}
		list := artifactList(t, s, task.ID)
		if len(list.Items) != schemas.MaxArtifacts || len(list.Skipped) != schemas.MaxArtifactSkipped {
			t.Errorf("the list has %d and %d", len(list.Items), len(list.Skipped))
		}
		if resp, body := artifact(t, up, task.ID, "file-09999"); resp.StatusCode != 200 || len(body) != 3 {
			t.Errorf("%s %s", resp.Status, body)
		}
	})
}

// TestArtifactsOfAKilledAgent kills everything while artifacts are being stored: the next
// agent gets the folder from the init that waits for it, and stores them whole.
func TestArtifactsOfAKilledAgent(t *testing.T) {
	image := testImage(t)
	up := newUp(t)
	s := newSite(t, image, up)
	const files, size = 24, 2 << 20
	task := s.post(map[string]any{"resources": map[string]any{"memory": "128MiB", "disk": "64MiB"}}, "leave", fmt.Sprint(files), fmt.Sprint(size), "300ms")
	s.wrote(task.ID, "ready")
	for range 3 {
		before := stored(t, up)
		for !s.over(task.ID) && stored(t, up) == before { // something of it was stored since
			time.Sleep(time.Millisecond)
		}
		if s.over(task.ID) {
			t.Log("it was stored whole before a kill came")
			break
		}
		if err := up.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := up.Start(s.ctx); err != nil {
			t.Fatal(err)
		}
	}
	task = s.ends(task.ID, schemas.Completed, schemas.ReasonExit)
	if task.ArtifactSum == nil || task.ArtifactSum.Count != files || task.ArtifactSum.Truncated || task.ArtifactSum.Bytes != files*size {
		t.Fatalf("%+v", task.ArtifactSum)
	}
	for i := range files {
		if resp, body := artifact(t, up, task.ID, fmt.Sprintf("file-%05d", i)); resp.StatusCode != 200 || !bytes.Equal(body, bytes.Repeat([]byte{byte('a' + i%26)}, size)) {
			t.Errorf("file %d: %s, %d bytes", i, resp.Status, len(body))
		}
	}
}

// dayfly runs the CLI against an up.
func dayfly(t *testing.T, up *harness.Up, args ...string) string {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "dayfly"), append([]string{"--url", up.URL}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("dayfly %s: %v\n%s", strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// stored is how many bytes the files of the store of artifacts have.
func stored(t *testing.T, up *harness.Up) (n int64) {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(up.Dir, "data", "nats", "jetstream", "*", "streams", schemas.StreamArtifacts, "msgs", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range list {
		if st, err := os.Stat(name); err == nil {
			n += st.Size()
		}
	}
	return n
}

func (s *site) over(id schemas.TaskID) bool {
	var task schemas.Task
	err := s.Call(s.ctx, "GET", "/v1/tasks/"+string(id), nil, &task)
	return err == nil && task.State.Final()
}
