// Package gossip says who is in the mesh, who is alive and how far each has come, by memberlist over authenticated
// connections through the gateways. It carries opinions, and small records as a first way; it never decides that
// anything is gone.
package gossip

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// Config describes one member.
type Config struct {
	// Name of the local cluster.
	Name string
	// Advertise is the first gateway of the local cluster; other members show it, they dial by name.
	Advertise netip.AddrPort
	// Dial opens a connection to a member.
	Dial Dialer
	// OnPacket is handed each broadcast that came in. It must not block.
	OnPacket func([]byte)
	// LocalState is what a member that exchanges states is told, at most 1 MiB; RemoteState is handed what it told.
	LocalState  func() []byte
	RemoteState func([]byte)
	// OnChange is told that a member became alive or dead, as memberlist believes. It must not block.
	OnChange func(name string, alive bool)
	// Members lists who ought to be there; the rejoin loop tries those that memberlist does not have, which heals
	// partitions that memberlist has given up on.
	Members func() []string
	// Rejoin is the time between two such tries. Lowering it heals sooner and costs a dial per missing member.
	Rejoin time.Duration
	// Log takes memberlist's lines, too.
	Log *slog.Logger
}

// Gossip is one member.
type Gossip struct {
	cfg       Config
	transport *transport
	queue     *memberlist.TransmitLimitedQueue

	mu   sync.Mutex
	list *memberlist.Memberlist
}

// New makes a member; it says nothing until Run.
func New(cfg Config) *Gossip {
	if cfg.Rejoin == 0 {
		cfg.Rejoin = 2 * time.Second
	}
	g := &Gossip{cfg: cfg, transport: newTransport(cfg.Advertise, cfg.Dial, cfg.Log)}
	g.queue = &memberlist.TransmitLimitedQueue{RetransmitMult: 2, NumNodes: func() int { return len(cfg.Members()) + 1 }}
	return g
}

// Serve takes over an incoming connection whose other end is a member; it returns when it is done with it.
func (g *Gossip) Serve(conn net.Conn) { g.transport.serve(conn) }

// Broadcast spreads a packet of at most MaxPacket bytes to every member, by and by. A later one with the same key replaces it.
func (g *Gossip) Broadcast(key string, b []byte) {
	if len(b) <= MaxPacket {
		g.queue.QueueBroadcast(broadcast{key, b})
	}
}

// MaxPacket is the largest broadcast in bytes.
const MaxPacket = 1024

// Alive returns what memberlist believes of each member: alive, suspect, dead or left.
func (g *Gossip) Alive() map[string]string {
	g.mu.Lock()
	list := g.list
	g.mu.Unlock()
	out := map[string]string{}
	if list == nil {
		return out
	}
	names := map[memberlist.NodeStateType]string{memberlist.StateAlive: "alive", memberlist.StateSuspect: "suspect", memberlist.StateDead: "dead", memberlist.StateLeft: "left"}
	for _, n := range list.Members() {
		out[n.Name] = names[n.State]
	}
	return out
}

// Run is the member until ctx ends; then it leaves.
func (g *Gossip) Run(ctx context.Context) error {
	defer g.transport.Shutdown()
	c := memberlist.DefaultWANConfig()
	c.Name = g.cfg.Name
	c.Transport = g.transport
	c.EnableCompression = false
	c.ProbeInterval, c.ProbeTimeout = time.Second, 500*time.Millisecond
	c.SuspicionMult, c.PushPullInterval = 3, 30*time.Second
	c.GossipInterval, c.GossipToTheDeadTime = 100*time.Millisecond, 30*time.Second
	c.DisableTcpPings = true // packets are TCP already
	c.Delegate, c.Events = delegate{g}, delegate{g}
	c.RequireNodeNames = true
	c.UDPBufferSize = 8 << 10
	c.LogOutput = logWriter{g.cfg.Log}
	list, err := memberlist.Create(c)
	if err != nil {
		return fmt.Errorf("start gossip as %s: %w", g.cfg.Name, err)
	}
	g.mu.Lock()
	g.list = list
	g.mu.Unlock()
	tick := time.NewTicker(g.cfg.Rejoin)
	defer tick.Stop()
	for {
		g.rejoin(list)
		select {
		case <-tick.C:
		case <-ctx.Done():
			if err := list.Shutdown(); err != nil {
				return fmt.Errorf("stop gossip as %s: %w", g.cfg.Name, err)
			}
			return nil
		}
	}
}

// rejoin tries every member that is expected and not alive.
func (g *Gossip) rejoin(list *memberlist.Memberlist) {
	alive := map[string]bool{}
	for _, n := range list.Members() {
		alive[n.Name] = n.State == memberlist.StateAlive || n.State == memberlist.StateSuspect
	}
	var missing []string
	for _, name := range g.cfg.Members() {
		if !alive[name] && name != g.cfg.Name {
			missing = append(missing, name+"/192.0.2.1:15443") // dialled by name; memberlist wants some address (RFC 5737)
		}
	}
	if len(missing) == 0 {
		return
	}
	if n, err := list.Join(missing); n < len(missing) && err != nil {
		g.cfg.Log.Debug("members not reached", "part", "gossip", "err", err)
	}
}

type broadcast struct {
	key string
	b   []byte
}

// Name implements memberlist.NamedBroadcast.
func (b broadcast) Name() string { return b.key }

// Invalidates implements memberlist.Broadcast.
func (b broadcast) Invalidates(o memberlist.Broadcast) bool {
	other, ok := o.(broadcast)
	return ok && other.key == b.key
}

// Message implements memberlist.Broadcast.
func (b broadcast) Message() []byte { return b.b }

// Finished implements memberlist.Broadcast.
func (broadcast) Finished() {}

// delegate is how memberlist calls us.
type delegate struct{ g *Gossip }

// NodeMeta implements memberlist.Delegate.
func (delegate) NodeMeta(int) []byte { return nil }

// NotifyMsg implements memberlist.Delegate.
func (d delegate) NotifyMsg(b []byte) { d.g.cfg.OnPacket(append([]byte(nil), b...)) }

// GetBroadcasts implements memberlist.Delegate.
func (d delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.g.queue.GetBroadcasts(overhead, limit)
}

// LocalState implements memberlist.Delegate.
func (d delegate) LocalState(bool) []byte { return d.g.cfg.LocalState() }

// MergeRemoteState implements memberlist.Delegate.
func (d delegate) MergeRemoteState(b []byte, _ bool) { d.g.cfg.RemoteState(append([]byte(nil), b...)) }

// NotifyJoin implements memberlist.EventDelegate.
func (d delegate) NotifyJoin(n *memberlist.Node) { d.g.cfg.OnChange(n.Name, true) }

// NotifyLeave implements memberlist.EventDelegate.
func (d delegate) NotifyLeave(n *memberlist.Node) { d.g.cfg.OnChange(n.Name, false) }

// NotifyUpdate implements memberlist.EventDelegate.
func (delegate) NotifyUpdate(*memberlist.Node) {}

// logWriter turns memberlist's lines into records.
type logWriter struct{ log *slog.Logger }

// Write implements io.Writer for one line such as "[WARN] memberlist: text". What memberlist warns of is no operator's
// business here: the links have their own account. So nothing is above debug.
func (w logWriter) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	if i := strings.Index(text, "memberlist: "); i >= 0 {
		text = text[i+len("memberlist: "):]
	}
	w.log.Debug("memberlist", "line", text)
	return len(line), nil
}
