package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"dayfly.dev/client"
	"dayfly.dev/schemas"
)

func (c *cli) forwardCommand() *cobra.Command {
	var address string
	cmd := &cobra.Command{
		Use:   "port-forward ID [LOCAL:]PORT…",
		Short: "Reach ports of a task at ports of this machine",
		Long: `port-forward listens on this machine, and joins each connection to a port of the task,
which need not be named in its spec. The task needs no network, and may listen on
127.0.0.1 alone. It ends when the task does, or by Ctrl-C.

A LOCAL of 0 is a free port; one that is left out is the task's.`,
		Example: `  dayfly port-forward t-01jd6q0t 8080
  dayfly port-forward t-01jd6q0t 15432:5432 0:80`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.MinimumNArgs(2)(cmd, args); err != nil {
				return err
			}
			_, err := readForwards(args[1:])
			return err
		},
		ValidArgsFunction: c.completeTasks(true),
	}
	cmd.Flags().StringVar(&address, "address", "127.0.0.1", "address of this machine to listen on")
	cmd.RunE = c.command(func(ctx context.Context, cl *client.Client, args []string) error {
		ports, err := readForwards(args[1:])
		if err != nil {
			return err
		}
		id, err := c.resolve(ctx, cl, args[0])
		if err != nil {
			return err
		}
		return c.forward(ctx, cl, id, address, ports)
	})
	return cmd
}

// portForward is a port of this machine for one of a task.
type portForward struct{ local, port int }

func readForwards(args []string) (list []portForward, err error) {
	for _, text := range args {
		local, port, two := strings.Cut(text, ":")
		if !two {
			port = local
		}
		var f portForward
		var bad error
		f.local, bad = strconv.Atoi(local)
		f.port, err = strconv.Atoi(port)
		if bad != nil || err != nil || f.local < 0 || f.local > 65535 || f.port < 1 || f.port > 65535 {
			return nil, errors.New("ports must be PORT or LOCAL:PORT, such as 8080:80")
		}
		list = append(list, f)
	}
	return list, nil
}

// forward listens until the task has ended.
func (c *cli) forward(ctx context.Context, cl *client.Client, id schemas.TaskID, address string, ports []portForward) error {
	t, err := cl.Get(ctx, id, client.GetOptions{})
	if err != nil {
		return err
	}
	if t.State.Final() {
		return &hintError{fmt.Errorf("%s is over (%s)", id, t.State), "dayfly inspect " + string(id)}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var work sync.WaitGroup
	defer work.Wait()
	for _, p := range ports {
		l, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(p.local)))
		if err != nil {
			cancel(nil)
			return &hintError{err, fmt.Sprintf("another port of this machine, such as 0:%d for a free one", p.port)}
		}
		stop := context.AfterFunc(ctx, func() { l.Close() })
		defer stop()
		c.tell("%s is port %d of %s", l.Addr(), p.port, id)
		work.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				work.Go(func() { c.join(ctx, cl, id, p.port, conn) })
			}
		})
	}
	if t.State != schemas.Running {
		work.Go(func() { c.tellWaits(ctx, patient(cl), id) })
	}
	work.Go(func() {
		t, err := patient(cl).Wait(ctx, id)
		if err == nil {
			err = taskOver{t.State}
		}
		cancel(err)
	})
	<-ctx.Done()
	var over taskOver
	if cause := context.Cause(ctx); errors.As(cause, &over) {
		c.tell("%s is over (%s)", id, over.state)
		return nil
	} else {
		return cause
	}
}

// taskOver ends what is for a task that runs.
type taskOver struct{ state schemas.State }

func (t taskOver) Error() string { return "the task is over" }

// join joins a connection of this machine to one of the task.
func (c *cli) join(ctx context.Context, cl *client.Client, id schemas.TaskID, port int, near net.Conn) {
	defer near.Close()
	far, err := cl.Tunnel(ctx, id, port)
	if err != nil {
		if ctx.Err() == nil {
			message, _ := explain(err)
			c.tell("%s: %s", near.RemoteAddr(), message)
		}
		return
	}
	defer far.Close()
	stop := context.AfterFunc(ctx, func() {
		near.Close()
		far.Close()
	})
	defer stop()
	var ways sync.WaitGroup
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		ways.Go(func() {
			_, err := io.Copy(way[1], way[0])
			if half, ok := way[1].(interface{ CloseWrite() error }); ok && err == nil {
				err = half.CloseWrite()
			}
			if err != nil { // neither way goes on
				near.Close()
				far.Close()
			}
		})
	}
	ways.Wait()
}
