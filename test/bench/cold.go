package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/test/harness"
)

// cold measures POST to running, beside create+start of the same sandbox through
// the raw Docker API in the same run, one after the other: with the identical
// configuration, and with network none as a client would ask for it (without
// NetworkDisabled).
func cold(ctx context.Context, bin string, n int) (err error) {
	if n == 0 {
		n = 40
	}
	up, err := harness.New(bin)
	if err != nil {
		return err
	}
	engine, err := client.New(client.FromEnv)
	if err != nil {
		return err
	}
	defer engine.Close()
	image := "dayfly-bench:" + up.Cluster
	defer func() {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, up.Remove(clean), harness.RemoveImage(clean, image))
	}()
	if err := harness.MakeImage(ctx, image); err != nil {
		return err
	}
	if err := up.Start(ctx); err != nil {
		return err
	}

	post := func() (schemas.Task, time.Duration, error) {
		var t schemas.Task
		began := time.Now()
		err := up.Call(ctx, "POST", "/v1/tasks?wait=running&timeout=30s",
			map[string]any{"image": image, "command": []string{"sleep", "1h"}, "timeouts": map[string]string{"stop": "0s"}}, &t)
		took := time.Since(began)
		if err == nil && t.State != schemas.Running {
			err = fmt.Errorf("state %s: %s", t.State, t.Message)
		}
		return t, took, err
	}
	end := func(t schemas.Task) error {
		if err := up.Call(ctx, "DELETE", "/v1/tasks/"+string(t.ID)+"?grace=0s", nil, nil); err != nil {
			return err
		}
		return harness.Poll(ctx, func() error { // its teardown must not meet the next start
			ids, err := up.Containers(ctx)
			if err == nil && len(ids) > 0 {
				err = errors.New("the container is still there")
			}
			return err
		})
	}

	// The sandbox that the raw calls make is the one that dayfly itself made.
	t, _, err := post()
	if err != nil {
		return err
	}
	ids, err := up.Containers(ctx)
	if err != nil || len(ids) != 1 {
		return fmt.Errorf("containers %v: %w", ids, err)
	}
	made, err := engine.ContainerInspect(ctx, ids[0], client.ContainerInspectOptions{})
	if err != nil {
		return err
	}
	config, host := *made.Container.Config, *made.Container.HostConfig
	config.Entrypoint, config.Cmd, config.Hostname = []string{"/bin/sleep"}, []string{"1h"}, ""
	if err := end(t); err != nil {
		return err
	}
	for i := range host.Mounts { // the attempt's own folders are gone; any will do
		if host.Mounts[i].Type == "bind" {
			host.Mounts[i].Source = up.Dir
		}
	}
	raw := func(disabled bool) (time.Duration, error) {
		c := config
		c.NetworkDisabled = disabled
		began := time.Now()
		made, err := engine.ContainerCreate(ctx, client.ContainerCreateOptions{Config: &c, HostConfig: &host})
		if err != nil {
			return 0, err
		}
		_, err = engine.ContainerStart(ctx, made.ID, client.ContainerStartOptions{})
		took := time.Since(began)
		_, e := engine.ContainerRemove(ctx, made.ID, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true})
		return took, errors.Join(err, e)
	}
	var dayfly, same, none sample
	for i := range n + 2 {
		t, took, err := post()
		if err != nil {
			return err
		}
		if err := end(t); err != nil {
			return err
		}
		a, err := raw(true)
		if err != nil {
			return err
		}
		b, err := raw(false)
		if err != nil {
			return err
		}
		if i < 2 {
			continue // warm up
		}
		dayfly, same, none = append(dayfly, took), append(same, a), append(none, b)
	}
	fmt.Printf("cold start, interleaved\n")
	fmt.Printf("  dayfly, POST to running                        %s\n", dayfly)
	fmt.Printf("  raw API create+start, the identical sandbox    %s\n", same)
	fmt.Printf("  raw API create+start, without NetworkDisabled  %s\n", none)
	fmt.Printf("  dayfly / identical: p50 x%.2f p90 x%.2f;  dayfly / network none: p50 x%.2f p90 x%.2f\n",
		dayfly.at(.5)/same.at(.5), dayfly.at(.9)/same.at(.9), dayfly.at(.5)/none.at(.5), dayfly.at(.9)/none.at(.9))
	return nil
}
