// Package acks finds out who has the newest roots: the proxies of this cluster, at every replica of its isthmusd, and
// the other clusters, which say it of their own proxies in their records.
package acks

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/socket"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// Path is where one replica asks another which of its proxies are behind; the query names the version.
const Path = "/v1/trust/behind"

const (
	// again is the time between two looks while somebody is behind.
	again = 250 * time.Millisecond
	// comeBack is how long a proxy that is gone is waited for.
	comeBack = 10 * time.Second
	// watchEvery is how often it is noted who is there.
	watchEvery = time.Second
)

// Config is what is asked.
type Config struct {
	Local     *mesh.Cluster
	Snapshots mesh.Snapshots
	// Roots are those that this cluster signs and trusts with now, in PEM.
	Roots func() []byte
	// Accepted says of the proxies of this replica whether they have accepted that version of the roots.
	Accepted func(version string) map[string]bool
	// Others asks the other replicas for a path; nil: there are none.
	Others func(ctx context.Context, path string) [][]byte
	Peers  func() []protocol.Peer
	// Leads says whether this replica speaks for the cluster.
	Leads func() bool
	// Update changes what is said of this cluster.
	Update func(func(*mesh.Cluster))
}

// Acks is the account. It is safe for concurrent use.
type Acks struct {
	cfg     Config
	started time.Time

	mu      sync.Mutex
	version string
	lost    map[string]time.Time // proxies that went before they accepted version, and when that was seen
	seen    map[string]bool      // proxies there at the last look, and whether they had accepted version
}

// New starts nothing.
func New(cfg Config) *Acks { return &Acks{cfg: cfg, started: time.Now()} }

// Said returns what the last record of this cluster says of the bundles that it and all its proxies have. That holds on
// after a start: a proxy does not lose what it accepted, and without it the record would change twice for nothing.
func Said(records []*federationv1.Record, self mesh.ClusterID) map[mesh.TrustDomain][]byte {
	for _, r := range records {
		var c federationv1.Cluster
		if r.GetOrigin() != string(self) || r.GetKind() != protocol.KindCluster || proto.Unmarshal(r.GetBody(), &c) != nil || len(c.GetTrusts()) == 0 {
			continue
		}
		out := map[mesh.TrustDomain][]byte{}
		for td, sum := range c.GetTrusts() {
			out[mesh.TrustDomain(td)] = sum
		}
		return out
	}
	return nil
}

// Sum is how a cluster names the bundle that it has.
func Sum(bundle []byte) []byte {
	s := sha256.Sum256(bundle)
	return s[:]
}

// version is that of the roots as proxies get them.
func version(snap *mesh.Snapshot) string {
	if s := socket.TrustBundle(snap); s != nil {
		if r := xds.NewResource(s.GetName(), s); r != nil {
			return r.Version
		}
	}
	return ""
}

// Behind lists the proxies of this replica that have not accepted the version. One whose stream broke before it could is
// waited for a while: it serves on with what it has, and is most likely on its way back. So are all after a start.
func (a *Acks) Behind(version string) []string {
	now := a.cfg.Accepted(version)
	a.mu.Lock()
	defer a.mu.Unlock()
	if version != a.version {
		a.version, a.lost = version, map[string]time.Time{}
		for id := range a.seen {
			a.seen[id] = false
		}
	}
	for id, had := range a.seen {
		if _, there := now[id]; !there && !had && a.lost[id].IsZero() {
			a.lost[id] = time.Now()
		}
	}
	out := []string{}
	for id, has := range now {
		if delete(a.lost, id); !has {
			out = append(out, id)
		}
	}
	for id, at := range a.lost {
		if time.Since(at) < comeBack {
			out = append(out, id)
		}
	}
	a.seen = now
	if len(now) == 0 && time.Since(a.started) < comeBack {
		out = append(out, "those that have not come back since isthmusd started")
	}
	return out
}

// watch notes which proxies are there, so that those that go are missed.
func (a *Acks) watch() {
	a.mu.Lock()
	v := a.version
	a.mu.Unlock()
	if v != "" {
		a.Behind(v)
	}
}

// proxies lists those of all replicas that are behind.
func (a *Acks) proxies(ctx context.Context, v string) []string {
	out := a.Behind(v)
	if a.cfg.Others != nil {
		for _, body := range a.cfg.Others(ctx, Path+"?version="+url.QueryEscape(v)) {
			var more []string
			if json.Unmarshal(body, &more) == nil {
				out = append(out, more...)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Lagging lists who does not have the newest roots of this cluster: own proxies, and the other clusters that are heard.
// Those that are not heard are not waited for: they take the roots before they are served again.
func (a *Acks) Lagging(ctx context.Context) (out []authority.Lag) {
	roots := a.cfg.Roots()
	snap, _ := a.cfg.Snapshots.Latest()
	if snap == nil || !bytes.Equal(snap.Local.Roots, roots) {
		return []authority.Lag{{Kind: "replica", Name: string(a.cfg.Local.ID), Why: "its snapshot with the new roots is being built"}}
	}
	for _, node := range a.proxies(ctx, version(snap)) {
		out = append(out, authority.Lag{Kind: "proxy", Name: node, Why: "has not accepted the new roots"})
	}
	want := Sum(roots)
	for _, p := range a.cfg.Peers() {
		if p.State != protocol.Approved || p.Freshness != mesh.Fresh || p.Cluster == nil {
			continue
		}
		if !bytes.Equal(p.Cluster.GetTrusts()[string(a.cfg.Local.TrustDomain)], want) {
			out = append(out, authority.Lag{Kind: "peer", Name: string(p.Name), Why: "has not said that it and its proxies have the new roots"})
		}
	}
	return out
}

// Run says in the record of this cluster which bundles of other clusters it and all its proxies have, until ctx ends.
func (a *Acks) Run(ctx context.Context) error {
	for {
		snap, changed := a.cfg.Snapshots.Latest()
		retry := time.After(watchEvery)
		if snap != nil && a.cfg.Leads() && !a.say(ctx, snap) {
			retry = time.After(again)
		}
		a.watch()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-retry:
		}
	}
}

// say brings the record in line, and reports false while somebody is behind.
func (a *Acks) say(ctx context.Context, snap *mesh.Snapshot) bool {
	want := map[mesh.TrustDomain][]byte{}
	for _, c := range snap.Clusters {
		if c.TrustDomain != snap.Local.TrustDomain && len(c.Roots) > 0 {
			want[c.TrustDomain] = Sum(c.Roots)
		}
	}
	if maps.EqualFunc(want, snap.Local.Trusts, bytes.Equal) {
		return true
	}
	if len(a.proxies(ctx, version(snap))) > 0 {
		return false
	}
	a.cfg.Update(func(local *mesh.Cluster) { local.Trusts = want })
	return true
}

// String names a lag in one line.
func String(l authority.Lag) string { return fmt.Sprintf("%s %s %s", l.Kind, l.Name, l.Why) }
