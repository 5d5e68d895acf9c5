package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/lastknown"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/operator"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
	"github.com/isthmus-mesh/isthmus/federation/kubestate"
	"github.com/isthmus-mesh/isthmus/federation/ledger"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/version"
)

// cacheConfig is about what is kept for a start without the API server.
type cacheConfig struct {
	// Directory is relative to dataDir, unless it begins with a slash; empty: nothing is kept.
	Directory string `yaml:"directory"`
	// Secrets says where private keys, credentials of gateways and remote secrets are kept, too: memory (where the
	// directory is on a file system in memory), always or never.
	Secrets string `yaml:"secrets"`
}

func (c cacheConfig) validate() error {
	switch c.Secrets {
	case lastknown.Memory, lastknown.Always, lastknown.Never:
		return nil
	}
	return fmt.Errorf("state.cache.secrets: %q is none of memory, always and never", c.Secrets)
}

// lastKnown opens what is kept for a start without the API server, if one is read at all.
func (c Config) lastKnown() lastknown.Config {
	dir := c.State.Cache.Directory
	if !c.Source.Kube.Enabled && c.State.In != inKubernetes {
		dir = ""
	}
	if dir != "" && !filepath.IsAbs(dir) {
		dir = c.data(dir)
	}
	return lastknown.Config{Dir: dir, Secrets: c.State.Cache.Secrets}
}

// keys are what is kept of the Secrets.
type keys struct {
	Cluster     string         `json:"cluster"`
	TrustDomain string         `json:"trustDomain"`
	Federation  []byte         `json:"federation"` // PEM, as Token
	Token       []byte         `json:"token"`
	CA          authority.Kept `json:"ca"`
	Leader      string         `json:"leader,omitempty"` // as the Lease said last
}

// String keeps the keys out of every kind of output.
func (keys) String() string { return "[redacted]" }

// GoString returns [redacted].
func (keys) GoString() string { return "[redacted]" }

// resumed says that this process began with what was kept.
type resumed struct {
	at    time.Time // when that was current
	began time.Time
	why   error         // the state could not be read
	over  chan struct{} // closed when it has been
}

// cold reports whether this process lives on what was kept.
func (s *kubeState) cold() bool {
	if s.resumed == nil {
		return false
	}
	select {
	case <-s.resumed.over:
		return false
	default:
		return true
	}
}

// Times of tries to read the state at the start.
const (
	firstTry = 4 * time.Second // where something was kept: it is used then
	laterTry = 15 * time.Second
)

// await reads the state, or takes what was kept of it if it cannot be read.
func (s *kubeState) await(ctx context.Context, k *keeping) error {
	var kept keys
	at, found := s.copy.LoadKeys(&kept)
	if found && (kept.Cluster != s.cfg.Cluster || kept.TrustDomain != s.cfg.TrustDomain) {
		s.log.Warn("what was kept is of another cluster, and not used", "part", "state", "kept", kept.Cluster)
		found = false
	}
	var waiting *operator.Waiting
	defer func() { waiting.Close() }()
	began := time.Now()
	for wait := time.Second; ; wait = min(2*wait, laterTry) {
		most := laterTry
		if found {
			most = firstTry
		}
		try, cancel := context.WithTimeout(ctx, most)
		err := s.load(try, k)
		cancel()
		if err == nil || !kubestate.Transient(err) || ctx.Err() != nil {
			return err
		}
		if found {
			failed := s.resume(k, kept, at, err)
			if failed == nil {
				return nil
			}
			s.log.Error("what was kept cannot be used", "part", "state", "err", failed)
			found = false
		}
		s.log.Warn("keys cannot be read yet; nobody is served until they are", "part", "state", "err", err)
		if waiting == nil {
			var failed error
			if waiting, failed = operator.Wait(s.cfg.Admin.Socket, s.log); failed != nil {
				return failed
			}
		}
		waiting.Say(s.unready(began, err))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unready is the status of an isthmusd without keys.
func (s *kubeState) unready(since time.Time, why error) admin.Status {
	out := admin.Status{
		Cluster: s.cfg.Cluster, TrustDomain: s.cfg.TrustDomain, Network: s.cfg.Network, Version: version.String(),
		Sources: []admin.Source{{Cluster: s.cfg.Cluster, Server: s.rest.Host, Since: since, Error: why.Error()}},
	}
	kept := "nothing was kept here by an isthmusd before"
	if ok, not := s.copy.KeepsSecrets(); !ok {
		kept = "keys are not kept here: " + not
	}
	problems := append(s.copy.Problems(), mesh.Problem{
		Object: mesh.ObjectRef{Kind: "Cluster", Name: s.cfg.Cluster}, Reason: kube.ReasonSourceLost,
		Message: fmt.Sprintf("the state in the API server %s cannot be read since %s, and %s; nobody is served: %v", s.rest.Host, since.UTC().Format(time.RFC3339), kept, why),
		Remedy:  cmp.Or(diag.HintOf(why), "check that "+s.rest.Host+" runs and can be reached from isthmusd; it is tried all the time, and isthmusd comes up by itself"),
	})
	for _, p := range problems {
		out.Problems = append(out.Problems, admin.ProblemLine{Object: p.Object.String(), Reason: p.Reason, Message: p.Message, Remedy: p.Remedy})
	}
	return out
}

// load reads the state, and makes the keys if this replica is the first.
func (s *kubeState) load(ctx context.Context, k *keeping) error {
	held, err := s.client.EnsureSecret(ctx, keysSecret, func(held map[string][]byte) (map[string][]byte, error) {
		out := map[string][]byte{}
		for name, create := range map[string]func() ([]byte, error){federationKeyKey: ledger.MakeKey, tokenKeyKey: identity.NewTokenKey} {
			if len(held[name]) > 0 {
				continue
			}
			data, err := create()
			if err != nil {
				return nil, err
			}
			out[name] = data
		}
		return out, nil
	})
	if err != nil {
		return err
	}
	if k.key, err = ledger.ParseKey("in Secret "+s.client.Namespace()+"/"+keysSecret, held[federationKeyKey]); err != nil {
		return err
	}
	if k.ca, err = s.ca.Load(ctx, held[tokenKeyKey]); err != nil {
		return err
	}
	s.keys = keys{Cluster: s.cfg.Cluster, TrustDomain: s.cfg.TrustDomain, Federation: held[federationKeyKey], Token: held[tokenKeyKey]}
	s.openLedger(k)
	peers, heard, err := s.ledger.Load(ctx)
	if err != nil {
		return err
	}
	k.state = k.state.Join(mesh.ClusterID(s.cfg.Cluster), since(peers, heard))
	s.keep(s.ca.Kept())
	return nil
}

func (s *kubeState) openLedger(k *keeping) {
	s.ledger = kubestate.NewLedger(kubestate.LedgerConfig{
		Client: s.client, Local: mesh.ClusterID(s.cfg.Cluster), TrustDomain: mesh.TrustDomain(s.cfg.TrustDomain), FederationKey: k.key.Public(), Cache: k.disk,
		Peers: func() []protocol.Peer { return s.d.peering.Status().Peers }, Log: s.log,
	})
}

// keep keeps the keys for a start without the API server.
func (s *kubeState) keep(ca authority.Kept) {
	s.keeping.Lock()
	defer s.keeping.Unlock()
	s.keys.CA = ca
	s.copy.SaveKeys(s.keys)
}

// keepLeader keeps who leads until ctx ends: a replica that starts without the API server follows it.
func (s *kubeState) keepLeader(ctx context.Context) error {
	for ctx.Err() == nil {
		t, changed := s.election.Current()
		s.keeping.Lock()
		if t.Leader != "" && t.Leader != s.keys.Leader {
			s.keys.Leader = t.Leader
			s.copy.SaveKeys(s.keys)
		}
		s.keeping.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	return nil
}

// term says who leads: whoever did last, while that cannot be read. This replica does not lead by that alone.
func (s *kubeState) term() (kubestate.Term, <-chan struct{}) {
	t, changed := s.election.Current()
	if t.Leader == "" && s.cold() {
		t.Known = true
		s.keeping.Lock()
		if s.keys.Leader != s.replica {
			t.Leader = s.keys.Leader
		}
		s.keeping.Unlock()
	}
	return t, changed
}

// resume begins with what was kept. Records are those of the data directory. Nothing is said for the cluster before
// its state was read: which numbers were used meanwhile nobody here knows.
func (s *kubeState) resume(k *keeping, kept keys, at time.Time, why error) (err error) {
	if k.key, err = ledger.ParseKey("as it was kept", kept.Federation); err != nil {
		return err
	}
	if k.ca, err = s.ca.Resume(kept.CA, kept.Token); err != nil {
		return err
	}
	s.keys, s.resumed = kept, &resumed{at: at, began: time.Now(), why: why, over: make(chan struct{})}
	s.openLedger(k)
	s.log.Warn("the state cannot be read; this replica begins with what was kept of it", "part", "state", "at", at, "err", why)
	return nil
}

// confirmation has the state read that could not be at the start; nil where it could.
func (s *kubeState) confirmation(problems mesh.Sink) func(context.Context) error {
	if s.resumed == nil {
		return nil
	}
	const key = "resumed"
	problems.Report(key, mesh.Input{Problems: []mesh.Problem{{
		Object: mesh.ObjectRef{Kind: "Cluster", Name: s.cfg.Cluster}, Reason: "StateNotRead",
		Message: fmt.Sprintf("the state in the API server %s is not read since %s; keys and peers of %s are in use, and what must be written (joins, tokens, changes of exports) waits: %v",
			s.rest.Host, s.resumed.began.UTC().Format(time.RFC3339), s.resumed.at.UTC().Format(time.RFC3339), s.resumed.why),
		Remedy: cmp.Or(diag.HintOf(s.resumed.why), "check that "+s.rest.Host+" runs and can be reached from isthmusd; it is tried all the time"),
	}}})
	return func(ctx context.Context) error {
		held, err := s.client.EnsureSecret(ctx, keysSecret, func(map[string][]byte) (map[string][]byte, error) {
			return map[string][]byte{federationKeyKey: s.keys.Federation, tokenKeyKey: s.keys.Token}, nil // where they are missing
		})
		if err != nil {
			return err
		}
		if !bytes.Equal(held[federationKeyKey], s.keys.Federation) || !bytes.Equal(held[tokenKeyKey], s.keys.Token) {
			return diag.Hint(fmt.Errorf("%w: Secret %s/%s", authority.ErrOther, s.client.Namespace(), keysSecret), "they are used when isthmusd has started again")
		}
		if err := s.ca.Confirm(ctx); err != nil {
			return err
		}
		problems.Forget(key)
		close(s.resumed.over)
		s.log.Info("the state is read", "part", "state", "after", time.Since(s.resumed.began).Round(time.Second))
		return nil
	}
}
