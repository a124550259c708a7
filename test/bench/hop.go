package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"dayfly.dev/test/harness"
)

// hop measures what it costs that the services are processes of their own: the whole
// life of a task by `up`, and by one of each service and a NATS server over the
// loopback interface, in turns. Both sync every record write.
func hop(ctx context.Context, bin string, n int) (err error) {
	if n == 0 {
		n = 1000
	}
	up, err := harness.New(bin)
	if err != nil {
		return err
	}
	up.Args = []string{"--runtime", "fake", "--fake-journal", filepath.Join(up.Dir, "host")}
	site, err := harness.NewSite(ctx, harness.SiteOptions{Bin: bin, Fake: true})
	if err != nil {
		return err
	}
	client := &http.Client{}
	defer func() {
		client.CloseIdleConnections()
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, up.Remove(clean), site.Remove(clean))
	}()
	if err := errors.Join(up.Start(ctx), site.Start(ctx)); err != nil {
		return err
	}
	var one, many sample
	for i := range n + 100 {
		for _, x := range []struct {
			url string
			all *sample
		}{{up.URL, &one}, {site.Gateway[0].Addrs.HTTP, &many}} {
			began := time.Now()
			if err := runOne(ctx, client, x.url); err != nil {
				return err
			}
			if i >= 100 { // warm
				*x.all = append(*x.all, time.Since(began))
			}
		}
	}
	fmt.Printf("POST to final, one after the other, the two in turns; fake runtime, synced writes; one fsync of 1200 B here: %v\n", fsync(up.Dir))
	fmt.Printf("  up, one process     %s\n", one)
	fmt.Printf("  five processes      %s\n", many)
	fmt.Printf("  the hops cost       p50 %7.2f  p90 %7.2f ms: x%.2f\n", many.at(.5)-one.at(.5), many.at(.9)-one.at(.9), many.at(.5)/one.at(.5))
	return nil
}
