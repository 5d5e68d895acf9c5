// Package agent puts the parts of isthmus-agent together.
package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ads"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/appstatus"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/bootstrap"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/dns"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/envoy"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/health"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/roots"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/sds"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
	"github.com/isthmus-mesh/isthmus/internal/capture"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// part is one component; a failing part ends the agent with its name.
type part struct {
	name string
	run  func(context.Context) error
}

// Bootstrap returns the configuration that Envoy starts with.
func Bootstrap(c *config.Config) ([]byte, error) {
	node, err := node(c)
	if err != nil {
		return nil, err
	}
	p := bootstrap.Params{
		Node: node, AdminPort: c.Envoy.AdminPort, StatsPort: c.Envoy.StatsPort, MaxConnections: c.Envoy.MaxConnections,
		XDSSocket: filepath.Join(c.DataDir, "xds.sock"), Mark: captures(c),
	}
	if !c.EastWest() {
		p.SDSSocket = filepath.Join(c.DataDir, "sds.sock")
	}
	if path := c.Envoy.CustomBootstrap; path != "" {
		info, err := os.Stat(path)
		if err == nil && info.Size() > config.MaxSize {
			err = fmt.Errorf("%s has over %d bytes", path, config.MaxSize)
		}
		if err == nil {
			p.Custom, err = os.ReadFile(path)
		}
		if err != nil {
			return nil, diag.Hint(fmt.Errorf("custom bootstrap: %w", err), "set envoy.customBootstrap to a JSON or YAML file")
		}
	}
	return bootstrap.Build(p)
}

func node(c *config.Config) (bootstrap.Node, error) {
	addresses := c.Addresses
	if len(addresses) == 0 {
		var err error
		if addresses, err = config.InterfaceAddresses(); err != nil {
			return bootstrap.Node{}, err
		}
	}
	kind := "sidecar"
	if c.Role == config.Gateway || c.Role == config.Relay {
		kind = "router"
	}
	n := bootstrap.Node{
		Type: kind, Name: c.Name, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount, Cluster: c.Cluster,
		Network: c.Network, Locality: c.Locality, Addresses: addresses, Labels: maps.Clone(c.Labels),
	}
	if c.Pod != nil {
		n.Domain, n.Extra = c.Pod.Domain, c.Pod.Metadata
	}
	return n, nil
}

// captures reports whether the agent changes how the machine's traffic flows, and so must mark its own.
func captures(c *config.Config) bool { return c.Capture.Enabled && c.Role != config.Relay }

// CaptureConfig returns what capture is asked for.
func CaptureConfig(c *config.Config) (capture.Config, error) {
	out := capture.Config{
		Mark: bootstrap.Mark, ExcludeInboundPorts: c.Capture.ExcludeInboundPorts, ExcludeOutboundPorts: c.Capture.ExcludeOutboundPorts,
		ExcludeOutboundCIDRs: c.Capture.Prefixes(),
	}
	if c.Capture.DNS {
		servers, err := resolvers(c)
		if err != nil {
			return out, err
		}
		out.DNSPort, out.DNSServers = uint16(c.DNS.Port), dns.CaptureOnly(servers)
	}
	return out, nil
}

func resolvers(c *config.Config) ([]string, error) {
	if len(c.DNS.Upstream) > 0 {
		return c.DNS.Upstream, nil
	}
	return dns.Resolvers(c.DNS.ResolvConf)
}

// Run runs the agent until ctx ends, then takes leave in order: the control plane first, then Envoy with its open
// connections, then the rest.
func Run(ctx context.Context, c *config.Config, log *slog.Logger) error {
	held, err := lock(c.DataDir)
	if err != nil {
		return err
	}
	defer held.Close()
	a, err := build(c, log)
	if err != nil {
		return err
	}
	cleanCapture, err := a.applyCapture()
	if err != nil {
		return err
	}
	err = a.run(ctx)
	// A crash leaves the rules: better no traffic than traffic in clear. So does a failure once traffic has flowed.
	if err == nil || !a.flowed.Load() {
		err = errors.Join(err, cleanCapture())
	}
	return err
}

type agent struct {
	c      *config.Config
	log    *slog.Logger
	certs  *ca.Manager
	roots  *roots.Roots
	dialer *upstream.Dialer // with the workload's certificate
	node   bootstrap.Node
	reg    *prometheus.Registry

	parts  []part // run until everything else has ended
	main   part   // ended first, and in its own time
	leave  func() // tells the control plane; nil: nothing to tell
	checks []health.Check
	flowed atomic.Bool
	quit   chan struct{} // closed by a request to end
}

func build(c *config.Config, log *slog.Logger) (*agent, error) {
	a := &agent{c: c, log: log, reg: prometheus.NewRegistry(), quit: make(chan struct{})}
	var err error
	if a.roots, err = roots.New(roots.Config{File: c.RootCert, Dir: c.DataDir, TrustDomain: c.TrustDomain}); err != nil {
		return nil, err
	}
	if a.node, err = node(c); err != nil {
		return nil, err
	}
	up := upstream.Config{Addresses: c.ControlPlane.Addresses, ServerName: c.ControlPlane.ServerName, Roots: a.roots.Pool, Mark: captures(c), Cluster: c.Cluster}
	authority := up
	if len(c.ControlPlane.CA) > 0 {
		authority.Addresses, authority.ServerName = c.ControlPlane.CA, c.ControlPlane.CAName
	}
	anonymous := upstream.New(authority)
	up.Certificate = func() *tls.Certificate { return a.certs.TLS() }
	a.dialer, authority.Certificate = upstream.New(up), up.Certificate
	known := upstream.New(authority)
	connect := func(ctx context.Context, withCertificate bool) (*grpc.ClientConn, error) {
		if withCertificate {
			return known.Connect(ctx)
		}
		return anonymous.Connect(ctx)
	}
	keep := ""
	if c.Role == config.Machine {
		keep = c.DataDir
	}
	if a.certs, err = ca.New(ca.Config{
		ID: c.SPIFFE(), TTL: time.Duration(c.CertTTL), Sign: ca.Istio(connect, c.TokenFile, c.Pod != nil && c.Pod.TokenAlways), Roots: a.roots.Pool, Dir: keep, Log: log.With("part", "ca"),
	}); err != nil {
		return nil, err
	}
	if !a.certs.Ready() {
		if err := ca.CheckToken(c.TokenFile); err != nil {
			return nil, err
		}
	}
	a.parts = append(a.parts, part{"ca", a.certs.Run}, part{"roots", a.followRoots})
	a.gauge("certificate_expiry_timestamp_seconds", "When the workload's certificate expires, in seconds since 1970; 0 without one.", func() float64 {
		if cert, _ := a.certs.Current(); cert != nil {
			return float64(cert.Leaf.NotAfter.Unix())
		}
		return 0
	})
	a.checks = append(a.checks, func(context.Context) error {
		if !a.certs.Ready() {
			return errors.New("no valid certificate")
		}
		return nil
	})
	if c.Role == config.Relay {
		err = a.addRelay()
	} else {
		err = a.addEnvoy()
	}
	if err != nil {
		return nil, err
	}
	if c.Role == config.Machine || c.Capture.DNS {
		if err := a.addNames(); err != nil {
			return nil, err
		}
	}
	if c.Pod != nil && len(c.Pod.ApplicationPorts) > 0 {
		a.checks = append(a.checks, appstatus.Listening(a.node.Addresses[0], c.Pod.ApplicationPorts))
	}
	answers := health.New(health.Config{Port: c.ListenHealth, Checks: a.checks, Gather: a.reg, Log: log})
	a.parts = append(a.parts, part{"health", answers.Run})
	if c.Pod != nil && c.Pod.StatusPort != 0 {
		a.addStatus(answers)
	}
	return a, nil
}

// addStatus adds the port of a Pod that the kubelet's probes and Prometheus are led to.
func (a *agent) addStatus(answers *health.Server) {
	stats := a.c.Envoy.StatsPort
	if a.c.Role == config.Relay {
		stats = 0
	}
	s := appstatus.New(appstatus.Config{
		Port: a.c.Pod.StatusPort, Address: a.node.Addresses[0], Probes: a.c.Pod.AppProbes, Scrape: a.c.Pod.AppScrape, StatsPort: stats,
		Ready: answers.Handler(), Quit: sync.OnceFunc(func() { close(a.quit) }), Reg: a.reg, Log: a.log.With("part", "status"),
	})
	a.parts = append(a.parts, part{"status", s.Run})
}

func (a *agent) gauge(name, help string, value func() float64) {
	a.reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "isthmus", Subsystem: "agent", Name: name, Help: help}, value))
}

// followRoots renews the certificate soon after another root signs, so that the old one may be retired: not at once, since
// every agent does.
func (a *agent) followRoots(ctx context.Context) error {
	for {
		root, told := a.roots.Signer()
		cert, renewed := a.certs.Current()
		var due <-chan time.Time
		if !roots.Under(root, cert) {
			life := cert.Leaf.NotAfter.Sub(cert.Leaf.NotBefore)
			due = time.After(time.Second + rand.N(min(20*time.Second, max(life/10, time.Millisecond))))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-told:
		case <-renewed:
		case <-due:
			a.log.Info("another root signs: the certificate is renewed", "part", "ca")
			a.certs.Renew()
			select { // or fails, and is tried again there
			case <-renewed:
			case <-time.After(5 * time.Second):
			case <-ctx.Done():
				return nil
			}
		}
	}
}

// connect waits for the first certificate, then reaches the control plane with it.
func (a *agent) connect(ctx context.Context, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	for {
		cert, changed := a.certs.Current()
		if cert != nil {
			return a.dialer.Connect(ctx, opts...)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errors.New("no certificate yet")
		}
	}
}

func (a *agent) addEnvoy() error {
	config, err := Bootstrap(a.c)
	if err != nil {
		return err
	}
	sup, err := envoy.New(envoy.Config{
		Path: a.c.Envoy.Path, Dir: a.c.DataDir, Bootstrap: config, NodeID: a.node.ID(), AdminPort: a.c.Envoy.AdminPort,
		Concurrency: a.c.Envoy.Concurrency, LogLevel: a.c.Envoy.LogLevel, LogFile: a.c.Envoy.LogFile,
		Components: a.c.Envoy.ComponentLog, DrainTime: time.Duration(a.c.Envoy.DrainTime), MinDrain: time.Duration(a.c.Envoy.MinDrain), Log: a.log.With("part", "envoy"),
	})
	if err != nil {
		return err
	}
	a.main = part{"envoy", func(ctx context.Context) error {
		defer func() { a.flowed.Store(a.flowed.Load() || sup.Started()) }()
		return sup.Run(ctx)
	}}
	a.checks = append(a.checks, sup.Ready)
	a.gauge("envoy_restarts", "How often Envoy was started anew after it had died.", func() float64 { return float64(sup.Restarts()) })
	proxy := ads.New(ads.Config{
		Connect: func(ctx context.Context) (*grpc.ClientConn, error) { return a.connect(ctx) },
		Peek:    a.roots.Peek, Log: a.log.With("part", "ads"),
	})
	a.gauge("xds_streams", "Streams of Envoy that lead to a control plane.", func() float64 { return float64(proxy.Connected()) })
	a.parts = append(a.parts, part{"ads", func(ctx context.Context) error {
		return serveUnix(ctx, filepath.Join(a.c.DataDir, "xds.sock"), grpc.NewServer(proxy.ServerOptions()...))
	}})
	if !a.c.EastWest() {
		secrets := grpc.NewServer(grpc.MaxRecvMsgSize(1 << 20))
		sds.New(a.certs, a.log.With("part", "sds")).Register(secrets)
		a.parts = append(a.parts, part{"sds", func(ctx context.Context) error {
			return serveUnix(ctx, filepath.Join(a.c.DataDir, "sds.sock"), secrets)
		}})
	}
	return nil
}

// serveUnix serves on a socket that takes the place of a dead agent's.
func serveUnix(ctx context.Context, path string, s *grpc.Server) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove old socket: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("listen for Envoy: %w", err)
	}
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", path, err)
	}
	return nil
}

// applyCapture installs the rules and returns what removes them.
func (a *agent) applyCapture() (func() error, error) {
	nothing := func() error { return nil }
	if !captures(a.c) {
		return nothing, nil
	}
	rules, err := CaptureConfig(a.c)
	if err != nil {
		return nil, err
	}
	before, err := capture.Installed()
	if err != nil {
		return nil, err
	}
	if err := capture.Apply(rules); err != nil {
		return nil, err
	}
	if len(before) > 0 {
		a.flowed.Store(true) // an earlier agent was killed
	}
	return capture.Clean, nil
}

func (a *agent) run(ctx context.Context) error {
	// The parts end after main, so that Envoy drains with its control plane in reach.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	g, serving := errgroup.WithContext(serving)
	for _, p := range a.parts {
		g.Go(func() error { return named(serving, p) })
	}
	mainCtx, stopMain := context.WithCancel(serving)
	defer stopMain()
	g.Go(func() error {
		select {
		case <-ctx.Done():
		case <-a.quit:
		case <-serving.Done():
			stopMain()
			return nil
		}
		a.log.Info("stopping")
		if a.leave != nil {
			a.leave()
		}
		stopMain()
		return nil
	})
	g.Go(func() error {
		err := named(mainCtx, a.main)
		stopServing()
		return err
	})
	return g.Wait()
}

func named(ctx context.Context, p part) error {
	if err := p.run(ctx); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	return nil
}
