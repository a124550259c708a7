package rctf

import (
	"slices"
	"testing"
)

func TestSplit(t *testing.T) {
	for line, want := range map[string][]string{
		"":                             nil,
		"  python3   app.py ":          {"python3", "app.py"},
		`sh -c 'echo "$HOME" \n'`:      {"sh", "-c", `echo "$HOME" \n`},
		`echo "a \"b\" \n \\" c\ d`:    {"echo", `a "b" \n \`, "c d"},
		`printf '' ""`:                 {"printf", "", ""},
		`a'b c'd`:                      {"ab cd"},
		"/bin/ü --weiß":                {"/bin/ü", "--weiß"},
		"one\ttwo\nthree":              {"one", "two", "three"},
		`socat TCP-LISTEN:1337,fork -`: {"socat", "TCP-LISTEN:1337,fork", "-"},
	} {
		if have, err := split(line); err != nil || !slices.Equal(have, want) {
			t.Errorf("%s: %q (%v), not %q", line, have, err, want)
		}
	}
	for _, line := range []string{`'`, `a "b`, `a \`} {
		if have, err := split(line); err == nil {
			t.Errorf("%s: %q", line, have)
		}
	}
}
