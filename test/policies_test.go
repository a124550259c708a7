package test

import (
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// Each example policy starts a dayfly, with the example kinds, that takes and refuses what
// it says.
func TestPolicies(t *testing.T) {
	const image, user, entrypoint, tmpfs = `"image":"any","command":["exit","0"]`, `,"user":"image"`, `,"entrypoint":["exit"]`, `,"tmpfs":{"/run":"1MiB"}`
	ttl := func(s string) string { return `,"ttl":"` + s + `"` }
	// What is refused, by the field that the answer names; "" is taken.
	policies := map[string]map[string]string{
		"ctf":    {ttl("6h"): "", ttl("6h1s"): "ttl", user: "", entrypoint: "", tmpfs: ""},
		"school": {ttl("2h"): "", ttl("3h"): "ttl", user: "user", entrypoint: "entrypoint", tmpfs: ""},
		"judge":  {ttl("15m"): "", ttl("16m"): "ttl", "": "ttl", user + ttl("1m"): "user", entrypoint + ttl("1m"): "entrypoint", tmpfs + ttl("1m"): ""},
	}
	files, err := filepath.Glob("../deploy/policies/*.env")
	if err != nil || len(files) != len(policies) {
		t.Fatalf("%d files, %d cases: %v", len(files), len(policies), err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".env")
		t.Run(name, func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			up := newUp(t, "--runtime", "fake", "--kinds", "../deploy/kinds")
			help, err := exec.CommandContext(t.Context(), up.Bin, "up", "--help").Output()
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(string(b)) {
				line = strings.TrimSpace(line)
				if set := strings.TrimPrefix(line, "# "); strings.HasPrefix(set, "DAYFLY_") {
					if name, _, ok := strings.Cut(set, "="); !ok || !strings.Contains(string(help), "[$"+name+"]") {
						t.Errorf("%s sets nothing", name)
					}
				}
				if line != "" && line[0] != '#' {
					up.Env = append(up.Env, line)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := up.Start(ctx); err != nil {
				t.Fatal(err)
			}
			for _, spec := range slices.Sorted(maps.Keys(policies[name])) {
				want := policies[name][spec]
				var made schemas.Task
				err := up.Call(ctx, "POST", "/v1/tasks?wait=done", "{"+image+spec+"}", &made)
				var refused *schemas.Error
				switch {
				case want == "" && (err != nil || made.State != schemas.Completed):
					t.Errorf("%s: %s %v", spec, made.State, err)
				case want != "" && (!errors.As(err, &refused) || refused.Status != 422 || refused.Field != want):
					t.Errorf("%s: %v, want %s refused", spec, err, want)
				}
			}
		})
	}
}
