package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

const leastPrefix = 4 // characters of an id, beyond "t-"

// resolve finds the task that a person means: by its id, or by the beginning of it
// that no other task has.
func (c *cli) resolve(ctx context.Context, cl *client.Client, arg string) (schemas.TaskID, error) {
	if id, err := schemas.ParseTaskID(arg); err == nil {
		return id, nil
	}
	prefix := strings.ToLower(arg)
	if !strings.HasPrefix(prefix, "t-") {
		prefix = "t-" + prefix
	}
	if len(prefix) < len("t-")+leastPrefix {
		return "", &hintError{fmt.Errorf("%q is too short for the beginning of an id", arg),
			fmt.Sprintf("at least %d characters after t-; dayfly ps -a shows the ids", leastPrefix)}
	}
	var found []schemas.Task
	for t, err := range cl.All(ctx, client.ListOptions{}) {
		if err != nil {
			return "", err
		}
		if strings.HasPrefix(string(t.ID), prefix) {
			found = append(found, t)
		} else if string(t.ID) < prefix {
			break // newest first: all others are smaller
		}
	}
	switch len(found) {
	case 0:
		return "", &hintError{fmt.Errorf("no task has an id that begins with %s", prefix), "dayfly ps -a shows the tasks that there are"}
	case 1:
		return found[0].ID, nil
	}
	var b strings.Builder
	const most = 10
	for i, t := range found {
		if i == most {
			fmt.Fprintf(&b, "\n       … and %d more", len(found)-most)
			break
		}
		fmt.Fprintf(&b, "\n       %s  %s  %s", t.ID, t.State, t.Spec.Image)
	}
	return "", &hintError{fmt.Errorf("%d tasks have an id that begins with %s:%s", len(found), prefix, b.String()), "more of the id"}
}

// resolveAll is resolve for several; it finds all before anything is done to one.
func (c *cli) resolveAll(ctx context.Context, cl *client.Client, args []string) ([]schemas.TaskID, error) {
	ids := make([]schemas.TaskID, 0, len(args))
	for _, a := range args {
		id, err := c.resolve(ctx, cl, a)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// completeTasks completes ids of tasks; live says to offer only those that have not
// ended.
func (c *cli) completeTasks(live bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		const no = cobra.ShellCompDirectiveNoFileComp
		cl, err := c.client()
		if err != nil {
			return nil, no
		}
		cl = cl.With(client.WithRetryFor(0))
		o := client.ListOptions{Limit: 50}
		if live {
			o.States = liveStates()
		}
		l, err := cl.List(cmd.Context(), o)
		if err != nil {
			return nil, no
		}
		var ids []string
		for _, t := range l.Items {
			if strings.HasPrefix(string(t.ID), begun) {
				ids = append(ids, fmt.Sprintf("%s\t%s %s", t.ID, t.State, t.Spec.Image))
			}
		}
		return ids, no
	}
}

// completeWorkers completes names of workers.
func (c *cli) completeWorkers(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	const no = cobra.ShellCompDirectiveNoFileComp
	cl, err := c.client()
	if err != nil {
		return nil, no
	}
	l, err := cl.With(client.WithRetryFor(0)).Workers(cmd.Context())
	if err != nil {
		return nil, no
	}
	var names []string
	for _, w := range l.Items {
		names = append(names, fmt.Sprintf("%s\t%s, %d tasks", w.ID, w.State, w.Assigned.Tasks))
	}
	return names, no
}

func liveStates() []schemas.State {
	var live []schemas.State
	for _, s := range schemas.States() {
		if !s.Final() {
			live = append(live, s)
		}
	}
	return live
}

// shortIDs gives for each id the shortest beginning that tells it apart from the
// others, and at least the part that holds its time.
func shortIDs(tasks []schemas.Task) map[schemas.TaskID]string {
	const least = len("t-") + 10
	short := make(map[schemas.TaskID]string, len(tasks))
	count := map[string]int{}
	open := tasks
	for n := least; len(open) > 0; n++ {
		clear(count)
		for _, t := range tasks {
			count[cut(string(t.ID), n)]++
		}
		var next []schemas.Task
		for _, t := range open {
			s := cut(string(t.ID), n)
			if count[s] == 1 || len(s) == len(t.ID) {
				short[t.ID] = s
			} else {
				next = append(next, t)
			}
		}
		open = next
	}
	return short
}

func cut(s string, n int) string { return s[:min(n, len(s))] }
