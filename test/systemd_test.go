package test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	unitVariable = regexp.MustCompile(`\bDAYFLY_[A-Z_]+`)
	unitCommand  = regexp.MustCompile(`(?m)^ExecStart=/usr/local/bin/dayfly (\S+)(.*)$`)
	unitFlag     = regexp.MustCompile(`--[a-z-]+`)
)

// systemd understands the units, and what they start understands its flags and
// variables.
func TestSystemdUnits(t *testing.T) {
	bin, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	bin = filepath.Join(bin, "dayfly")
	files, err := filepath.Glob("../deploy/systemd/*")
	if err != nil || len(files) == 0 {
		t.Fatal("no units", err)
	}
	dir := t.TempDir()
	var units []string
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		parts := []string{""}
		if before, _, template := strings.Cut(filepath.Base(file), "@."); template {
			parts = []string{"nats", "gateway", "placer", "reaper"}
			file = before + "@%i" + filepath.Ext(file)
		}
		known := map[string]bool{} // variables, to one of the parts at least
		for _, part := range parts {
			text := strings.ReplaceAll(string(b), "%i", part)
			if m := unitCommand.FindStringSubmatch(text); m != nil {
				help, err := exec.CommandContext(t.Context(), bin, m[1], "--help").Output()
				if err != nil {
					t.Fatalf("%s: dayfly %s: %v", file, m[1], err)
				}
				for _, flag := range unitFlag.FindAllString(m[2], -1) {
					if !strings.Contains(string(help), flag+" ") {
						t.Errorf("%s: dayfly %s has no flag %s", file, m[1], flag)
					}
				}
				for line := range strings.Lines(text) {
					if !strings.HasPrefix(line, "Environment=") {
						continue
					}
					for _, name := range unitVariable.FindAllString(line, -1) {
						known[name] = known[name] || strings.Contains(string(help), "[$"+name+"]")
					}
				}
			}
			unit := filepath.Join(dir, strings.ReplaceAll(filepath.Base(file), "%i", part))
			if err := os.WriteFile(unit, []byte(strings.ReplaceAll(string(b), "/usr/local/bin/dayfly", bin)), 0o600); err != nil {
				t.Fatal(err)
			}
			units = append(units, unit)
		}
		for name, ok := range known {
			if !ok {
				t.Errorf("%s: nothing that it starts knows %s", file, name)
			}
		}
	}
	cmd := exec.CommandContext(t.Context(), "systemd-analyze", append([]string{"verify", "--man=no"}, units...)...)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v (make setup installs it)\n%s", err, out)
	}
}
