package judge0

import (
	"archive/zip"
	"bytes"
	"encoding/base64"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"dayfly.dev/schemas"
)

// archive makes a zip archive of names with their contents, in base64.
func archive(t *testing.T, mode fs.FileMode, files ...string) string {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		h := &zip.FileHeader{Name: files[i], Method: zip.Deflate}
		h.SetMode(mode)
		f, err := w.CreateHeader(h)
		if err == nil {
			_, err = f.Write([]byte(files[i+1]))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(b.Bytes())
}

func TestUnzip(t *testing.T) {
	lines := archive(t, 0o644, "a.h", "1", "lib/b.h", "2\xfe")
	files, err := unzip(lines[:60] + "\r\n" + strings.TrimRight(lines[60:], "="))
	if err != nil || len(files) != 2 || files[0].Path != "a.h" || files[0].Content != "1" || files[1].Path != "lib/b.h" || files[1].Content != "2\xfe" {
		t.Errorf("%+v (%v)", files, err)
	}
	if files, err := unzip(""); err != nil || files != nil {
		t.Errorf("%+v (%v) of nothing", files, err)
	}
	many := []string{}
	for i := range schemas.MaxFiles + 1 {
		many = append(many, fmt.Sprint(i), "")
	}
	half := strings.Repeat("\x00", maxExtract/2)
	for name, c := range map[string]struct{ archive, want string }{
		"no base64":        {"@", "in base64"},
		"no archive":       {"bm90IGEgemlw", "zip"},
		"above its root":   {archive(t, 0o644, "../x", "1"), "root"},
		"above it, inside": {archive(t, 0o644, "a/../../x", "1"), "root"},
		"absolute":         {archive(t, 0o644, "/etc/passwd", "1"), "root"},
		"of Windows":       {archive(t, 0o644, `..\x`, "1"), "root"},
		"a link":           {archive(t, fs.ModeSymlink|0o777, "x", "/etc/passwd"), "root"},
		"too many":         {archive(t, 0o644, many...), "at most 256"},
		"a bomb":           {archive(t, 0o644, "1", half, "2", half, "3", "x"), "at most 10MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			if files, err := unzip(c.archive); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%d files, %v, not %s", len(files), err, c.want)
			}
		})
	}
}
