package schemas

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// Secret is a value that the task gets like an entry of env or files, and that nobody is
// shown again: no answer, event or callback has it, and the record forgets it when the
// task is over. The task's worker gets it with the order.
type Secret struct {
	Env   string `json:"env,omitzero"`   // the name of a variable, or
	Path  string `json:"path,omitzero"`  // of a file in /task/input
	Value string `json:"value,omitzero"` // never shown

	Unknown Unknown `json:",embed"`
}

// MaxSecrets is how many a spec may have.
const MaxSecrets = 64

func (s *Spec) checkSecrets(c *checker) {
	if len(s.Secrets) > MaxSecrets {
		c.add("secrets", CodeInvalidValue, "must be at most %d", MaxSecrets)
		return
	}
	names := map[string]bool{}
	for name := range s.Env {
		names[name] = true
	}
	paths := map[string]bool{}
	for _, f := range s.Files {
		paths[f.Path] = true
	}
	for i, secret := range s.Secrets {
		at := fmt.Sprintf("secrets.%d", i)
		switch {
		case (secret.Env == "") == (secret.Path == ""):
			c.add(at, CodeInvalidValue, "give one of env and path")
		case secret.Env != "":
			c.value(envName(secret.Env), at+".env", "must be letters, digits and _ and not begin with a digit")
			c.value(!names[secret.Env], at+".env", "stands in env or secrets already")
			c.value(!strings.ContainsAny(secret.Value, "\x00\n"), at+".value", "must not hold a NUL or a newline; use path for longer texts")
			names[secret.Env] = true
		default:
			c.value(inputPath(secret.Path), at+".path", "must be a plain relative path inside /task/input")
			c.value(!paths[secret.Path], at+".path", "stands in files or secrets already")
			paths[secret.Path] = true
		}
	}
	for i, secret := range s.Secrets {
		for dir := range parents(secret.Path) {
			c.value(!paths[dir], fmt.Sprintf("secrets.%d.path", i), "lies below another file")
		}
		if secret.Path == "" {
			continue
		}
		for j, f := range s.Files {
			c.value(!strings.HasPrefix(f.Path, secret.Path+"/"), fmt.Sprintf("files.%d.path", j), "lies below another file")
		}
	}
}

// inputPath says whether p may be the path of a file in /task/input.
func inputPath(p string) bool {
	return p != "" && len(p) <= 255 && !path.IsAbs(p) && p != "." && clean(p) && !strings.HasPrefix(p, "../") && p != ".."
}

// parents gives the folders in which p lies.
func parents(p string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for dir := path.Dir(p); dir != "." && dir != "/"; dir = path.Dir(dir) {
			if !yield(dir) {
				return
			}
		}
	}
}

// hidden are the secrets as they may be shown: where they go.
func hidden(secrets []Secret) []Secret {
	if len(secrets) == 0 {
		return secrets
	}
	shown := slices.Clone(secrets)
	for i := range shown {
		shown[i].Value, shown[i].Unknown = "", nil
	}
	return shown
}

// revealed is the spec as the task's worker gets it: with the secrets where they go.
func (s Spec) revealed() Spec {
	if len(s.Secrets) == 0 {
		return s
	}
	env, files := map[string]string{}, slices.Clone(s.Files)
	maps.Copy(env, s.Env)
	for _, secret := range s.Secrets {
		if secret.Env != "" {
			env[secret.Env] = secret.Value
		} else {
			files = append(files, File{Path: secret.Path, Content: secret.Value})
		}
	}
	s.Secrets, s.Files = nil, files
	if len(env) > 0 {
		s.Env = env
	}
	return s
}
