package main

import (
	"context"
	"fmt"
	"iter"
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
	id, err := byPrefix("t-", "task", "dayfly ps -a", arg, func(yield func(candidate, error) bool) {
		for t, err := range cl.All(ctx, client.ListOptions{}) {
			if !yield(candidate{string(t.ID), fmt.Sprintf("%s  %s", t.State, t.Spec.Image)}, err) {
				return
			}
		}
	})
	return schemas.TaskID(id), err
}

// candidate is something that may be meant, and what tells a person so.
type candidate struct{ id, about string }

// byPrefix finds the one of all, which come newest first, whose id begins as arg does.
// kind is what all ids begin with; where says how to see them.
func byPrefix(kind, noun, where, arg string, all iter.Seq2[candidate, error]) (string, error) {
	prefix := strings.ToLower(arg)
	if !strings.HasPrefix(prefix, kind) {
		prefix = kind + prefix
	}
	if len(prefix) < len(kind)+leastPrefix {
		return "", &hintError{fmt.Errorf("%q is too short for the beginning of an id", arg),
			fmt.Sprintf("at least %d characters after %s; %s shows the ids", leastPrefix, kind, where)}
	}
	var found []candidate
	for one, err := range all {
		if err != nil {
			return "", err
		}
		if strings.HasPrefix(one.id, prefix) {
			found = append(found, one)
		} else if one.id < prefix {
			break // newest first: all others are smaller
		}
	}
	plural := noun + "s"
	if strings.HasSuffix(noun, "h") {
		plural = noun + "es"
	}
	switch len(found) {
	case 0:
		return "", &hintError{fmt.Errorf("no %s has an id that begins with %s", noun, prefix), fmt.Sprintf("%s shows the %s that there are", where, plural)}
	case 1:
		return found[0].id, nil
	}
	var b strings.Builder
	const most = 10
	for i, one := range found {
		if i == most {
			fmt.Fprintf(&b, "\n       … and %d more", len(found)-most)
			break
		}
		fmt.Fprintf(&b, "\n       %s  %s", one.id, one.about)
	}
	return "", &hintError{fmt.Errorf("%d %s have an id that begins with %s:%s", len(found), plural, prefix, b.String()), "more of the id"}
}

// resolveAll is resolve for several; it finds all before anything is done to one.
func (c *cli) resolveAll(ctx context.Context, cl *client.Client, args []string) ([]schemas.TaskID, error) {
	return resolveEach(ctx, cl, args, c.resolve)
}

func resolveEach[ID any](ctx context.Context, cl *client.Client, args []string, one func(context.Context, *client.Client, string) (ID, error)) ([]ID, error) {
	ids := make([]ID, 0, len(args))
	for _, a := range args {
		id, err := one(ctx, cl, a)
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
func shortIDs[ID ~string](ids []ID) map[ID]string {
	const least = len("t-") + 10
	short := make(map[ID]string, len(ids))
	count := map[string]int{}
	open := ids
	for n := least; len(open) > 0; n++ {
		clear(count)
		for _, id := range ids {
			count[cut(string(id), n)]++
		}
		var next []ID
		for _, id := range open {
			s := cut(string(id), n)
			if count[s] == 1 || len(s) == len(id) {
				short[id] = s
			} else {
				next = append(next, id)
			}
		}
		open = next
	}
	return short
}

func cut(s string, n int) string { return s[:min(n, len(s))] }
