package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

// taskFlags are the flags that say what a task is. Only those that are given are
// sent: the server's defaults hold for the others, and the server alone says which
// values it takes.
type taskFlags struct {
	ttl                                                   time.Duration
	memory, disk                                          string
	cpus                                                  float64
	pids, gpus, priority, maxAttempts                     int
	env, envFiles, entrypoint, labels, constraints, files []string
	tmpfs, capAdd                                         []string
	readOnly                                              bool
	workdir, user, onLost, pull, stdin, credentials       string
	interactive, terminal                                 bool
	kind, payload                                         string
	restart, healthHTTP                                   string
	healthTCP                                             int
	healthCmd, ports, secrets, secretFiles                []string
	uploads                                               []*os.File // what the spec names as blobs
	timeoutQueue, timeoutPull, timeoutStart, timeoutStop  time.Duration
}

// specFlags says which flag sets which field, for errors about a field.
var specFlags = []struct{ field, flag string }{
	{"image", "IMAGE"}, {"kind", "--kind"}, {"payload", "--payload"}, {"command", "CMD"}, {"ttl", "--ttl"}, {"resources.memory", "--memory"}, {"resources.cpus", "--cpus"},
	{"resources.gpus", "--gpus"}, {"restart", "--restart"}, {"health.http", "--health-http"}, {"health.tcp", "--health-tcp"},
	{"health.exec", "--health-cmd"}, {"health", "--health-…"}, {"resources.pids", "--pids"}, {"resources.disk", "--disk"}, {"env", "--env"}, {"secrets", "--secret"}, {"workdir", "--workdir"}, {"user", "--user"},
	{"entrypoint", "--entrypoint"}, {"labels", "--label"}, {"constraints", "--constraint"}, {"priority", "--priority"},
	{"on_lost", "--on-lost"}, {"max_attempts", "--max-attempts"}, {"tmpfs", "--tmpfs"}, {"read_only", "--read-only"}, {"cap_add", "--cap-add"}, {"files", "--file"}, {"stdin", "--stdin"},
	{"stdin_open", "-i"}, {"tty", "-t"},
	{"ports", "--port"}, {"pull", "--pull"}, {"registry_credentials", "--registry-credentials"}, {"timeouts.queue", "--timeout-queue"}, {"timeouts.pull", "--timeout-pull"},
	{"timeouts.start", "--timeout-start"}, {"timeouts.stop", "--timeout-stop"},
}

func (t *taskFlags) register(f *pflag.FlagSet) {
	f.StringVar(&t.kind, "kind", "", "one of the site's kinds, which makes the task of --payload")
	f.StringVar(&t.payload, "payload", "", "file with the payload of --kind, in JSON; - is standard input")
	f.DurationVar(&t.ttl, "ttl", 0, "how long it may live once it runs, such as 5m or 2h (default: the server's, 1h)")
	f.StringVarP(&t.memory, "memory", "m", "", "memory, such as 128MiB or 1g, all its tmpfs and output counted in")
	f.Float64Var(&t.cpus, "cpus", 0, "processors, such as 0.5")
	f.IntVar(&t.pids, "pids", 0, "processes and threads at a time")
	f.IntVar(&t.gpus, "gpus", 0, "GPUs of its own")
	f.StringVar(&t.disk, "disk", "", "size of /task/output")
	f.StringArrayVarP(&t.env, "env", "e", nil, "set an environment variable: K=V, or K to pass on one's own")
	f.StringArrayVar(&t.envFiles, "env-file", nil, "read environment variables from a file, one K=V on a line")
	f.StringArrayVar(&t.secrets, "secret", nil, "set an environment variable that nobody is shown: K to pass on one's own, or K=V")
	f.StringArrayVar(&t.secretFiles, "secret-file", nil, "put a text that nobody is shown into /task/input: LOCAL or LOCAL:PATH")
	f.StringVarP(&t.workdir, "workdir", "w", "", "folder to start in")
	f.StringVar(&t.user, "user", "", `who it runs as: UID:GID, or "image"`)
	f.StringArrayVar(&t.entrypoint, "entrypoint", nil, "replace the image's entrypoint; repeat for its arguments")
	f.StringArrayVarP(&t.labels, "label", "l", nil, "attach K=V to the task")
	f.StringArrayVar(&t.constraints, "constraint", nil, "run only on workers with the label K=V")
	f.IntVar(&t.priority, "priority", 0, "1 (low) to 9 (high)")
	f.StringVar(&t.onLost, "on-lost", "", "when its worker is lost: requeue, fail or wait")
	f.StringVar(&t.restart, "restart", "", "run it again in its container: never, on_failure or always, with :N at most N times")
	f.StringVar(&t.healthHTTP, "health-http", "", "it is ready once a GET is answered well: PORT or PORT/PATH")
	f.IntVar(&t.healthTCP, "health-tcp", 0, "it is ready once this port takes connections")
	f.StringArrayVar(&t.healthCmd, "health-cmd", nil, "it is ready once this program, run beside it, exits with 0; repeat for its arguments")
	f.StringArrayVarP(&t.ports, "port", "p", nil, "let others reach a port of it: [NAME=]PORT[/http|/h2c|/tcp]")
	f.IntVar(&t.maxAttempts, "max-attempts", 0, "how many workers may try to run it")
	f.StringArrayVar(&t.tmpfs, "tmpfs", nil, "a further place to write, in memory: PATH=SIZE")
	f.BoolVar(&t.readOnly, "read-only", true, "the image's own folders cannot be written; false where the site allows it")
	f.StringArrayVar(&t.capAdd, "cap-add", nil, "a capability for root in the container, such as SETUID, where the site allows it; may be repeated")
	f.StringArrayVar(&t.files, "file", nil, "put a file into /task/input: LOCAL or LOCAL:PATH; a large one is sent as a blob, once for all tasks")
	f.StringVar(&t.stdin, "stdin", "", "text for its standard input")
	f.BoolVarP(&t.interactive, "interactive", "i", false, "keep its standard input open, and send it what comes here")
	f.BoolVarP(&t.terminal, "tty", "t", false, "run it on a terminal")
	f.StringVar(&t.pull, "pull", "", "when to pull the image: missing, always or never")
	f.StringVar(&t.credentials, "registry-credentials", "", "name of the login to pull the image with, as the workers know it")
	f.DurationVar(&t.timeoutQueue, "timeout-queue", 0, "how long it may wait for a worker")
	f.DurationVar(&t.timeoutPull, "timeout-pull", 0, "how long pulling the image may take")
	f.DurationVar(&t.timeoutStart, "timeout-start", 0, "how long the start may take once the image is there")
	f.DurationVar(&t.timeoutStop, "timeout-stop", 0, "how long it may take to end after TERM, before KILL")
}

// args checks how many words there are: an image at least, and none with --kind.
func (t *taskFlags) args(cmd *cobra.Command, args []string) error {
	if t.kind != "" {
		return cobra.NoArgs(cmd, args)
	}
	return cobra.MinimumNArgs(1)(cmd, args)
}

// specOf is the JSON to send for a command line.
func (t *taskFlags) specOf(f *pflag.FlagSet, stdin io.Reader, window *schemas.Window, args []string) (map[string]any, error) {
	if t.kind == "" {
		if t.payload != "" {
			return nil, errors.New("--payload goes with --kind")
		}
		return t.spec(f, window, args[0], args[1:])
	}
	s, err := t.spec(f, window, "", nil)
	if err != nil {
		return nil, err
	}
	delete(s, "image")
	s["kind"] = t.kind
	if t.payload == "" {
		return s, nil
	}
	var b []byte
	if t.payload == "-" {
		b, err = io.ReadAll(io.LimitReader(stdin, schemas.MaxBodyBytes+1))
	} else {
		b, err = os.ReadFile(t.payload)
	}
	if err != nil {
		return nil, fmt.Errorf("--payload: %w", err)
	}
	if !json.Valid(b) {
		return nil, fmt.Errorf("--payload: %s is not JSON", t.payload)
	}
	s["payload"] = json.RawMessage(b)
	return s, nil
}

// spec is the JSON to send, as a tree. window is the size of the terminal here, nil if
// there is none.
func (t *taskFlags) spec(f *pflag.FlagSet, window *schemas.Window, image string, command []string) (map[string]any, error) {
	s := map[string]any{"image": image}
	resources, timeouts, health := map[string]any{}, map[string]any{}, map[string]any{}
	if len(command) > 0 {
		s["command"] = command
	}
	for _, g := range []struct {
		flag  string
		into  map[string]any
		field string
		value any
	}{
		{"ttl", s, "ttl", schemas.Duration(t.ttl).String()},
		{"cpus", resources, "cpus", t.cpus},
		{"pids", resources, "pids", t.pids},
		{"gpus", resources, "gpus", t.gpus},
		{"health-tcp", health, "tcp", map[string]int{"port": t.healthTCP}},
		{"health-cmd", health, "exec", t.healthCmd},
		{"workdir", s, "workdir", t.workdir},
		{"user", s, "user", t.user},
		{"read-only", s, "read_only", t.readOnly},
		{"cap-add", s, "cap_add", t.capAdd},
		{"priority", s, "priority", t.priority},
		{"on-lost", s, "on_lost", t.onLost},
		{"max-attempts", s, "max_attempts", t.maxAttempts},
		{"pull", s, "pull", t.pull},
		{"registry-credentials", s, "registry_credentials", t.credentials},
		{"stdin", s, "stdin", t.stdin},
		{"timeout-queue", timeouts, "queue", schemas.Duration(t.timeoutQueue).String()},
		{"timeout-pull", timeouts, "pull", schemas.Duration(t.timeoutPull).String()},
		{"timeout-start", timeouts, "start", schemas.Duration(t.timeoutStart).String()},
		{"timeout-stop", timeouts, "stop", schemas.Duration(t.timeoutStop).String()},
	} {
		if f.Changed(g.flag) {
			g.into[g.field] = g.value
		}
	}
	for flag, text := range map[string]string{"memory": t.memory, "disk": t.disk} {
		if !f.Changed(flag) {
			continue
		}
		size, err := schemas.ParseSize(text)
		if err != nil {
			return nil, fmt.Errorf("--%s %w", flag, err)
		}
		resources[flag] = size
	}
	if f.Changed("restart") {
		policy, most, limited := strings.Cut(t.restart, ":")
		restart := map[string]any{"policy": policy}
		if limited {
			n, err := strconv.Atoi(most)
			if err != nil {
				return nil, errors.New("--restart must be POLICY or POLICY:N")
			}
			restart["max"] = n
		}
		s["restart"] = restart
	}
	if f.Changed("health-http") {
		port, path, _ := strings.Cut(t.healthHTTP, "/")
		n, err := strconv.Atoi(port)
		if err != nil {
			return nil, errors.New("--health-http must be PORT or PORT/PATH")
		}
		health["http"] = map[string]any{"port": n, "path": "/" + path}
	}
	if f.Changed("entrypoint") {
		words := t.entrypoint
		if len(words) == 1 && words[0] == "" {
			words = []string{} // none, as in docker run
		}
		s["entrypoint"] = words
	}
	env, err := t.environment()
	if err != nil {
		return nil, err
	}
	labels, err := pairs("label", t.labels)
	if err != nil {
		return nil, err
	}
	constraints, err := pairs("constraint", t.constraints)
	if err != nil {
		return nil, err
	}
	tmpfs := map[string]any{}
	for _, p := range t.tmpfs {
		where, text, ok := strings.Cut(p, "=")
		size, err := schemas.ParseSize(text)
		if !ok || err != nil {
			return nil, errors.New("--tmpfs must be PATH=SIZE, such as /run=1MiB")
		}
		tmpfs[where] = size
	}
	if len(t.ports) > 0 {
		if s["ports"], err = readPorts(t.ports); err != nil {
			return nil, err
		}
	}
	files, err := t.readFiles()
	if err != nil {
		return nil, err
	}
	if t.interactive {
		if f.Changed("stdin") {
			return nil, errors.New("give --stdin or -i, not both")
		}
		s["stdin_open"] = true
	}
	if t.terminal {
		s["tty"] = true
		if window != nil {
			s["window"] = map[string]uint16{"rows": window.Rows, "cols": window.Cols}
		}
		if _, set := env["TERM"]; !set && os.Getenv("TERM") != "" && window != nil {
			env["TERM"] = os.Getenv("TERM")
		}
	}
	for field, m := range map[string]map[string]any{
		"resources": resources, "timeouts": timeouts, "health": health, "env": env, "labels": labels, "constraints": constraints, "tmpfs": tmpfs,
	} {
		if len(m) > 0 {
			s[field] = m
		}
	}
	if len(files) > 0 {
		s["files"] = files
	}
	secrets, err := t.readSecrets()
	if err != nil {
		return nil, err
	}
	if len(secrets) > 0 {
		s["secrets"] = secrets
	}
	return s, nil
}

// readSecrets reads what --secret and --secret-file say. One of our own environment that
// is not set is an error: a task shall not run without its password.
func (t *taskFlags) readSecrets() (list []map[string]any, err error) {
	for _, entry := range t.secrets {
		k, v, ok := strings.Cut(entry, "=")
		if !ok {
			if v, ok = os.LookupEnv(k); !ok {
				return nil, errors.New("--secret K passes on one's own environment variable, and there is no such one; or give K=V")
			}
		}
		list = append(list, map[string]any{"env": k, "value": v})
	}
	for _, arg := range t.secretFiles {
		local, name := arg, ""
		if i := strings.LastIndexByte(arg, ':'); i > 0 {
			local, name = arg[:i], arg[i+1:]
		}
		if name == "" {
			name = filepath.Base(local)
		}
		text, err := readSecret("--secret-file", nil, local)
		if err != nil {
			return nil, err
		}
		list = append(list, map[string]any{"path": name, "value": text})
	}
	return list, nil
}

// readPorts reads what --port says.
func readPorts(list []string) (ports []map[string]any, err error) {
	for _, text := range list {
		p := map[string]any{}
		name, rest, named := strings.Cut(text, "=")
		if named {
			p["name"] = name
		} else {
			rest = text
		}
		number, protocol, typed := strings.Cut(rest, "/")
		if typed {
			p["protocol"] = protocol
		}
		if p["port"], err = strconv.Atoi(number); err != nil {
			return nil, errors.New("--port must be [NAME=]PORT[/http|/h2c|/tcp], such as 8080 or shell=7000/tcp")
		}
		ports = append(ports, p)
	}
	return ports, nil
}

func pairs(flag string, list []string) (map[string]any, error) {
	m := map[string]any{}
	for _, kv := range list {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("--%s must be K=V", flag)
		}
		m[k] = v
	}
	return m, nil
}

// environment reads --env-file and then --env over it. An entry without = is passed
// on from our own environment if it is set there.
func (t *taskFlags) environment() (map[string]any, error) {
	env := map[string]any{}
	add := func(entry string) {
		k, v, ok := strings.Cut(entry, "=")
		if !ok {
			if v, ok = os.LookupEnv(k); !ok {
				return
			}
		}
		env[k] = v
	}
	for _, name := range t.envFiles {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		in := bufio.NewScanner(f)
		in.Buffer(nil, schemas.MaxBodyBytes)
		for in.Scan() {
			line := strings.TrimSuffix(strings.TrimLeft(in.Text(), " \t"), "\r")
			if line != "" && line[0] != '#' {
				add(line)
			}
		}
		f.Close()
		if err := in.Err(); err != nil {
			return nil, fmt.Errorf("--env-file %s: %w", name, err)
		}
	}
	for _, e := range t.env {
		if e == "" || e[0] == '=' {
			return nil, errors.New("--env must be K=V or K")
		}
		add(e)
	}
	return env, nil
}

// inlineMost is how many bytes of files, or of standard input, go with the spec itself.
const inlineMost = 16 << 10

func (t *taskFlags) readFiles() ([]map[string]any, error) {
	var files []map[string]any
	total := int64(0)
	for _, arg := range t.files {
		local, name := arg, ""
		if i := strings.LastIndexByte(arg, ':'); i > 0 {
			local, name = arg[:i], arg[i+1:]
		}
		if name == "" {
			name = filepath.Base(local)
		}
		info, err := os.Stat(local)
		if err != nil {
			return nil, fmt.Errorf("--file: %w", err)
		}
		if !info.Mode().IsRegular() {
			return nil, fmt.Errorf("--file %s is no plain file; name its files one by one", strconv.Quote(local))
		}
		f := map[string]any{"path": name}
		files = append(files, f)
		if total+info.Size() > inlineMost {
			file, err := os.Open(local)
			if err == nil {
				f["blob"], err = t.upload(file)
			}
			if err != nil {
				return nil, fmt.Errorf("--file: %w", err)
			}
			continue
		}
		total += info.Size()
		b, err := os.ReadFile(local)
		if err != nil {
			return nil, fmt.Errorf("--file: %w", err)
		}
		if utf8.Valid(b) {
			f["content"] = string(b)
		} else {
			f["base64"] = base64.StdEncoding.EncodeToString(b)
		}
	}
	return files, nil
}

// upload names a file as a blob that is to be sent before the spec.
func (t *taskFlags) upload(f *os.File) (schemas.BlobID, error) {
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	t.uploads = append(t.uploads, f)
	return schemas.BlobIDOf([sha256.Size]byte(sum.Sum(nil))), nil
}

// send sends the blobs that the spec names.
func (t *taskFlags) send(ctx context.Context, cl *client.Client) error {
	for _, f := range t.uploads {
		_, _, err := putFile(ctx, cl, f)
		f.Close()
		if err != nil {
			return fmt.Errorf("send %s: %w", filepath.Base(f.Name()), err)
		}
	}
	return nil
}
