package gossip

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// A connection begins with one byte: packets (each with a 16-bit big-endian length) or one stream.
const (
	kindPackets byte = 'P'
	kindStream  byte = 'S'
)

const (
	streamTime   = 10 * time.Second // for one stream to say what it has to
	queueLen     = 256              // packets waiting for one member; the newest is dropped when full, as on any network
	idlePackets  = 5 * time.Minute  // a packet connection without traffic is closed
	dialTimeout  = 2 * time.Second  // for one gateway
	writeTimeout = 2 * time.Second  // for one packet
	readKind     = 5 * time.Second  // for the first byte
	inboxLen     = 1024             // packets and streams not yet taken by memberlist
)

// Dialer opens an authenticated connection to the member of that name, through one of its gateways.
type Dialer func(ctx context.Context, member string) (net.Conn, error)

// transport carries memberlist's packets and streams over authenticated connections.
type transport struct {
	advertise netip.AddrPort
	dial      Dialer
	log       *slog.Logger
	packets   chan *memberlist.Packet
	streams   chan net.Conn
	ctx       context.Context
	end       context.CancelFunc
	wg        sync.WaitGroup

	mu    sync.Mutex
	out   map[string]chan []byte // member -> packets to send
	conns map[net.Conn]bool
}

var _ memberlist.NodeAwareTransport = (*transport)(nil)

func newTransport(advertise netip.AddrPort, dial Dialer, log *slog.Logger) *transport {
	ctx, end := context.WithCancel(context.Background())
	return &transport{
		advertise: advertise, dial: dial, log: log, ctx: ctx, end: end,
		packets: make(chan *memberlist.Packet, inboxLen), streams: make(chan net.Conn, inboxLen),
		out: map[string]chan []byte{}, conns: map[net.Conn]bool{},
	}
}

var errNoName = errors.New("members are reached by name only")

// FinalAdvertiseAddr implements memberlist.Transport.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.advertise.Addr().AsSlice(), int(t.advertise.Port()), nil
}

// PacketCh implements memberlist.Transport.
func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh implements memberlist.Transport.
func (t *transport) StreamCh() <-chan net.Conn { return t.streams }

// WriteTo implements memberlist.Transport.
func (t *transport) WriteTo([]byte, string) (time.Time, error) { return time.Time{}, errNoName }

// DialTimeout implements memberlist.Transport.
func (t *transport) DialTimeout(string, time.Duration) (net.Conn, error) { return nil, errNoName }

// WriteToAddress implements memberlist.NodeAwareTransport: it queues the packet and never blocks.
func (t *transport) WriteToAddress(b []byte, addr memberlist.Address) (time.Time, error) {
	now := time.Now()
	if addr.Name == "" {
		return now, errNoName
	}
	if len(b) > 0xffff {
		return now, fmt.Errorf("packet of %d bytes for %s: 65535 are allowed", len(b), addr.Name)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx.Err() != nil {
		return now, net.ErrClosed
	}
	queue := t.out[addr.Name]
	if queue == nil {
		queue = make(chan []byte, queueLen)
		t.out[addr.Name] = queue
		t.wg.Go(func() { t.send(addr.Name, queue) })
	}
	select {
	case queue <- append([]byte(nil), b...):
	default:
	}
	return now, nil
}

// send writes one member's packets, dialling when there is something to say, until it has been idle for long.
func (t *transport) send(name string, queue chan []byte) {
	var conn net.Conn
	idle := time.NewTimer(idlePackets)
	defer idle.Stop()
	defer func() {
		if conn != nil {
			t.drop(conn)
		}
	}()
	for {
		var packet []byte
		select {
		case packet = <-queue:
		case <-t.ctx.Done():
			return
		case <-idle.C:
			t.mu.Lock()
			if len(queue) == 0 {
				delete(t.out, name)
				t.mu.Unlock()
				return
			}
			t.mu.Unlock()
			idle.Reset(idlePackets)
			continue
		}
		idle.Reset(idlePackets)
		if conn == nil {
			c, err := t.open(name, kindPackets, dialTimeout)
			if err != nil {
				t.log.Debug("gossip packet not sent", "peer", name, "err", err)
				continue // lost, as packets may be
			}
			conn = c
		}
		frame := append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(packet)), uint16(len(packet))), packet...)
		_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if _, err := conn.Write(frame); err != nil {
			t.drop(conn)
			conn = nil
		}
	}
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *transport) DialAddressTimeout(addr memberlist.Address, timeout time.Duration) (net.Conn, error) {
	if addr.Name == "" {
		return nil, errNoName
	}
	conn, err := t.open(addr.Name, kindStream, timeout)
	if err != nil {
		return nil, err
	}
	return &screened{Conn: conn}, nil
}

func (t *transport) open(name string, kind byte, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(t.ctx, timeout)
	defer cancel()
	conn, err := t.dial(ctx, name)
	if err != nil {
		return nil, err
	}
	_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if _, err := conn.Write([]byte{kind}); err != nil {
		conn.Close()
		return nil, fmt.Errorf("greet %s: %w", name, err)
	}
	_ = conn.SetWriteDeadline(time.Time{})
	if kind == kindPackets && !t.keep(conn) {
		conn.Close()
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (t *transport) keep(c net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx.Err() != nil {
		return false
	}
	t.conns[c] = true
	return true
}

func (t *transport) drop(c net.Conn) {
	t.mu.Lock()
	delete(t.conns, c)
	t.mu.Unlock()
	c.Close()
}

// serve takes over an authenticated connection that was accepted and returns when it is done with it.
func (t *transport) serve(conn net.Conn) {
	if !t.keep(conn) {
		conn.Close()
		return
	}
	defer t.drop(conn)
	_ = conn.SetReadDeadline(time.Now().Add(readKind))
	kind := make([]byte, 1)
	if _, err := io.ReadFull(conn, kind); err != nil {
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	switch kind[0] {
	case kindPackets:
		t.receive(conn)
	case kindStream:
		_ = conn.SetReadDeadline(time.Now().Add(streamTime))
		s := &stream{screened: screened{Conn: conn}, done: make(chan struct{})}
		if _, err := s.Read(nil); err != nil {
			t.log.Debug("gossip stream refused", "part", "gossip", "err", err)
			return
		}
		select {
		case t.streams <- s:
		case <-t.ctx.Done():
			return
		}
		select {
		case <-s.done:
		case <-t.ctx.Done():
		}
	}
}

// receive reads packets until the connection ends.
func (t *transport) receive(conn net.Conn) {
	r := bufio.NewReader(conn)
	from := net.TCPAddrFromAddrPort(t.advertise) // memberlist only logs it: answers go to the name inside
	for {
		var length [2]byte
		_ = conn.SetReadDeadline(time.Now().Add(2 * idlePackets))
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return
		}
		buf := make([]byte, binary.BigEndian.Uint16(length[:]))
		if _, err := io.ReadFull(r, buf); err != nil || len(buf) == 0 {
			return
		}
		if err := screenPacket(buf); err != nil {
			t.log.Debug("gossip packet refused", "part", "gossip", "err", err)
			return
		}
		select {
		case t.packets <- &memberlist.Packet{Buf: buf, From: from, Timestamp: time.Now()}:
		case <-t.ctx.Done():
			return
		}
	}
}

// Shutdown implements memberlist.Transport.
func (t *transport) Shutdown() error {
	t.mu.Lock()
	t.end()
	for c := range t.conns {
		c.Close()
	}
	t.mu.Unlock()
	t.wg.Wait()
	return nil
}

// stream is an incoming stream.
type stream struct {
	screened
	once sync.Once
	done chan struct{}
}

// Close implements net.Conn.
func (s *stream) Close() error {
	s.once.Do(func() { close(s.done) })
	return s.Conn.Close()
}
