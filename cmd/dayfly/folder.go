package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"dayfly.dev/schemas"
)

// takeFolder makes a folder ours alone. The lock goes with the process, however that
// ends.
func takeFolder(dir string) (unlock func(), err error) {
	hint := "--data with a folder that this user may write to"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, &hintError{fmt.Errorf("make the data folder: %w", err), hint}
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, &hintError{fmt.Errorf("open the data folder: %w", err), hint}
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer lock.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock the data folder: %w", err)
		}
		owner := make([]byte, 32)
		n, _ := lock.Read(owner)
		return nil, &hintError{fmt.Errorf("another dayfly (process %s) uses %s", orElse(strings.TrimSpace(string(owner[:n])), "unknown"), dir),
			"end it first, or another --data"}
	}
	err = lock.Truncate(0)
	if err == nil {
		_, err = lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("lock the data folder: %w", err)
	}
	return func() { lock.Close() }, nil // the lock goes with it
}

// clusterName gives the name that tells this dayfly's containers from those of
// others on the same Docker; it is made up once for a data folder.
func clusterName(dir string) (string, error) {
	path := filepath.Join(dir, "cluster")
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		b = []byte("dayfly-" + strings.ToLower(rand.Text()[:10]) + "\n")
		err = writeFile(path, b, 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("name of the cluster: %w", err)
	}
	name := strings.TrimSpace(string(b))
	if _, err := schemas.ParseWorkerID(name); err != nil {
		return "", fmt.Errorf("%s does not hold a cluster's name (1 to 63 of a-z, 0-9, -)", path)
	}
	return name, nil
}

// writeFile replaces a file as a whole.
func writeFile(name string, b []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}
