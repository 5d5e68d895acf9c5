package gossip

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// network connects members in memory, and can cut any of them off.
type network struct {
	mu    sync.Mutex
	nodes map[string]*Gossip
	cut   map[string]bool
	wg    sync.WaitGroup
}

func (n *network) dial(from string) Dialer {
	return func(_ context.Context, to string) (net.Conn, error) {
		n.mu.Lock()
		defer n.mu.Unlock()
		g := n.nodes[to]
		if g == nil || n.cut[from] || n.cut[to] {
			return nil, fmt.Errorf("%s is out of reach", to)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		client, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		server, err := l.Accept()
		if err != nil {
			return nil, err
		}
		n.wg.Go(func() { g.Serve(server) })
		return client, nil
	}
}

type member struct {
	*Gossip
	mu      sync.Mutex
	packets []string
	states  []string
}

func (m *member) has(list func() []string, want string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, x := range list() {
		if x == want {
			return true
		}
	}
	return false
}

func start(t *testing.T, n *network, names ...string) map[string]*member {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait(); n.wg.Wait() })
	out := map[string]*member{}
	for i, name := range names {
		m := &member{}
		m.Gossip = New(Config{
			Name: name, Advertise: netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:15443", i+1)), Dial: n.dial(name), Rejoin: 50 * time.Millisecond,
			OnPacket:    func(b []byte) { m.mu.Lock(); defer m.mu.Unlock(); m.packets = append(m.packets, string(b)) },
			LocalState:  func() []byte { return []byte("state of " + name) },
			RemoteState: func(b []byte) { m.mu.Lock(); defer m.mu.Unlock(); m.states = append(m.states, string(b)) },
			OnChange:    func(string, bool) {}, Members: func() []string { return names }, Log: slog.New(slog.DiscardHandler),
		})
		n.mu.Lock()
		n.nodes[name] = m.Gossip
		n.mu.Unlock()
		out[name] = m
		wg.Go(func() {
			if err := m.Run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	return out
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond) // between polls of the condition
	}
}

func TestMembersFindEachOtherSpeakAndHeal(t *testing.T) {
	n := &network{nodes: map[string]*Gossip{}, cut: map[string]bool{}}
	members := start(t, n, "amber", "birch", "cedar")
	eventually(t, "three members see each other", func() bool {
		for _, m := range members {
			if alive := m.Alive(); len(alive) != 3 {
				return false
			}
		}
		return true
	})
	eventually(t, "states are exchanged", func() bool {
		m := members["birch"]
		return m.has(func() []string { return m.states }, "state of amber")
	})
	members["amber"].Broadcast("k", []byte("hello"))
	eventually(t, "a broadcast reaches all", func() bool {
		b, c := members["birch"], members["cedar"]
		return b.has(func() []string { return b.packets }, "hello") && c.has(func() []string { return c.packets }, "hello")
	})
}

func TestServeSurvivesGarbage(t *testing.T) {
	tr := newTransport(netip.MustParseAddrPort("192.0.2.1:15443"), nil, slog.New(slog.DiscardHandler))
	defer tr.Shutdown()
	for _, in := range [][]byte{{}, {'X'}, {'P'}, {'P', 0, 0}, {'P', 0xff, 0xff, 1}, append([]byte{'P'}, append(binary.BigEndian.AppendUint16(nil, 2), compressMsg, 1)...), {'S', compressMsg}, {'S'}} {
		client, server := net.Pipe()
		done := make(chan struct{})
		go func() { defer close(done); tr.serve(server) }()
		go func() { _, _ = client.Write(in); client.Close() }()
		<-done
	}
	select {
	case p := <-tr.packets:
		t.Errorf("garbage became a packet: %v", p.Buf)
	default:
	}
}
