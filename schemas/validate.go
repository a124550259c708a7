package schemas

import (
	"encoding/base64"
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/distribution/reference"
	"github.com/go-json-experiment/json"
)

// Policy is what an operator lets tasks ask for.
type Policy struct {
	MaxTTL          Duration // longest lifetime, extensions included
	AllowEntrypoint bool
	AllowTmpfs      bool
	AllowImageUser  bool // user: "image"
	AllowMounts     bool // other places for input and output

	AllowWritableRoot bool     // read_only: false
	AllowCaps         []string // of Capabilities, for cap_add

	Kinds     Kinds // nil: there are none
	KindsOnly bool  // no task without a kind
}

// Capabilities are those that an operator may allow: what Docker gives by default, less
// MKNOD. What a task does not ask for it does not have.
var Capabilities = []string{"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE",
	"NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"}

// DefaultPolicy is the policy of `dayfly up`.
func DefaultPolicy() Policy {
	return Policy{MaxTTL: Duration(24 * time.Hour), AllowEntrypoint: true, AllowTmpfs: true}
}

// Limits of a spec.
const (
	MaxArgs        = 1024
	MaxArgBytes    = 128 << 10
	MaxEnv         = 1000
	MaxEnvBytes    = 128 << 10
	MaxLabels      = 64
	MaxFiles       = 256
	MaxTmpfs       = 8
	MaxPids        = 32768
	MaxGPUs        = 64
	MaxRestarts    = 1_000_000
	MaxRetries     = 100
	MaxAttempts    = 100
	MinMemory      = 6 << 20  // Docker takes no less
	MaxFaults      = 64       // that one answer names
	MaxSpecBytes   = 40 << 10 // as JSON, so that the status has room in the record
	MaxRecordBytes = 64 << 10
)

// maxBytes bounds every size; no machine has as much.
const maxBytes = 1 << 46

type checker struct{ errs []FieldError }

func (c *checker) add(field string, code Code, format string, args ...any) {
	if len(c.errs) == MaxFaults {
		return
	}
	c.errs = append(c.errs, FieldError{Field: field, Code: code, Message: fmt.Sprintf(format, args...)})
}

func (c *checker) value(ok bool, field, format string, args ...any) {
	if !ok {
		c.add(field, CodeInvalidValue, format, args...)
	}
}

// Validate checks a spec, defaults filled in, against the rules and the operator's policy.
// It gives every fault up to MaxFaults, in the order of the fields, and repeats no value.
func (s *Spec) Validate(p Policy) []FieldError {
	c := &checker{}
	s.checkImage(c)
	checkArgs(c, "entrypoint", s.Entrypoint)
	if s.Entrypoint != nil && !p.AllowEntrypoint {
		c.add("entrypoint", CodeNotAllowed, "this site does not let tasks replace the image's entrypoint")
	}
	checkArgs(c, "command", s.Command)
	s.checkEnv(c)
	c.value(s.Workdir == "" || path.IsAbs(s.Workdir) && clean(s.Workdir), "workdir", "must be an absolute path")
	s.checkUser(c, p)
	s.checkTerminal(c)
	s.checkFiles(c)
	s.checkSecrets(c)
	s.checkResources(c)
	s.checkTmpfs(c, p)
	s.checkMounts(c, p)
	if s.WritableRoot() && !p.AllowWritableRoot {
		c.add("read_only", CodeNotAllowed, "this site does not let tasks write to the image's own folders; use tmpfs for places to write")
	}
	s.checkCaps(c, p)
	s.checkPorts(c)
	s.checkTimes(c, p)
	s.checkRestart(c)
	s.checkHealth(c)
	s.checkJudge(c)
	c.value(s.Kind == "" || KindName(s.Kind), "kind", "must be 1 to 63 of a-z, 0-9 and -")
	c.value(s.Payload == nil, "payload", "goes with kind")
	c.value(s.Pull == PullMissing || s.Pull == PullAlways || s.Pull == PullNever, "pull", `must be "missing", "always" or "never"`)
	checkCredentials(c, "registry_credentials", s.Credentials)
	c.value(s.MaxAttempts >= 1 && s.MaxAttempts <= MaxAttempts, "max_attempts", "must be 1 to %d", MaxAttempts)
	c.value(s.OnLost == OnLostRequeue || s.OnLost == OnLostFail || s.OnLost == OnLostWait, "on_lost", `must be "requeue", "fail" or "wait"`)
	c.value(s.Priority >= 1 && s.Priority <= 9, "priority", "must be 1 (low) to 9 (high)")
	checkPairs(c, "constraints", s.Constraints)
	s.Callback.check(c, "callback")
	checkPairs(c, "labels", s.Labels)
	s.checkAvailable(c)
	if len(c.errs) == 0 {
		s.checkSize(c)
	}
	return c.errs
}

// checkAvailable names the fields whose features have not landed. A field leaves
// this list in the change that brings its feature.
func (s *Spec) checkAvailable(c *checker) {
	no := func(given bool, field, instead string) {
		if given {
			c.add(field, CodeNotAvailable, "not available in this version yet; %s", instead)
		}
	}
	no(s.Network == NetworkEgress || s.Network == NetworkInternal, "network", `use "none"`)
	c.value(slices.Contains([]Network{NetworkNone, NetworkEgress, NetworkInternal}, s.Network), "network", `must be "none"`)
	no(s.Runtime != "", "runtime", "leave it out")
}

// checkSize keeps room in the record for the status, once contents that are too large have
// become blobs. It names the field that takes the most, since that one has to shrink.
func (s *Spec) checkSize(c *checker) {
	if b, err := json.Marshal(s); err == nil && len(b) <= MaxSpecBytes {
		return // as most are, in whichever order maps are written
	}
	slim, _ := s.Slim()
	b, err := Encode(slim)
	if err != nil {
		c.add("", CodeInvalidValue, "must be text in UTF-8")
		return
	}
	if len(b) <= MaxSpecBytes {
		return
	}
	biggest, most := "", 0
	for _, part := range []struct {
		field string
		value any
	}{{"entrypoint", slim.Entrypoint}, {"command", slim.Command}, {"env", slim.Env}, {"stdin", slim.Stdin}, {"files", slim.Files}, {"secrets", slim.Secrets}, {"judge", slim.Judge}} {
		if b, _ := Encode(part.value); len(b) > most {
			biggest, most = part.field, len(b)
		}
	}
	if biggest == "judge" && s.Kind != "" {
		biggest = "payload.tests"
	}
	c.add(biggest, CodeTooLarge, "the spec takes %s as JSON and may take %s; this field is the largest", Size(len(b)), Size(MaxSpecBytes))
}

func (s *Spec) checkImage(c *checker) {
	if s.Image == "" {
		c.add("image", CodeInvalidValue, "is needed, such as \"busybox\" or \"registry.lan/web:1\"")
		return
	}
	ok := len(s.Image) <= 512
	if ok {
		_, err := reference.ParseNormalizedNamed(s.Image)
		ok = err == nil
	}
	c.value(ok, "image", "is not a valid image reference, such as \"busybox\" or \"registry.lan/web:1\"")
}

func checkArgs(c *checker, field string, args []string) {
	total := 0
	for i, a := range args {
		total += len(a) + 1
		if strings.Contains(a, "\x00") {
			c.add(fmt.Sprintf("%s.%d", field, i), CodeInvalidValue, "must not hold a NUL")
		}
	}
	c.value(len(args) <= MaxArgs && total <= MaxArgBytes, field, "must be at most %d words and %d bytes", MaxArgs, MaxArgBytes)
	if len(args) > 0 {
		c.value(args[0] != "", field+".0", "must name a program")
	}
}

func (s *Spec) checkEnv(c *checker) {
	total := 0
	for _, k := range slices.Sorted(maps.Keys(s.Env)) {
		v := s.Env[k]
		total += len(k) + len(v) + 2
		if !envName(k) {
			c.add("env", CodeInvalidValue, "names must be letters, digits and _ and not begin with a digit")
			break
		}
		if strings.ContainsAny(v, "\x00\n") {
			c.add("env."+k, CodeInvalidValue, "must not hold a NUL or a newline; use files for longer texts")
			break
		}
	}
	c.value(len(s.Env) <= MaxEnv && total <= MaxEnvBytes, "env", "must be at most %d entries and %d bytes", MaxEnv, MaxEnvBytes)
}

func envName(s string) bool {
	if len(s) == 0 || len(s) > 256 {
		return false
	}
	for i, r := range s {
		if r != '_' && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (i == 0 || r < '0' || r > '9') {
			return false
		}
	}
	return true
}

func (s *Spec) checkTerminal(c *checker) {
	c.value(s.StdinBlob == "" || !s.Interactive(), "stdin_blob", "goes with neither stdin_open nor tty: whoever attaches writes it")
	c.value(s.Stdin == "" || !s.Interactive(), "stdin", "goes with neither stdin_open nor tty: whoever attaches writes it")
	if w := s.Window; w != nil {
		c.value(s.TTY, "window", "goes with tty alone")
		c.value(w.Rows >= 1 && w.Rows <= MaxWindow && w.Cols >= 1 && w.Cols <= MaxWindow, "window", "must have 1 to %d rows and cols", MaxWindow)
	}
}

func (s *Spec) checkUser(c *checker, p Policy) {
	if s.User == "image" {
		if !p.AllowImageUser {
			c.add("user", CodeNotAllowed, "this site does not let tasks run as the image's own user")
		}
		return
	}
	uid, gid, ok := strings.Cut(s.User, ":")
	c.value(ok && validID(uid) && validID(gid), "user", `must be "UID:GID" with numbers from 1 to 65533, or "image"`)
}

func validID(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && len(s) <= 5 && n >= 1 && n <= 65533
}

func (s *Spec) checkFiles(c *checker) {
	if len(s.Files) > MaxFiles {
		c.add("files", CodeInvalidValue, "must be at most %d", MaxFiles)
		return
	}
	seen := map[string]bool{}
	blobs, _ := s.Blobs()
	c.value(len(blobs) <= MaxBlobs, "files", "must name at most %d blobs; put small files together into an archive", MaxBlobs)
	c.checkBlob(s.StdinBlob, "stdin_blob")
	c.value(s.Stdin == "" || s.StdinBlob == "", "stdin_blob", "give stdin or stdin_blob, not both")
	for i, f := range s.Files {
		at := fmt.Sprintf("files.%d", i)
		c.value(inputPath(f.Path), at+".path", "must be a plain relative path inside /task/input")
		c.value(!seen[f.Path], at+".path", "stands there twice")
		seen[f.Path] = true
		given := 0
		for _, v := range []string{f.Content, f.Base64, string(f.Blob)} {
			if v != "" {
				given++
			}
		}
		c.value(given <= 1, at, "give one of content, base64 and blob")
		c.checkBlob(f.Blob, at+".blob")
		if _, err := f.Bytes(); err != nil {
			c.add(at+".base64", CodeInvalidValue, "is not standard base64")
		}
	}
	for i, f := range s.Files {
		for dir := range parents(f.Path) {
			c.value(!seen[dir], fmt.Sprintf("files.%d.path", i), "lies below another file")
		}
	}
}

func (c *checker) checkBlob(b BlobID, field string) {
	if b == "" {
		return
	}
	id, err := ParseBlobID(string(b))
	c.value(err == nil && id == b, field, "must be %s and the 64 hexadecimal digits of its SHA-256", blobPrefix)
}

// Bytes is what the file holds, if it is not a blob.
func (f File) Bytes() ([]byte, error) {
	if f.Base64 != "" {
		return base64.StdEncoding.DecodeString(f.Base64)
	}
	return []byte(f.Content), nil
}

// clean says whether p is in its shortest form and has no control characters.
func clean(p string) bool {
	return path.Clean(p) == p && len(p) <= 4096 && !strings.ContainsFunc(p, unicode.IsControl)
}

func (s *Spec) checkResources(c *checker) {
	r := s.Resources
	c.value(!math.IsNaN(float64(r.CPUs)) && r.CPUs >= 0.01 && r.CPUs <= 1024, "resources.cpus", "must be 0.01 to 1024")
	c.value(r.Memory >= MinMemory && r.Memory <= maxBytes, "resources.memory", "must be %s to %s", Size(MinMemory), Size(maxBytes))
	c.value(r.Pids >= 1 && r.Pids <= MaxPids, "resources.pids", "must be 1 to %d", MaxPids)
	c.value(r.Disk >= 4<<10 && r.Disk <= maxBytes, "resources.disk", "must be 4KiB to %s", Size(maxBytes))
	c.value(r.GPUs >= 0 && r.GPUs <= MaxGPUs, "resources.gpus", "must be 0 to %d", MaxGPUs)
}

func (s *Spec) checkTmpfs(c *checker, p Policy) {
	if len(s.Tmpfs) > 0 && !p.AllowTmpfs {
		c.add("tmpfs", CodeNotAllowed, "this site does not let tasks have places to write of their own")
	}
	c.value(len(s.Tmpfs) <= MaxTmpfs, "tmpfs", "must be at most %d", MaxTmpfs)
	for _, k := range slices.Sorted(maps.Keys(s.Tmpfs)) {
		ok := path.IsAbs(k) && clean(k) && k != "/" && !strings.ContainsAny(k, ":,")
		for _, taken := range []string{"/task", "/.dayfly", "/proc", "/sys", "/dev"} {
			ok = ok && k != taken && !strings.HasPrefix(k, taken+"/")
		}
		if !ok {
			c.add("tmpfs", CodeInvalidValue, "paths must be absolute and outside /task, /.dayfly, /proc, /sys and /dev")
			break
		}
		c.value(s.Tmpfs[k] >= 4<<10 && s.Tmpfs[k] <= maxBytes, "tmpfs."+k, "must be 4KiB to %s", Size(maxBytes))
	}
}

// checkMounts lets the folders stand where nothing else does, and neither inside the
// other nor in a place to write.
func (s *Spec) checkMounts(c *checker, p Policy) {
	if s.Mounts == nil {
		return
	}
	if !p.AllowMounts {
		c.add("mounts", CodeNotAllowed, "this site does not let tasks have their folders elsewhere; use /task/input and /task/output")
		return
	}
	within := func(a, b string) bool { return a == b || strings.HasPrefix(a, b+"/") }
	check := func(field, at, other string) {
		ok := path.IsAbs(at) && clean(at) && at != "/" && !strings.ContainsAny(at, ":,")
		for _, taken := range []string{"/.dayfly", "/proc", "/sys", "/dev"} {
			ok = ok && !within(at, taken)
		}
		c.value(ok, field, "must be an absolute path outside /.dayfly, /proc, /sys and /dev, without : and ,")
		c.value(!within(at, other) && !within(other, at), field, "must not be the other folder, nor inside it")
		c.value(!within(at, "/tmp"), field, "must not be /tmp, nor inside it")
		for _, k := range slices.Sorted(maps.Keys(s.Tmpfs)) {
			c.value(!within(at, path.Clean(k)) && !within(path.Clean(k), at), field, "must not be a tmpfs, inside one, or hold one")
		}
	}
	if s.Mounts.Input != "" {
		check("mounts.input", s.Mounts.Input, s.OutputPath())
	}
	if s.Mounts.Output != "" {
		check("mounts.output", s.Mounts.Output, s.InputPath())
	}
}

// checkCaps lets a task name what it needs by the names of Capabilities, each once. Only
// root has use for them: nobody gains privileges by starting a program.
func (s *Spec) checkCaps(c *checker, p Policy) {
	for i, name := range s.CapAdd {
		at := fmt.Sprintf("cap_add.%d", i)
		switch {
		case !slices.Contains(Capabilities, name):
			c.add(at, CodeInvalidValue, "must be one of %s", strings.Join(Capabilities, ", "))
		case slices.Contains(s.CapAdd[:i], name):
			c.add(at, CodeInvalidValue, "stands there twice")
		case !slices.Contains(p.AllowCaps, name):
			c.add(at, CodeNotAllowed, "this site does not let tasks have this capability")
		}
	}
	c.value(len(s.CapAdd) == 0 || s.User == "image", "cap_add", `needs user "image", of an image whose user is root: nobody else has a use for capabilities`)
}

func (s *Spec) checkTimes(c *checker, p Policy) {
	c.value(s.TTL.Std() >= time.Second, "ttl", `must be at least "1s"`)
	c.value(s.TTL <= p.MaxTTL, "ttl", "must be at most %s here", p.MaxTTL)
	for _, t := range []struct {
		field string
		value Duration
		least time.Duration
	}{
		{"timeouts.queue", s.Timeouts.Queue, time.Second}, {"timeouts.pull", s.Timeouts.Pull, time.Second},
		{"timeouts.start", s.Timeouts.Start, time.Second}, {"timeouts.stop", s.Timeouts.Stop, 0},
	} {
		c.value(t.value.Std() >= t.least && t.value.Std() <= 24*time.Hour, t.field, `must be %s to "24h"`, Duration(t.least))
	}
}

// LabelName says whether k may be the name of a label or of a constraint.
func LabelName(k string) bool {
	return k != "" && len(k) <= 63 && !strings.ContainsFunc(k, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./", r))
	})
}

func (s *Spec) checkRestart(c *checker) {
	r := s.Restart
	if r == nil {
		return
	}
	c.value(slices.Contains([]RestartPolicy{"", RestartNever, RestartOnFailure, RestartAlways}, r.Policy), "restart.policy", `must be "never", "on_failure" or "always"`)
	if !s.Restarts() {
		c.value(r.Max == 0 && r.Backoff == 0, "restart.policy", `must be "on_failure" or "always" for max and backoff to mean anything`)
		return
	}
	c.value(r.Max >= 0 && r.Max <= MaxRestarts, "restart.max", "must be 0 (without limit) to %d", MaxRestarts)
	c.value(r.Backoff.Std() >= 100*time.Millisecond && r.Backoff.Std() <= MaxRestartPause, "restart.backoff", `must be "100ms" to "1m"`)
}

func (s *Spec) checkHealth(c *checker) {
	h := s.Health
	if h == nil {
		return
	}
	port := func(field string, n int) { c.value(n >= 1 && n <= 65535, field, "must be 1 to 65535") }
	given := 0
	if h.HTTP != nil {
		given++
		port("health.http.port", h.HTTP.Port)
		p := h.HTTP.Path
		c.value(strings.HasPrefix(p, "/") && len(p) <= 1024 && !strings.ContainsFunc(p, func(r rune) bool { return r <= ' ' || r >= 0x7f }),
			"health.http.path", "must be a path of printable ASCII that begins with /")
	}
	if h.TCP != nil {
		given++
		port("health.tcp.port", h.TCP.Port)
	}
	if h.Exec != nil {
		given++
		c.value(len(h.Exec) > 0, "health.exec", "must name a program")
		checkArgs(c, "health.exec", h.Exec)
	}
	c.value(given == 1, "health", "give one of http, tcp and exec")
	for _, t := range []struct {
		field string
		value Duration
		least time.Duration
		most  time.Duration
	}{
		{"health.interval", h.Interval, 100 * time.Millisecond, time.Hour}, {"health.timeout", h.Timeout, 100 * time.Millisecond, time.Hour},
		{"health.start_period", h.StartPeriod, 0, 24 * time.Hour},
	} {
		c.value(t.value.Std() >= t.least && t.value.Std() <= t.most, t.field, "must be %s to %s", Duration(t.least), Duration(t.most))
	}
	c.value(h.Retries >= 1 && h.Retries <= MaxRetries, "health.retries", "must be 1 to %d", MaxRetries)
}

func checkPairs(c *checker, field string, m map[string]string) {
	c.value(len(m) <= MaxLabels, field, "must be at most %d", MaxLabels)
	for _, k := range slices.Sorted(maps.Keys(m)) {
		v := m[k]
		if !LabelName(k) {
			c.add(field, CodeInvalidValue, "names must be 1 to 63 of letters, digits and -_./")
			return
		}
		if len(v) > 256 || strings.ContainsFunc(v, unicode.IsControl) {
			c.add(field+"."+k, CodeInvalidValue, "must be at most 256 bytes without control characters")
			return
		}
	}
}
