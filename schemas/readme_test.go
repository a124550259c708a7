package schemas_test

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

// The README is where people learn the contract, so it may not lag behind it.

func readme(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestReadmeHasTheTable(t *testing.T) {
	_, rest, found := strings.Cut(readme(t), "| from | to | who | on |\n|---|---|---|---|\n")
	if !found {
		t.Fatal("README.md has no table | from | to | who | on |")
	}
	table, _, _ := strings.Cut(rest, "\n\n")
	have := map[string]bool{}
	for row := range strings.Lines(table) {
		have[strings.TrimSpace(row)] = true
	}
	var want strings.Builder
	missing := false
	for _, row := range schemas.Table() {
		from := string(row.From)
		if from == "" {
			from = "–"
		}
		line := fmt.Sprintf("| %s | %s | %s | %s |", from, row.To, row.Who, row.On)
		missing = missing || !have[line]
		delete(have, line)
		want.WriteString(line + "\n")
	}
	for row := range have {
		t.Errorf("README.md has a row that Table() does not have: %s", row)
	}
	if missing || t.Failed() {
		t.Errorf("make the table in README.md this, and look at the diagram above it:\n%s", want.String())
	}
}

func TestReadmeDrawsEveryState(t *testing.T) {
	_, rest, _ := strings.Cut(readme(t), "## A task's life\n\n```\n")
	diagram, _, _ := strings.Cut(rest, "```")
	for _, s := range schemas.States() {
		if !strings.Contains(diagram, string(s)) {
			t.Errorf("the diagram in README.md lacks the state %s", s)
		}
	}
	for _, row := range schemas.Table() {
		if row.On == "no process is left" || row.To.Final() {
			continue
		}
		if !strings.Contains(diagram, row.On) {
			t.Errorf("the diagram in README.md lacks %q (%s to %s)", row.On, row.From, row.To)
		}
	}
}

func TestReadmeNamesEveryAsset(t *testing.T) {
	text := readme(t)
	number := regexp.MustCompile(`^WORK_\d+$`)
	row := func(start, name string) string {
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, start) {
				return line
			}
		}
		t.Errorf("README.md, On the bus: no row for %s; add one that begins with %q", name, start)
		return ""
	}
	for _, a := range schemas.Assets(time.Hour) {
		if a.Bucket {
			row("| bucket `"+a.Name+"` |", a.Name)
			continue
		}
		line := row("| stream `"+number.ReplaceAllString(a.Name, "WORK_<n>")+"` |", a.Name)
		for _, subject := range a.Subjects {
			subject = regexp.MustCompile(`\.\d+\.>$`).ReplaceAllString(subject, ".<n>.>")
			if !strings.Contains(line, "`"+strings.TrimSuffix(subject, ">")) {
				t.Errorf("README.md, On the bus: the row of %s lacks its subject %s", a.Name, subject)
			}
		}
	}
	row("| request `"+schemas.PlacerWhySubject+"` |", schemas.PlacerWhySubject)
	row("| request `"+schemas.PlacerDrainedSubject+"` |", schemas.PlacerDrainedSubject)
}

// What an agent publishes ends up in a stream or bucket of ours, and nowhere else.
func TestSubjectsMatchTheAssets(t *testing.T) {
	streams := map[string]string{}
	for _, a := range schemas.Assets(time.Hour) {
		for _, s := range a.Subjects {
			streams[strings.TrimSuffix(s, ">")] = a.Name
		}
	}
	of := func(subject string) string {
		for prefix, name := range streams {
			if strings.HasPrefix(subject, prefix) {
				return name
			}
		}
		return ""
	}
	for i := range 20 {
		w := schemas.WorkerID(fmt.Sprintf("w%d", i))
		for subject, stream := range map[string]string{
			schemas.OrderSubject(w, taskID):  schemas.WorkStream(w),
			schemas.ReportSubject(w, taskID): schemas.StreamReports,
			schemas.LogSubject(w, taskID):    schemas.StreamLogs,
		} {
			if got := of(subject); got != stream {
				t.Errorf("%s goes to %q, not %s", subject, got, stream)
			}
		}
		publish, subscribe := schemas.AgentPermissions(w)
		for _, s := range append(publish, subscribe...) {
			if strings.Contains(s, "KV_tasks") || strings.Contains(s, "KV.tasks") || strings.HasPrefix(s, "$JS.API") || s == ">" || strings.HasPrefix(s, "*") {
				t.Errorf("worker %s may use %s", w, s)
			}
		}
		for _, s := range publish {
			if !reachable(s) {
				t.Errorf("worker %s may publish to %s, which AgentServices does not export", w, s)
			}
		}
	}
}

func reachable(subject string) bool {
	for _, s := range schemas.AgentServices() {
		as := s.As
		if as == "" {
			as = s.Subject
		}
		if covers(strings.Split(as, "."), strings.Split(subject, ".")) {
			return true
		}
	}
	return false
}

// covers says whether pattern takes in everything that subject does.
func covers(pattern, subject []string) bool {
	for i, p := range pattern {
		switch {
		case p == ">":
			return len(subject) > i
		case i >= len(subject), subject[i] == ">":
			return false
		case p != "*" && p != subject[i]:
			return false
		}
	}
	return len(pattern) == len(subject)
}
