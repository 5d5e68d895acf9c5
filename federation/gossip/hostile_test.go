package gossip

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// head is the header of an exchange of states, as memberlist encodes it.
func head(nodes, state uint32) []byte {
	b := []byte{pushPullMsg, 0x83}
	b = append(append(b, 0xa5), "Nodes"...)
	b = binary.BigEndian.AppendUint32(append(b, 0xce), nodes)
	b = append(append(b, 0xac), "UserStateLen"...)
	b = binary.BigEndian.AppendUint32(append(b, 0xce), state)
	b = append(append(b, 0xa4), "Join"...)
	return append(b, 0xc2)
}

func compound(parts ...[]byte) []byte {
	b := []byte{compoundMsg, byte(len(parts))}
	for _, p := range parts {
		b = binary.BigEndian.AppendUint16(b, uint16(len(p)))
	}
	return append(b, bytes.Join(parts, nil)...)
}

func crc(b []byte) []byte { return append([]byte{hasCrcMsg, 1, 2, 3, 4}, b...) }

// field is a map of one entry.
func field(key string, value ...byte) []byte {
	return append(append([]byte{0x81, 0xa0 | byte(len(key))}, key...), value...)
}

var bombs = map[string]struct {
	packet, stream []byte
}{
	"a million members announced":        {stream: head(1<<20, 0)},
	"four billion members announced":     {stream: head(1<<32-1, 0)},
	"twenty megabytes of state":          {stream: head(0, 20<<20)},
	"state announced and never sent":     {stream: head(1, 1<<20)},
	"a negative number of members":       {stream: append([]byte{pushPullMsg}, field("Nodes", 0xff)...)},
	"one field twice":                    {stream: append([]byte{pushPullMsg, 0x82}, append(field("Nodes", 1)[1:], field("Nodes", 0xce, 0, 16, 0, 0)[1:]...)...)},
	"a header as a list":                 {stream: []byte{pushPullMsg, 0x93, 0xce, 0, 16, 0, 0, 0, 0xc2}},
	"a string of four gigabytes":         {stream: append(head(1, 0), field("Name", 0xdb, 0xff, 0xff, 0xff, 0xff)...)},
	"a list of four billion":             {stream: append(head(1, 0), field("Vsn", 0xdd, 0xff, 0xff, 0xff, 0xff)...)},
	"a map of four billion":              {stream: append([]byte{pushPullMsg}, 0xdf, 0xff, 0xff, 0xff, 0xff)},
	"maps within maps":                   {stream: append(head(1, 0), bytes.Repeat(field("a"), 1000)...)},
	"a compressed stream":                {stream: append([]byte{compressMsg}, field("Buf", 0xc6, 0, 0x30, 0, 0)...)},
	"an encrypted stream":                {stream: []byte{encryptMsg, 0, 0xff, 0xff, 0xff, 0xff}},
	"a user message of twenty megabytes": {stream: append([]byte{userMsg}, field("UserMsgLen", 0xce, 1, 0x40, 0, 0)...)},
	"a label":                            {stream: []byte{244, 3, 'a', 'b', 'c', compressMsg}},
	"a compressed packet":                {packet: append([]byte{compressMsg}, field("Buf", 0xc5, 0xf0, 0)...)},
	"a compressed part of a compound":    {packet: compound([]byte{compressMsg, 0x80})},
	"a compound in a compound":           {packet: compound(compound(compound([]byte{pingMsg, 0x80})))},
	"compression behind a checksum":      {packet: crc([]byte{compressMsg, 0x80})},
	"a checksum behind a checksum":       {packet: crc(crc([]byte{compressMsg, 0x80}))},
	"compression behind both":            {packet: crc(compound([]byte{compressMsg, 0x80}))},
	"a label before a packet":            {packet: []byte{244, 1, 'a', compressMsg}},
	"a compound that is cut":             {packet: []byte{compoundMsg, 255, 0, 1}},
	"a part longer than the packet":      {packet: []byte{compoundMsg, 1, 0xff, 0xff, pingMsg}},
	"a name of four gigabytes":           {packet: append([]byte{aliveMsg}, field("Node", 0xdb, 0xff, 0xff, 0xff, 0xff)...)},
	"a payload of four gigabytes":        {packet: append([]byte{ackRespMsg}, field("Payload", 0xc6, 0xff, 0xff, 0xff, 0xff)...)},
	"a broadcast of 64 KiB":              {packet: append([]byte{userMsg}, make([]byte, 65000)...)},
	"an exchange of states in a packet":  {packet: head(1<<20, 0)},
	"a type that is none":                {packet: []byte{99, 0x80}},
	"nothing in a compound":              {packet: compound(nil)},
}

// TestBombs sends what would make memberlist allocate without end. The transport refuses it, with less memory than it
// announces, and honest members go on.
func TestBombs(t *testing.T) {
	n := &network{nodes: map[string]*Gossip{}, cut: map[string]bool{}}
	members := start(t, n, "amber", "birch")
	both := func() bool { return len(members["amber"].Alive()) == 2 && len(members["birch"].Alive()) == 2 }
	eventually(t, "two members see each other", both)
	for name, b := range bombs {
		t.Run(name, func(t *testing.T) {
			if b.packet != nil && screenPacket(b.packet) == nil {
				t.Error("the packet passes")
			}
			if b.stream != nil {
				if _, err := screenStream(bytes.NewReader(b.stream)); err == nil {
					t.Error("the stream passes")
				}
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range 20 {
				conn, err := n.dial("mallory")(t.Context(), "amber")
				if err != nil {
					t.Fatal(err)
				}
				if b.stream != nil {
					_, _ = conn.Write(append([]byte{kindStream}, b.stream...))
				} else {
					_, _ = conn.Write(append(binary.BigEndian.AppendUint16([]byte{kindPackets}, uint16(len(b.packet))), b.packet...))
				}
				_ = conn.(*net.TCPConn).CloseWrite()
				_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
				if k, _ := conn.Read(make([]byte, 1)); k > 0 {
					t.Error("there is an answer")
				}
				conn.Close()
			}
			runtime.ReadMemStats(&after)
			if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
				t.Errorf("%d MiB were allocated for 20 of them", used>>20)
			}
		})
	}
	eventually(t, "they still see each other", both)
}

// TestLongPartition cuts a member off for ten minutes, on a clock that the test makes pass: until the others have given it
// up. Once the way is clear it is back within five seconds, by our own loop, over connections alone.
func TestLongPartition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		cut := map[string]bool{}
		nodes := map[string]*Gossip{}
		names := []string{"amber", "birch", "cedar"}
		var conns []net.Conn
		var serving, running sync.WaitGroup
		ctx, cancel := context.WithCancel(t.Context())
		for i, name := range names {
			nodes[name] = New(Config{
				Name: name, Advertise: netip.MustParseAddrPort(fmt.Sprintf("192.0.2.%d:15443", i+1)), Rejoin: 2 * time.Second,
				Dial: func(_ context.Context, to string) (net.Conn, error) {
					mu.Lock()
					defer mu.Unlock()
					if cut[name] || cut[to] {
						return nil, fmt.Errorf("%s is out of reach", to)
					}
					a, b := net.Pipe()
					conns = append(conns, a, b)
					serving.Go(func() { nodes[to].Serve(b) })
					return a, nil
				},
				OnPacket: func([]byte) {}, LocalState: func() []byte { return nil }, RemoteState: func([]byte) {}, OnChange: func(string, bool) {},
				Members: func() []string { return names }, Log: slog.New(slog.DiscardHandler),
			})
		}
		for _, g := range nodes {
			running.Go(func() {
				if err := g.Run(ctx); err != nil {
					t.Error(err)
				}
			})
		}
		alive := func() (all bool, seen int) {
			all = true
			for _, g := range nodes {
				n := 0
				for _, state := range g.Alive() {
					if state == "alive" {
						n++
					}
				}
				all = all && n == len(names)
			}
			for _, state := range nodes["amber"].Alive() {
				if state == "alive" || state == "suspect" {
					seen++
				}
			}
			return all, seen
		}
		within := func(d time.Duration, what string, ok func() bool) {
			t.Helper()
			for begin := time.Now(); !ok(); time.Sleep(50 * time.Millisecond) {
				if time.Since(begin) > d {
					t.Fatalf("not within %s: %s", d, what)
				}
			}
		}
		within(30*time.Second, "all see all", func() bool { all, _ := alive(); return all })
		mu.Lock()
		cut["cedar"] = true
		for _, c := range conns { // those of others come again
			c.Close()
		}
		mu.Unlock()
		within(2*time.Minute, "cedar is given up", func() bool { _, seen := alive(); return seen == 2 })
		time.Sleep(10 * time.Minute)
		mu.Lock()
		cut["cedar"] = false
		mu.Unlock()
		within(5*time.Second, "all see all again", func() bool { all, _ := alive(); return all })
		cancel()
		running.Wait()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		serving.Wait()
	})
}

// FuzzGossip: whatever comes as a packet or a stream, it is refused, or read in bounds.
func FuzzGossip(f *testing.F) {
	for _, b := range bombs {
		f.Add(b.packet)
		f.Add(b.stream)
	}
	f.Add(append([]byte{pingMsg}, field("SeqNo", 1)...))
	f.Add(crc(compound(append([]byte{aliveMsg}, field("Node", 0xa1, 'a')...), []byte{userMsg, 1, 2})))
	f.Add(append(append(head(1, 2), field("Name", 0xa1, 'a')...), 1, 2))
	f.Fuzz(func(t *testing.T, in []byte) {
		_ = screenPacket(in)
		out, err := screenStream(bytes.NewReader(in))
		if err == nil && (len(out) > len(in) || !bytes.Equal(out, in[:len(out)])) {
			t.Fatalf("%x was read as %x", in, out)
		}
		if len(out) > len(in)+8192 {
			t.Fatalf("%d bytes were kept of %d", len(out), len(in))
		}
	})
}
