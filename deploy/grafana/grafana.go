// Package grafana makes dayfly's dashboards: dashboards.go says what they show,
// grafana.go how Grafana wants it written, and `go generate` writes the files in
// dashboards/, which an operator imports or provisions. Each panel has a unit, says
// what it shows, and leads to the runbook where that has an answer.
package grafana

import (
	"encoding/json"
	"fmt"
)

//go:generate go run ./generate

// Dashboard is one page.
type Dashboard struct {
	UID, Title string
	Workers    bool // it has a variable for the workers shown
	Rows       []Row
}

// Row is panels side by side under a heading.
type Row struct {
	Title  string
	Panels []Panel
}

// Panel shows the results of queries.
type Panel struct {
	Title, About string
	Unit         string // as Grafana names it
	Stat         bool   // one number instead of a graph
	Stack        bool
	Alert        string // the entry of the runbook
	Queries      []Query
}

// Query is one expression of Prometheus and what its series are called.
type Query struct{ Expr, Legend string }

// Variables that stand in queries.
const (
	RateInterval   = "$__rate_interval"
	WorkerVariable = "$worker"
)

type object = map[string]any

// JSON is the dashboard as Grafana imports it.
func (d Dashboard) JSON() ([]byte, error) {
	datasource := object{"type": "prometheus", "uid": "${datasource}"}
	var panels []object
	id, y := 0, 0
	add := func(p object, x, width, height int) {
		id++
		p["id"], p["gridPos"] = id, object{"x": x, "y": y, "w": width, "h": height}
		panels = append(panels, p)
	}
	for _, r := range d.Rows {
		add(object{"type": "row", "title": r.Title, "collapsed": false, "panels": []object{}}, 0, 24, 1)
		y++
		height, width := 8, 24/len(r.Panels)
		if r.Panels[0].Stat {
			height = 4
		}
		for i, p := range r.Panels {
			add(p.object(datasource), i*width, width, height)
		}
		y += height
	}
	variables := []object{{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}}
	if d.Workers {
		query := "label_values(dayfly_worker_allocated_slots, worker)"
		variables = append(variables, object{"name": "worker", "label": "Worker", "type": "query", "datasource": datasource, "definition": query,
			"query": object{"query": query, "refId": "worker"}, "refresh": 2, "sort": 1, "multi": true, "includeAll": true, "allValue": ".+"})
	}
	b, err := json.MarshalIndent(object{
		"uid": d.UID, "title": d.Title, "tags": []string{"dayfly"}, "schemaVersion": 39, "editable": true,
		"time": object{"from": "now-1h", "to": "now"}, "refresh": "30s", "timezone": "browser",
		"templating": object{"list": variables}, "panels": panels,
		"links": []object{{"type": "dashboards", "title": "dayfly", "tags": []string{"dayfly"}, "asDropdown": true, "includeVars": true, "keepTime": true}},
	}, "", " ")
	return append(b, '\n'), err
}

func (p Panel) object(datasource object) object {
	var targets []object
	for i, q := range p.Queries {
		targets = append(targets, object{"refId": string(rune('A' + i)), "datasource": datasource, "expr": q.Expr, "legendFormat": q.Legend, "instant": p.Stat, "range": !p.Stat})
	}
	about := p.About
	if p.Alert != "" {
		about += fmt.Sprintf("\n\nRunbook: docs/runbook.md, %s", p.Alert)
	}
	defaults := object{"unit": p.Unit}
	o := object{"type": "timeseries", "title": p.Title, "description": about, "datasource": datasource, "targets": targets}
	if p.Stat {
		o["type"] = "stat"
		o["options"] = object{"reduceOptions": object{"calcs": []string{"lastNotNull"}}, "graphMode": "none"}
	} else {
		custom := object{"fillOpacity": 10, "showPoints": "never"}
		if p.Stack {
			custom["stacking"], custom["fillOpacity"] = object{"mode": "normal"}, 40
		}
		defaults["custom"], defaults["min"] = custom, 0
		o["options"] = object{"legend": object{"displayMode": "list", "placement": "bottom"}, "tooltip": object{"mode": "multi"}}
	}
	o["fieldConfig"] = object{"defaults": defaults, "overrides": []object{}}
	return o
}
