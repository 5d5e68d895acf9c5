package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/lastknown"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/federation/kubestate"
	"github.com/isthmus-mesh/isthmus/federation/ledger"
	"github.com/isthmus-mesh/isthmus/federation/peering"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// keeping is what this cluster must not forget, read from where it is kept, and where it is kept from now on.
type keeping struct {
	ca     *identity.CA
	key    ledger.Key
	grants token.Store
	log    peering.Log
	state  protocol.State
	memory store.Memory
	// kube is nil where all is in the data directory; then there is one isthmusd and it leads.
	kube     *kubeState
	election *kubestate.Election
	disk     *ledger.Ledger
	copy     *lastknown.Store

	authority *authority.Authority // what ca is of
}

// keep opens the state where the configuration says.
func keep(ctx context.Context, cfg Config, log *slog.Logger) (*keeping, error) {
	disk, err := ledger.Open(cfg.data("ledger.db"))
	if err != nil {
		return nil, diag.Hint(err, "one isthmusd for each dataDir: end the other one")
	}
	last := cfg.lastKnown()
	last.Log = log
	k := &keeping{disk: disk, copy: lastknown.Open(last)}
	contents, err := disk.Load()
	if err == nil {
		for _, skipped := range contents.Skipped {
			log.Error("ledger entry not loaded", "err", skipped)
		}
		k.state = contents.State(0, time.Now())
		if cfg.State.In == inKubernetes {
			err = k.openKube(ctx, cfg, log)
		} else {
			err = k.openLocal(cfg, log)
		}
	}
	if err != nil {
		return nil, errors.Join(err, disk.Close())
	}
	return k, nil
}

// close gives the data directory free.
func (k *keeping) close() { k.disk.Close() }

// openLocal keeps everything in the data directory.
func (k *keeping) openLocal(cfg Config, log *slog.Logger) (err error) {
	k.grants, k.log, k.memory = k.disk.Bucket("grants"), k.disk, store.FileMemory(cfg.data("addresses.json"))
	k.authority = authority.New(cfg.authority(nil, log))
	if k.ca, err = k.authority.Load(context.Background(), nil); err != nil {
		return err
	}
	k.key, err = ledger.LoadOrCreateKey(cfg.data("federation.key"))
	return err
}

// authority is where the CA is: with a client, in the API.
func (c Config) authority(client *kubestate.Client, log *slog.Logger) authority.Config {
	return authority.Config{
		Client: client, DataDir: c.DataDir, Dir: c.CA.Dir, TrustDomain: mesh.TrustDomain(c.TrustDomain), MaxTTL: c.CA.MaxTTL, Settle: c.CA.Settle, Overlap: c.CA.Overlap, Log: log,
	}
}

// leadership is nil where there is one isthmusd.
func (k *keeping) leadership() peering.Leadership {
	if k.kube == nil {
		return nil
	}
	return k.kube
}

// parts are what runs for the state.
func (k *keeping) parts(d *daemon, st *store.Store) []part {
	if k.kube == nil {
		return []part{{"certificate authority", func(ctx context.Context) error { return k.authority.Run(ctx, d.listener(st)) }}}
	}
	return k.kube.parts(d, st)
}

// Values of state.in.
const (
	inLocal      = "local"
	inKubernetes = "kubernetes"
)

// StateConfig says where the state is.
type StateConfig struct {
	// In is local (the data directory, one isthmusd) or kubernetes (Secrets and custom resources, any number of replicas).
	In string `yaml:"in"`
	// Kubeconfig and Context name the API server; without them it is that of source.kube, else the Pod's own.
	Kubeconfig string `yaml:"kubeconfig"`
	Context    string `yaml:"context"`
	// Namespace of the objects; that of source.kube unless given.
	Namespace string `yaml:"namespace"`
	// Replica is this replica's name; POD_NAME, else the host's name, unless given.
	Replica string `yaml:"replica"`
	// Address is where other replicas reach the TLS port, IP:PORT; POD_IP and the port of listen unless given.
	Address string `yaml:"address"`
	// Lease is how long the others wait for a leader that is silent. Lowering it fails over sooner, and takes a slow API
	// server for a dead leader. Whole seconds, at least 3.
	Lease time.Duration `yaml:"lease"`
	// Cache is about what is kept for a start without the API server.
	Cache cacheConfig `yaml:"cache"`
}

func defaultState() StateConfig {
	return StateConfig{In: inLocal, Lease: kubestate.DefaultElection().Duration, Cache: cacheConfig{Directory: "lastknown", Secrets: lastknown.Memory}}
}

func (c StateConfig) validate() error {
	switch {
	case c.In != inLocal && c.In != inKubernetes:
		return fmt.Errorf("state.in: %q is neither %s nor %s", c.In, inLocal, inKubernetes)
	case c.Lease < 3*time.Second || c.Lease%time.Second != 0:
		return fmt.Errorf("state.lease: %s is not a number of whole seconds, 3s or more", c.Lease)
	}
	return c.Cache.validate()
}
