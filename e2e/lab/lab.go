package lab

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Config is what a Lab is made from.
type Config struct {
	// World is what to build.
	World *World
	// BinDir is the folder of the product's and the applications' programs.
	BinDir string
	// RunDir is the base folder of runs; each makes a folder of its own in it. Default /run/isthmus-lab for root, else
	// a folder in the temporary one. Keep it short: unix sockets live below it.
	RunDir string
	// LogDir keeps the log files of processes; the default is in the run's folder, which Down removes.
	LogDir string
	// Envoy is the path of Envoy, handed to agents. Default: $ENVOY, else envoy/envoy beside BinDir if it is there.
	Envoy string
	// Log gets one record for each thing started. Default: discarded.
	Log *slog.Logger
	// NetworkOnly makes Up build the namespaces and links and start nothing. Pods get their namespaces.
	NetworkOnly bool
	// Tolerant makes Up warn about programs that do not exist instead of failing.
	Tolerant bool
	// Parallel bounds how many processes are being started at a time. Default 8: more makes all of them slower.
	Parallel int
	// Ready is how long a process may take to be ready. Default 30 s.
	Ready time.Duration
}

// Lab is one world, up or not.
type Lab struct {
	// Run is the name of the run: unique, and part of the names of all namespaces.
	Run string

	cfg      Config
	log      *slog.Logger
	world    *World
	base     string
	dir      string // of this run
	logDir   string
	clusters []*Cluster
	slots    chan struct{}
	ports    atomic.Int64
	journal  *journal
	wait     sync.WaitGroup // reapers
	keeping  *execServer    // rootless only: lets "lab exec" in

	mu     sync.Mutex
	nodes  map[string]*Node
	procs  map[*Proc]bool
	closed bool
}

// New checks the configuration and that network namespaces are allowed; it makes and starts nothing.
func New(cfg Config) (*Lab, error) {
	if cfg.World == nil {
		return nil, errors.New("lab: no world given")
	}
	if err := Allowed(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Parallel <= 0 {
		cfg.Parallel = 8
	}
	if cfg.Ready <= 0 {
		cfg.Ready = 30 * time.Second
	}
	if cfg.Envoy == "" {
		cfg.Envoy = os.Getenv("ENVOY")
	}
	if built := filepath.Join(cfg.BinDir, "..", "envoy", "envoy"); cfg.Envoy == "" && cfg.BinDir != "" {
		if _, err := os.Stat(built); err == nil {
			cfg.Envoy = built
		}
	}
	for _, p := range []*string{&cfg.BinDir, &cfg.Envoy, &cfg.LogDir, &cfg.RunDir} {
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return nil, fmt.Errorf("lab: %w", err)
		}
		*p = abs
	}
	if cfg.RunDir == "" {
		cfg.RunDir = defaultBase()
	}
	id := make([]byte, 4)
	_, _ = rand.Read(id) // never fails
	l := &Lab{
		Run: hex.EncodeToString(id), cfg: cfg, log: cfg.Log, world: cfg.World, base: cfg.RunDir,
		slots: make(chan struct{}, cfg.Parallel),
		nodes: map[string]*Node{}, procs: map[*Proc]bool{},
	}
	l.dir = filepath.Join(l.base, l.Run)
	l.logDir = cfg.LogDir
	if l.logDir == "" {
		l.logDir = filepath.Join(l.dir, "logs")
	}
	for _, s := range cfg.World.Clusters {
		c := &Cluster{lab: l, Spec: s, Dir: filepath.Join(l.dir, s.Name), pods: map[string]*Pod{}}
		c.ConfigDir, c.Socket = filepath.Join(c.Dir, "config"), filepath.Join(c.Dir, "isthmusd.sock")
		for _, g := range s.Gateways {
			c.gateways = append(c.gateways, &daemon{spec: g})
		}
		if len(c.Socket) > 100 {
			return nil, fmt.Errorf("lab: run folder %s is too long for unix sockets; choose a shorter one", l.dir)
		}
		l.clusters = append(l.clusters, c)
	}
	return l, nil
}

// Dir is the folder of this run: namespaces, configuration and data of all programs, logs.
func (l *Lab) Dir() string { return l.dir }

// LogDir is the folder with the log files of all processes.
func (l *Lab) LogDir() string { return l.logDir }

// Cluster returns a cluster by its name, nil when the world has none of that name.
func (l *Lab) Cluster(name string) *Cluster {
	for _, c := range l.clusters {
		if c.Spec.Name == name {
			return c
		}
	}
	return nil
}

// Clusters returns all clusters in the order of the world.
func (l *Lab) Clusters() []*Cluster { return l.clusters }

// Node returns a node by its name, nil when there is none.
func (l *Lab) Node(name string) *Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.nodes[name]
}

// Nodes returns the names of all nodes, sorted.
func (l *Lab) Nodes() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]string, 0, len(l.nodes))
	for name := range l.nodes {
		out = append(out, name)
	}
	sort.Strings(out)
	return out
}

func (l *Lab) lookup(node string) (*Node, error) {
	if node == "" {
		return nil, nil
	}
	if n := l.Node(node); n != nil {
		return n, nil
	}
	return nil, fmt.Errorf("no node %q in this lab; it has %s", node, strings.Join(l.Nodes(), ", "))
}

// Up removes what crashed runs left, builds the world's network and starts its programs; it returns when all are
// ready. When it fails, or ctx ends before, call Down.
func (l *Lab) Up(ctx context.Context) error {
	removed, err := RemoveLeftovers(l.base)
	if err != nil {
		l.log.Warn("leftovers of an earlier run stay", "err", err)
	}
	if len(removed) > 0 {
		l.log.Info("leftovers of earlier runs removed", "runs", removed)
	}
	if err := l.prepare(); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if err := l.network(); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, c := range l.clusters {
		g.Go(func() error {
			if err := c.up(gctx); err != nil {
				return fmt.Errorf("lab: cluster %s: %w", c.Spec.Name, err)
			}
			return nil
		})
	}
	for _, m := range l.world.Machines {
		g.Go(func() error {
			if err := l.startMachine(m); err != nil {
				return fmt.Errorf("lab: machine %s: %w", m.Name, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func (l *Lab) prepare() error {
	if err := os.MkdirAll(l.base, 0o755); err != nil {
		return err
	}
	fresh, err := os.MkdirTemp(l.base, ".new-") // has no journal, so other runs leave it alone
	if err != nil {
		return err
	}
	if err := os.Chmod(fresh, 0o755); err != nil {
		return err
	}
	if l.journal, err = openJournal(fresh); err != nil {
		return err
	}
	if err := l.journal.add(entry{Owner: true, PID: os.Getpid(), Start: startTime(os.Getpid())}); err != nil {
		return err
	}
	if err := os.Rename(fresh, l.dir); err != nil {
		return err
	}
	for _, d := range []string{filepath.Join(l.dir, "ns"), filepath.Join(l.dir, "etc"), l.logDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	for _, c := range l.clusters {
		if err := os.MkdirAll(c.Dir, 0o755); err != nil {
			return err
		}
	}
	if Rootless() {
		if l.keeping, err = serveExec(l.dir); err != nil {
			return err
		}
	}
	return nil
}

// addNode makes a namespace with loopback up, and its resolv.conf and hosts.
func (l *Lab) addNode(name string, nameserver netip.Addr, search string) (*Node, error) {
	l.mu.Lock()
	taken := l.nodes[name] != nil
	l.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("node %s exists already", name)
	}
	file := "isth-" + l.Run + "-" + strings.ReplaceAll(name, "/", "-")
	n := &Node{Name: name, Path: filepath.Join(l.dir, "ns", file), nameserver: nameserver}
	var err error
	if n.fd, n.inode, err = makeNamespace(n.Path); err != nil {
		return nil, err
	}
	if err := l.journal.add(entry{NS: n.Path, Inode: n.inode}); err != nil {
		return nil, err
	}
	if nameserver.IsValid() {
		conf := "nameserver " + nameserver.String() + "\n"
		if search != "" {
			conf += "search " + search + "\noptions ndots:5\n"
		}
		for target, text := range map[string]string{"/etc/resolv.conf": conf, "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n"} {
			source := filepath.Join(l.dir, "etc", file+"-"+filepath.Base(target))
			if err := os.WriteFile(source, []byte(text), 0o644); err != nil {
				return nil, err
			}
			if real, err := filepath.EvalSymlinks(target); err == nil {
				target = real
			}
			n.mounts = append(n.mounts, [2]string{source, target})
		}
	}
	l.mu.Lock()
	l.nodes[name] = n
	err = l.writeNodes()
	l.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return n, n.loopback()
}

// nodeFile is what "lab exec" needs to enter a node.
type nodeFile struct {
	NS     string      `json:"ns"`
	Mounts [][2]string `json:"mounts,omitempty"`
}

const nodesFile = "nodes.json"

func (l *Lab) writeNodes() error {
	m := map[string]nodeFile{}
	for name, n := range l.nodes {
		m[name] = nodeFile{NS: n.Path, Mounts: n.mounts}
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(l.dir, nodesFile), b, 0o644)
}

// writeFile replaces a file in one step, so that watchers never see half of it.
func writeFile(path string, data []byte, mode os.FileMode) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.WriteFile(tmp, data, mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// removeNode ends what runs in a node and takes its namespace away.
func (l *Lab) removeNode(n *Node) error {
	if err := killAll(func() []int { return processes(map[uint64]bool{n.inode: true}, "") }); err != nil {
		return fmt.Errorf("remove %s: %w", n.Name, err)
	}
	l.mu.Lock()
	delete(l.nodes, n.Name)
	err := l.writeNodes()
	l.mu.Unlock()
	return errors.Join(err, unix.Close(n.fd), unix.Unmount(n.Path, unix.MNT_DETACH), os.Remove(n.Path))
}

// Down ends every process the lab started, and those they started, and removes its namespaces and files. It may be
// called at any time, more than once, and after a failed Up.
func (l *Lab) Down() error {
	l.mu.Lock()
	if l.closed || l.journal == nil {
		l.closed = true
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	inodes, files := map[uint64]bool{}, []string{}
	for _, n := range l.nodes {
		inodes[n.inode] = true
		files = append(files, n.Path)
	}
	l.mu.Unlock()
	l.stopProcs(inodes)
	err := killAll(func() []int { return processes(inodes, l.Run) })
	l.wait.Wait()
	if l.keeping != nil {
		l.keeping.close()
	}
	l.release()
	return errors.Join(err, removeFiles(l.dir, files))
}

// stopProcs asks all processes to end and gives them a moment: programs then leave complete logs and data.
func (l *Lab) stopProcs(inodes map[uint64]bool) {
	for _, pid := range processes(inodes, l.Run) {
		_ = syscall.Kill(pid, syscall.SIGTERM)
	}
	_ = Eventually(context.Background(), time.Second, func(context.Context) error {
		return errIf(len(processes(inodes, l.Run)) > 0, "processes still run")
	})
}

func (l *Lab) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.nodes {
		_ = unix.Close(n.fd)
	}
	l.nodes = map[string]*Node{}
	l.journal.close()
}
