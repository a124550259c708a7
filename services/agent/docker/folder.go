package docker

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
	"dayfly.dev/services/agent/initproto"
)

// meta is meta.json: what must be known of an attempt after the agent is gone.
type meta struct {
	Version    int                `json:"version"`
	Assignment schemas.Assignment `json:"assignment"`
	Key        string             `json:"key"` // what init repeats in its hello
	Free       bool               `json:"free,omitempty"`
	Grace      time.Duration      `json:"grace"`
	LogLimit   int64              `json:"log_limit"`
	BootID     string             `json:"boot_id"`
	Again      *initproto.Again   `json:"again,omitempty"`
	TTY        bool               `json:"tty,omitempty"`   // its process is on a terminal
	Input      bool               `json:"input,omitempty"` // clients write its stdin
}

// outcome is outcome.json.
type outcome struct {
	By      schemas.EndedBy `json:"by"`
	Reason  schemas.Reason  `json:"reason,omitempty"`
	Message string          `json:"message,omitempty"`
	Exit    *schemas.Exit   `json:"exit,omitempty"`
	Usage   schemas.Usage   `json:"usage"`
}

// makeFolder makes an attempt's folder. Only root may enter it, so the socket that
// every user of the container may dial is out of reach for users of the host.
func makeFolder(dir string, m meta, spec schemas.Spec, blobs map[schemas.BlobID]string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make state folder: %w", err)
	}
	for _, d := range []string{"c", "input"} {
		p := filepath.Join(dir, d)
		if err := os.Mkdir(p, 0o755); err != nil {
			return fmt.Errorf("make state folder: %w", err)
		}
		if err := os.Chmod(p, 0o755); err != nil { // whatever the umask is
			return fmt.Errorf("make state folder: %w", err)
		}
	}
	if err := writeFiles(filepath.Join(dir, "input"), spec.Files, blobs); err != nil {
		return fmt.Errorf("place input files: %w", err)
	}
	if spec.StdinBlob != "" {
		// Init opens it through its own mount: a descriptor that was opened out here would let a
		// task whose user is root change the mode of the file, and then write it.
		if err := placeBlob(filepath.Join(dir, "c"), initproto.StdinName, blobs[spec.StdinBlob]); err != nil {
			return fmt.Errorf("place stdin: %w", err)
		}
	}
	return writeJSON(filepath.Join(dir, "meta.json"), m)
}

// writeFiles places the spec's files. The paths come from a client: os.Root lets
// none of them out of the folder. The task may read and run them, never write.
func writeFiles(dir string, files []schemas.File, blobs map[schemas.BlobID]string) error {
	if len(files) == 0 {
		return nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, f := range files {
		b, err := f.Bytes()
		if err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
		if parent := filepath.Dir(f.Path); parent != "." {
			if err := root.MkdirAll(parent, 0o755); err != nil {
				return err
			}
			for p := parent; p != "."; p = filepath.Dir(p) {
				if err := root.Chmod(p, 0o755); err != nil {
					return err
				}
			}
		}
		if f.Blob != "" {
			if err := linkBlob(root, f.Path, blobs[f.Blob]); err != nil {
				return fmt.Errorf("%s: %w", f.Path, err)
			}
			continue
		}
		if err := root.WriteFile(f.Path, b, 0o555); err != nil {
			return err
		}
		if err := root.Chmod(f.Path, 0o555); err != nil {
			return err
		}
	}
	return nil
}

func placeBlob(dir, name, blob string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return linkBlob(root, name, blob)
}

// linkBlob places a blob of the cache: the file itself, which is mounted read-only, or a
// copy where it cannot be linked, as for its 65,000th task or across file systems.
func linkBlob(root *os.Root, name, blob string) error {
	if blob == "" {
		return errors.New("its blob is not here")
	}
	parent, err := root.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer parent.Close()
	err = unix.Linkat(unix.AT_FDCWD, blob, int(parent.Fd()), filepath.Base(name), 0)
	if !errors.Is(err, unix.EMLINK) && !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EPERM) {
		return err
	}
	from, err := os.Open(blob)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o555)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from) // shares the blocks where the file system can
	if err == nil {
		err = to.Chmod(0o555) // whatever the umask is
	}
	return errors.Join(err, to.Close())
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return os.Rename(tmp, path)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

func readOutcome(dir string) (agent.Outcome, bool) {
	var o outcome
	if err := readJSON(filepath.Join(dir, "outcome.json"), &o); err != nil || o.By == "" {
		return agent.Outcome{}, false
	}
	return agent.Outcome(o), true
}

func newKey() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// stdinFile holds the task's standard input: in memory, sealed, so that a task whose
// user is root cannot grow it into the host's memory through /proc/self/fd/0.
func stdinFile(content string) (*os.File, error) {
	if content == "" {
		return os.Open(os.DevNull)
	}
	fd, err := unix.MemfdCreate("stdin", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make stdin: %w", err)
	}
	f := os.NewFile(uintptr(fd), "stdin")
	_, err = f.WriteString(content)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("make stdin: %w", err)
	}
	return f, nil
}

// installInit copies the init binary into the state folder under its content hash,
// so that an upgrade never pulls the file from under running containers.
func installInit(from, stateDir string) (string, error) {
	b, err := os.ReadFile(from)
	if err != nil {
		return "", fmt.Errorf("read dayfly-init: %w", err)
	}
	dir := filepath.Join(stateDir, "init")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	to := filepath.Join(dir, hex.EncodeToString(sum[:8]))
	if old, err := os.ReadFile(to); err == nil && sha256.Sum256(old) == sum {
		return to, nil
	}
	if err := os.WriteFile(to+".new", b, 0o755); err != nil {
		return "", fmt.Errorf("install dayfly-init: %w", err)
	}
	if err := os.Chmod(to+".new", 0o755); err != nil {
		return "", err
	}
	return to, os.Rename(to+".new", to)
}

// lockFolder takes the lock of the state folder, or says that another agent has it.
// The kernel lets it go when the process ends.
func lockFolder(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", dir, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// bootID names this boot of the machine: boot times of another one mean nothing.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// forgetOldBoot takes the permit of an earlier boot away.
func forgetOldBoot(stateDir, boot string) error {
	path := filepath.Join(stateDir, "boot_id")
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if string(old) == boot {
		return nil
	}
	if err := initproto.WriteInstant(filepath.Join(stateDir, "permit", initproto.PermitName), 0); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(boot), 0o600)
}
