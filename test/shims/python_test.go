package shims

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// jobImage is what gridx's document calls the image of its one kind of jobs.
const jobImage = "gridx-job-python:latest"

// runner does what the document says of the image: "Entrypoint in image reads
// /work/input/task.json and executes", "write script to /tmp/main.py", "execute python
// /tmp/main.py".
const runner = `import base64, json, os, sys
with open("/work/input/task.json") as f:
    job = json.load(f)
assert job["kind"] == "python", job
payload = job["payload"]
script = base64.b64decode(payload["main_py"]) if payload.get("main_py") else payload["script_text"].encode()
with open("/tmp/main.py", "wb") as f:
    f.write(script)
os.execv(sys.executable, [sys.executable, "-u", "/tmp/main.py"] + payload.get("args", []))
`

func allImages() iter.Seq[string] {
	return func(yield func(string) bool) {
		for name := range maps.Keys(images) {
			if !yield(name) {
				return
			}
		}
		yield(jobImage)
	}
}

// unwanted are folders of the standard library that no job needs.
var unwanted = []string{"test", "__pycache__", "lib2to3", "idlelib", "ensurepip", "dist-packages", "pydoc_data"}

// libraries are those that ldd names.
var libraries = regexp.MustCompile(`(/\S+) \(0x`)

// python gives the files of an image with this machine's own Python: its interpreter, the
// libraries of that, and what of the standard library is Python.
func python() ([]byte, error) {
	program, err := filepath.EvalSymlinks("/usr/bin/python3")
	if err != nil {
		return nil, fmt.Errorf("a Python of Debian's is needed: %w", err)
	}
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w", program, err)
	}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	add := func(name string, body []byte) {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(name, "/"), Mode: 0o755, Size: int64(len(body))}))
		_, failed := w.Write(body)
		err = errors.Join(err, failed)
	}
	copied := func(to, from string) {
		body, failed := os.ReadFile(from)
		err = errors.Join(err, failed)
		add(to, body)
	}
	copied("/usr/bin/python3", program)
	for _, found := range libraries.FindAllStringSubmatch(string(out), -1) {
		copied(found[1], found[1])
	}
	lib := "/usr/lib/" + filepath.Base(program)
	walked := filepath.WalkDir(lib, func(path string, d fs.DirEntry, failed error) error {
		switch {
		case failed != nil:
			return failed
		case d.IsDir() && slices.Contains(unwanted, d.Name()):
			return fs.SkipDir
		case d.Type().IsRegular() && (strings.HasSuffix(path, ".py") || strings.HasSuffix(path, ".so")):
			copied(path, path)
		}
		return nil
	})
	add("/runner.py", []byte(runner))
	err = errors.Join(err, walked, w.Close())
	return archive.Bytes(), err
}
