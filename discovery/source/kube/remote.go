package kube

import (
	"cmp"
	"context"
	"crypto/sha256"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube/kubeconfig"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// maxRemotes bounds the clusters whose API servers one control plane reads.
const maxRemotes = 100

// remotes keeps the clusters that remote secrets name.
type remotes struct {
	src    *Source
	wake   chan struct{} // holds one token while there is something to do
	wg     sync.WaitGroup
	mu     sync.Mutex
	byName map[mesh.ClusterID]*remote

	outside      map[*cluster]map[string][]string // addresses of Services, by cluster and host
	outsideNews  bool
	applied      bool // the secrets were looked at
	synced       bool // or is about to be said
	problems     []mesh.Problem
	problemsKept map[mesh.ClusterID]bool
}

// remote is one remote cluster and its connection.
type remote struct {
	*cluster
	digest [sha256.Size]byte // of the kubeconfig in use
	config *rest.Config      // what it says
	stop   context.CancelFunc
	done   chan struct{}
}

func newRemotes(s *Source) *remotes {
	return &remotes{src: s, wake: make(chan struct{}, 1), byName: map[mesh.ClusterID]*remote{}, outside: map[*cluster]map[string][]string{}}
}

// poke has the secrets looked at.
func (r *remotes) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *remotes) clusters() []*cluster {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*cluster
	for _, x := range r.byName {
		out = append(out, x.cluster)
	}
	return out
}

// run starts and stops clusters as the secrets say, until ctx ends.
func (r *remotes) run(ctx context.Context) {
	defer r.wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		}
		secrets, known := r.secrets()
		if known {
			r.apply(ctx, secrets)
		}
		r.tellOutside()
		r.sync(ctx)
	}
}

// secrets returns the remote secrets, oldest first; known is false before the local cluster was read.
func (r *remotes) secrets() (out []*corev1.Secret, known bool) {
	c := r.src.local
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.live {
		return nil, false
	}
	for _, t := range c.tables {
		if t.name != kindSecret {
			continue
		}
		if t.state == StateForbidden && len(t.entries) == 0 {
			return nil, false
		}
		for _, e := range t.entries {
			out = append(out, e.kept.(*corev1.Secret))
		}
	}
	slices.SortFunc(out, func(a, b *corev1.Secret) int {
		return cmp.Or(a.CreationTimestamp.Time.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
	return out, true
}

// claim is a cluster as a secret describes it.
type claim struct {
	secret     *corev1.Secret
	kubeconfig []byte
}

// apply brings the running clusters up to the secrets.
func (r *remotes) apply(ctx context.Context, secrets []*corev1.Secret) {
	claims, problems := r.claims(secrets)
	for id, x := range r.running() {
		if _, named := claims[id]; !named {
			r.remove(id, x)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(claims)) {
		cl := claims[id]
		if err := r.ensure(ctx, id, cl.kubeconfig); err != nil {
			p := r.problem(cl.secret, id, ReasonRemoteSecret, err.Error(), diag.HintOf(err))
			if _, runs := r.running()[id]; runs {
				p.Message += "; the connection made before stays in use"
			}
			problems = append(problems, p)
		}
	}
	r.mu.Lock()
	same := reflect.DeepEqual(problems, r.problems)
	r.problems, r.applied = problems, true
	r.mu.Unlock()
	key := string(r.src.cfg.Cluster) + "/remote-secrets"
	switch {
	case same:
	case len(problems) == 0:
		r.src.cfg.Sink.Forget(key)
	default:
		r.src.cfg.Sink.Report(key, mesh.Input{Problems: slices.Clone(problems)})
		for _, p := range problems {
			r.src.log.Warn("remote secret", "err", p.String())
		}
	}
}

func (r *remotes) running() map[mesh.ClusterID]*remote {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.byName)
}

func (r *remotes) problem(s *corev1.Secret, id mesh.ClusterID, reason, message, remedy string) mesh.Problem {
	return mesh.Problem{
		Object: mesh.ObjectRef{Kind: kindSecret, Namespace: s.Namespace, Name: s.Name, Source: r.src.local.said},
		Field:  "data[" + string(id) + "]", Reason: reason, Message: message, Remedy: remedy,
	}
}

// claims sorts out which secret speaks for which cluster.
func (r *remotes) claims(secrets []*corev1.Secret) (map[mesh.ClusterID]claim, []mesh.Problem) {
	out := map[mesh.ClusterID]claim{}
	var problems []mesh.Problem
	for _, s := range secrets {
		for _, key := range slices.Sorted(maps.Keys(s.Data)) {
			id := mesh.ClusterID(key)
			first, taken := out[id]
			switch {
			case !mesh.IsLabel(key):
				problems = append(problems, r.problem(s, id, ReasonRemoteSecret, "the key is not the name of a cluster (a-z, 0-9, -)", kubeconfig.RemakeSecret))
			case id == r.src.cfg.Cluster:
				problems = append(problems, r.problem(s, id, ReasonRemoteTwice, "the key is the name of the local cluster; it is not read a second time", "give the remote cluster a name of its own"))
			case taken:
				problems = append(problems, r.problem(s, id, ReasonRemoteTwice, "the older Secret "+first.secret.Name+" is for cluster "+key+", too, and is used", "delete one of the two"))
			case len(out) == maxRemotes:
				problems = append(problems, r.problem(s, id, ReasonRemoteSecret, "there are more than 100 remote clusters; this one is not read", "give clusters control planes of their own"))
			default:
				out[id] = claim{s, s.Data[key]}
			}
		}
	}
	return out, problems
}

// ensure has the cluster read with that kubeconfig.
func (r *remotes) ensure(ctx context.Context, id mesh.ClusterID, raw []byte) error {
	digest := sha256.Sum256(raw)
	x := r.running()[id]
	if x != nil && x.digest == digest {
		return nil
	}
	cfg, err := kubeconfig.Remote(raw)
	if err != nil {
		return err
	}
	conn, err := dial(cfg)
	if err != nil {
		return diag.Hint(err, "%s", kubeconfig.RemakeSecret)
	}
	c := (*cluster)(nil)
	if x != nil { // new credentials fill the same tables: nothing that is still there is wiped
		c = x.cluster
		x.end()
		r.src.log.Info("remote cluster is read with new credentials", "from", string(id))
	} else {
		c = newCluster(r.src, id, true)
		r.src.log.Info("remote cluster is read", "from", string(id), "server", conn.server)
	}
	c.mu.Lock()
	c.conn = conn
	c.mu.Unlock()
	run, stop := context.WithCancel(ctx)
	next := &remote{cluster: c, digest: digest, config: cfg, stop: stop, done: make(chan struct{})}
	r.mu.Lock()
	r.byName[id] = next
	r.mu.Unlock()
	r.src.servers.tell()
	r.wg.Go(func() {
		defer close(next.done)
		defer conn.close()
		c.run(run)
	})
	return nil
}

// end stops reading and waits until nothing is reported any more.
func (x *remote) end() {
	x.stop()
	<-x.done
}

// remove forgets a cluster whose secret is gone.
func (r *remotes) remove(id mesh.ClusterID, x *remote) {
	x.end()
	r.mu.Lock()
	delete(r.byName, id)
	delete(r.outside, x.cluster)
	r.outsideNews = true
	r.mu.Unlock()
	r.src.servers.tell()
	x.forget()
	r.src.metrics.forget(x.cluster)
	r.src.log.Info("remote cluster is forgotten", "from", string(id))
}

// externalChanged keeps the outside addresses of a cluster's Services. The caller holds the cluster's mu.
func (s *Source) externalChanged(c *cluster) {
	s.remotes.mu.Lock()
	s.remotes.outside[c] = maps.Clone(c.external)
	s.remotes.outsideNews = true
	s.remotes.mu.Unlock()
	s.remotes.poke()
}

// external returns the outside addresses of all clusters' Services, by host.
func (s *Source) external() map[string][]string {
	s.remotes.mu.Lock()
	defer s.remotes.mu.Unlock()
	out := map[string][]string{}
	for _, hosts := range s.remotes.outside {
		for host, addresses := range hosts {
			out[host] = append(out[host], addresses...)
			slices.Sort(out[host])
		}
	}
	return out
}

// tellOutside has the mesh's networks reported anew when a Service that may be a gateway of one has new addresses.
func (r *remotes) tellOutside() {
	r.mu.Lock()
	news := r.outsideNews
	r.outsideNews = false
	r.mu.Unlock()
	if !news {
		return
	}
	c := r.src.local
	c.mu.Lock()
	defer c.mu.Unlock()
	c.again(func(t *table, _ *entry) bool { return t.name == kindConfigMap })
}
