package harness

import "testing"

func TestReplaceWantsTheTextOnce(t *testing.T) {
	o := Overlay{"a.go": "one two two"}
	for _, old := range []string{"three", "two"} {
		if o.Replace("a.go", old, "x") == nil {
			t.Errorf("%q was replaced", old)
		}
	}
	if err := o.Replace("a.go", "one", "1"); err != nil || o["a.go"] != "1 two two" {
		t.Error(err, o)
	}
}
