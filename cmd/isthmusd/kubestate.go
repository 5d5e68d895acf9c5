package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/lastknown"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/vips"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/federation/kubestate"
	"github.com/isthmus-mesh/isthmus/federation/peering"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/trust"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Objects in the root namespace.
const (
	keysSecret       = "isthmus-keys"
	federationKeyKey = "federation-key.pem"
	tokenKeyKey      = "workload-token-key.pem"
)

// kubeState keeps the state in the Kubernetes API. It is the peering.Leadership of a replica.
type kubeState struct {
	cfg      Config
	log      *slog.Logger
	client   *kubestate.Client
	rest     *rest.Config
	ledger   *kubestate.Ledger
	election *kubestate.Election
	ca       *authority.Authority
	memory   *vips.Memory
	copy     *lastknown.Store
	keeping  sync.Mutex
	keys     keys
	resumed  *resumed // nil: the state was read
	replica  string
	d        *daemon // set before anything runs
}

// openKube reads the state, or, while the API server is away, what was kept of it. Where nothing was it waits: without
// keys nobody can be served.
func (k *keeping) openKube(ctx context.Context, cfg Config, log *slog.Logger) error {
	where := cfg.State
	if where.Kubeconfig == "" && where.Context == "" {
		where.Kubeconfig, where.Context = cfg.Source.Kube.Kubeconfig, cfg.Source.Kube.Context
	}
	rc, err := restConfig(where)
	if err != nil {
		return err
	}
	client, err := kubestate.NewClient(rc, cmp.Or(cfg.State.Namespace, cfg.Source.Kube.Namespace))
	if err != nil {
		return err
	}
	s := &kubeState{cfg: cfg, log: log, client: client, rest: rc, copy: k.copy}
	k.authority = authority.New(cfg.authority(s.client, log))
	s.ca = k.authority
	addr, err := replicaAddress(cfg)
	if err != nil {
		return err
	}
	if err := s.await(ctx, k); err != nil {
		return err
	}
	host, _ := os.Hostname()
	s.replica = kubestate.Identity(cmp.Or(cfg.State.Replica, os.Getenv("POD_NAME"), host), addr)
	ec := kubestate.DefaultElection()
	ec.Client, ec.Identity, ec.Log = client, s.replica, log
	ec.Duration, ec.Renew = cfg.State.Lease, cfg.State.Lease*2/3
	ec.Ready = func(ctx context.Context) error { return s.ready(ctx) }
	s.election = kubestate.NewElection(ec)
	s.memory = vips.New(vips.Config{Client: client, File: store.FileMemory(cfg.data("addresses.json")), Leads: func() bool { here, _ := s.leads(); return here }, Log: log})
	k.kube, k.election, k.grants, k.log, k.memory = s, s.election, client.Grants(), s.ledger, s.memory
	return nil
}

// restConfig finds the API server.
func restConfig(c StateConfig) (*rest.Config, error) {
	if c.Kubeconfig == "" && c.Context == "" {
		rc, err := rest.InClusterConfig()
		if err != nil {
			return nil, diag.Hint(fmt.Errorf("state.in is kubernetes: %w", err), "run isthmusd in a Pod, or set state.kubeconfig")
		}
		return rc, nil
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = c.Kubeconfig
	rc, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: c.Context}).ClientConfig()
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("state.kubeconfig: %w", err), "name a kubeconfig and a context of it")
	}
	return rc, nil
}

// replicaAddress is where other replicas reach this one.
func replicaAddress(cfg Config) (netip.AddrPort, error) {
	if cfg.State.Address != "" {
		a, err := netip.ParseAddrPort(cfg.State.Address)
		if err != nil {
			return a, fmt.Errorf("state.address: %q is not IP:PORT", cfg.State.Address)
		}
		return a, nil
	}
	host, port, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("listen: %q is not ADDRESS:PORT", cfg.Listen)
	}
	if ip := os.Getenv("POD_IP"); ip != "" {
		host = ip
	}
	a, err := netip.ParseAddrPort(net.JoinHostPort(host, port))
	if err != nil || a.Addr().IsUnspecified() {
		return a, diag.Hint(fmt.Errorf("other replicas do not know where to reach this one"), "set POD_IP, or state.address in the configuration")
	}
	return a, nil
}

// since gives times since now.
func since(s protocol.State, heard map[mesh.ClusterID]time.Time) protocol.State {
	s.LastHeard = map[mesh.ClusterID]time.Duration{}
	for id, at := range heard {
		if !at.IsZero() {
			s.LastHeard[id] = min(time.Until(at), 0)
		}
	}
	return s
}

// ready blocks until this replica knows the cluster: before its first snapshot it would declare that nothing is exported,
// and before the state was read it does not know what was said under the numbers it would use.
func (s *kubeState) ready(ctx context.Context) error {
	if s.resumed != nil {
		select {
		case <-s.resumed.over:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for {
		snap, changed := s.d.snapshots.Latest()
		if snap != nil {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// parts are what runs beside the others.
func (s *kubeState) parts(d *daemon, st *store.Store) []part {
	s.d = d
	return []part{
		{"leader election", s.election.Run},
		{"leader as it is kept", s.keepLeader},
		{"federation/kubestate", s.ledger.Run},
		{"certificate authority", func(ctx context.Context) error {
			l := d.listener(st)
			l.Keep, l.Confirmed = s.keep, s.confirmation(st.Sink("state"))
			return s.ca.Run(ctx, l)
		}},
		{"virtual addresses", func(ctx context.Context) error { return s.memory.Run(ctx, st) }},
	}
}

// leads reports whether this replica is the leader, and if not where that is.
func (s *kubeState) leads() (bool, netip.AddrPort) {
	t, _ := s.term()
	return t.Leading, t.Address()
}

// Current implements peering.Leadership.
func (s *kubeState) Current() (peering.Standing, <-chan struct{}) {
	t, changed := s.term()
	st := peering.Standing{Leads: t.Leading, Term: t.Number, Known: t.Known}
	if !t.Leading {
		st.Leader = t.Address()
	}
	return st, changed
}

// Begin implements peering.Leadership.
func (s *kubeState) Begin(ctx context.Context, held protocol.State) (protocol.State, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	local := mesh.ClusterID(s.cfg.Cluster)
	epoch, err := s.ledger.Claim(ctx, held.Marks[local].Epoch)
	if err != nil {
		return held, err
	}
	kept, heard, err := s.ledger.Load(ctx) // after the claim nobody else writes it
	if err != nil {
		return held, err
	}
	out := held.Join(local, since(kept, heard))
	out.Marks[local] = protocol.Mark{Epoch: epoch}
	var all []protocol.Action
	for _, r := range out.Records {
		all = append(all, protocol.Persist{Record: r})
	}
	s.log.Info("speaks for the cluster", "part", "state", "epoch", epoch, "records", len(out.Records))
	return out, s.ledger.Commit(all)
}

// Dial implements peering.Leadership.
func (s *kubeState) Dial(leader netip.AddrPort) (*grpc.ClientConn, error) {
	cfg := trust.ClientConfig(trust.Config{
		Local: s.d.certs.control.Certificate, Bundles: s.d.bundles, Authorize: trust.Exactly("spiffe://" + s.cfg.TrustDomain + pathControlPlane),
	})
	cfg.ServerName = sni.XDS.Name(mesh.TrustDomain(s.cfg.TrustDomain))
	return grpc.NewClient("passthrough:///"+leader.String(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
}

// Node implements peering.Leadership.
func (s *kubeState) Node() string { return s.replica }
