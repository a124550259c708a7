package docker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/moby/moby/api/types/jsonstream"
	"github.com/moby/moby/client"

	"dayfly.dev/schemas"
	"dayfly.dev/services/agent"
)

// pulls lets one pull of an image serve all who wait for it.
type pulls struct {
	mu      sync.Mutex
	running map[[2]string]*pull // guarded
}

type pull struct {
	cancel  context.CancelFunc
	waiting int            // guarded by pulls.mu
	said    agent.Progress // guarded by pulls.mu
	changed chan struct{}  // guarded by pulls.mu; closed when said changes
	done    chan struct{}
	err     error // valid once done is closed
}

// wait joins the pull of (name, auth), or begins it. When the last who waits has
// left, the pull is broken off. Each tells its own progress, so that a slow one keeps
// nobody else; it may miss sentences, never the latest.
func (ps *pulls) wait(ctx context.Context, r *Runtime, name, auth string, progress func(agent.Progress)) error {
	key := [2]string{name, auth}
	p, err := ps.join(r, key)
	if err != nil {
		return err
	}
	for told := (agent.Progress{}); ; {
		ps.mu.Lock()
		said, changed := p.said, p.changed
		ps.mu.Unlock()
		if said.Sentence != told.Sentence && progress != nil {
			progress(said)
			told = said
		}
		select {
		case <-p.done:
			return p.err
		case <-ctx.Done():
			ps.leave(p, key)
			return context.Cause(ctx)
		case <-changed:
		}
	}
}

func (ps *pulls) join(r *Runtime, key [2]string) (*pull, error) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p := ps.running[key]
	if p == nil {
		ctx, cancel := context.WithCancel(r.ctx)
		p = &pull{cancel: cancel, changed: make(chan struct{}), done: make(chan struct{})}
		if !r.goDo(func() { ps.run(ctx, r, p, key) }) {
			cancel()
			return nil, errors.New("the runtime is closed")
		}
		if ps.running == nil {
			ps.running = map[[2]string]*pull{}
		}
		ps.running[key] = p
	}
	p.waiting++
	return p, nil
}

func (ps *pulls) leave(p *pull, key [2]string) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	p.waiting--
	if p.waiting == 0 {
		p.cancel()
		if ps.running[key] == p {
			delete(ps.running, key) // who comes now begins anew
		}
	}
}

func (ps *pulls) run(ctx context.Context, r *Runtime, p *pull, key [2]string) {
	defer p.cancel()
	p.err = r.pullImage(ctx, key[0], key[1], func(s agent.Progress) {
		ps.mu.Lock()
		defer ps.mu.Unlock()
		if s.Sentence != p.said.Sentence {
			p.said = s
			close(p.changed)
			p.changed = make(chan struct{})
		}
	})
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.running[key] == p {
		delete(ps.running, key)
	}
	close(p.done)
}

func (r *Runtime) pullImage(ctx context.Context, name, auth string, say func(agent.Progress)) (err error) {
	began := time.Now()
	defer func() { r.metrics.done(ctx, "pull", began, err) }()
	short := name
	if ref, err := reference.ParseNormalizedNamed(name); err == nil {
		short = reference.FamiliarString(ref)
	}
	say(agent.Progress{Sentence: "pulling " + short})
	before, listed := r.stock.ids(ctx)
	resp, err := r.docker.ImagePull(ctx, name, client.ImagePullOptions{RegistryAuth: auth})
	if err != nil {
		return err
	}
	defer resp.Close()
	all := layers{}
	for m, err := range resp.JSONMessages(ctx) {
		if err != nil {
			return err
		}
		if m.Error != nil {
			return m.Error
		}
		if s := all.add(m); s != "" {
			say(agent.Progress{Sentence: "pulling " + short + ": " + s, Pull: all.sum()})
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if listed == nil { // else nobody knows whether it was there before: it is not ours
		r.stock.pulled(ctx, name, before)
	}
	return nil
}

// layers sums up what Docker tells of each layer.
type layers map[string]layer

type layer struct {
	now, all int64 // bytes
	got      bool
}

// add gives what there is to say after a message, "" if that is nothing new.
func (l layers) add(m jsonstream.Message) string {
	if m.ID == "" {
		return ""
	}
	one := l[m.ID]
	switch {
	case m.Status == "Pulling fs layer", m.Status == "Waiting":
	case strings.HasPrefix(m.Status, "Retrying in"):
		l[m.ID] = layer{}
		return "the registry broke off, trying again" // Docker counts seconds; we do not
	case m.Status == "Downloading":
		if p := m.Progress; p != nil {
			one.now, one.all = p.Current, max(p.Total, p.Current)
		}
	case m.Status == "Verifying Checksum", m.Status == "Download complete", m.Status == "Extracting", m.Status == "Pull complete":
		one.now, one.got = one.all, true
	default:
		return "" // of the tag, or a layer that is there already
	}
	l[m.ID] = one
	sum := l.sum()
	now, all, got := sum.Done, sum.Total, sum.Ready == sum.Layers
	const kib, mib = 1 << 10, 1 << 20
	switch {
	case got && (m.Status == "Extracting" || m.Status == "Pull complete"):
		return "unpacking"
	case all == 0:
		return ""
	case all < mib:
		return fmt.Sprintf("%.1f of %.1f KiB", float64(now)/kib, float64(all)/kib)
	}
	return fmt.Sprintf("%.1f of %.1f MiB", float64(now)/mib, float64(all)/mib)
}

// sum adds up the layers.
func (l layers) sum() *schemas.Pull {
	p := &schemas.Pull{Layers: len(l)}
	for _, one := range l {
		p.Done, p.Total = p.Done+one.now, p.Total+one.all
		if one.got {
			p.Ready++
		}
	}
	return p
}
