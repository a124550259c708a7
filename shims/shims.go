// Package shims has the protocols of other systems that dayfly answers, each as a shim:
// programs made for those systems go on working when they are pointed here.
package shims

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/shims/gridx"
	"dayfly.dev/shims/hub"
	"dayfly.dev/shims/judge0"
	"dayfly.dev/shims/mhs20"
	"dayfly.dev/shims/poseidon"
	"dayfly.dev/shims/rctf"
	"dayfly.dev/shims/shim"
)

// Config is what an operator says about a shim.
type Config = shim.Config

var all = map[string]func(*client.Client, Config) http.Handler{
	"gridx":    gridx.New,
	"hub":      hub.New,
	"judge0":   judge0.New,
	"mhs20":    mhs20.New,
	"poseidon": poseidon.New,
	"rctf":     rctf.New,
}

// Names lists the shims.
func Names() []string { return slices.Sorted(maps.Keys(all)) }

// Announce gives the request that announces the end of a task in the protocol of the shim
// that made it; no method if that has nothing of its own.
func Announce(t schemas.Task) (method string, body []byte, err error) {
	if t.Spec.Labels[shim.Label] != "judge0" {
		return "", nil, nil
	}
	body, err = judge0.Announce(t)
	return http.MethodPut, body, err
}

// New makes the handler of a shim on a client of dayfly's API.
func New(name string, c *client.Client, cfg Config) (http.Handler, error) {
	make, ok := all[name]
	if !ok {
		return nil, fmt.Errorf("there is no shim of that name; there are %s", strings.Join(Names(), ", "))
	}
	return make(c, cfg), nil
}
