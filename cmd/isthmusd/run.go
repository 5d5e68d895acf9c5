package main

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/acks"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/audit"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/conns"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/debug"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/operator"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/views"
	"github.com/isthmus-mesh/isthmus/discovery/config/refs"
	"github.com/isthmus-mesh/isthmus/discovery/gatewayapi"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
	"github.com/isthmus-mesh/isthmus/discovery/source/workload"
	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/dns/vip"
	"github.com/isthmus-mesh/isthmus/federation/gossip"
	"github.com/isthmus-mesh/isthmus/federation/ledger"
	"github.com/isthmus-mesh/isthmus/federation/peering"
	"github.com/isthmus-mesh/isthmus/federation/policy"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/federation/trust"
	"github.com/isthmus-mesh/isthmus/internal/cidr"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/tlsmux"
	"github.com/isthmus-mesh/isthmus/internal/version"
)

// part is one component with the name that its failure is reported under.
type part struct {
	name string
	run  func(context.Context) error
}

func (p part) runNamed(ctx context.Context) error {
	if err := p.run(ctx); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	return nil
}

// daemon is what the parts share while they are put together.
type daemon struct {
	cfg      Config
	log      *slog.Logger
	local    *mesh.Cluster
	ca       *identity.CA
	key      ledger.Key
	bundles  *trust.Bundles
	certs    certificates
	peering  *peering.Peering
	gossip   *gossiper
	machines *workload.Source
	kube     *kube.Source      // nil: no API server is read
	reviews  *identity.Reviews // nil, too, then
	grants   *token.Grants
	kept     *keeping
	// snapshots are the store's.
	snapshots mesh.Snapshots

	audit     *audit.Log
	behind    *acks.Acks
	conns     conns.Conns
	trusting  sync.Mutex
	peerRoots map[mesh.TrustDomain][]byte // as setTrust was told
}

// run puts the parts together and runs them until ctx ends or one fails.
func run(ctx context.Context, cfg Config, log *slog.Logger, reg *prometheus.Registry) error {
	ports, err := openPorts(cfg) // before anything is written
	if err != nil {
		return err
	}
	defer ports.close()
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return diag.Hint(fmt.Errorf("data directory: %w", err), "make %s writable, or name another dataDir", cfg.DataDir)
	}
	pages := openWeb(ports.metrics, reg)
	defer pages.close()
	d := &daemon{cfg: cfg, log: log, bundles: &trust.Bundles{}}
	if d.audit, err = audit.Open(cfg.Audit, log); err != nil {
		return err
	}
	defer d.audit.Close()
	if d.kept, err = keep(ctx, cfg, log); err != nil {
		return err
	}
	defer d.kept.close()
	d.ca, d.key = d.kept.ca, d.kept.key
	if d.certs, err = newCertificates(d.ca, mesh.TrustDomain(cfg.TrustDomain), cfg.Source.Kube.Namespace); err != nil {
		return err
	}
	d.local = &mesh.Cluster{
		ID: mesh.ClusterID(cfg.Cluster), TrustDomain: mesh.TrustDomain(cfg.TrustDomain), Network: mesh.NetworkID(cfg.Network),
		Gateways: addrs(cfg.Gateways), ControlPlane: addrs(cfg.Advertise), Roots: d.ca.Roots(),
	}
	d.local.PodRanges, _ = cidr.Parse(cfg.PodRanges) // validate has checked both
	d.local.ServiceRanges, _ = cidr.Parse(cfg.ServiceRanges)
	if err := d.bundles.Set(map[mesh.TrustDomain][]byte{d.local.TrustDomain: d.local.Roots}); err != nil {
		return err
	}

	sc := store.DefaultConfig(d.local)
	sc.Ranges, _ = vip.ParseRanges(cfg.VirtualRanges) // validate has checked them
	sc.ClusterNames, sc.PodNames = slices.Contains(cfg.Names, "cluster"), slices.Contains(cfg.Names, "pod")
	sc.Await, sc.Memory, sc.Check = append(cfg.Source.awaited(), "federation", "machine"), d.kept.memory, refs.Check
	sc.Derive = gatewayapi.Config{Deploy: cfg.Source.Kube.Enabled && cfg.Source.Kube.DeployGateways}.Derive
	if cfg.Source.Kube.Enabled {
		sc.ControlPlaneHost = mesh.LocalHost("isthmusd", cfg.Source.Kube.Namespace)
	}
	st := store.New(sc, log, reg)
	d.snapshots = st
	pages.use(st)
	d.kept.copy.Report(st.Sink("lastknown"))
	if d.machines, err = workload.New(workload.Config{Dir: cfg.data("machines"), Sink: st.Sink("machine"), Grace: cfg.MachineGrace, Log: log}); err != nil {
		return err
	}
	parts, err := d.readObjects(st, reg)
	if err != nil {
		return err
	}
	d.grants = token.NewGrants(d.kept.grants)
	if err := d.federate(st, reg); err != nil {
		return err
	}
	vs := views.New(st, log, reg)
	ads := xds.New(xds.Config{Feed: d.feed(vs), Identify: d.identify, Connected: d.connected, Log: log, Reg: reg})
	certs := identity.NewService(identity.ServiceConfig{CA: d.ca, Auth: d.authenticator(), Log: log, Reg: reg})
	issuer, err := token.NewIssuer(token.IssuerConfig{
		TrustDomain: d.local.TrustDomain, Key: ed25519Signer{d.key}, Grants: d.grants, VerifyRecord: func(r *federationv1.Record, k ed25519.PublicKey) error { return protocol.Verify(r, k) },
		AdmitCluster: d.admitCluster, AdmitMachine: d.admitMachine, Decided: d.audit.Redeemed, Log: log, Reg: reg,
		OnReuse: func(g token.Grant, r token.Redemption) {
			log.Warn("spent token was shown again by another key", "reason", "TokenReuse", "token", g.ID, "name", g.Subject, "by", r.String())
		},
	})
	if err != nil {
		return err
	}

	queue, adminQueue := tlsmux.NewQueue(tcpAddr(cfg.Listen)), tlsmux.NewQueue(tcpAddr(cfg.Listen))
	mux, err := tlsmux.Listen(tlsmux.Config{Listener: ports.tls, Log: log, Routes: append(d.adminRoutes(adminQueue), d.routes(ctx, issuer, queue)...)})
	if err != nil {
		return err
	}
	srv := grpc.NewServer(append(xds.ServerOptions(), grpc.Creds(tlsmux.Credentials()),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}))...)
	ads.Register(srv)
	certs.Register(srv)
	others := d.others(ads.Clients)
	d.behind = d.acks(st, ads, others)
	op, err := operator.Listen(operator.Config{
		Socket: cfg.Admin.Socket, Version: version.String(), Local: d.local, Snapshots: st, Peering: d.peering, Alive: d.gossip.Alive,
		Proxies: ads.Clients, Machines: d.machines.List, Problems: vs.Problems, Grants: d.grants, IssueToken: d.issueToken, Join: d.join, MintWorkload: d.mintWorkload, Probe: d.probe, Sources: d.sourceStates, Others: others, Wrap: d.byLeader, Log: log,
		Trust: d.kept.authority, Behind: d.behind.Behind, Audit: d.audit,
		Debug: debug.Handler(debug.Config{Snapshots: st, Clients: ads.Clients, Held: vs.Held, Others: others}),
	})
	if err != nil {
		return err
	}
	defer op.Close()
	adminParts, err := d.adminParts(adminQueue, ports.admin, op.Handler())
	if err != nil {
		return err
	}

	parts = append(parts, []part{
		{"discovery/source/workload", d.machines.Run},
		{"discovery/store", st.Run},
		{"views", vs.Run},
		{"federation/peering", d.peering.Run},
		{"federation/gossip", d.gossip.Run},
		{"tls port", mux.Run},
		{"grpc", serveGRPC(srv, queue)},
		{"operator", op.Run},
	}...)
	parts = append(append(append(parts, d.kept.parts(d, st)...), adminParts...), part{"roots of peers", d.behind.Run})
	hooks, err := d.webhooks(ports.webhook, reg)
	if err != nil {
		return err
	}
	parts = append(parts, hooks...)
	parts = append(parts, d.writeStatus(st, vs, reg)...)
	parts = append(parts, part{"metrics", pages.run})
	if ports.plaintext != nil {
		plain := grpc.NewServer(xds.ServerOptions()...)
		ads.Register(plain)
		log.Warn("xds is served without authentication", "addr", cfg.XDSPlaintext)
		parts = append(parts, part{"plaintext xds", serveGRPC(plain, ports.plaintext)})
	}
	log.Info("isthmusd runs", "addr", mux.Addr().String(), "trustdomain", cfg.TrustDomain, "network", cfg.Network)
	g, ctx := errgroup.WithContext(ctx)
	for _, p := range parts {
		g.Go(func() error { return p.runNamed(ctx) }) // a failing part ends the process with its name
	}
	return g.Wait()
}

// ports are what isthmusd listens on; those that are off are nil.
type ports struct{ tls, metrics, plaintext, webhook, admin net.Listener }

// openPorts opens all of them or none.
func openPorts(cfg Config) (p ports, err error) {
	for _, x := range []struct {
		to          *net.Listener
		field, addr string
	}{{&p.tls, "listen", cfg.Listen}, {&p.metrics, "metrics", cfg.Metrics}, {&p.plaintext, "xdsPlaintext", cfg.XDSPlaintext}, {&p.webhook, "webhook.listen", cfg.Webhook.Listen}, {&p.admin, "admin.listen", cfg.Admin.Listen}} {
		if x.addr == "" {
			continue
		}
		if *x.to, err = net.Listen("tcp", x.addr); err != nil {
			p.close()
			return ports{}, diag.Hint(fmt.Errorf("%s: %w", x.field, err), "another process has the port: end it, or set %s in the configuration", x.field)
		}
	}
	return p, nil
}

func (p ports) close() {
	for _, l := range []net.Listener{p.tls, p.metrics, p.plaintext, p.webhook, p.admin} {
		if l != nil {
			l.Close()
		}
	}
}

// federate makes the peer agent out of what was kept.
func (d *daemon) federate(st *store.Store, reg prometheus.Registerer) (err error) {
	if said := acks.Said(d.kept.state.Records, d.local.ID); said != nil {
		st.UpdateLocal(func(local *mesh.Cluster) { local.Trusts = said })
	}
	d.peering, err = peering.New(peering.Config{
		Core: protocol.Config{
			Name: d.local.ID, TrustDomain: d.local.TrustDomain, PublicKey: d.key.Public(), Sign: d.key.Sign,
			LateAfter: d.cfg.Federation.LateAfter, Lease: d.cfg.Federation.Lease, Beat: uint64(time.Now().Unix()), Seed: uint64(time.Now().UnixNano()),
		},
		State: d.kept.state, Log: d.kept.log, Lead: d.kept.leadership(), Local: d.local, Snapshots: st, Policy: policy.Options{AllowLoopback: d.cfg.allowLoopback}, Sink: st.Sink("federation"),
		Evicted: func(g string) { st.UpdateLocal(func(local *mesh.Cluster) { local.Evictions = g }) },
		Changed: d.audit.Standing, Trust: d.setTrust, TLS: d.peerTLS, Broadcast: func(key string, b []byte) { d.gossip.Broadcast(key, b) }, Logger: d.log, Reg: reg,
	})
	if err != nil {
		return err
	}
	gc := gossip.Config{
		Name: d.cfg.Cluster, Dial: d.dialGossip, OnPacket: d.peering.OnPacket, LocalState: d.peering.GossipState, RemoteState: d.peering.OnGossipState,
		OnChange: d.peering.OnMember, Members: d.peering.Members, Log: d.log,
		Advertise: netip.MustParseAddrPort("192.0.2.1:15443"), // of documentation (RFC 5737): members are dialled by name
	}
	if len(d.local.Gateways) > 0 {
		gc.Advertise = d.local.Gateways[0]
	}
	d.gossip = &gossiper{cfg: gc, lead: d.kept.election}
	return nil
}

// serveGRPC serves until ctx ends; then streams are cut: clients resume elsewhere or when we are back.
func serveGRPC(srv *grpc.Server, l net.Listener) func(context.Context) error {
	return func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, srv.Stop)
		defer stop()
		if err := srv.Serve(l); err != nil && ctx.Err() == nil {
			return err
		}
		return nil
	}
}

// web serves /metrics and /ready, from the start: while keys are waited for, too.
type web struct {
	srv       *http.Server
	ended     chan error
	snapshots atomic.Pointer[mesh.Snapshots]
}

// openWeb serves on the listener, until close; nil: nowhere.
func openWeb(l net.Listener, reg *prometheus.Registry) *web {
	w := &web{ended: make(chan error, 1)}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /ready", func(out http.ResponseWriter, _ *http.Request) {
		s := w.snapshots.Load()
		if s == nil {
			http.Error(out, "the keys of the cluster are not read yet", http.StatusServiceUnavailable)
			return
		}
		if snap, _ := (*s).Latest(); snap == nil { // readiness never waits for a peer, only for the own objects
			http.Error(out, "the first snapshot is not built yet", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(out, "ready")
	})
	w.srv = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	if l != nil {
		go func() { w.ended <- w.srv.Serve(l) }()
	}
	return w
}

// use has /ready look at the snapshots.
func (w *web) use(s mesh.Snapshots) { w.snapshots.Store(&s) }

func (w *web) close() { w.srv.Close() }

// run returns when ctx ends, or with why nothing is served any more.
func (w *web) run(ctx context.Context) error {
	select {
	case err := <-w.ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

func tcpAddr(s string) net.Addr {
	a, err := net.ResolveTCPAddr("tcp", s)
	if err != nil {
		return &net.TCPAddr{}
	}
	return a
}
