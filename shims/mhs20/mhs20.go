// Package mhs20 answers the API of the manager of MHS-20's Poseidon, a container
// orchestrator:
//
//	GET    /tasks           all tasks
//	POST   /tasks           an event with the task that is wanted
//	DELETE /tasks/{taskID}  stops it
//	GET    /nodes           the workers
//
// A task has the UUID that its caller gave it, which is a label of ours.
package mhs20

import (
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/shims/shim"
)

// Labels of the tasks.
const (
	labelID   = "mhs20.ID"
	labelName = "mhs20.Name"
)

// maxTasks is how many tasks one list has: the newest.
const maxTasks = 10_000

// State of a task, in the order of its life.
type State int

// The states.
const (
	Pending State = iota
	Scheduled
	Running
	Completed
	Failed
)

// Task is a task as this protocol has it.
type Task struct {
	ID            string
	ContainerID   string // what it runs on: the id of our task
	Name          string
	State         State
	Image         string
	Cpu           float64
	Memory        int64 // bytes
	Disk          int64 // bytes
	ExposedPorts  map[string]struct{}
	PortBindings  map[string]string
	RestartPolicy string
	StartTime     time.Time
	FinishTime    time.Time
	HealthCheck   string // a path
	RestartCount  int
	HostPorts     map[string][]HostPort
}

// HostPort is where a port of a task is reached.
type HostPort struct {
	HostIp   string
	HostPort string
}

// TaskEvent is the body of POST /tasks.
type TaskEvent struct {
	ID        string
	State     State
	Timestamp time.Time
	Task      Task
}

// Node is a worker. Memory is in KiB.
type Node struct {
	Name            string
	Ip              string // always empty: workers are not dialled
	Api             string // likewise
	Memory          int64
	MemoryAllocated int64
	Disk            int64
	DiskAllocated   int64
	Stats           Stats
	Role            string
	TaskCount       int
}

// Stats is what a worker is doing.
type Stats struct{ TaskCount int }

// ErrResponse is an error of the manager.
type ErrResponse struct {
	HTTPStatusCode int
	Message        string
}

type handler struct{ *shim.Shim }

// New makes the handler.
func New(c *client.Client, cfg shim.Config) http.Handler {
	h := handler{shim.New(c, cfg, shim.Protocol{
		Name: "mhs20",
		Fail: func(w http.ResponseWriter, p shim.Problem) {
			_ = shim.Answer(w, p.Status, ErrResponse{p.Status, p.Message})
		},
		Fields: map[string]string{
			"image": "Task.Image", "resources.cpus": "Task.Cpu", "resources.memory": "Task.Memory", "resources.disk": "Task.Disk",
			"health.http.path": "Task.HealthCheck", "labels": "Task.Name", "Idempotency-Key": "Task.ID",
		},
	})}
	for _, end := range []string{"", "/{$}"} { // the manager's router takes both
		h.Handle("GET /tasks"+end, h.list)
		h.Handle("POST /tasks"+end, h.create)
		h.Handle("DELETE /tasks/{id}"+end, h.stop)
		h.Handle("GET /nodes"+end, h.nodes)
	}
	return h
}

func (h handler) create(w http.ResponseWriter, r *http.Request) error {
	var event TaskEvent
	if err := shim.Read(w, r, &event, shim.AnyCase); err != nil {
		p := h.Explain(err)
		p.Status = http.StatusBadRequest // whatever it is, the manager says so
		return p
	}
	id, err := parseUUID(event.Task.ID)
	if err != nil {
		return err
	}
	if event.State < Pending || event.State > Running {
		return shim.Refuse(http.StatusBadRequest, "State: an event that makes a task has 0, 1 or 2; DELETE /tasks/%s ends it", id)
	}
	spec, err := h.spec(id, event.Task)
	if err != nil {
		return err
	}
	t, _, err := h.Client.CreateOnce(r.Context(), spec, "mhs20-"+id)
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusCreated, task(t))
}

// spec makes a task of ours.
func (h handler) spec(id string, t Task) (schemas.Spec, error) {
	spec := h.Spec(map[string]string{labelID: id, labelName: t.Name})
	spec.Image = t.Image
	spec.Resources.CPUs, spec.Resources.Memory, spec.Resources.Disk = schemas.CPUs(t.Cpu), schemas.Size(t.Memory), schemas.Size(t.Disk)
	ports := maps.Clone(t.ExposedPorts)
	for p := range t.PortBindings {
		if _, ok := ports[p]; !ok {
			return spec, shim.Refuse(http.StatusUnprocessableEntity, "Task.PortBindings: has a port that is not in Task.ExposedPorts")
		}
	}
	for _, p := range slices.Sorted(maps.Keys(ports)) {
		number, kind, _ := strings.Cut(p, "/")
		n, err := strconv.Atoi(number)
		if err != nil || kind != "tcp" && kind != "" {
			return spec, shim.Refuse(http.StatusUnprocessableEntity, `Task.ExposedPorts: must be such as "7777/tcp"`)
		}
		spec.Ports = append(spec.Ports, schemas.Port{Port: n, Protocol: schemas.ProtocolTCP})
	}
	if t.HealthCheck != "" {
		if len(spec.Ports) == 0 {
			return spec, shim.Refuse(http.StatusUnprocessableEntity, "Task.HealthCheck: needs a port in Task.ExposedPorts")
		}
		spec.Health = &schemas.Health{HTTP: &schemas.HTTPCheck{Port: spec.Ports[0].Port, Path: t.HealthCheck}}
	}
	switch t.RestartPolicy {
	case "", "no":
	case "always", "unless-stopped":
		spec.Restart = &schemas.Restart{Policy: schemas.RestartAlways}
	case "on-failure":
		spec.Restart = &schemas.Restart{Policy: schemas.RestartOnFailure}
	default:
		return spec, shim.Refuse(http.StatusUnprocessableEntity, `Task.RestartPolicy: must be "no", "always", "unless-stopped" or "on-failure"`)
	}
	return spec, nil
}

// task shows one of ours.
func task(t schemas.Task) Task {
	s := t.Spec
	out := Task{
		ID: s.Labels[labelID], ContainerID: string(t.ID), Name: s.Labels[labelName], State: state(t.State), Image: s.Image,
		Cpu: float64(s.Resources.CPUs), Memory: int64(s.Resources.Memory), Disk: int64(s.Resources.Disk),
		StartTime: t.Timings.Running, FinishTime: t.Timings.Ended, RestartCount: t.Restarts,
	}
	for _, p := range s.Ports {
		if out.ExposedPorts == nil {
			out.ExposedPorts = map[string]struct{}{}
		}
		out.ExposedPorts[portKey(p)] = struct{}{}
		for _, e := range t.Endpoints {
			if e.Name == p.Name {
				if out.HostPorts == nil {
					out.HostPorts = map[string][]HostPort{}
				}
				out.HostPorts[portKey(p)] = []HostPort{{hostIP(e.Host), strconv.Itoa(e.Port)}}
			}
		}
	}
	if s.Health != nil && s.Health.HTTP != nil {
		out.HealthCheck = s.Health.HTTP.Path
	}
	if s.Restarts() {
		out.RestartPolicy = strings.ReplaceAll(string(s.Restart.Policy), "_", "-")
	}
	return out
}

func portKey(p schemas.Port) string { return strconv.Itoa(p.Port) + "/tcp" }

// hostIP is a host where it is an address; a name stands in Docker's place of it too.
func hostIP(host string) string {
	if ip := net.ParseIP(host); ip != nil {
		return ip.String()
	}
	return host
}

// state has no word for a task that was stopped, or whose time was over, but Completed.
func state(s schemas.State) State {
	switch s {
	case schemas.Queued:
		return Pending
	case schemas.Assigned, schemas.Starting:
		return Scheduled
	case schemas.Running:
		return Running
	case schemas.Failed:
		return Failed
	}
	return Completed
}

func (h handler) list(w http.ResponseWriter, r *http.Request) error {
	list := []Task{}
	for t, err := range h.Client.All(r.Context(), client.ListOptions{Labels: map[string]string{shim.Label: h.Name}}) {
		if err != nil {
			return err
		}
		if list = append(list, task(t)); len(list) == maxTasks {
			break
		}
	}
	return shim.Answer(w, http.StatusOK, list)
}

func (h handler) stop(w http.ResponseWriter, r *http.Request) error {
	id, err := parseUUID(r.PathValue("id"))
	if err != nil {
		return err
	}
	found := false
	for t, err := range h.Client.All(r.Context(), client.ListOptions{Labels: map[string]string{shim.Label: h.Name, labelID: id}}) {
		if err != nil {
			return err
		}
		if _, err := h.Client.Cancel(r.Context(), t.ID, nil); err != nil {
			return err
		}
		found = true
	}
	if !found {
		return shim.Refuse(http.StatusNotFound, "no task with ID %s found", id)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (h handler) nodes(w http.ResponseWriter, r *http.Request) error {
	workers, err := h.Client.Workers(r.Context())
	if err != nil {
		return err
	}
	list := []Node{}
	for _, wk := range workers.Items {
		list = append(list, Node{
			Name: string(wk.ID), Memory: int64(wk.Host.Memory >> 10), MemoryAllocated: int64(wk.Assigned.Memory >> 10),
			Stats: Stats{wk.Running}, Role: "worker", TaskCount: wk.Assigned.Tasks,
		})
	}
	return shim.Answer(w, http.StatusOK, list)
}

// parseUUID checks an id and gives its usual form.
func parseUUID(s string) (string, error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 || len(s) != 36 {
		return "", shim.Refuse(http.StatusBadRequest, "ID: must be a UUID such as 21b23589-5d2d-4731-b5c9-a97e9832d021")
	}
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}
