package acks

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// world is what an account asks.
type world struct {
	mu       sync.Mutex
	snap     *mesh.Snapshot
	changed  chan struct{}
	roots    []byte
	accepted map[string]bool
	asked    []string // versions
	others   [][]byte
	paths    []string
	peers    []protocol.Peer
	leads    bool
	updates  int
}

func (w *world) Latest() (*mesh.Snapshot, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.snap, w.changed
}

// set changes the world, and has the snapshot looked at again.
func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
	if w.changed != nil {
		close(w.changed)
	}
	w.changed = make(chan struct{})
}

func (w *world) account() *Acks {
	return New(Config{
		Local: &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh"}, Snapshots: w, Roots: func() []byte { return w.roots },
		Accepted: func(version string) map[string]bool {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.asked = append(w.asked, version)
			return maps.Clone(w.accepted)
		},
		Others: func(_ context.Context, path string) [][]byte { w.paths = append(w.paths, path); return w.others },
		Peers:  func() []protocol.Peer { return w.peers },
		Leads:  func() bool { w.mu.Lock(); defer w.mu.Unlock(); return w.leads },
		Update: func(change func(*mesh.Cluster)) {
			w.set(func() {
				local := *w.snap.Local
				change(&local)
				next := *w.snap
				next.Local, w.snap = &local, &next
				w.updates++
			})
		},
	})
}

func rootOf(t *testing.T, td mesh.TrustDomain) []byte {
	t.Helper()
	m, err := identity.MakeRoot(identity.Config{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	return m.Root
}

// TestBehind: proxies that are connected and have not accepted are behind, and so are for ten seconds those that went
// before they could, and after a start all.
func TestBehind(t *testing.T) {
	const early = "those that have not come back since isthmusd started"
	for _, step := range []struct {
		name  string
		looks []map[string]bool // the first of version 1, the others of version 2, a second after each other
		wait  time.Duration     // then
		want  []string
	}{
		{"nobody since the start", []map[string]bool{{}, {}}, 0, []string{early}},
		{"nobody for long", []map[string]bool{{}, {}}, comeBack, []string{}},
		{"one that has it", []map[string]bool{{"a": true}, {"a": true}}, 0, []string{}},
		{"one that has not", []map[string]bool{{"a": true}, {"a": false, "b": true}}, 0, []string{"a"}},
		{"one that went before", []map[string]bool{{"a": true, "b": true}, {"b": true}}, 0, []string{"a"}},
		{"one that went before, long ago", []map[string]bool{{"a": true, "b": true}, {"b": true}}, comeBack, []string{}},
		{"one that went when it had it", []map[string]bool{{"a": true, "b": true}, {"a": true, "b": true}, {"b": true}}, 0, []string{}},
		{"one that came back", []map[string]bool{{"a": true, "b": true}, {"b": true}, {"a": false, "b": true}}, 0, []string{"a"}},
		{"one that came back and has it", []map[string]bool{{"a": true, "b": true}, {"b": true}, {"a": true, "b": true}}, 0, []string{}},
		{"one that comes and goes", []map[string]bool{{"a": true, "b": true}, {"b": true}, {"a": false, "b": true}, {"b": true}}, comeBack - 2*time.Second, []string{"a"}},
	} {
		t.Run(step.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{}
				a := w.account()
				for i, look := range step.looks {
					time.Sleep(time.Second)
					w.accepted = look
					a.Behind([]string{"1", "2"}[min(i, 1)])
				}
				time.Sleep(step.wait)
				if got := slices.Sorted(slices.Values(a.Behind("2"))); !slices.Equal(got, step.want) && len(got)+len(step.want) > 0 {
					t.Errorf("behind: %q, want %q", got, step.want)
				}
			})
		})
	}
}

// TestLagging: who is waited for before a new root signs.
func TestLagging(t *testing.T) {
	roots := rootOf(t, "amber.mesh")
	peer := func(change func(*protocol.Peer)) protocol.Peer {
		p := protocol.Peer{Name: "birch", State: protocol.Approved, Freshness: mesh.Fresh, Cluster: &federationv1.Cluster{Trusts: map[string][]byte{"amber.mesh": Sum([]byte("before"))}}}
		change(&p)
		return p
	}
	told := peer(func(p *protocol.Peer) { p.Cluster.Trusts["amber.mesh"] = Sum(roots) })
	for _, c := range []struct {
		name string
		with func(*world)
		want []string
	}{
		{"nobody", func(*world) {}, nil},
		{"no snapshot yet", func(w *world) { w.snap = nil }, []string{"replica amber"}},
		{"a snapshot with the roots before", func(w *world) { w.snap.Local.Roots = rootOf(t, "amber.mesh") }, []string{"replica amber"}},
		{"a proxy", func(w *world) { w.accepted["b"] = false }, []string{"proxy b"}},
		{"proxies of replicas, each once", func(w *world) {
			w.accepted["b"] = false
			w.others = [][]byte{[]byte(`["c","b"]`), []byte(`not JSON`), []byte(`[]`)}
		}, []string{"proxy b", "proxy c"}},
		{"a peer that has other roots", func(w *world) { w.peers = []protocol.Peer{peer(func(*protocol.Peer) {}), told} }, []string{"peer birch"}},
		{"a peer that says nothing of it", func(w *world) {
			w.peers = []protocol.Peer{peer(func(p *protocol.Peer) { p.Cluster = &federationv1.Cluster{} })}
		}, []string{"peer birch"}},
		{"a peer that has them", func(w *world) { w.peers = []protocol.Peer{told} }, nil},
		{"a peer that is not heard", func(w *world) { w.peers = []protocol.Peer{peer(func(p *protocol.Peer) { p.Freshness = mesh.Late })} }, nil},
		{"a peer that waits", func(w *world) { w.peers = []protocol.Peer{peer(func(p *protocol.Peer) { p.State = protocol.Pending })} }, nil},
		{"an evicted peer", func(w *world) { w.peers = []protocol.Peer{peer(func(p *protocol.Peer) { p.State = protocol.Evicted })} }, nil},
		{"a peer without a record", func(w *world) { w.peers = []protocol.Peer{peer(func(p *protocol.Peer) { p.Cluster = nil })} }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			local := &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Roots: roots}
			w := &world{roots: roots, snap: &mesh.Snapshot{Local: local}, accepted: map[string]bool{"a": true}}
			c.with(w)
			var got []string
			for _, l := range w.account().Lagging(t.Context()) {
				if l.Why == "" || !strings.HasSuffix(String(l), l.Why) {
					t.Errorf("%q does not say why", String(l))
				}
				got = append(got, l.Kind+" "+l.Name)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("lagging: %q, want %q", got, c.want)
			}
			for _, v := range w.asked {
				if v == "" || len(w.paths) != 1 || w.paths[0] != Path+"?version="+url.QueryEscape(v) {
					t.Errorf("version %q was asked for here, %q of replicas", v, w.paths)
				}
			}
		})
	}
}

// TestRun: which bundles this cluster has is said when all its proxies have them, by the replica that leads.
func TestRun(t *testing.T) {
	birch, shared, bare := rootOf(t, "birch.mesh"), rootOf(t, "amber.mesh"), mesh.Cluster{ID: "cedar", TrustDomain: "cedar.mesh"}
	synctest.Test(t, func(t *testing.T) {
		local := &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Roots: shared}
		w := &world{changed: make(chan struct{}), accepted: map[string]bool{"a": false}}
		a := w.account()
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error)
		go func() { ran <- a.Run(ctx) }()
		said := func(when string, updates int, want map[mesh.TrustDomain][]byte) {
			t.Helper()
			time.Sleep(2 * watchEvery)
			synctest.Wait()
			w.mu.Lock()
			defer w.mu.Unlock()
			var got map[mesh.TrustDomain][]byte
			if w.snap != nil {
				got = w.snap.Local.Trusts
			}
			if !maps.EqualFunc(got, want, bytes.Equal) || w.updates != updates {
				t.Errorf("%s: %x after %d updates, want %x after %d", when, got, w.updates, want, updates)
			}
		}
		said("without a snapshot", 0, nil)
		w.set(func() {
			w.snap = &mesh.Snapshot{Local: local, Clusters: []*mesh.Cluster{local, {ID: "birch", TrustDomain: "birch.mesh", Roots: birch}, {ID: "ash", TrustDomain: "amber.mesh", Roots: birch}, &bare}}
		})
		said("while it follows", 0, nil)
		w.set(func() { w.leads = true })
		said("while a proxy is behind", 0, nil)
		w.set(func() { w.accepted = map[string]bool{"a": true} })
		want := map[mesh.TrustDomain][]byte{"birch.mesh": Sum(birch)}
		said("when it is not", 1, want)
		said("later", 1, want)
		w.set(func() { next := *w.snap; next.Clusters = next.Clusters[:1]; w.snap = &next })
		said("when birch is gone", 2, nil)
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
}

// TestReplicas: what one replica answers, another reads.
func TestReplicas(t *testing.T) {
	w := &world{accepted: map[string]bool{"b": false, "a": true}}
	body, err := json.Marshal(w.account().Behind("1"))
	if err != nil {
		t.Fatal(err)
	}
	asks := &world{accepted: map[string]bool{"c": true}, others: [][]byte{body}}
	if got := asks.account().proxies(t.Context(), "1 2"); !slices.Equal(got, []string{"b"}) || asks.paths[0] != Path+"?version=1+2" {
		t.Errorf("behind: %q, asked for %q", got, asks.paths)
	}
}
