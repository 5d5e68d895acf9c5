package features

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// wire is what was seen on a node's network interface: the bytes of TCP connections to one port, by direction.
type wire struct {
	mu      sync.Mutex
	streams map[stream][]byte
	port    uint16
}

type stream struct {
	peer     [4]byte
	peerPort uint16
	toServer bool
}

// listen captures what goes to and from a port of a node until the test ends.
func listen(t *testing.T, n *lab.Node, port uint16) *wire {
	t.Helper()
	v := &wire{streams: map[stream][]byte{}, port: port}
	fd := -1
	if err := n.Do(func() (err error) {
		all := int(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))) // what leaves, too
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
		return err
	}); err != nil {
		t.Fatalf("capture on %s: %v", n.Name, err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if k, _, err := unix.Recvfrom(fd, buf, 0); err == nil {
				v.take(buf[:k])
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
		_ = unix.Close(fd)
	})
	return v
}

// take reads one IPv4 packet. Packets on a virtual cable arrive in order, and the first bytes of a connection once.
func (v *wire) take(p []byte) {
	if len(p) < 20 || p[0]>>4 != 4 || p[9] != unix.IPPROTO_TCP {
		return
	}
	header, total := int(p[0]&15)*4, int(binary.BigEndian.Uint16(p[2:]))
	if total < header+20 || total > len(p) {
		return
	}
	tcp := p[header:total]
	from, to, data := binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint16(tcp[2:]), int(tcp[12]>>4)*4
	if data > len(tcp) || from != v.port && to != v.port {
		return
	}
	s := stream{[4]byte(p[12:16]), from, true}
	if from == v.port {
		s = stream{[4]byte(p[16:20]), to, false}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.streams[s]) < 1<<20 {
		v.streams[s] = append(v.streams[s], tcp[data:]...)
	}
}

// hello is what the two sides said in clear when they set up TLS.
type hello struct {
	name     string
	alpn     []string
	versions []uint16
	chosen   uint16
}

// from returns what one client sent and got, all connections after one another, and their TLS hellos.
func (v *wire) from(peer [4]byte) (sent, got []byte, hellos []hello) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for s, data := range v.streams {
		if s.peer != peer || !s.toServer {
			continue
		}
		back := v.streams[stream{s.peer, s.peerPort, false}]
		sent, got = append(sent, data...), append(got, back...)
		if h, ok := readHello(data); ok {
			h.chosen = chosenVersion(back)
			hellos = append(hellos, h)
		}
	}
	return sent, got, hellos
}

// readHello lets Go's own server parse the first flight.
func readHello(data []byte) (h hello, ok bool) {
	conn := tls.Server(replay{bytes.NewReader(data)}, &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
		h, ok = hello{name: i.ServerName, alpn: slices.Clone(i.SupportedProtos), versions: slices.Clone(i.SupportedVersions)}, true
		return nil, errors.New("seen enough")
	}})
	_ = conn.Handshake()
	return h, ok
}

// chosenVersion reads the supported_versions extension of a ServerHello (RFC 8446, section 4.1.3), 0 without one.
func chosenVersion(data []byte) uint16 {
	const fixed = 5 + 4 + 2 + 32 // record, handshake, legacy version, random
	if len(data) < fixed+1 || data[0] != 22 || data[5] != 2 {
		return 0
	}
	at := fixed + 1 + int(data[fixed]) + 3 // session id, cipher suite, compression
	if len(data) < at+2 {
		return 0
	}
	end := min(len(data), at+2+int(binary.BigEndian.Uint16(data[at:])))
	for at += 2; at+4 <= end; {
		kind, size := binary.BigEndian.Uint16(data[at:]), int(binary.BigEndian.Uint16(data[at+2:]))
		if kind == 43 && size == 2 && at+6 <= end {
			return binary.BigEndian.Uint16(data[at+4:])
		}
		at += 4 + size
	}
	return 0
}

// replay is a connection that only gives what was captured.
type replay struct{ io.Reader }

func (replay) Write(b []byte) (int, error)      { return len(b), nil }
func (replay) Close() error                     { return nil }
func (replay) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (replay) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (replay) SetDeadline(time.Time) error      { return nil }
func (replay) SetReadDeadline(time.Time) error  { return nil }
func (replay) SetWriteDeadline(time.Time) error { return nil }
