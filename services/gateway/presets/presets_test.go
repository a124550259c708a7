package presets_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/presets"
)

type thing struct {
	Image string            `json:"image"`
	Size  schemas.Size      `json:"size,omitzero"`
	Env   map[string]string `json:"env,omitzero"`
	Ports []struct {
		Port int `json:"port"`
	} `json:"ports,omitzero"`
}

func parse(_ string, d presets.Document) (v thing, _ []presets.Fault) {
	err := schemas.DecodeStrict(d.JSON, &v)
	if err == nil && v.Image == "" {
		return v, []presets.Fault{d.At("image", "is needed")}
	}
	return v, d.Faults(err)
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFaultsNameTheirPlaceAndNoValue(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"an unknown field":           {"image: a\ncolour: hunter2\n", "x.yaml:2:1: colour: there is no such field in this version"},
		"a wrong type":               {"image: a\nports:\n  - port: hunter2\n", "x.yaml:3:11: ports.0.port: must be a whole number"},
		"a number for a string":      {"image: a\nenv:\n  N: 7\n", "x.yaml:3:6: env.N: must be a string; put numbers, dates, true and false in quotes"},
		"a size":                     {"image: a\nsize: hunter2\n", "x.yaml:2:7: size: "},
		"a field twice":              {"image: a\nimage: hunter2\n", "x.yaml:2:1: image: the field stands there twice"},
		"a field that is needed":     {"size: 1MiB\n", "x.yaml:1:1: image: is needed"},
		"no value":                   {"image: a\nsize:\n", "x.yaml:2:6: size: has no value; give one, or leave the field out"},
		"an anchor":                  {"image: &a hunter2\n", "x.yaml:1:8: image: anchors and aliases are not taken; write the value out"},
		"an alias":                   {"image: &a x\nsize: *a\n", "x.yaml:1:8: image: anchors"},
		"a merge key":                {"image: a\n<<: {size: 1}\n", "x.yaml:2:1: names of fields must be plain words"},
		"a tag":                      {"image: !secret hunter2\n", "x.yaml:1:8: image: tags are not taken"},
		"two documents":              {"image: a\n---\nimage: b\n", "must be one document"},
		"bad YAML":                   {"image: a\n  b: [hunter2\n", "x.yaml:2:1: not valid YAML"},
		"an undefined alias":         {"image: *hunter2\n", "x.yaml:1:1: not valid YAML: unknown anchor"},
		"a list":                     {"- a\n", "x.yaml:1:1: must be fields with values"},
		"a text":                     {"hunter2", "x.yaml:1:1: must be fields with values"},
		"nothing":                    {"", "x.yaml:1:1: the file is empty"},
		"only a comment":             {"# hunter2\n", "x.yaml:1:1: the file is empty"},
		"a number beyond all bounds": {"image: a\nports: [{port: 99999999999999999999999}]\n", "x.yaml:2:16: ports.0.port: "},
		"no number":                  {"image: a\nports: [{port: .nan}]\n", "x.yaml:2:16: ports.0.port: must be a plain number"},
		"depth":                      {"image: " + strings.Repeat("[", 40) + strings.Repeat("]", 40), "nested deeper than 32 levels"},
		"a NUL":                      {"image: a\x00hunter2\n", "not valid YAML"},
		"no UTF-8":                   {"image: \xff\xfehunter2\n", "not valid YAML"},
		"a bomb of aliases":          {"a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b]\n", "anchors"},
		"too long":                   {"image: a\n#" + strings.Repeat("x", presets.MaxFileBytes), "x.yaml: the file must be at most 64KiB"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "x.yaml", c.text)
			f, err := presets.Open(dir, parse)
			if err != nil {
				t.Fatal(err)
			}
			s := f.Set()
			if len(s.Presets) != 0 || len(s.Faults) == 0 {
				t.Fatalf("%+v", s)
			}
			if got := s.Faults[0].String(); !strings.Contains(got, c.want) {
				t.Errorf("%s\nwant %s", got, c.want)
			}
			for _, fault := range s.Faults {
				if strings.Contains(fault.String(), "hunter2") {
					t.Errorf("it repeats a value: %s", fault)
				}
			}
		})
	}
}

func TestAWrongFileKeepsWhatItSaidBefore(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "web.yaml", "image: one\n")
	write(t, dir, "db.yml", "image: two\n")
	write(t, dir, ".hidden.yaml", "nonsense")
	write(t, dir, "README.md", "nonsense")
	f, err := presets.Open(dir, parse)
	if err != nil {
		t.Fatal(err)
	}
	want := func(name, image string, faults int) {
		t.Helper()
		p, ok := f.Set().Get(name)
		if ok != (image != "") || p.Value.Image != image || len(f.Set().Faults) != faults {
			t.Fatalf("%s is %+v, faults %v", name, p, f.Set().Faults)
		}
	}
	want("web", "one", 0)
	want("db", "two", 0)
	if f.Reload() {
		t.Error("nothing had changed")
	}
	first := f.Set().Digest
	write(t, dir, "web.yaml", "image: one\nnonsense: x\n")
	if !f.Reload() || f.Reload() {
		t.Error("a new fault is a change, once")
	}
	want("web", "one", 1)
	if f.Set().Digest != first {
		t.Error("what holds is the same")
	}
	write(t, dir, "web.yaml", "image: three\n")
	f.Reload()
	want("web", "three", 0)
	if f.Set().Digest == first {
		t.Error("what holds is another")
	}
	write(t, dir, "web.yml", "image: four\n")
	f.Reload()
	want("web", "three", 1)
	if err := os.Remove(filepath.Join(dir, "web.yaml")); err != nil {
		t.Fatal(err)
	}
	f.Reload()
	want("web", "four", 0)
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	f.Reload()
	want("web", "four", 1)
	want("db", "two", 1)
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	f.Reload()
	want("db", "two", 0)
	write(t, dir, "No_Name.yaml", "image: x\n")
	f.Reload()
	want("No_Name", "", 1)
	if _, err := presets.Open(filepath.Join(dir, "none"), parse); err == nil {
		t.Error("there is no such folder")
	}
}

func TestWhatIsNoFileIsNotRead(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink("/dev/zero", filepath.Join(dir, "zero.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "loop.yaml"), filepath.Join(dir, "loop.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "folder.yaml"), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := presets.Open(dir, parse)
	if err != nil {
		t.Fatal(err)
	}
	if s := f.Set(); len(s.Presets) != 0 || len(s.Faults) != 2 {
		t.Errorf("%+v", s)
	}
}

func TestFollowHearsOfChanges(t *testing.T) {
	dir := t.TempDir()
	f, err := presets.Open(dir, parse)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	sets, done := make(chan *presets.Set[thing], 1), make(chan struct{})
	go func() {
		defer close(done)
		f.Follow(ctx, time.Hour, func(s *presets.Set[thing]) { sets <- s })
	}()
	write(t, dir, "web.yaml", "image: one\n")
	f.Poke()
	if s := <-sets; len(s.Presets) != 1 {
		t.Errorf("%+v", s)
	}
	cancel()
	<-done
}
