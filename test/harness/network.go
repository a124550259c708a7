package harness

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
)

// Network is one address of this machine and namespaces that reach nothing but it, each
// behind a veth pair. It needs root, and the commands ip, iptables and nsenter.
type Network struct {
	Host string // the address, for whom the namespaces shall reach
	NS   []*Namespace
}

// Namespace is a network namespace.
type Namespace struct {
	Addr string // its own address
	name string
}

// NewNetwork makes a network of n namespaces. Remove it.
func NewNetwork(ctx context.Context, n int) (*Network, error) {
	base, err := unusedAddresses()
	if err != nil {
		return nil, err
	}
	w := &Network{Host: base.String()}
	id := strings.ToLower(rand.Text()[:7])
	for i, addr := range addressesAfter(base, n) {
		ns := &Namespace{Addr: addr, name: fmt.Sprintf("dayfly-%s-%d", id, i+1)}
		out, in := fmt.Sprintf("df%s%dh", id, i+1), fmt.Sprintf("df%s%dn", id, i+1)
		w.NS = append(w.NS, ns)
		// Unnumbered: every pair has the same address on the host's side.
		for _, args := range [][]string{
			{"netns", "add", ns.name},
			{"link", "add", out, "type", "veth", "peer", "name", in, "netns", ns.name},
			{"addr", "add", w.Host, "peer", addr, "dev", out},
			{"link", "set", out, "up"},
			{"-n", ns.name, "addr", "add", addr, "peer", w.Host, "dev", in},
			{"-n", ns.name, "link", "set", in, "up"},
			{"-n", ns.name, "link", "set", "lo", "up"},
		} {
			if err := command(ctx, "ip", args...); err != nil {
				return nil, errors.Join(err, w.Remove())
			}
		}
	}
	return w, nil
}

// Remove takes the namespaces away, and with them their pairs and rules.
func (w *Network) Remove() (err error) {
	for _, ns := range w.NS {
		if _, e := os.Stat(ns.path()); e == nil {
			err = errors.Join(err, command(context.Background(), "ip", "netns", "del", ns.name))
		}
	}
	return err
}

// unusedAddresses draws a private block that is none of this machine's networks.
func unusedAddresses() (netip.Addr, error) {
	used, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Addr{}, err
	}
	for {
		base := netip.AddrFrom4([4]byte{10, byte(64 + mathrand.IntN(128)), byte(mathrand.IntN(256)), 1})
		free := true
		for _, u := range used {
			n, ok := u.(*net.IPNet)
			free = free && (!ok || !n.Contains(base.AsSlice()) && n.IP.Mask(net.CIDRMask(24, 32)).String() != base.Prev().String())
		}
		if free {
			return base, nil
		}
	}
}

func addressesAfter(a netip.Addr, n int) (list []string) {
	for range n {
		a = a.Next()
		list = append(list, a.String())
	}
	return list
}

func (ns *Namespace) path() string { return "/run/netns/" + ns.name }

// Enter is what stands before a command that shall run inside.
func (ns *Namespace) Enter() []string { return []string{"nsenter", "--net=" + ns.path(), "--"} }

// Cut lets packets vanish: those that come in, and those that go out too unless only
// the namespace shall be deaf. Connections stay as they are.
func (ns *Namespace) Cut(deaf bool) error {
	err := ns.policy("INPUT", "DROP")
	if err == nil && !deaf {
		err = ns.policy("OUTPUT", "DROP")
	}
	return err
}

// Heal lets packets through again.
func (ns *Namespace) Heal() error {
	return errors.Join(ns.policy("INPUT", "ACCEPT"), ns.policy("OUTPUT", "ACCEPT"))
}

func (ns *Namespace) policy(chain, to string) error {
	args := append(ns.Enter()[1:], "iptables", "-w", "-P", chain, to)
	return command(context.Background(), "nsenter", args...)
}

func command(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// OutboundOnly refuses every connection to the namespace, as a NAT does; its own go on.
func (ns *Namespace) OutboundOnly() error {
	args := append(ns.Enter()[1:], "iptables", "-w", "-A", "INPUT", "-p", "tcp", "!", "--syn", "-j", "ACCEPT")
	if err := command(context.Background(), "nsenter", args...); err != nil {
		return err
	}
	return ns.policy("INPUT", "DROP")
}
