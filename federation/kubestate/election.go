package kubestate

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// Term says who leads.
type Term struct {
	// Leading: this replica does.
	Leading bool
	// Number grows with each time that this replica begins to lead.
	Number uint64
	// Leader is the identity of the holder; empty: nobody, or not known yet.
	Leader string
	// Known: the Lease was read. Until then nobody knows whether there is a leader.
	Known bool
}

// Address returns where the leader's TLS port is, out of its identity; invalid when the identity does not say it.
func (t Term) Address() netip.AddrPort {
	_, addr, _ := strings.Cut(t.Leader, "@")
	a, _ := netip.ParseAddrPort(addr)
	return a
}

// Identity makes the identity of a replica: its Pod, and where its TLS port is.
func Identity(pod string, addr netip.AddrPort) string { return pod + "@" + addr.String() }

// ElectionConfig describes a candidate.
type ElectionConfig struct {
	Client   *Client
	Lease    string // its name
	Identity string // made by Identity
	// Duration is how long others wait for a holder that is silent. Lowering it fails over sooner, and takes a slow API
	// server for a dead leader. Whole seconds.
	Duration time.Duration
	// Renew is how long a holder tries to renew; Retry the time between tries.
	Renew, Retry time.Duration
	// Ready blocks until this replica may lead. nil: at once.
	Ready func(context.Context) error
	Log   *slog.Logger
}

// DefaultElection returns times that fail over within ten seconds.
func DefaultElection() ElectionConfig {
	return ElectionConfig{Lease: "isthmus-leader", Duration: 6 * time.Second, Renew: 4 * time.Second, Retry: time.Second}
}

// Election takes part in the election of a leader. A holder that cannot renew because the API server is away goes on
// leading until it sees another holder: with the API away there can be none, and what a cut-off leader signs is older
// than what its successor signs. A clean stop gives the Lease free.
type Election struct {
	cfg ElectionConfig

	mu      sync.Mutex
	term    Term
	changed chan struct{}
}

// NewElection makes a candidate; nothing is read before Run.
func NewElection(cfg ElectionConfig) *Election {
	return &Election{cfg: cfg, changed: make(chan struct{})}
}

// Current returns who leads, and a channel closed when that is outdated.
func (e *Election) Current() (Term, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.term, e.changed
}

func (e *Election) set(change func(*Term)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	next := e.term
	change(&next)
	if next == e.term {
		return
	}
	e.term = next
	close(e.changed)
	e.changed = make(chan struct{})
}

// Run is a candidate until ctx ends.
func (e *Election) Run(ctx context.Context) error {
	if err := e.await(ctx); err != nil {
		return nil // ctx ended
	}
	for ctx.Err() == nil {
		if err := e.stand(ctx); err != nil {
			return err
		}
		select {
		case <-time.After(e.cfg.Retry):
		case <-ctx.Done():
		}
	}
	e.set(func(t *Term) { t.Leading, t.Leader = false, "" })
	return nil
}

// await reads who leads while this replica may not.
func (e *Election) await(ctx context.Context) error {
	if e.cfg.Ready == nil {
		return nil
	}
	ready := make(chan error, 1)
	go func() { ready <- e.cfg.Ready(ctx) }()
	tick := time.NewTicker(e.cfg.Retry)
	defer tick.Stop()
	for {
		e.look(ctx)
		select {
		case err := <-ready:
			return err
		case <-tick.C:
		}
	}
}

// look reads the Lease. One that nobody renewed for long says nothing of a leader that lives.
func (e *Election) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	l, err := e.cfg.Client.leases.Leases(e.cfg.Client.namespace).Get(ctx, e.cfg.Lease, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		e.cfg.Log.Debug("lease not read", "part", "election", "err", err)
		return
	}
	holder := ""
	if err == nil && l.Spec.HolderIdentity != nil && l.Spec.RenewTime != nil && time.Since(l.Spec.RenewTime.Time) < 4*e.cfg.Duration {
		holder = *l.Spec.HolderIdentity
	}
	if holder == e.cfg.Identity { // an earlier life of this very Pod
		holder = ""
	}
	e.set(func(t *Term) { t.Known, t.Leader = true, holder })
}

// stand is one candidacy: until the Lease is lost or ctx ends.
func (e *Election) stand(ctx context.Context) error {
	var le *leaderelection.LeaderElector
	built := make(chan struct{}) // callbacks run in goroutines of their own
	le, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Name: e.cfg.Lease, Namespace: e.cfg.Client.namespace}, Client: e.cfg.Client.leases,
			LockConfig: resourcelock.ResourceLockConfig{Identity: e.cfg.Identity},
		},
		LeaseDuration: e.cfg.Duration, RenewDeadline: e.cfg.Renew, RetryPeriod: e.cfg.Retry, ReleaseOnCancel: true, Name: e.cfg.Lease,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) {
				<-built
				if !le.IsLeader() {
					return
				}
				e.set(func(t *Term) { t.Leading, t.Leader, t.Known, t.Number = true, e.cfg.Identity, true, t.Number+1 })
				e.cfg.Log.Info("this replica leads", "part", "election")
			},
			OnStoppedLeading: func() {},
			OnNewLeader:      func(string) { <-built; e.observe(le.GetLeader()) },
		},
	})
	if err != nil {
		return fmt.Errorf("leader election: %w", err)
	}
	close(built)
	le.Run(ctx)
	if term, _ := e.Current(); term.Leading && ctx.Err() == nil {
		e.cfg.Log.Warn("the lease was not renewed; this replica leads on until it sees another leader", "part", "election")
	}
	return nil
}

// observe takes who holds the Lease. That nobody does ends no leadership: this replica may just not have it any more.
func (e *Election) observe(holder string) {
	if holder == e.cfg.Identity {
		return // leading begins when the elector says so
	}
	e.set(func(t *Term) {
		if holder == "" && t.Leading {
			return
		}
		if t.Leading {
			e.cfg.Log.Warn("another replica leads now", "part", "election", "leader", holder)
		}
		t.Leading, t.Leader, t.Known = false, holder, true
	})
}
