package kubelab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/e2e/wan"
)

// Config is what a Lab is made from.
type Config struct {
	// Topology is what to build; File is read when it is nil.
	Topology *Topology
	File     string
	// Bin is the folder of the programs, kube among them. Default build/bin.
	Bin string
	// Logs keeps the log files of processes; default is the run's folder, which Down removes.
	Logs string
	// Run is the base folder of runs; default /run/isthmus-lab for root.
	Run string
	// Log gets one record for each thing started. Default: discarded.
	Log *slog.Logger
	// Ready is how long an API server may take to answer. Default 90 s: the machine may be busy.
	Ready time.Duration
	// ControlOnly brings up API servers and no Nodes: Pods stay pending.
	ControlOnly bool
	// Scheduler runs the real scheduler (100 MB a cluster, a second of start).
	Scheduler bool
}

// Lab is a topology that is up.
type Lab struct {
	cfg      Config
	topology *Topology
	net      *lab.Lab
	log      *slog.Logger
	clusters []*Cluster
	wan      *wan.Emulator // nil: a bridge

	mu    sync.Mutex // over packet filters
	stop  context.CancelFunc
	parts errgroup.Group // what runs inside this process: forwarders and nodes
	down  sync.Once
	err   error
}

// ErrNeedsRoot is returned where network namespaces are allowed, but Pods are not: their file systems and users need
// more than a user namespace gives.
var ErrNeedsRoot = errors.New("clusters with Pods need root; run it as root (sudo, or a container with --privileged)")

// Allowed returns nil when labs can be made in this process, ErrNeedsRoot or lab.ErrNotAllowed otherwise.
func Allowed() error {
	if err := lab.Allowed(); err != nil {
		return err
	}
	if lab.Rootless() {
		return ErrNeedsRoot
	}
	return nil
}

// Up builds the network of a topology, starts its clusters and returns when all API servers answer and all Nodes are
// ready. When it fails it has taken everything down. Call lab.Main first in main or TestMain.
func Up(ctx context.Context, cfg Config) (*Lab, error) {
	if cfg.Topology == nil {
		var err error
		if cfg.Topology, err = LoadTopology(cfg.File); err != nil {
			return nil, err
		}
	} else if err := cfg.Topology.Complete(); err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	set(&cfg.Bin, "build/bin")
	set(&cfg.Ready, 90*time.Second)
	set(&cfg.Log, slog.New(slog.DiscardHandler))
	if err := Allowed(); err != nil && !(cfg.ControlOnly && errors.Is(err, ErrNeedsRoot)) {
		return nil, err
	}
	net, err := lab.New(lab.Config{World: &lab.World{}, BinDir: cfg.Bin, RunDir: cfg.Run, LogDir: cfg.Logs, Log: cfg.Log, Ready: cfg.Ready})
	if err != nil {
		return nil, err
	}
	if _, err := net.Program("kube"); err != nil {
		return nil, fmt.Errorf("%w; make kube builds it", err)
	}
	l := &Lab{cfg: cfg, topology: cfg.Topology, net: net, log: cfg.Log}
	var life context.Context
	life, l.stop = context.WithCancel(context.WithoutCancel(ctx))
	if err := l.up(ctx, life); err != nil {
		return nil, errors.Join(err, l.Down())
	}
	return l, nil
}

func (l *Lab) up(ctx, life context.Context) error {
	if err := l.net.Up(ctx); err != nil {
		return err
	}
	for i := range l.topology.Clusters {
		c := &Cluster{Spec: &l.topology.Clusters[i], lab: l, Dir: filepath.Join(l.net.Dir(), l.topology.Clusters[i].Name)}
		l.clusters = append(l.clusters, c)
	}
	if l.topology.Emulate {
		l.wan = wan.New(wan.Config{})
	}
	if err := l.network(); err != nil {
		if l.wan != nil {
			l.wan.Close()
		}
		return err
	}
	l.emulate(life)
	g, gctx := errgroup.WithContext(ctx)
	for _, c := range l.clusters {
		g.Go(func() error {
			if err := c.up(gctx, life); err != nil {
				return fmt.Errorf("cluster %s: %w", c.Spec.Name, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// Down ends everything and removes the run's folder. It may be called more than once.
func (l *Lab) Down() error {
	l.down.Do(func() {
		l.stop()
		l.err = errors.Join(l.parts.Wait(), l.net.Down())
	})
	return l.err
}

// Cluster returns a cluster by its name, nil when there is none.
func (l *Lab) Cluster(name string) *Cluster {
	for _, c := range l.clusters {
		if c.Spec.Name == name {
			return c
		}
	}
	return nil
}

// Clusters returns all clusters in the order of the topology.
func (l *Lab) Clusters() []*Cluster { return l.clusters }

// Net is the lab below: namespaces, processes and their logs.
func (l *Lab) Net() *lab.Lab { return l.net }

// network makes all namespaces, links, routes and packet filters.
func (l *Lab) network() error {
	for _, c := range l.clusters {
		if err := c.network(); err != nil {
			return fmt.Errorf("cluster %s: %w", c.Spec.Name, err)
		}
	}
	for i := range l.topology.Machines {
		if err := l.machine(&l.topology.Machines[i]); err != nil {
			return fmt.Errorf("machine %s: %w", l.topology.Machines[i].Name, err)
		}
	}
	for _, c := range l.clusters {
		var peers []*Cluster
		for _, o := range l.clusters {
			if o != c && c.Spec.Flat != "" && o.Spec.Flat == c.Spec.Flat {
				peers = append(peers, o)
			}
		}
		if err := c.routes(peers); err != nil {
			return fmt.Errorf("cluster %s: %w", c.Spec.Name, err)
		}
		if err := c.firewall(peers); err != nil {
			return fmt.Errorf("cluster %s: %w", c.Spec.Name, err)
		}
	}
	return nil
}

// machine makes a machine's namespace, on the WAN or beside a cluster's router.
func (l *Lab) machine(m *MachineSpec) error {
	n, err := l.net.AddNode(m.Name, lab.NodeOptions{Nameserver: m.DNS, OwnFiles: true})
	if err != nil {
		return err
	}
	if m.Cluster == "" {
		return l.onWAN(m.Name, n, []netip.Prefix{netip.PrefixFrom(m.Address, l.topology.WAN.Bits())}, nil)
	}
	router, bridge := l.Cluster(m.Cluster).Router, "m-"+m.Name
	if len(bridge) > 15 {
		bridge = bridge[:15]
	}
	if err := router.Bridge(bridge, netip.PrefixFrom(nth(m.Subnet, 1), m.Subnet.Bits())); err != nil {
		return err
	}
	return l.net.Attach(lab.Leg{Node: n, Link: "eth0", Parent: router, Bridge: bridge,
		Addresses: []netip.Prefix{netip.PrefixFrom(m.Address, m.Subnet.Bits())}, Gateways: []netip.Addr{nth(m.Subnet, 1)}})
}

// write makes a file that only this user reads.
func write(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}
