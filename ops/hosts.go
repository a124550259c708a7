package ops

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
)

// Hosts are the names under which a port answers beside those of its own machine. Any
// site can let its name lead to an address of ours (DNS rebinding), and is then the same
// site to a browser: only the name in Host gives it away.
type Hosts map[string]struct{}

// CheckHost says what is wrong with a name of NewHosts.
func CheckHost(name string) error {
	if _, err := netip.ParseAddr(name); err == nil {
		return nil
	}
	if name == "" || name != hostname(name) || strings.ContainsAny(name, "/@*, ") {
		return errors.New("must be a name or an address in lower case without a port, such as dayfly.example.org")
	}
	return nil
}

// NewHosts takes names and addresses beside localhost.
func NewHosts(names []string) Hosts {
	h := Hosts{"localhost": {}}
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

// Ours says whether a request names one of ours. Loopback addresses are, and the one to
// which the request came. A name below localhost is not: tasks have those. Who names no
// host, as HTTP/1.0 allows, is no browser.
func (h Hosts) Ours(r *http.Request) bool {
	name := hostname(r.Host)
	if _, ok := h[name]; ok || r.Host == "" {
		return true
	}
	ip, err := netip.ParseAddr(name)
	if err != nil {
		return false
	}
	ip = plain(ip)
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	_, ok := h[ip.String()]
	return ok || ip.IsLoopback() || local != nil && ip == plain(local.AddrPort().Addr())
}
