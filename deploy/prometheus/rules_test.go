package prometheus

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

func promtool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "promtool", args...).CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v (make setup installs it)\n%s", strings.Join(args, " "), err, out)
	}
}

func TestPromtoolTakesTheConfiguration(t *testing.T) {
	promtool(t, "check", "config", "prometheus.yml")
}

func TestAlertsFireWhenTheyShould(t *testing.T) { promtool(t, "test", "rules", "rules_test.yml") }

type rule struct {
	Alert       string
	Labels      struct{ Severity string }
	Annotations struct {
		Summary string
		Runbook string `yaml:"runbook_url"`
	}
}

func alerts(t *testing.T) map[string]rule {
	t.Helper()
	var file struct{ Groups []struct{ Rules []rule } }
	read(t, "rules.yml", &file)
	found := map[string]rule{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if r.Alert != "" {
				found[r.Alert] = r
			}
		}
	}
	return found
}

func read(t *testing.T, name string, into any) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err == nil {
		err = yaml.Unmarshal(b, into)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestEveryAlertHasACaseInWhichItFiresAndOneInWhichItDoesNot(t *testing.T) {
	var file struct {
		Tests []struct {
			Cases []struct {
				Alert  string `yaml:"alertname"`
				Alerts []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		}
	}
	read(t, "rules_test.yml", &file)
	type tried struct{ fires, quiet bool }
	cases := map[string]tried{}
	for _, test := range file.Tests {
		for _, c := range test.Cases {
			was := cases[c.Alert]
			cases[c.Alert] = tried{was.fires || len(c.Alerts) > 0, was.quiet || len(c.Alerts) == 0}
		}
	}
	for name := range alerts(t) {
		if c := cases[name]; !c.fires || !c.quiet {
			t.Errorf("%s: has a case in which it fires: %v, in which it does not: %v", name, c.fires, c.quiet)
		}
	}
}

func TestTheRunbookHasAnEntryForEachAlertAndNoOther(t *testing.T) {
	b, err := os.ReadFile("../../docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	entries := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^### (Dayfly\w+)$`).FindAllStringSubmatch(string(b), -1) {
		entries[m[1]] = true
	}
	all := alerts(t)
	for name, r := range all {
		if !entries[name] {
			t.Errorf("the runbook has no entry %q", "### "+name)
		}
		if want := "docs/runbook.md#" + strings.ToLower(name); r.Annotations.Runbook != want {
			t.Errorf("%s: runbook_url %q, want %q", name, r.Annotations.Runbook, want)
		}
		if s := r.Labels.Severity; s != "page" && s != "warn" {
			t.Errorf("%s: severity %q", name, s)
		}
		if r.Annotations.Summary == "" {
			t.Errorf("%s has no summary", name)
		}
	}
	for name := range entries {
		if _, ok := all[name]; !ok {
			t.Errorf("the runbook has an entry for %s, which is no alert", name)
		}
	}
}
