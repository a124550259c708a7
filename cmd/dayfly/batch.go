package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) batchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "batch",
		Short: "Run many tasks that differ in a little",
		Long: `A batch is up to 10,000 tasks asked for at once: a template, and what each item differs
in from it. It is accepted whole or not at all.`,
	}
	cmd.AddCommand(c.batchCreateCommand(), c.batchListCommand(), c.batchShowCommand(), c.batchItemsCommand(), c.batchWaitCommand(), c.batchCancelCommand())
	return cmd
}

func (c *cli) batchCreateCommand() *cobra.Command {
	var s batchSource
	var labels []string
	var key, callback, secretFile string
	var wait bool
	cmd := &cobra.Command{
		Use:   "create -f TEMPLATE --items ITEMS",
		Short: "Ask for a batch",
		Long: `create asks for a batch and prints its id. TEMPLATE is the JSON of a task's spec. ITEMS
has on each line a JSON object with the fields in which one task differs from it, and
perhaps its name; empty lines count for nothing. One of the two may be "-": standard input.

With --wait it waits as "dayfly batch wait" does. Ctrl-C ends the waiting, not the batch.`,
		Example: `  dayfly batch create -f template.json --items items.ndjson --wait
  for i in $(seq 100); do echo "{\"name\": \"case-$i\", \"stdin\": \"$i\"}"; done | dayfly batch create -f template.json --items -`,
		Args: cobra.NoArgs,
	}
	f := cmd.Flags()
	f.StringVarP(&s.template, "file", "f", "", "file with the template")
	f.StringVar(&s.items, "items", "", "file with the items, one on a line")
	f.StringArrayVarP(&labels, "label", "l", nil, "attach K=V to the batch and each of its tasks")
	f.StringVar(&callback, "callback-url", "", "POST the batch there once it is done")
	f.StringVar(&secretFile, "callback-secret-file", "", "file with the secret that signs the callback")
	f.StringVar(&key, "idempotency-key", "", "give the same batch again when the same is asked for with the same key, for 24 h")
	f.BoolVar(&wait, "wait", false, "wait until all of it is over")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		usage := func(err error) error { return &usageError{err, cmd.CommandPath()} }
		if s.template == "" || s.items == "" {
			return usage(errors.New("--file and --items are needed"))
		}
		given, err := pairs("label", labels)
		if err != nil {
			return usage(err)
		}
		body := map[string]any{}
		if len(given) > 0 {
			body["labels"] = given
		}
		if callback != "" {
			to := map[string]any{"url": callback}
			if secretFile != "" {
				secret, err := os.ReadFile(secretFile)
				if err != nil {
					return usage(fmt.Errorf("--callback-secret-file: %w", err))
				}
				to["secret"] = strings.TrimRight(string(secret), "\r\n")
			}
			body["callback"] = to
		} else if secretFile != "" {
			return usage(errors.New("--callback-secret-file goes with --callback-url"))
		}
		if body["template"], body["items"], err = s.read(c.in); err != nil {
			return usage(err)
		}
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		return c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
			b, err := cl.CreateBatchRaw(ctx, encoded, key)
			if err != nil {
				return s.explain(err)
			}
			if !wait {
				return c.printBatch(b)
			}
			if !c.data() {
				fmt.Fprintln(c.out, b.ID)
			}
			return c.waitForBatch(ctx, cl, b.ID)
		})(cmd, args)
	}
	return cmd
}

// batchSource is where a batch is read from.
type batchSource struct {
	template, items string // names of files
	lines           []int  // on which line each item stands
}

func (s *batchSource) read(stdin io.Reader) (template json.RawMessage, items []json.RawMessage, err error) {
	if s.template == "-" && s.items == "-" {
		return nil, nil, errors.New("standard input can be the template or the items, not both")
	}
	open := func(flag, name string) ([]byte, error) {
		if name == "-" {
			return io.ReadAll(io.LimitReader(stdin, schemas.MaxBatchBytes+1))
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", flag, err)
		}
		return b, nil
	}
	if template, err = open("--file", s.template); err != nil {
		return nil, nil, err
	}
	if !isObject(template) {
		return nil, nil, fmt.Errorf("--file %s must be one JSON object: the spec of a task", s.template)
	}
	all, err := open("--items", s.items)
	if err != nil {
		return nil, nil, err
	}
	if len(all) > schemas.MaxBatchBytes {
		return nil, nil, fmt.Errorf("--items %s is longer than the %s that a batch may have", s.items, schemas.Size(schemas.MaxBatchBytes))
	}
	n := 0
	for line := range bytes.Lines(all) {
		n++
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		if !isObject(line) {
			return nil, nil, fmt.Errorf("--items %s: line %d must be a JSON object", s.items, n)
		}
		items, s.lines = append(items, line), append(s.lines, n)
	}
	if len(items) == 0 {
		return nil, nil, fmt.Errorf("--items %s has no items", s.items)
	}
	return template, items, nil
}

func isObject(b []byte) bool {
	return bytes.HasPrefix(bytes.TrimLeft(b, " \t\r\n"), []byte("{")) && json.Valid(b)
}

// explain says of what the server refuses where it stands in the files.
func (s *batchSource) explain(err error) error {
	var e *schemas.Error
	if !errors.As(err, &e) {
		return err
	}
	where := func(field string) string {
		if rest, ok := strings.CutPrefix(field, "template."); ok {
			return s.template + ": " + rest
		}
		rest, ok := strings.CutPrefix(field, "items.")
		index, rest, _ := strings.Cut(rest, ".")
		if n, err := strconv.Atoi(index); ok && err == nil && n < len(s.lines) {
			return strings.TrimSuffix(fmt.Sprintf("%s, line %d: %s", s.items, s.lines[n], rest), ": ")
		}
		return field
	}
	at := *e
	at.Field, at.Errors = where(e.Field), slices.Clone(e.Errors)
	for i := range at.Errors {
		at.Errors[i].Field = where(at.Errors[i].Field)
	}
	hint := nextStep(&at)
	if at.Code != schemas.CodeKeyReused && at.Code != schemas.CodeKeyExpired && at.Status == 422 {
		hint = "dayfly batch create --help; docs/callbacks.md shows a batch"
	}
	return &hintError{&at, hint}
}

// waitForBatch waits for the end of a batch and says what came of it.
func (c *cli) waitForBatch(ctx context.Context, cl *client.Client, id schemas.BatchID) error {
	var last schemas.BatchStatus
	said := time.Time{}
	for b, err := range patient(cl).WatchBatch(ctx, id) {
		if err != nil {
			return noBatch(err)
		}
		last = b
		if b.State != schemas.BatchDone && time.Since(said) >= sayEvery {
			c.say("%d of %d are over", over(b), b.Items)
			said = time.Now()
		}
	}
	var err error
	switch {
	case c.data():
		err = c.printData(last)
	case c.names():
	default:
		_, err = fmt.Fprintf(c.out, "%s\t%s\t%s\n", last.ID, last.State, countWords(last))
	}
	if err != nil {
		return err
	}
	if last.Counts[schemas.Completed] == last.Items {
		return nil
	}
	return &exitError{exitAmiss, &hintError{fmt.Errorf("%s: %s", id, countWords(last)),
		fmt.Sprintf("dayfly batch items %s --state failed", id)}}
}

// sayEvery is how often a person hears how far a batch is.
const sayEvery = 2 * time.Second

// over is how many items have ended.
func over(b schemas.BatchStatus) (n int) {
	for s, count := range b.Counts {
		if s.Final() || s == schemas.ItemGone {
			n += count
		}
	}
	return n
}

// countWords says how many items are in which state: "98 completed, 2 failed".
func countWords(b schemas.BatchStatus) string {
	var words []string
	for _, s := range itemStates() {
		if n := b.Counts[s]; n > 0 {
			words = append(words, fmt.Sprintf("%d %s", n, s))
		}
	}
	return strings.Join(words, ", ")
}

// itemStates are the states that an item may be in, in the order of its life.
func itemStates() []schemas.State {
	return append(append([]schemas.State{schemas.ItemPending}, schemas.States()...), schemas.ItemGone)
}

func (c *cli) batchWaitCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait ID",
		Short: "Wait until all of a batch is over",
		Long: `wait prints a line when every item of the batch has its result, and exits with 0 if all
completed, else with 1; with 124 if --timeout is over first.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeBatches(true),
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "stop waiting after so long (0: never)")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		id, err := c.resolveBatch(ctx, cl, args[0])
		if err != nil {
			return err
		}
		if timeout > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeoutCause(ctx, timeout, errTimeout)
			defer cancel()
		}
		err = c.waitForBatch(ctx, cl, id)
		if errors.Is(err, errTimeout) {
			return &exitError{exitTimeout, &hintError{
				fmt.Errorf("%s is not over within %s", id, schemas.Duration(timeout)), "dayfly batch show " + string(id)}}
		}
		return err
	})
	return cmd
}

func (c *cli) batchListCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List batches, newest first",
		Args:    cobra.NoArgs,
	}
	cmd.Flags().IntVarP(&limit, "limit", "n", 0, "at most so many, the newest (0: all)")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, _ []string) error {
		list := []schemas.BatchStatus{}
		for b, err := range cl.AllBatches(ctx, client.BatchListOptions{Limit: min(limit, 1000)}) {
			if err != nil {
				return err
			}
			if list = append(list, b); len(list) == limit {
				break
			}
		}
		if c.data() {
			return c.printData(list)
		}
		ids := make([]schemas.BatchID, len(list))
		for i, b := range list {
			ids[i] = b.ID
		}
		if c.names() {
			for _, id := range ids {
				fmt.Fprintln(c.out, id)
			}
			return nil
		}
		short := shortIDs(ids)
		rows := [][]string{{"ID", "STATE", "ITEMS", "COMPLETED", "LEFT", "AGE", "LABELS"}}
		for _, b := range list {
			rows = append(rows, []string{short[b.ID], string(b.State), strconv.Itoa(b.Items), strconv.Itoa(b.Counts[schemas.Completed]),
				strconv.Itoa(b.Items - over(b)), ago(time.Since(b.AcceptedAt)), clip(strings.Join(pairList(b.Labels), ","), 60)})
		}
		return c.table(rows)
	})
	return cmd
}

func (c *cli) batchShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "show ID…",
		Short:             "Show how far batches are",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: c.completeBatches(false),
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			ids, err := resolveEach(ctx, cl, args, c.resolveBatch)
			if err != nil {
				return err
			}
			for i, id := range ids {
				b, err := cl.Batch(ctx, id)
				if err != nil {
					return noBatch(err)
				}
				if c.data() || c.names() {
					err = c.printBatch(b)
				} else {
					if i > 0 {
						fmt.Fprintln(c.out)
					}
					err = c.table(batchRows(b))
				}
				if err != nil {
					return err
				}
			}
			return nil
		}),
	}
}

// batchRows describes a batch for people.
func batchRows(b schemas.BatchStatus) [][]string {
	rows := [][]string{{"id:", string(b.ID)}, {"state:", string(b.State)}, {"items:", fmt.Sprintf("%d: %s", b.Items, countWords(b))},
		{"accepted:", when(b.AcceptedAt)}}
	if !b.CanceledAt.IsZero() {
		rows = append(rows, []string{"canceled:", when(b.CanceledAt)})
	}
	if !b.DoneAt.IsZero() {
		rows = append(rows, []string{"done:", fmt.Sprintf("%s (after %s)", when(b.DoneAt), brief(b.DoneAt.Sub(b.AcceptedAt)))})
	}
	if cb := b.Callback; cb != nil {
		rows = append(rows, []string{"callback:", cb.URL})
		if cb.State != "" {
			said := fmt.Sprintf("%s, %d tries", cb.State, cb.Tries)
			if cb.LastError != "" {
				said += ", last " + cb.LastError
			}
			rows = append(rows, []string{"", said})
		}
	}
	for _, kv := range pairList(b.Labels) {
		rows = append(rows, []string{"label:", kv})
	}
	return rows
}

func (c *cli) batchItemsCommand() *cobra.Command {
	var states []string
	cmd := &cobra.Command{
		Use:   "items ID",
		Short: "List what became of each item",
		Long: `items lists the items of a batch in their order. With -o name or -q it prints the ids of
their tasks.`,
		Example: `  dayfly batch items b-01jd6q0t --state failed
  dayfly batch items b-01jd6q0t -q --state failed | xargs -n 1 dayfly logs`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: c.completeBatches(false),
	}
	cmd.Flags().StringSliceVar(&states, "state", nil, "only items in these states")
	names := func() (list []string) {
		for _, s := range itemStates() {
			list = append(list, string(s))
		}
		return list
	}
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(names(), cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		for _, s := range states {
			if !slices.Contains(names(), s) {
				return &usageError{fmt.Errorf("--state must be one of %s", strings.Join(names(), ", ")), cmd.CommandPath()}
			}
		}
		return c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			id, err := c.resolveBatch(ctx, cl, args[0])
			if err != nil {
				return err
			}
			list := []schemas.BatchItem{}
			for item, err := range cl.BatchItems(ctx, id) {
				if err != nil {
					return noBatch(err)
				}
				if len(states) == 0 || slices.Contains(states, string(item.State)) {
					list = append(list, item)
				}
			}
			return c.printItems(list)
		})(cmd, args)
	}
	return cmd
}

func (c *cli) printItems(list []schemas.BatchItem) error {
	switch {
	case c.data():
		return c.printData(list)
	case c.names():
		for _, item := range list {
			fmt.Fprintln(c.out, item.Task)
		}
		return nil
	}
	rows := [][]string{{"INDEX", "NAME", "TASK", "STATE", "EXIT", "REASON"}}
	for _, item := range list {
		exit := ""
		if item.Exit != nil {
			exit = strconv.Itoa(item.Exit.Code)
		}
		rows = append(rows, []string{strconv.Itoa(item.Index), clip(item.Name, 40), string(item.Task), string(item.State), exit, string(item.Reason)})
	}
	return c.table(rows)
}

func (c *cli) batchCancelCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "cancel ID…",
		Aliases: []string{"stop"},
		Short:   "End all tasks of batches, and make no more",
		Long: `cancel asks for the end of all tasks of batches and does not wait for it; "dayfly batch
wait" does. A batch that is done already stays as it is, which is no error.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: c.completeBatches(true),
		RunE: c.command(func(ctx context.Context, cl *client.Client, args []string) error {
			ids, err := resolveEach(ctx, cl, args, c.resolveBatch)
			if err != nil {
				return err
			}
			return noBatch(changeEach(c, ids, func(id schemas.BatchID) (schemas.BatchStatus, error) { return cl.CancelBatch(ctx, id) }, c.printBatch))
		}),
	}
}

// printBatch prints a batch that a command has made or changed.
func (c *cli) printBatch(b schemas.BatchStatus) error {
	if c.data() {
		return c.printData(b)
	}
	_, err := fmt.Fprintln(c.out, b.ID)
	return err
}

// noBatch gives the next step where there is no such batch.
func noBatch(err error) error {
	if errors.Is(err, schemas.CodeNotFound) {
		return &hintError{err, "dayfly batch ls shows the batches that there are"}
	}
	return err
}

// resolveBatch is resolve for a batch.
func (c *cli) resolveBatch(ctx context.Context, cl *client.Client, arg string) (schemas.BatchID, error) {
	if id, err := schemas.ParseBatchID(arg); err == nil {
		return id, nil
	}
	id, err := byPrefix("b-", "batch", "dayfly batch ls", arg, func(yield func(candidate, error) bool) {
		for b, err := range cl.AllBatches(ctx, client.BatchListOptions{}) {
			if !yield(candidate{string(b.ID), fmt.Sprintf("%s  %s", b.State, countWords(b))}, err) {
				return
			}
		}
	})
	return schemas.BatchID(id), err
}

// completeBatches completes ids of batches; live says to offer only those that are not
// done.
func (c *cli) completeBatches(live bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
		const no = cobra.ShellCompDirectiveNoFileComp
		cl, err := c.client()
		if err != nil {
			return nil, no
		}
		l, err := cl.With(client.WithRetryFor(0)).Batches(cmd.Context(), client.BatchListOptions{Limit: 50})
		if err != nil {
			return nil, no
		}
		var ids []string
		for _, b := range l.Items {
			if strings.HasPrefix(string(b.ID), begun) && (!live || b.State != schemas.BatchDone) {
				ids = append(ids, fmt.Sprintf("%s\t%s, %s", b.ID, b.State, countWords(b)))
			}
		}
		return ids, no
	}
}
