package main

import (
	"context"
	"fmt"
	"log/slog"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/discovery/inject/webhook"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
)

// remoteBundles keeps our certificate authority in the webhook configurations of the clusters that are read by remote
// secret: their API servers call the injector here.
type remoteBundles struct {
	servers func() ([]kube.Server, <-chan struct{})
	bundle  webhook.BundleConfig // but for the client
	log     *slog.Logger

	running map[mesh.ClusterID]*remoteBundle
}

type remoteBundle struct {
	config *rest.Config
	stop   context.CancelFunc
	done   chan struct{}
}

// Run starts and stops a Bundler for each remote cluster, as remote secrets come and go, until ctx ends.
func (r *remoteBundles) Run(ctx context.Context) error {
	r.running = map[mesh.ClusterID]*remoteBundle{}
	for {
		servers, changed := r.servers()
		r.follow(ctx, servers)
		select {
		case <-changed:
		case <-ctx.Done():
			r.follow(ctx, nil)
			return nil
		}
	}
}

func (r *remoteBundles) follow(ctx context.Context, servers []kube.Server) {
	want := map[mesh.ClusterID]*rest.Config{}
	for _, s := range servers {
		if s.Remote {
			want[s.Cluster] = s.Config
		}
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

func (r *remoteBundles) bundler(id mesh.ClusterID, config *rest.Config) (*webhook.Bundler, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("client of its API server: %w", err)
	}
	c := r.bundle
	c.Client, c.Log = client, r.log.With("cluster", string(id))
	return webhook.NewBundler(c)
}
