package grafana_test

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"dayfly.dev/deploy/grafana"
)

func TestTheFilesAreUpToDate(t *testing.T) {
	files, err := filepath.Glob("dashboards/*.json")
	if err != nil || len(files) != len(grafana.All()) {
		t.Errorf("%d files for %d dashboards (%v)", len(files), len(grafana.All()), err)
	}
	for _, d := range grafana.All() {
		want, err := d.JSON()
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join("dashboards", d.UID+".json"))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what dashboards.go says: go generate ./deploy/grafana (%v)", d.UID, err)
		}
	}
}

func TestPanelsAreComplete(t *testing.T) {
	book, err := os.ReadFile("../../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	window := regexp.MustCompile(`\[[^\]]*\]`)
	for _, d := range grafana.All() {
		for _, r := range d.Rows {
			for _, p := range r.Panels {
				if p.Title == "" || p.About == "" || p.Unit == "" || len(p.Queries) == 0 {
					t.Errorf("%s, %s: lacks a title, what it is about, a unit or a query", d.Title, p.Title)
				}
				if p.Alert != "" && !bytes.Contains(book, []byte("### "+p.Alert+"\n")) {
					t.Errorf("%s, %s: the runbook has no entry %s", d.Title, p.Title, p.Alert)
				}
				for _, q := range p.Queries {
					for _, w := range window.FindAllString(q.Expr, -1) {
						if w != "["+grafana.RateInterval+"]" {
							t.Errorf("%s, %s: %s looks over %s and not over %s", d.Title, p.Title, q.Expr, w, grafana.RateInterval)
						}
					}
					if strings.Contains(q.Expr, grafana.WorkerVariable) && !d.Workers {
						t.Errorf("%s, %s: %s asks for a variable that the dashboard lacks", d.Title, p.Title, q.Expr)
					}
				}
			}
		}
	}
}
