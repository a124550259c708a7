// Package hub answers the API of a hub before containers with students' programs: one is
// made at a request, files are put into it, and programs run in it.
//
//	POST   /create   {Image, CPU, Mem, Command, Env, Port, Files} → {ID, IP, UpdatedAt, …}
//	GET    /get?id=ID
//	DELETE /delete?id=ID
//	PUT    /files    {ID, Files: {PATH: CONTENT}}
//	POST   /run      {ID, Command, Background} → {ExitCode, Stdout, Stderr}
//
// Names of fields are taken in any case. A path that is not absolute is below /work, a
// folder in memory, where programs start too.
package hub

import (
	"archive/tar"
	"bytes"
	"context"
	"maps"
	"net/http"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// Folder is where files are put and programs start.
const Folder = "/work"

const (
	folderSize  = schemas.Size(64 << 20)
	startWithin = 2 * time.Minute
	runWithin   = 5 * time.Minute
)

// CreateRequest is the body of POST /create.
type CreateRequest struct {
	Image   string
	CPU     shim.Number       // processors; the site's default if it is not given
	Mem     shim.Number       // MiB; the site's default if it is not given
	Command Words             // the image's own if it is not given
	Env     map[string]string // beside the image's
	Port    int               // where the student's server listens; the one that the image exposes if it is 0
	Files   map[string]string // text by path
}

// FilesRequest is the body of PUT /files.
type FilesRequest struct {
	ID    string
	Files map[string]string // text by path
}

// RunRequest is the body of POST /run.
type RunRequest struct {
	ID         string
	Command    Words
	Background bool // it goes on after the answer
}

// Container is a container as the hub shows it.
type Container struct {
	ID        string
	IP        string // always empty: containers have no network; URL reaches them
	State     string // that of the task
	URL       string
	UpdatedAt time.Time
}

// Files says what PUT /files has done.
type Files struct {
	ID      string
	Entries int
}

// Run is how a program ended; of one in the background, its id.
type Run struct {
	ExitCode   int
	Stdout     string
	Stderr     string
	Truncated  bool   `json:",omitzero"`
	Background string `json:",omitzero"`
}

// Words reads ["ls", "/"] and "ls /", which a shell of the image takes apart.
type Words []string

// UnmarshalJSON implements json.Unmarshaler.
func (w *Words) UnmarshalJSON(b []byte) error {
	if text, err := jsontext.AppendUnquote(nil, b); err == nil {
		*w = nil
		if len(text) > 0 {
			*w = Words{"sh", "-c", string(text)}
		}
		return nil
	}
	return schemas.Decode(b, (*[]string)(w))
}

type handler struct{ *shim.Shim }

// New makes the handler.
func New(c *client.Client, cfg shim.Config) http.Handler {
	h := handler{shim.New(c, cfg, shim.Protocol{
		Name: "hub",
		Fail: func(w http.ResponseWriter, p shim.Problem) {
			_ = shim.Answer(w, p.Status, map[string]string{"Error": p.Message})
		},
		Fields: map[string]string{"image": "Image", "resources.memory": "Mem", "resources.cpus": "CPU", "command": "Command", "ports.0.port": "Port", "env": "Env"},
	})}
	h.Handle("POST /create", h.create)
	h.Handle("GET /get", h.get)
	h.Handle("DELETE /delete", h.delete)
	h.Handle("POST /delete", h.delete)
	h.Handle("PUT /files", h.files)
	h.Handle("POST /files", h.files)
	h.Handle("POST /run", h.run)
	return h
}

func (h handler) create(w http.ResponseWriter, r *http.Request) error {
	var req CreateRequest
	if err := shim.Read(w, r, &req, shim.AnyCase); err != nil {
		return err
	}
	files, err := folders(req.Files)
	if err != nil {
		return err
	}
	spec := h.Spec(nil)
	spec.Image, spec.Command, spec.Env = req.Image, req.Command, req.Env
	if req.CPU < 0 || req.Mem < 0 || req.Mem > 1<<24 {
		return shim.Refuse(http.StatusUnprocessableEntity, "CPU and Mem: must be processors and MiB")
	}
	spec.Resources.CPUs = schemas.CPUs(req.CPU)
	spec.Resources.Memory = schemas.Size(req.Mem * (1 << 20))
	spec.Tmpfs = map[string]schemas.Size{Folder: folderSize}
	spec.OnLost = schemas.OnLostWait
	if req.Port != 0 {
		spec.Ports = []schemas.Port{{Port: req.Port}}
	}
	ctx, cancel := context.WithTimeout(r.Context(), startWithin)
	defer cancel()
	t, err := h.Client.Create(ctx, spec, client.CreateOptions{})
	if err != nil {
		return err
	}
	if t, err = h.started(ctx, t.ID); err == nil {
		err = h.put(ctx, t.ID, files)
	}
	if err != nil { // all of it or nothing
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		now := time.Duration(0)
		_, _ = h.Client.Cancel(ctx, t.ID, &now)
		return err
	}
	return shim.Answer(w, http.StatusOK, container(t))
}

// started waits until the container runs.
func (h handler) started(ctx context.Context, id schemas.TaskID) (schemas.Task, error) {
	t, err := h.Client.WaitRunning(ctx, id)
	switch {
	case err != nil && ctx.Err() != nil:
		return schemas.Task{ID: id}, shim.Refuse(http.StatusGatewayTimeout, "the container did not start within %s", schemas.Duration(startWithin))
	case err != nil:
		return schemas.Task{ID: id}, err
	case t.State.Final():
		return t, shim.Refuse(http.StatusBadGateway, "the container is over already (%s %s): its program has to go on", t.State, t.Reason)
	}
	return t, nil
}

func container(t schemas.Task) Container {
	c := Container{ID: string(t.ID), State: string(t.State), UpdatedAt: t.Timings.Accepted}
	if len(t.History) > 0 {
		c.UpdatedAt = t.History[len(t.History)-1].At
	}
	if len(t.Endpoints) > 0 {
		c.URL = t.Endpoints[0].URL
	}
	return c
}

// find gives a container of this hub.
func (h handler) find(ctx context.Context, id string) (schemas.Task, error) {
	if _, err := schemas.ParseTaskID(id); err != nil {
		return schemas.Task{}, noContainer()
	}
	t, err := h.Client.Get(ctx, schemas.TaskID(id), client.GetOptions{})
	if err == nil && !h.Mine(t) {
		return t, noContainer()
	}
	return t, err
}

func noContainer() error { return shim.Refuse(http.StatusNotFound, "there is no such container") }

func (h handler) get(w http.ResponseWriter, r *http.Request) error {
	t, err := h.find(r.Context(), r.URL.Query().Get("id"))
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusOK, container(t))
}

func (h handler) delete(w http.ResponseWriter, r *http.Request) error {
	t, err := h.find(r.Context(), r.URL.Query().Get("id"))
	if err == nil {
		t, err = h.Client.Cancel(r.Context(), t.ID, nil)
	}
	if err == nil {
		t, err = h.Client.Wait(r.Context(), t.ID)
	}
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusOK, container(t))
}

func (h handler) files(w http.ResponseWriter, r *http.Request) error {
	var req FilesRequest
	if err := shim.Read(w, r, &req, shim.AnyCase); err != nil {
		return err
	}
	files, err := folders(req.Files)
	if err != nil {
		return err
	}
	t, err := h.find(r.Context(), req.ID)
	if err != nil {
		return err
	}
	if err := h.put(r.Context(), t.ID, files); err != nil {
		return err
	}
	return shim.Answer(w, http.StatusOK, Files{ID: req.ID, Entries: len(req.Files)})
}

// folders makes a tar archive for each folder of the root that files are put into.
func folders(files map[string]string) (map[string]*bytes.Buffer, error) {
	all := map[string]*bytes.Buffer{}
	writers := map[string]*tar.Writer{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		to := name
		if !path.IsAbs(to) {
			to = Folder + "/" + to
		}
		to = path.Clean(to)
		first, rest, ok := strings.Cut(to[1:], "/")
		first = "/" + first
		if !ok || strings.HasSuffix(name, "/") || !path.IsAbs(name) && first != Folder || strings.Contains(name, "\x00") {
			return nil, shim.Refuse(http.StatusUnprocessableEntity, "Files: paths must name files, below %s or a folder of the container", Folder)
		}
		if all[first] == nil {
			all[first] = &bytes.Buffer{}
			writers[first] = tar.NewWriter(all[first])
		}
		content := files[name]
		if err := writers[first].WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: rest, Mode: 0o644, Size: int64(len(content))}); err != nil {
			return nil, shim.Refuse(http.StatusUnprocessableEntity, "Files: a path has a form that no archive can hold")
		}
		if _, err := writers[first].Write([]byte(content)); err != nil {
			return nil, err
		}
	}
	for _, w := range writers {
		if err := w.Close(); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// put puts what folders has made, each folder as a whole.
func (h handler) put(ctx context.Context, id schemas.TaskID, all map[string]*bytes.Buffer) error {
	for _, folder := range slices.Sorted(maps.Keys(all)) {
		if _, err := h.Client.PutArchive(ctx, id, folder, all[folder]); err != nil {
			return err
		}
	}
	return nil
}

func (h handler) run(w http.ResponseWriter, r *http.Request) error {
	var req RunRequest
	if err := shim.Read(w, r, &req, shim.AnyCase); err != nil {
		return err
	}
	t, err := h.find(r.Context(), req.ID)
	if err != nil {
		return err
	}
	program := schemas.ExecRequest{Command: req.Command, Workdir: Folder, Background: req.Background}
	if req.Background {
		x, err := h.Client.Launch(r.Context(), t.ID, program)
		if err != nil {
			return err
		}
		return shim.Answer(w, http.StatusOK, Run{Background: string(x.ID)})
	}
	program.Timeout = schemas.Duration(runWithin)
	res, err := h.Client.Exec(r.Context(), t.ID, program)
	if err != nil {
		return err
	}
	if res.TimedOut {
		return shim.Refuse(http.StatusGatewayTimeout, "the program was ended after %s; run it in the background", schemas.Duration(runWithin))
	}
	return shim.Answer(w, http.StatusOK, Run{ExitCode: res.ExitCode, Stdout: text(res.Stdout, res.StdoutBase64), Stderr: text(res.Stderr, res.StderrBase64), Truncated: res.Truncated})
}

// text is what a program wrote, as JSON can hold it: bytes that are no UTF-8 are replaced.
func text(s, base64ed string) string {
	if base64ed == "" {
		return s
	}
	b, _ := schemas.File{Base64: base64ed}.Bytes()
	return shim.Text(b)
}
