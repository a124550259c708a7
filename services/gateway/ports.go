package gateway

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"dayfly.dev/bus"
	"dayfly.dev/bus/session"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/ingress"
)

// PortRange is where tcp ports of tasks get ports of the gateways; off if it is zero.
type PortRange struct {
	Host     string // to listen on
	From, To int
}

func (r PortRange) size() int {
	if r.From == 0 {
		return 0
	}
	return r.To - r.From + 1
}

// ports gives tasks TCP ports of the site's gateways, and listens on all that are given.
// A port is a key that is created once: whoever creates it has it, until the task is
// final.
type ports struct {
	g      *Gateway
	within PortRange
	table  *bus.Table[schemas.PortLease]
	view   *bus.View[schemas.PortLease]

	over   chan schemas.TaskID // tasks that have become final
	orphan map[int]time.Time   // leases of no task that is known, and since when; of run

	mu      sync.Mutex
	ctx     context.Context     // under mu: nil while nothing is listened to
	open    map[int]*publicPort // under mu
	serving sync.WaitGroup
}

// publicPort is a port that this gateway listens on.
type publicPort struct {
	net.Listener
	lease schemas.PortLease // under ports.mu
}

func newPorts(g *Gateway, within PortRange) *ports {
	p := &ports{g: g, within: within, table: bus.NewTable(g.conn, schemas.BucketPorts, bus.JSON(func(l schemas.PortLease, op string) bool { return l.Op == op })),
		over: make(chan schemas.TaskID, 1024), orphan: map[int]time.Time{}, open: map[int]*publicPort{}}
	p.view = bus.NewView(g.conn, schemas.BucketPorts, func(_ string, _ nats.Header, data []byte) (l schemas.PortLease, err error) {
		return l, schemas.Decode(data, &l)
	}, bus.ViewOptions[schemas.PortLease]{OnChange: p.changed})
	return p
}

// run listens until ctx ends.
func (p *ports) run(ctx context.Context) error {
	if p.within.size() == 0 {
		<-ctx.Done()
		return nil
	}
	p.mu.Lock()
	p.ctx = ctx
	p.mu.Unlock()
	defer p.serving.Wait()
	defer p.closeAll()
	var view sync.WaitGroup
	defer view.Wait()
	view.Go(func() { _ = p.view.Run(ctx) }) // it ends with ctx alone
	tick := time.NewTicker(p.g.cfg.PortSweep)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case id := <-p.over:
			p.release(ctx, id)
		case <-tick.C:
			p.sweep(ctx)
		}
	}
}

func (p *ports) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ctx = nil
	for n, l := range p.open {
		p.closeLocked(n, l)
	}
}

func (p *ports) closeLocked(n int, l *publicPort) {
	delete(p.open, n)
	_ = l.Close()
	p.g.outside.Ports.Set(float64(len(p.open)))
}

// misfit says why a task cannot get the ports that it asks for, nil if it can.
func (p *ports) misfit(spec schemas.Spec) *schemas.Error {
	if e := p.off(spec); e != nil {
		return e
	}
	if n := tcpPorts(spec); n > 0 && p.view.Len()+n > p.within.size() {
		return noPorts()
	}
	return nil
}

// off says that this site gives no ports, or has fewer in all than the task asks for.
func (p *ports) off(spec schemas.Spec) *schemas.Error {
	if size := p.within.size(); size > 0 {
		if tcpPorts(spec) <= size {
			return nil
		}
		return &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeNotAllowed, Field: "ports",
			Detail: fmt.Sprintf("this site has %d TCP ports for all tasks; its operator widens --tcp-ports", size)}
	}
	for i, port := range spec.Ports {
		if port.Protocol == schemas.ProtocolTCP {
			return &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeNotAllowed, Field: fmt.Sprintf("ports.%d.protocol", i),
				Detail: "this site gives tasks no TCP ports; its operator does with --tcp-ports"}
		}
	}
	return nil
}

func tcpPorts(spec schemas.Spec) (n int) {
	for _, port := range spec.Ports {
		if port.Protocol == schemas.ProtocolTCP {
			n++
		}
	}
	return n
}

func noPorts() *schemas.Error {
	return &schemas.Error{Status: http.StatusServiceUnavailable, Code: schemas.CodeNoPorts, RetryAfter: schemas.Duration(5 * time.Second),
		Detail: "all TCP ports of this site are taken; wait until a task with one ends, or its operator widens --tcp-ports"}
}

// take gives a task its ports, and none if it cannot have all: those of former, the task
// that was final and whose place it takes, while nobody else has them.
func (p *ports) take(ctx context.Context, id schemas.TaskID, spec schemas.Spec, former schemas.Record) (map[string]int, error) {
	if tcpPorts(spec) == 0 {
		return nil, nil
	}
	if e := p.off(spec); e != nil {
		return nil, e
	}
	select {
	case <-p.view.Ready():
	case <-ctx.Done():
		return nil, unavailable()
	}
	taken := map[string]int{}
	var err error
	for _, port := range spec.Ports {
		if port.Protocol != schemas.ProtocolTCP {
			continue
		}
		lease := schemas.PortLease{Task: id, Name: port.Name, Op: meta("gateway").Op}
		n := former.Public[port.Name]
		if n < p.within.From || n > p.within.To || !p.keep(ctx, n, lease, former.ID) {
			n, err = p.takeOne(ctx, lease)
		}
		if err != nil {
			p.give(ctx, id, taken)
			return nil, err
		}
		taken[port.Name] = n
	}
	return taken, nil
}

// keep takes a port that a final task had, if it has it still or nobody does.
func (p *ports) keep(ctx context.Context, n int, lease schemas.PortLease, former schemas.TaskID) bool {
	key := strconv.Itoa(n)
	e, err := p.table.Get(ctx, key)
	switch {
	case err == nil && e.Value.Task == former && e.Value.Name == lease.Name:
		e, err = p.table.Replace(ctx, e, lease, lease.Op) // whoever frees it sees that it is another's
	case errors.Is(err, bus.ErrNotFound) && p.listen(n, lease):
		if e, err = p.table.Create(ctx, key, lease, lease.Op); err != nil {
			p.unlisten(n, lease)
		}
	default:
		return false
	}
	if err == nil {
		p.view.Observe(key, lease, e.Revision)
	}
	return err == nil
}

// takeOne tries the ports in an order of chance: one that was freed just now is not the
// next to be given.
func (p *ports) takeOne(ctx context.Context, lease schemas.PortLease) (int, error) {
	for _, i := range rand.Perm(p.within.size()) {
		n := p.within.From + i
		if _, _, held := p.view.Get(strconv.Itoa(n)); held {
			continue
		}
		// It is listened on first: a port that something else has is of no use.
		if !p.listen(n, lease) {
			continue
		}
		e, err := p.table.Create(ctx, strconv.Itoa(n), lease, lease.Op)
		if err == nil {
			p.view.Observe(e.Key, lease, e.Revision)
			return n, nil
		}
		p.unlisten(n, lease)
		if !errors.Is(err, bus.ErrConflict) {
			return 0, err
		}
	}
	return 0, noPorts()
}

// give frees ports of a task that was not made.
func (p *ports) give(ctx context.Context, id schemas.TaskID, taken map[string]int) {
	for _, n := range taken {
		key := strconv.Itoa(n)
		e, err := p.table.Get(ctx, key)
		if err == nil && e.Value.Task == id {
			err = p.table.Delete(ctx, key, e.Revision)
		}
		if err != nil && !errors.Is(err, bus.ErrNotFound) {
			p.g.log.Debug().Err(err).Int("port", n).Msg("port not given back; the sweep does it")
		}
	}
}

// taskChanged hears of tasks that are over.
func (p *ports) taskChanged(c bus.Change[*item]) {
	if p.within.size() == 0 || c.New == nil || c.New.ports == "" || !c.New.state.Final() || c.HadOld && c.Old.state.Final() {
		return
	}
	select {
	case p.over <- schemas.TaskID(c.Key):
	default: // the sweep finds it
	}
}

// release frees the ports of a task that is final.
func (p *ports) release(ctx context.Context, id schemas.TaskID) {
	p.view.Range(func(key string, lease schemas.PortLease, revision uint64) bool {
		if lease.Task == id {
			p.free(ctx, key, revision)
		}
		return true
	})
}

func (p *ports) free(ctx context.Context, key string, revision uint64) {
	if err := p.table.Delete(ctx, key, revision); err != nil && !errors.Is(err, bus.ErrConflict) && ctx.Err() == nil {
		p.g.log.Debug().Err(err).Str("port", key).Msg("port not freed; the sweep does it")
	}
}

// sweep frees what belongs to no task that can still run, and listens where that failed.
func (p *ports) sweep(ctx context.Context) {
	seen := map[int]time.Time{}
	p.view.Range(func(key string, lease schemas.PortLease, revision uint64) bool {
		n, err := strconv.Atoi(key)
		if err != nil {
			return true
		}
		it, _, ok := p.g.tasks.Get(string(lease.Task))
		switch {
		case ok && it.state.Final():
			p.free(ctx, key, revision)
			return true
		case ok && names(it, lease, n):
			p.follow(n, lease)
			return true
		}
		since, before := p.orphan[n]
		if !before {
			since = time.Now()
		}
		seen[n] = since
		if time.Since(since) < p.g.cfg.PortGrace {
			return true
		}
		r, err := p.g.records.Get(ctx, string(lease.Task))
		if errors.Is(err, bus.ErrNotFound) || err == nil && (r.Value.State.Final() || r.Value.Public[lease.Name] != n) {
			p.g.log.Warn().Str("task", string(lease.Task)).Int("port", n).Msg("port of no task freed")
			p.free(ctx, key, revision)
		}
		return ctx.Err() == nil
	})
	p.orphan = seen
}

// names says whether the task knows of its lease.
func names(it *item, lease schemas.PortLease, n int) bool {
	for _, port := range schemas.ParsePortsHeader(it.ports) {
		if port.Name == lease.Name && port.Public == n {
			return true
		}
	}
	return false
}

// changed follows the view.
func (p *ports) changed(c bus.Change[schemas.PortLease]) {
	n, err := strconv.Atoi(c.Key)
	if err != nil || n < 1 || n > 65535 {
		return
	}
	if c.Deleted {
		p.unlisten(n, c.Old)
		return
	}
	p.follow(n, c.New)
}

// follow listens on a port for whom it belongs to.
func (p *ports) follow(n int, lease schemas.PortLease) {
	p.mu.Lock()
	if l := p.open[n]; l != nil {
		l.lease = lease
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	if !p.listen(n, lease) {
		p.g.outside.PortErrors.Inc()
		p.g.log.Warn().Int("port", n).Str("task", string(lease.Task)).Msg("cannot listen on the port of a task; trying again")
	}
}

// listen opens a port, if nobody here has it.
func (p *ports) listen(n int, lease schemas.PortLease) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx == nil || p.open[n] != nil {
		return false
	}
	ln, err := net.Listen("tcp", net.JoinHostPort(p.within.Host, strconv.Itoa(n)))
	if err != nil {
		return false
	}
	l := &publicPort{Listener: ln, lease: lease}
	p.open[n] = l
	p.g.outside.Ports.Set(float64(len(p.open)))
	ctx := p.ctx
	p.serving.Go(func() { p.accept(ctx, l) })
	return true
}

// unlisten closes a port if it is still that of lease.
func (p *ports) unlisten(n int, lease schemas.PortLease) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l := p.open[n]; l != nil && l.lease.Task == lease.Task && l.lease.Name == lease.Name {
		p.closeLocked(n, l)
	}
}

func (p *ports) accept(ctx context.Context, l *publicPort) {
	for {
		c, err := l.Accept()
		switch {
		case err == nil:
			p.serving.Go(func() { p.serve(ctx, l, c) })
		case errors.Is(err, net.ErrClosed):
			return
		default: // such as too many open files
			select {
			case <-ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}

// tcpPatience is how long a connection waits for its task to run.
const tcpPatience = 10 * time.Second

// serve joins a connection from outside to the task.
func (p *ports) serve(ctx context.Context, l *publicPort, c net.Conn) {
	p.mu.Lock()
	lease := l.lease
	p.mu.Unlock()
	open := p.g.outside.Open.WithLabelValues(ingress.KindTCP)
	open.Inc()
	defer open.Dec()
	stream, leave, err := p.reach(ctx, lease)
	if err != nil {
		_ = c.Close() // there is no language in which to say why
		return
	}
	defer leave()
	session.Join(ctx, stream, p.g.outside.Outside(c, ingress.KindTCP))
}

func (p *ports) reach(ctx context.Context, lease schemas.PortLease) (*session.Stream, func(), error) {
	leave, err := p.g.visits.enter(lease.Task)
	if err != nil {
		return nil, nil, err
	}
	it, err := p.g.whenRunning(ctx, lease.Task, tcpPatience)
	var stream *session.Stream
	if err == nil {
		err = noEndpoint()
		for _, port := range schemas.ParsePortsHeader(it.ports) {
			if port.Name == lease.Name {
				stream, err = p.g.openSession(ctx, lease.Task, schemas.Open{Kind: schemas.SessionDial, Port: port.Port})
			}
		}
	}
	if err != nil {
		leave()
		return nil, nil, err
	}
	return stream, leave, nil
}
