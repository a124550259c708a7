package docker

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"dayfly.dev/services/agent"
)

// What a submission leaves where it was compiled is its own fault, whatever it is.
func TestWhatACompilerLeaves(t *testing.T) {
	for name, c := range map[string]struct {
		path, want string
	}{
		"a program":              {"a/b/main", ""},
		"a name that is none":    {"a/\xff\xfe/main", "no UTF-8"},
		"a file that is none":    {"\xff", "no UTF-8"},
		"many levels":            {strings.Repeat("d/", 300) + "main", ""},
		"more than it may":       {"large", "more than its output folder"},
		"more files than it may": {"many", "more than 4096 files"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for i := range 5 {
				if name == "more files than it may" {
					if err := os.WriteFile(filepath.Join(dir, c.path+strings.Repeat("x", i)), nil, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			body := []byte("x")
			if name == "more than it may" {
				body = make([]byte, 1001)
			}
			if err := errors.Join(os.MkdirAll(filepath.Join(dir, filepath.Dir(c.path)), 0o700), os.WriteFile(filepath.Join(dir, c.path), body, 0o700)); err != nil {
				t.Fatal(err)
			}
			from, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer from.Close()
			to, err := os.OpenRoot(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer to.Close()
			copied := buildCopy{from: from, to: to, bytes: 1000, files: 400}
			if name == "more files than it may" {
				copied.files = 3
			}
			err = fs.WalkDir(from.FS(), ".", copied.one)
			var fault *agent.BuildError
			switch {
			case c.want == "" && err != nil, c.want != "" && (!errors.As(err, &fault) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %v, want %s", err, c.want)
			case c.want == "":
				if st, err := to.Stat(c.path); err != nil || st.Mode().Perm() != 0o555 {
					t.Errorf("%v, %v", st, err)
				}
			}
		})
	}
}
