package ui

import (
	"cmp"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/schemas"
)

// short gives a length of time in at most two units: "412ms", "3.2s", "12m", "2h 5m", "3d 4h".
func short(d time.Duration) string {
	switch d = max(d, 0); {
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < 10*time.Second && d%time.Second != 0:
		return fmt.Sprintf("%.1fs", math.Floor(d.Seconds()*10)/10)
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return two(d, time.Minute, "m", time.Second, "s")
	case d < 24*time.Hour:
		return two(d, time.Hour, "h", time.Minute, "m")
	}
	return two(d, 24*time.Hour, "d", time.Hour, "h")
}

func two(d, large time.Duration, l string, small time.Duration, s string) string {
	if rest := d % large / small; rest > 0 && d < 10*large {
		return fmt.Sprintf("%d%s %d%s", d/large, l, rest, s)
	}
	return fmt.Sprintf("%d%s", d/large, l)
}

// ago is how long before now t was, in whole seconds at the least, so that a page does
// not change all the time.
func ago(now, t time.Time) string {
	d := now.Sub(t)
	if d < time.Second {
		return "now"
	}
	return short(d.Round(time.Second)) + " ago"
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// bar is how much of something is promised to tasks.
type bar struct {
	ID, Name, Part, Whole string
	Percent               int
}

func bars(w schemas.Worker) []bar {
	of := func(name, part, whole string, p, all float64) bar {
		return bar{string(w.ID) + "-" + strings.ToLower(name), name, part, whole, int(math.Round(min(100, 100*p/max(all, 1e-9))))}
	}
	a, h := w.Assigned, w.Host
	list := []bar{
		of("Tasks", strconv.Itoa(a.Tasks), strconv.Itoa(h.Slots), float64(a.Tasks), float64(h.Slots)),
		of("CPU", a.CPUs.String(), h.CPUs.String(), float64(a.CPUs), float64(h.CPUs)),
		of("Memory", a.Memory.String(), h.Memory.String(), float64(a.Memory), float64(h.Memory)),
	}
	if h.GPUs > 0 {
		list = append(list, of("GPUs", strconv.Itoa(a.GPUs), strconv.Itoa(h.GPUs), float64(a.GPUs), float64(h.GPUs)))
	}
	return list
}

func command(s schemas.Spec) string {
	return strings.Join(append(append([]string{}, s.Entrypoint...), s.Command...), " ")
}

// when says in a list what matters of a task's time.
func when(t schemas.Task, now time.Time) string {
	switch {
	case t.State == schemas.Queued:
		return "waits " + short(now.Sub(t.Timings.Accepted).Round(time.Second))
	case t.State.Final() && !t.Timings.Running.IsZero():
		return "ran " + short(t.Timings.Ended.Sub(t.Timings.Running))
	case t.State.Final():
		return "never ran"
	case t.SecondsLeft > 0:
		return short(time.Duration(t.SecondsLeft)*time.Second) + " left"
	}
	return ""
}

// sentence says how a task stands, and why.
func sentence(t schemas.Task, now time.Time) string {
	said := ""
	if t.Message != "" {
		said = ": " + strings.TrimSuffix(t.Message, ".")
	}
	ran := short(t.Timings.Ended.Sub(t.Timings.Running))
	switch t.State {
	case schemas.Queued:
		if t.Why != nil {
			return "The task " + t.Why.Summary + "."
		}
		return "It waits for a worker" + said + "."
	case schemas.Assigned:
		return fmt.Sprintf("%s was asked to run it.", t.Worker)
	case schemas.Starting:
		return fmt.Sprintf("%s starts it: %s.", t.Worker, cmp.Or(t.Progress, "makes the container"))
	case schemas.Running:
		text := fmt.Sprintf("It runs on %s", t.Worker)
		if t.Cancel != nil {
			text += " and is being canceled"
		}
		if !t.WorkerLostAt.IsZero() {
			text += ", of which nothing was heard for " + short(now.Sub(t.WorkerLostAt).Round(time.Second))
		}
		if t.SecondsLeft > 0 {
			text += fmt.Sprintf(", with %s left", short(time.Duration(t.SecondsLeft)*time.Second))
		}
		return text + "."
	case schemas.Completed:
		return fmt.Sprintf("It ended by itself after %s, with exit code 0.", ran)
	case schemas.Canceled:
		if t.Timings.Running.IsZero() {
			return "It was canceled before it ran."
		}
		return fmt.Sprintf("It was canceled after %s.", ran)
	case schemas.Expired:
		if t.Timings.Running.IsZero() {
			return "Its time was over before it ran."
		}
		return fmt.Sprintf("Its time was over after %s.", ran)
	}
	return failure(t, ran, said)
}

// failure says why a task failed.
func failure(t schemas.Task, ran, said string) string {
	switch {
	case t.Reason == schemas.ReasonOOM:
		return fmt.Sprintf("It was killed after %s: it needed more memory than its %s.", ran, t.Spec.Resources.Memory)
	case t.Reason == schemas.ReasonExit && t.Exit != nil:
		return fmt.Sprintf("It ended by itself after %s, with exit code %d%s.", ran, t.Exit.Code, said)
	case t.Reason == schemas.ReasonSignal && t.Exit != nil:
		return fmt.Sprintf("It was killed after %s by signal %d%s.", ran, t.Exit.Signal, said)
	}
	reasons := map[schemas.Reason]string{
		schemas.ReasonImage:     "The image does not exist or may not be pulled",
		schemas.ReasonImageAuth: "The registry refuses the login for the image, or asks for one",
		schemas.ReasonImagePull: "The registry did not give the image",
		schemas.ReasonImageArch: "The image is for another kind of machine", schemas.ReasonPullTimeout: "The image was not there in time",
		schemas.ReasonNotFound: "The command is not in the image", schemas.ReasonNotExec: "The command cannot be executed",
		schemas.ReasonStart: "The container could not be started", schemas.ReasonStartTimeout: "The container was not started in time",
		schemas.ReasonQueueTimeout: "No worker took it in time", schemas.ReasonWorkerLost: "Its worker was lost",
	}
	return cmp.Or(reasons[t.Reason], "It failed") + said + "."
}
