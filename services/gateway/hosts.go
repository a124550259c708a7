package gateway

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"dayfly.dev/schemas"
)

// hosts are the names under which a gateway answers beside those of its own machine. Any
// site can let its name lead to an address of ours (DNS rebinding), and is then the same
// site to a browser: only the name in Host gives it away.
type hosts map[string]struct{}

// CheckHost says what is wrong with a name of Config.Hosts.
func CheckHost(name string) error {
	if _, err := netip.ParseAddr(name); err == nil {
		return nil
	}
	if name == "" || name != hostname(name) || strings.ContainsAny(name, "/@*, ") {
		return errors.New("must be a name or an address in lower case without a port, such as dayfly.example.org")
	}
	return nil
}

func newHosts(names []string) hosts {
	h := hosts{"localhost": {}}
	for _, name := range names {
		if ip, err := netip.ParseAddr(name); err == nil {
			name = plain(ip).String()
		}
		h[name] = struct{}{}
	}
	return h
}

// plain gives an address in its one form.
func plain(ip netip.Addr) netip.Addr { return ip.Unmap().WithZone("") }

// hostname is the name in a Host, as it is compared.
func hostname(host string) string {
	return strings.TrimSuffix(strings.ToLower((&url.URL{Host: host}).Hostname()), ".")
}

// check refuses a request to a name that is none of ours. Loopback addresses are, and the
// one to which the request came. A name below localhost is not: tasks have those. Who
// names no host, as HTTP/1.0 allows, is no browser.
func (h hosts) check(r *http.Request) error {
	name := hostname(r.Host)
	if _, ok := h[name]; ok || r.Host == "" {
		return nil
	}
	if ip, err := netip.ParseAddr(name); err == nil {
		ip = plain(ip)
		local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if ip.IsLoopback() || local != nil && ip == plain(local.AddrPort().Addr()) {
			return nil
		}
		if _, ok := h[ip.String()]; ok {
			return nil
		}
	}
	return &schemas.Error{Status: http.StatusMisdirectedRequest, Code: schemas.CodeUnknownHost,
		Detail: "this gateway does not answer under that name; dayfly gateway and dayfly up take more names with --host"}
}
