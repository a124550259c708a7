package schemas_test

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"dayfly.dev/schemas"
)

func TestPortsGetWhatIsLeftOut(t *testing.T) {
	s, err := schemas.ParseSpec([]byte(`{"image":"a","ports":[{"port":80},{"name":"db","port":6379,"protocol":"tcp"}]}`), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	want := []schemas.Port{{Name: "80", Port: 80, Protocol: schemas.ProtocolHTTP}, {Name: "db", Port: 6379, Protocol: schemas.ProtocolTCP}}
	if !reflect.DeepEqual(s.Ports, want) {
		t.Errorf("%+v", s.Ports)
	}
	if s.OnLost != schemas.OnLostWait {
		t.Errorf("on_lost %s", s.OnLost)
	}
	r := schemas.NewRecord(taskID, s, schemas.DefaultPolicy(), meta(t0))
	r.Public = map[string]int{"db": 20001}
	got := schemas.ParsePortsHeader(r.Headers()[schemas.HeaderPorts][0])
	if !reflect.DeepEqual(got, []schemas.OpenPort{{Name: "80", Port: 80, Protocol: schemas.ProtocolHTTP}, {Name: "db", Port: 6379, Protocol: schemas.ProtocolTCP, Public: 20001}}) {
		t.Errorf("%+v", got)
	}
	if got := schemas.ParsePortsHeader("  x y:z:tcp a:1:http:b later:3:quic:0:more"); len(got) != 1 || got[0].Name != "later" {
		t.Errorf("%v", got)
	}
	r.Spec.Ports = nil
	if _, ok := r.Headers()[schemas.HeaderPorts]; ok {
		t.Error("a header of no ports")
	}
}

func TestLabelsAreStableAndApart(t *testing.T) {
	k := schemas.HostnameKey{Secret: []byte(strings.Repeat("k", 32))}
	if got := k.Label(taskID, "web"); got != k.Label(taskID, "web") || len(got) != schemas.LabelBytes || strings.Trim(got, "abcdefghijklmnopqrstuvwxyz234567") != "" {
		t.Errorf("%q", got)
	}
	seen := map[string]bool{}
	for _, l := range []string{k.Label(taskID, "web"), k.Label(taskID, "we"), k.Label(taskID+"w", "eb"),
		schemas.HostnameKey{Secret: []byte(strings.Repeat("l", 32))}.Label(taskID, "web")} {
		if seen[l] {
			t.Errorf("%q twice", l)
		}
		seen[l] = true
	}
}

func TestDigestsAreOfTheKey(t *testing.T) {
	k, other := schemas.HostnameKey{Secret: []byte(strings.Repeat("k", 32))}, schemas.HostnameKey{Secret: []byte(strings.Repeat("l", 32))}
	if again := (schemas.HostnameKey{Secret: slices.Clone(k.Secret)}); again.Digest("a", "b") != k.Digest("a", "b") {
		t.Error("it is not the same twice")
	}
	seen := map[string]bool{}
	for _, d := range []string{k.Digest("a", "b"), other.Digest("a", "b"), k.Digest("ab"), k.Digest("a", "b", ""), k.Digest("a\x001:b")} {
		if seen[d] || len(d) != 64 {
			t.Errorf("%q", d)
		}
		seen[d] = true
	}
}
