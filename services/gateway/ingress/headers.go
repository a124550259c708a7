package ingress

import (
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"slices"
	"strings"
)

// OwnCookies begin the names of cookies that are dayfly's. A task gets none of them.
const OwnCookies = "dayfly_"

// rewrite makes what the task gets of what a client sent. Hop-by-hop headers are gone
// already.
func (s *Server) rewrite(p *httputil.ProxyRequest) {
	target := targetOf(p.In.Context())
	p.Out.URL.Scheme, p.Out.URL.Host, p.Out.URL.User = "http", target.address(), nil
	p.Out.URL.RawQuery = p.In.URL.RawQuery // as it is: who is to understand it is the task
	p.Out.Host = p.In.Host
	h := p.Out.Header
	if !s.cfg.PassAuthorization {
		h.Del("Authorization")
	}
	s.dropCookies(h)
	trusted := s.trusts(p.In.RemoteAddr)
	for name := range h {
		if !trusted && (strings.HasPrefix(name, "X-Forwarded-") || name == "X-Real-Ip") {
			delete(h, name)
		}
	}
	if !trusted {
		p.SetXForwarded()
		return
	}
	if via := p.In.Header["X-Forwarded-For"]; len(via) > 0 {
		h["X-Forwarded-For"] = slices.Clone(via)
	}
	p.SetXForwarded()
	for _, name := range []string{"X-Forwarded-Host", "X-Forwarded-Proto"} {
		if v := p.In.Header.Get(name); v != "" {
			h.Set(name, v)
		}
	}
}

// trusts says whether a proxy of the operator's is at the address.
func (s *Server) trusts(remote string) bool {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return false
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && slices.ContainsFunc(s.cfg.TrustedProxies, func(p netip.Prefix) bool { return p.Contains(addr.Unmap()) })
}

// dropCookies takes the platform's cookies away and leaves the others as they came.
func (s *Server) dropCookies(h http.Header) {
	var kept []string
	for _, line := range h["Cookie"] {
		for pair := range strings.SplitSeq(line, ";") {
			name, _, _ := strings.Cut(pair, "=")
			if pair = strings.TrimSpace(pair); pair != "" && !s.private(strings.TrimSpace(name)) {
				kept = append(kept, pair)
			}
		}
	}
	h.Del("Cookie")
	if len(kept) > 0 {
		h.Set("Cookie", strings.Join(kept, "; "))
	}
}

func (s *Server) private(name string) bool {
	plain := strings.ToLower(name)
	plain = strings.TrimPrefix(strings.TrimPrefix(plain, "__host-"), "__secure-")
	return strings.HasPrefix(plain, OwnCookies) ||
		slices.ContainsFunc(s.cfg.PrivateCookies, func(p string) bool { return strings.EqualFold(p, name) })
}

// modifyResponse makes a task's answer one that may leave.
func modifyResponse(r *http.Response) error {
	withinHost(r.Header)
	if len(r.Trailer) > 0 { // HTTP/1.1 has no room for them behind a body of a known length
		r.Header.Del("Content-Length")
	}
	return nil
}

// withinHost takes from a task's answer what would reach beyond its own hostname.
func withinHost(h http.Header) {
	h.Del("Clear-Site-Data") // browsers clear cookies of the whole domain
	h.Del(codeHeader)
	for i, cookie := range h["Set-Cookie"] {
		h["Set-Cookie"][i] = withoutDomain(cookie)
	}
}

// withoutDomain makes a cookie one of the host that sets it.
func withoutDomain(cookie string) string {
	parts := strings.Split(cookie, ";")
	return strings.Join(append(parts[:1:1], slices.DeleteFunc(parts[1:], func(attribute string) bool {
		name, _, _ := strings.Cut(attribute, "=")
		return strings.EqualFold(strings.TrimSpace(name), "Domain")
	})...), ";")
}
