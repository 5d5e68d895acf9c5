// Package relay is the built-in east-west gateway. It takes the Envoy resources that eastwest/gateway makes, reads the
// server name of each TLS connection's ClientHello, finds the address by one map look-up, and passes octets on. It
// terminates no TLS, holds no key and answers nothing: a connection that leads nowhere is closed.
//
// It runs on Linux: octets move by splice(2).
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// The resource types to subscribe to and to hand to Apply.
const (
	ListenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	ClusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
)

// listenerName is the listener that the relay takes its chains from.
const listenerName = "eastwest"

// Config is what a Relay needs. Zero values mean the default.
type Config struct {
	// Listen is host:port; ":15443" by default, which is IPv4 and IPv6.
	Listen string
	// HelloTimeout is how long a client may take to send its ClientHello; 5 s by default. More helps clients on bad
	// links, less frees the places of those that send nothing.
	HelloTimeout time.Duration
	// DialTimeout is for one address; 2 s by default. Three instances are tried.
	DialTimeout time.Duration
	// IdleTimeout closes connections on which no octet passed for that long, up to a quarter more; 1 h by default.
	IdleTimeout time.Duration
	// DrainTimeout is how long open connections may go on when Run is asked to end; 25 s by default.
	DrainTimeout time.Duration
	// MaxConnections is how many may be open at once; 65536 by default. Each takes two descriptors and about 8 KiB.
	MaxConnections int
	Log            *slog.Logger
	Reg            prometheus.Registerer
}

// Relay forwards TLS connections by server name.
type Relay struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	pipes   pipes
	peeks   peekBuffers
	table   atomic.Pointer[table]
	address atomic.Pointer[net.TCPAddr] // set while listening
	tick    atomic.Uint32               // grows four times per IdleTimeout

	config   sync.Mutex // guards what Apply and Update build the table from
	chains   []*chain
	clusters map[string]*upstream
	heard    map[string]bool // resource types heard of

	mu   sync.Mutex
	open map[*link]struct{}
}

// New returns a Relay that does not listen yet.
func New(cfg Config) *Relay {
	if cfg.Listen == "" {
		cfg.Listen = ":15443"
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&cfg.HelloTimeout, 5 * time.Second}, {&cfg.DialTimeout, 2 * time.Second},
		{&cfg.IdleTimeout, time.Hour}, {&cfg.DrainTimeout, 25 * time.Second},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	if cfg.MaxConnections <= 0 {
		cfg.MaxConnections = 65536
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	r := &Relay{
		cfg: cfg, log: cfg.Log, metrics: newMetrics(cfg.Reg),
		clusters: map[string]*upstream{}, heard: map[string]bool{}, open: map[*link]struct{}{},
	}
	r.table.Store(&table{})
	return r
}

// Addr returns where the relay listens, the zero value while it does not.
func (r *Relay) Addr() netip.AddrPort {
	if a := r.address.Load(); a != nil {
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

// Ready reports whether the relay listens and has heard of listeners and of clusters.
func (r *Relay) Ready() bool {
	r.config.Lock()
	defer r.config.Unlock()
	return r.address.Load() != nil && r.heard[ListenerType] && r.heard[ClusterType]
}

// Lookup returns the addresses that a server name leads to, and whether there is a route for it.
func (r *Relay) Lookup(name string) (addrs []netip.AddrPort, ok bool) {
	route, ok := (*r.table.Load())[name]
	if ok && route.up != nil {
		for _, i := range route.up.instances {
			addrs = append(addrs, i.addrs...)
		}
	}
	return addrs, ok
}

// Update replaces all routes by those of the listener "eastwest" and the clusters. An error changes nothing. Open
// connections go on either way.
func (r *Relay) Update(listeners []*listenerv3.Listener, clusters []*clusterv3.Cluster) error {
	var chains []*chain
	ups := make(map[string]*upstream, len(clusters))
	var errs []error
	for _, l := range listeners {
		if l.GetName() == listenerName {
			cs, err := parseListener(l)
			chains, errs = cs, append(errs, err)
		}
	}
	for _, c := range clusters {
		up, err := parseCluster(c)
		ups[c.GetName()], errs = up, append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		r.metrics.updates.WithLabelValues("refused").Inc()
		return fmt.Errorf("update the routes: %w", err)
	}
	r.config.Lock()
	defer r.config.Unlock()
	for name, up := range ups { // clusters that stay keep their turn
		if old := r.clusters[name]; old != nil && old.equal(up) {
			ups[name] = old
		}
	}
	r.chains, r.clusters = chains, ups
	r.heard[ListenerType], r.heard[ClusterType] = true, true
	r.publish()
	r.metrics.updates.WithLabelValues("ok").Inc()
	return nil
}

// Apply takes one delta response of one type. A resource that the relay cannot serve is named in the error and stays as
// it was; all others are taken over. Open connections go on.
func (r *Relay) Apply(typeURL string, added []*discoveryv3.Resource, removed []string) error {
	if typeURL != ListenerType && typeURL != ClusterType {
		return nil
	}
	r.config.Lock()
	defer r.config.Unlock()
	var errs []error
	for _, res := range added {
		errs = append(errs, r.take(typeURL, res))
	}
	for _, name := range removed {
		if typeURL == ClusterType {
			delete(r.clusters, name)
		} else if name == listenerName {
			r.chains = nil
		}
	}
	r.heard[typeURL] = true
	r.publish()
	if err := errors.Join(errs...); err != nil {
		r.metrics.updates.WithLabelValues("refused").Inc()
		return err
	}
	r.metrics.updates.WithLabelValues("ok").Inc()
	return nil
}

func (r *Relay) take(typeURL string, res *discoveryv3.Resource) error {
	if typeURL == ListenerType {
		l := &listenerv3.Listener{}
		if err := res.GetResource().UnmarshalTo(l); err != nil {
			return fmt.Errorf("listener %s: %w", res.GetName(), err)
		}
		if l.GetName() != listenerName {
			return nil
		}
		chains, err := parseListener(l)
		if err == nil {
			r.chains = chains
		}
		return err
	}
	c := &clusterv3.Cluster{}
	if err := res.GetResource().UnmarshalTo(c); err != nil {
		return fmt.Errorf("cluster %s: %w", res.GetName(), err)
	}
	up, err := parseCluster(c)
	if err != nil {
		return err
	}
	if old := r.clusters[c.GetName()]; old == nil || !old.equal(up) {
		r.clusters[c.GetName()] = up
	}
	return nil
}

// publish builds and swaps the table; the caller holds r.config.
func (r *Relay) publish() {
	t := newTable(r.chains, r.clusters)
	r.table.Store(&t)
	r.metrics.routes.Set(float64(len(t)))
	r.log.Debug("relay routes changed", "chains", len(r.chains), "clusters", len(r.clusters), "routes", len(t))
}

func (u *upstream) equal(v *upstream) bool {
	return slices.EqualFunc(u.instances, v.instances, func(a, b instance) bool {
		return a.weight == b.weight && slices.Equal(a.addrs, b.addrs)
	})
}

// Run listens and forwards until ctx ends, then lets open connections go on for Config.DrainTimeout. It returns nil
// when ctx ended it.
func (r *Relay) Run(ctx context.Context) error {
	listen := net.ListenConfig{KeepAliveConfig: keepalive}
	l, err := listen.Listen(ctx, "tcp", r.cfg.Listen)
	if err != nil {
		return diag.Hint(fmt.Errorf("relay: listen on %s: %w", r.cfg.Listen, err), "free the port, or choose another address for the east-west gateway")
	}
	ln := l.(*net.TCPListener)
	r.address.Store(ln.Addr().(*net.TCPAddr))
	r.log.Info("relay listens", "address", ln.Addr().String())

	dialCtx, endDials := context.WithCancel(context.WithoutCancel(ctx))
	defer endDials()
	var links, own sync.WaitGroup
	stopSweep := make(chan struct{})
	own.Go(func() { r.sweep(stopSweep) })
	stopAccept := context.AfterFunc(ctx, func() {
		r.address.Store(nil)
		_ = ln.Close()
	})
	err = r.accept(ctx, ln, func(c *net.TCPConn) { links.Go(func() { r.serve(dialCtx, c) }) })
	stopAccept()
	r.address.Store(nil)
	_ = ln.Close()

	drained := make(chan struct{})
	own.Go(func() { links.Wait(); close(drained) })
	deadline := time.NewTimer(r.cfg.DrainTimeout)
	defer deadline.Stop()
	select {
	case <-drained:
	case <-deadline.C:
		endDials()
		r.log.Info("relay closes connections that did not end in time", "count", r.closeAll(func(*link) bool { return true }))
		<-drained
	}
	close(stopSweep)
	own.Wait()
	return err
}

// accept hands every connection to serve until ctx ends. Running out of descriptors does not end it.
func (r *Relay) accept(ctx context.Context, ln *net.TCPListener, serve func(*net.TCPConn)) error {
	wait := 5 * time.Millisecond
	for {
		c, err := ln.AcceptTCP()
		switch {
		case err == nil:
			wait = 5 * time.Millisecond
			serve(c)
			continue
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("relay: accept on %s: %w", r.cfg.Listen, err)
		}
		r.log.Warn("relay cannot accept connections", "err", err, "wait", wait)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
		wait = min(2*wait, time.Second)
	}
}

// sweep closes links on which nothing passed for the idle timeout. It looks four times in that time, so that passing
// octets costs no look at a clock.
func (r *Relay) sweep(stop <-chan struct{}) {
	ticker := time.NewTicker(max(r.cfg.IdleTimeout/4, time.Millisecond))
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			now := r.tick.Add(1)
			n := r.closeAll(func(l *link) bool { return now-l.active.Load() > 4 })
			r.metrics.idleClosed.Add(float64(n))
		case <-stop:
			return
		}
	}
}

// closeAll closes the links that are chosen and returns how many.
func (r *Relay) closeAll(chosen func(*link) bool) int {
	r.mu.Lock()
	links := slices.Collect(maps.Keys(r.open))
	r.mu.Unlock()
	n := 0
	for _, l := range links {
		if chosen(l) && l.close() {
			n++
		}
	}
	return n
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
