package webhook

import (
	"context"
	"fmt"
	"log/slog"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Remote is a cluster whose API server calls the injector of this control plane.
type Remote struct {
	Cluster mesh.ClusterID
	Config  *rest.Config // another pointer when the credentials are other ones
}

// RemoteBundles keeps the certificate authority in the webhook configurations of remote clusters.
type RemoteBundles struct {
	remotes func() ([]Remote, <-chan struct{})
	bundle  BundleConfig // but for the client
	log     *slog.Logger
	running map[mesh.ClusterID]*remoteBundle
}

// NewRemoteBundles returns RemoteBundles for the clusters that remotes lists; its channel is closed when they change. c
// needs no Client. It starts nothing.
func NewRemoteBundles(remotes func() ([]Remote, <-chan struct{}), c BundleConfig) *RemoteBundles {
	return &RemoteBundles{remotes: remotes, bundle: c, log: c.Log, running: map[mesh.ClusterID]*remoteBundle{}}
}

type remoteBundle struct {
	config *rest.Config
	stop   context.CancelFunc
	done   chan struct{}
}

// Run starts and stops a Bundler for each remote cluster, as remote secrets come and go, until ctx ends.
func (r *RemoteBundles) Run(ctx context.Context) error {
	for {
		remotes, changed := r.remotes()
		r.follow(ctx, remotes)
		select {
		case <-changed:
		case <-ctx.Done():
			r.follow(ctx, nil)
			return nil
		}
	}
}

func (r *RemoteBundles) follow(ctx context.Context, remotes []Remote) {
	want := map[mesh.ClusterID]*rest.Config{}
	for _, x := range remotes {
		want[x.Cluster] = x.Config
	}
	for id, x := range r.running {
		if want[id] != x.config { // gone, or with other credentials
			x.stop()
			<-x.done
			delete(r.running, id)
		}
	}
	for id, config := range want {
		if r.running[id] != nil {
			continue
		}
		b, err := r.bundler(id, config)
		if err != nil {
			r.log.Warn("the webhook configuration of a remote cluster is not kept", "cluster", string(id), "err", err)
			continue
		}
		ctx, stop := context.WithCancel(ctx)
		x := &remoteBundle{config: config, stop: stop, done: make(chan struct{})}
		r.running[id] = x
		go func() {
			defer close(x.done)
			_ = b.Run(ctx) // it ends with ctx only
		}()
	}
}

func (r *RemoteBundles) bundler(id mesh.ClusterID, config *rest.Config) (*Bundler, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("client of its API server: %w", err)
	}
	c := r.bundle
	c.Client, c.Log = client, r.log.With("cluster", string(id))
	return NewBundler(c)
}
