// Package wan emulates the network between clusters: it joins network namespaces by TUN devices and passes packets
// between them with delay, jitter, loss, reordering, cuts in one direction and small MTUs. The kernel's own emulator
// (netem) is not everywhere; this one needs /dev/net/tun and CAP_NET_ADMIN.
//
// It works on whole IP packets and knows nothing of what they carry. A rule is for one direction between two ports.
package wan

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// DefaultMTU is the size in bytes of the largest IP packet where a Link does not say.
const DefaultMTU = 1500

// DefaultQueue is how many packets may be on their way to one port. Raising it takes memory (1.5 KB each); a long
// delay at a high rate needs it: 100 ms at 50,000 packets a second are 5,000.
const DefaultQueue = 20_000

// Link is how one direction between two ports behaves. The zero Link is a perfect one.
type Link struct {
	Delay   time.Duration `yaml:"delay,omitempty"`
	Jitter  time.Duration `yaml:"jitter,omitempty"`  // the delay is drawn evenly from Delay ± Jitter, order is kept
	Loss    float64       `yaml:"loss,omitempty"`    // share of packets lost, 0..1, each on its own
	Reorder float64       `yaml:"reorder,omitempty"` // share of packets that overtake those before them, 0..1; needs a Delay
	MTU     int           `yaml:"mtu,omitempty"`     // bytes, 0 means DefaultMTU; larger packets are answered with ICMP "too big", as a router does
	Down    bool          `yaml:"down,omitempty"`    // nothing passes, and nobody is told
}

// Check returns what is wrong with the values.
func (l Link) Check() error {
	switch {
	case l.Delay < 0 || l.Jitter < 0 || l.Delay > time.Minute:
		return fmt.Errorf("delay %v, jitter %v: want 0 to 1m", l.Delay, l.Jitter)
	case l.Jitter > l.Delay:
		return fmt.Errorf("jitter %v is more than delay %v", l.Jitter, l.Delay)
	case l.Loss < 0 || l.Loss > 1 || l.Reorder < 0 || l.Reorder > 1:
		return fmt.Errorf("loss %v, reorder %v: want 0 to 1", l.Loss, l.Reorder)
	case l.MTU != 0 && (l.MTU < 576 || l.MTU > DefaultMTU):
		return fmt.Errorf("mtu %d: want 576 to %d", l.MTU, DefaultMTU)
	}
	return nil
}

// Stats counts the packets of one direction.
type Stats struct {
	Passed    uint64 // handed to the other side
	Lost      uint64 // by Loss
	Down      uint64 // by Down
	TooBig    uint64 // over the MTU
	Overflow  uint64 // the queue was full
	Overtaken uint64 // sent ahead of others by Reorder
}

// Port is one side's attachment.
type Port struct {
	Name string
	// Enter runs a function on a thread inside the port's network namespace; nil means the caller's.
	Enter func(func() error) error
	// Device is the name of the TUN device that is made there.
	Device string
	// Addresses are given to the device; the kernel there sends what lies in their prefixes to it.
	Addresses []netip.Prefix
	// Routes are further destinations that lie behind this port, for example the addresses of its load balancers.
	Routes []netip.Prefix
}

// Config is how an Emulator is made.
type Config struct {
	// Seed makes the draws of loss, jitter and reordering. The draws repeat for one order of packets, not the order itself.
	Seed uint64
	// Queue bounds the packets on their way to one port; 0 means DefaultQueue.
	Queue int
}

// Emulator is the network. Attach ports, then Run.
type Emulator struct {
	cfg   Config
	ports []*port // fixed once Run began
	mu    sync.RWMutex
	links map[direction]*link
}

type direction struct{ from, to string }

// link is the rule of one direction with its draws and counts.
type link struct {
	mu    sync.Mutex
	rule  Link
	draws *rand.Rand
	last  time.Time // when the newest packet is due: order is kept

	passed, lost, down, tooBig, overflow, overtaken atomic.Uint64
}

type port struct {
	Port
	file  *os.File
	queue *queue
}

// New returns an Emulator without ports. It starts nothing.
func New(cfg Config) *Emulator {
	if cfg.Queue == 0 {
		cfg.Queue = DefaultQueue
	}
	return &Emulator{cfg: cfg, links: map[direction]*link{}}
}

// Attach makes the port's device, with its addresses, set up. It must not be called once Run began.
func (e *Emulator) Attach(p Port) error {
	for _, have := range e.ports {
		if have.Name == p.Name {
			return fmt.Errorf("wan port %s: the name is taken", p.Name)
		}
	}
	if p.Enter == nil {
		p.Enter = func(fn func() error) error { return fn() }
	}
	f, err := openDevice(p)
	if err != nil {
		return fmt.Errorf("wan port %s: %w", p.Name, err)
	}
	e.ports = append(e.ports, &port{Port: p, file: f, queue: newQueue(e.cfg.Queue)})
	return nil
}

// Close removes the devices of an Emulator that is not to Run.
func (e *Emulator) Close() {
	for _, p := range e.ports {
		p.file.Close()
	}
}

// Set gives one direction a rule, at once; packets on their way keep theirs.
func (e *Emulator) Set(from, to string, l Link) error {
	if err := l.Check(); err != nil {
		return fmt.Errorf("wan link %s to %s: %w", from, to, err)
	}
	for _, name := range []string{from, to} {
		if e.port(name) == nil {
			return fmt.Errorf("wan link %s to %s: there is no port %s", from, to, name)
		}
	}
	x := e.link(direction{from, to})
	x.mu.Lock()
	defer x.mu.Unlock()
	x.rule = l
	return nil
}

// Get returns the rule of one direction.
func (e *Emulator) Get(from, to string) Link {
	x := e.link(direction{from, to})
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.rule
}

// Stats returns the counts of one direction.
func (e *Emulator) Stats(from, to string) Stats {
	x := e.link(direction{from, to})
	return Stats{x.passed.Load(), x.lost.Load(), x.down.Load(), x.tooBig.Load(), x.overflow.Load(), x.overtaken.Load()}
}

func (e *Emulator) port(name string) *port {
	for _, p := range e.ports {
		if p.Name == name {
			return p
		}
	}
	return nil
}

func (e *Emulator) link(d direction) *link {
	e.mu.RLock()
	x := e.links[d]
	e.mu.RUnlock()
	if x != nil {
		return x
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if x = e.links[d]; x == nil {
		h := uint64(14695981039346656037) // FNV-1a over both names: each direction draws on its own
		for _, c := range []byte(d.from + "\x00" + d.to) {
			h = (h ^ uint64(c)) * 1099511628211
		}
		x = &link{draws: rand.New(rand.NewPCG(e.cfg.Seed, h))}
		e.links[d] = x
	}
	return x
}

// Run passes packets until ctx ends, then removes the devices.
func (e *Emulator) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, p := range e.ports {
		g.Go(func() error { return e.read(ctx, p) })
		g.Go(func() error { return p.deliver(ctx) })
	}
	g.Go(func() error {
		<-ctx.Done()
		e.Close() // ends the reads
		return nil
	})
	return g.Wait()
}

// read takes what leaves a port and sends it on its way.
func (e *Emulator) read(ctx context.Context, p *port) error {
	buf := make([]byte, 65_535)
	for {
		n, err := p.file.Read(buf)
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, os.ErrClosed) {
				return nil
			}
			return fmt.Errorf("wan port %s: read: %w", p.Name, err)
		}
		e.forward(p, buf[:n])
	}
}

// forward finds where a packet goes and what happens to it on the way. The packet's bytes are copied.
func (e *Emulator) forward(from *port, packet []byte) {
	_, dst, ok := addresses(packet)
	if !ok {
		return
	}
	to := e.route(dst)
	if to == nil || to == from {
		return
	}
	x := e.link(direction{from.Name, to.Name})
	now := time.Now()
	due, verdict := x.judge(now, len(packet))
	switch verdict {
	case pass:
		if to.queue.push(item{due: due, packet: append([]byte(nil), packet...), link: x}) {
			return
		}
		x.overflow.Add(1)
	case tooBig:
		if reply := tooBigReply(packet, x.mtu()); reply != nil {
			from.queue.push(item{due: now, packet: reply})
		}
	}
}

// route returns the port with the longest prefix around an address.
func (e *Emulator) route(dst netip.Addr) *port {
	var best *port
	bits := -1
	for _, p := range e.ports {
		for _, a := range p.Addresses {
			if a.Addr() == dst {
				return p
			}
		}
		for _, r := range p.Routes {
			if r.Bits() > bits && r.Contains(dst) {
				best, bits = p, r.Bits()
			}
		}
	}
	return best
}

type verdict int

const (
	drop verdict = iota
	pass
	tooBig
)

func (x *link) mtu() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.rule.MTU == 0 {
		return DefaultMTU
	}
	return x.rule.MTU
}

// judge says what happens to a packet that enters now, and when it is due at the other side.
func (x *link) judge(now time.Time, size int) (time.Time, verdict) {
	x.mu.Lock()
	defer x.mu.Unlock()
	r := x.rule
	mtu := r.MTU
	if mtu == 0 {
		mtu = DefaultMTU
	}
	switch {
	case r.Down:
		x.down.Add(1)
		return now, drop
	case size > mtu:
		x.tooBig.Add(1)
		return now, tooBig
	case r.Loss > 0 && x.draws.Float64() < r.Loss:
		x.lost.Add(1)
		return now, drop
	case r.Reorder > 0 && r.Delay > 0 && x.draws.Float64() < r.Reorder:
		x.overtaken.Add(1)
		return now, pass
	}
	due := now.Add(r.Delay)
	if r.Jitter > 0 {
		due = due.Add(time.Duration((2*x.draws.Float64() - 1) * float64(r.Jitter)))
	}
	if due.Before(x.last) {
		due = x.last
	}
	x.last = due
	return due, pass
}
