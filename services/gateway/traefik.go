package gateway

import (
	"fmt"
	"net/http"

	"dayfly.dev/schemas"
)

// TraefikConfig is what Traefik's HTTP provider reads: its dynamic configuration.
type TraefikConfig struct {
	HTTP TraefikHTTP `json:"http,omitzero"`
}

// TraefikHTTP is the part of it for HTTP. Traefik refuses a map that is there and empty, and
// keeps what it knew before.
type TraefikHTTP struct {
	Routers  map[string]TraefikRouter  `json:"routers,omitzero"`
	Services map[string]TraefikService `json:"services,omitzero"`
}

// TraefikRouter sends requests for one hostname to a service.
type TraefikRouter struct {
	Rule    string `json:"rule"`
	Service string `json:"service"`
}

// TraefikService is where they go: to the ingresses of this site.
type TraefikService struct {
	LoadBalancer TraefikLoadBalancer `json:"loadBalancer"`
}

// TraefikLoadBalancer passes the hostname on, by which an ingress knows the task.
type TraefikLoadBalancer struct {
	Servers        []TraefikServer `json:"servers"`
	PassHostHeader bool            `json:"passHostHeader"`
}

// TraefikServer is one ingress.
type TraefikServer struct {
	URL string `json:"url"`
}

// traefikService is the name of the one service.
const traefikService = "dayfly"

// traefik is GET /v1/ingress/traefik: a router for each hostname of a task that runs or
// will. The service is there without any too, or Traefik would not let the last one go.
func (g *Gateway) traefik(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	c := TraefikConfig{HTTP: TraefikHTTP{Routers: map[string]TraefikRouter{}}}
	g.tasks.Range(func(key string, it *item, _ uint64) bool {
		if it.ports == "" || it.state.Final() {
			return true
		}
		id := schemas.TaskID(key)
		for _, p := range schemas.ParsePortsHeader(it.ports) {
			if p.Protocol == schemas.ProtocolTCP {
				continue
			}
			label := g.endpoints.label(id, it.instance, p.Name)
			c.HTTP.Routers[key+"-"+p.Name] = TraefikRouter{Rule: fmt.Sprintf("Host(`%s.%s`)", label, g.cfg.Endpoints.Domain), Service: traefikService}
		}
		return true
	})
	if len(c.HTTP.Routers) == 0 {
		c.HTTP.Routers = nil
	}
	var servers []TraefikServer
	for _, url := range g.cfg.IngressBackends {
		servers = append(servers, TraefikServer{URL: url})
	}
	if len(servers) == 0 { // no ingress
		return answer(w, http.StatusOK, TraefikConfig{})
	}
	c.HTTP.Services = map[string]TraefikService{traefikService: {TraefikLoadBalancer{Servers: servers, PassHostHeader: true}}}
	return answer(w, http.StatusOK, c)
}
