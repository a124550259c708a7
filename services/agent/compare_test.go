package agent

import (
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"dayfly.dev/schemas"
)

func TestCompare(t *testing.T) {
	long := strings.Repeat(" \t", 2*blanksKept)
	for _, c := range []struct {
		how              schemas.Compare
		expected, output string
		right            bool
	}{
		{"", "1 2\n", "1  2", true},
		{"tokens", "1 2\n", "\n1\n2\n\n", true},
		{"tokens", "1 2", "12", false},
		{"tokens", "12", "1 2", false},
		{"tokens", "1 2", "1 2 3", false},
		{"tokens", "1 2 3", "1 2", false},
		{"tokens", "", " \n\t", true},
		{"tokens", "", "x", false},
		{"tokens", "é à", "é\u00a0à", false},
		{"lines", "a b\nc\n", "a b  \nc", true},
		{"lines", "a b\nc\n", "a b\r\nc\r\n\n\n", true},
		{"lines", "a b\nc\n", "a  b\nc\n", false},
		{"lines", "a\n\nb", "a\nb", false},
		{"lines", "a\n\nb", "a\n \nb\n", true},
		{"lines", " a", "a", false},
		{"lines", "a", " a", false},
		{"lines", "\na", "\na", true},
		{"lines", "a", "a" + strings.Repeat(" ", 1000), true},
		{"lines", "a b", "a" + strings.Repeat(" ", 1000) + "b", false},
		{"lines", "a" + long + "b", "a" + long + "b \t", true},
		{"lines", "a" + long + "b", "a" + long + " b", false},
		{"lines", "a" + long + "\tb", "a\t" + long + "b", false},
		{"lines", "a" + long + "\nb", "a\nb" + long, true},
		{"lines", "", "\n\n", true},
		{"exact", "a\n", "a\n", true},
		{"exact", "a\n", "a", false},
		{"exact", "a", "a\n", false},
		{"exact", "", "", true},
	} {
		for name, r := range map[string]io.Reader{"whole": strings.NewReader(c.output), "by bytes": iotest.OneByteReader(strings.NewReader(c.output))} {
			cmp := newComparison(c.how)
			if _, err := io.Copy(cmp, r); err != nil {
				t.Fatal(err)
			}
			if right, err := cmp.right(t.Context(), strings.NewReader(c.expected)); right != c.right || err != nil {
				t.Errorf("%s, %s: %q for %q is %v, %v", c.how, name, c.output, c.expected, right, err)
			}
		}
	}
}
