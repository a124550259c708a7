package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/client"

	dayfly "dayfly.dev/client"
	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// ingress measures requests to a task by its hostname, beside requests to the same server
// in a container on a bridge of Docker's, reached by its address; and a tunnel with one
// request, beside a connection to that container with one. They take turns.
func ingress(ctx context.Context, bin string, n int) (err error) {
	if n == 0 {
		n = 200
	}
	up, err := harness.New(bin, "--tcp-ports", "")
	if err != nil {
		return err
	}
	engine, err := client.New(client.FromEnv)
	if err != nil {
		return err
	}
	defer engine.Close()
	image, network, bridged := "dayfly-bench:"+up.Cluster, "dayfly-bench-"+up.Cluster, ""
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if bridged != "" {
			_, e := engine.ContainerRemove(clean, bridged, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
			err = errors.Join(err, e)
		}
		_, _ = engine.NetworkRemove(clean, network, client.NetworkRemoveOptions{}) // perhaps it was not made
		err = errors.Join(err, up.Remove(clean), harness.RemoveImage(clean, image))
	}()
	if err := harness.MakeImage(ctx, image); err != nil {
		return err
	}
	if err := up.Start(ctx); err != nil {
		return err
	}
	var task schemas.Task
	err = up.Call(ctx, "POST", "/v1/tasks?wait=running", map[string]any{"image": image, "command": []string{"http", "8080"}, "ttl": "1h",
		"ports": []schemas.Port{{Name: "web", Port: 8080}}, "resources": map[string]any{"cpus": 2}}, &task)
	if err != nil {
		return err
	}
	var addr string
	if bridged, addr, err = bridge(ctx, engine, image, network); err != nil {
		return err
	}

	direct := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}
	through := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", up.Ingress)
	}
	url := task.Endpoints[0].URL + "/"
	err = harness.Poll(ctx, func() error {
		for _, dial := range []func(context.Context, string, string) (net.Conn, error){direct, through} {
			if _, err := requests(ctx, dial, url, 1, 1); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Println("requests for a line of text over kept connections, in turns")
	for _, conns := range []int{1, 50} {
		rounds := map[string]*load{"direct": {}, "ingress": {}}
		for range 4 {
			for name, dial := range map[string]func(context.Context, string, string) (net.Conn, error){"direct": direct, "ingress": through} {
				l, err := requests(ctx, dial, url, conns, max(n, 5*conns))
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				rounds[name].times = append(rounds[name].times, l.times...)
				rounds[name].took += l.took
			}
		}
		for _, name := range []string{"direct", "ingress"} {
			l := rounds[name]
			fmt.Printf("  %2d connections, %-7s  %8.0f requests/s  %s\n", conns, name, float64(len(l.times))/l.took.Seconds(), l.times)
		}
		fmt.Printf("  %2d connections: the ingress adds %.2f ms at the median\n", conns, rounds["ingress"].times.at(.5)-rounds["direct"].times.at(.5))
	}

	api, err := dayfly.New(up.URL)
	if err != nil {
		return err
	}
	tunnel := func() (net.Conn, error) { return api.Tunnel(ctx, task.ID, 8080) }
	near := func() (net.Conn, error) { return direct(ctx, "", "") }
	var connect, tunneled, dialed sample
	for range max(n, 100) {
		c, whole, err := once(tunnel)
		if err != nil {
			return err
		}
		_, straight, err := once(near)
		if err != nil {
			return err
		}
		connect, tunneled, dialed = append(connect, c), append(tunneled, whole), append(dialed, straight)
	}
	fmt.Println("a new connection and one GET over it, in turns")
	fmt.Printf("  tunnel, until it is open   %s\n  tunnel, connect and GET    %s\n  dial the bridge and GET    %s\n", connect, tunneled, dialed)
	return nil
}

// bridge starts the same server in a container on a bridge of its own.
func bridge(ctx context.Context, engine *client.Client, image, network string) (id, addr string, err error) {
	if _, err := engine.NetworkCreate(ctx, network, client.NetworkCreateOptions{Driver: "bridge"}); err != nil {
		return "", "", err
	}
	made, err := engine.ContainerCreate(ctx, client.ContainerCreateOptions{Config: &container.Config{Image: image, Cmd: []string{"http", "0.0.0.0:8080"}},
		HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(network)}})
	if err != nil {
		return "", "", err
	}
	if _, err := engine.ContainerStart(ctx, made.ID, client.ContainerStartOptions{}); err != nil {
		return made.ID, "", err
	}
	seen, err := engine.ContainerInspect(ctx, made.ID, client.ContainerInspectOptions{})
	if err != nil {
		return made.ID, "", err
	}
	for _, network := range seen.Container.NetworkSettings.Networks {
		addr = net.JoinHostPort(network.IPAddress.String(), "8080")
	}
	return made.ID, addr, nil
}

// load is what some connections did.
type load struct {
	times sample
	took  time.Duration
}

// requests sends n of them over so many connections at a time.
func requests(ctx context.Context, dial func(context.Context, string, string) (net.Conn, error), url string, conns, n int) (load, error) {
	t := &http.Transport{DialContext: dial, MaxIdleConnsPerHost: conns, DisableCompression: true}
	defer t.CloseIdleConnections()
	c := &http.Client{Transport: t}
	get := func() (time.Duration, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return 0, err
		}
		began := time.Now()
		res, err := c.Do(req)
		if err != nil {
			return 0, err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err == nil && string(b) != "hello\n" {
			err = fmt.Errorf("%s: %q", res.Status, b)
		}
		return time.Since(began), err
	}
	var mu sync.Mutex
	var all load
	var failed error
	run := func(each int, keep bool) {
		var work sync.WaitGroup
		for range conns {
			work.Go(func() {
				for range each {
					took, err := get()
					mu.Lock()
					failed = errors.Join(failed, err)
					if keep {
						all.times = append(all.times, took)
					}
					mu.Unlock()
					if err != nil {
						return
					}
				}
			})
		}
		work.Wait()
	}
	run(1, false) // connects
	began := time.Now()
	run((n+conns-1)/conns, true)
	all.took = time.Since(began)
	return all, failed
}

// once makes a connection and sends one request over it.
func once(dial func() (net.Conn, error)) (connect, whole time.Duration, err error) {
	began := time.Now()
	c, err := dial()
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	connect = time.Since(began)
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return 0, 0, err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err == nil {
		_, err = io.Copy(io.Discard, res.Body)
	}
	if err == nil && res.StatusCode != http.StatusOK {
		err = errors.New(strconv.Itoa(res.StatusCode))
	}
	return connect, time.Since(began), err
}
