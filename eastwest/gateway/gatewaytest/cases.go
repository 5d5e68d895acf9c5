package gatewaytest

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
)

const suffix = ".p80.birch.web.shop.global"

// Case is one connection to a gateway and where it must end.
type Case struct {
	Name string
	SNI  string
	ALPN []string
	Wrap func(net.Conn) net.Conn // how the ClientHello is cut into records and writes
	Raw  string                  // sent as it is, instead of TLS
	Want []string                // servers, one of which must answer; empty: closed without a byte
}

var (
	mesh1 = []string{"istio"}
	any2  = []string{"web-1", "web-2"}
)

// Cases is the table that each gateway must pass in the world of NewWorld.
func Cases() []Case {
	return []Case{
		{Name: "first pod", SNI: "web-1" + suffix, ALPN: mesh1, Want: []string{"web-1"}},
		{Name: "second pod", SNI: "web-2" + suffix, ALPN: mesh1, Want: []string{"web-2"}},
		{Name: "upper case", SNI: "WEB-1" + strings.ToUpper(suffix), ALPN: mesh1, Want: []string{"web-1"}},
		{Name: "several protocols", SNI: "web-1" + suffix, ALPN: []string{"istio-peer-exchange", "istio", "h2"}, Want: []string{"web-1"}},
		{Name: "mesh protocol last", SNI: "web-1" + suffix, ALPN: []string{"h2", "istio-h2"}, Want: []string{"web-1"}},
		{Name: "unknown pod", SNI: "web-9" + suffix, ALPN: mesh1},
		{Name: "pod that is not ready", SNI: "web-unready" + suffix, ALPN: mesh1},
		{Name: "pod without mesh TLS", SNI: "web-plain" + suffix, ALPN: mesh1},
		{Name: "name below a pod", SNI: "x.web-1" + suffix, ALPN: mesh1},
		{Name: "service without pod", SNI: suffix[1:], ALPN: mesh1},
		{Name: "unknown port", SNI: "web-1.p81.birch.web.shop.global", ALPN: mesh1},
		{Name: "other cluster", SNI: "web-1.p80.amber.web.shop.global", ALPN: mesh1},
		{Name: "unknown service", SNI: "web-1.p80.birch.none.shop.global", ALPN: mesh1},
		{Name: "service that is not exported", SNI: "db-1.p5432.birch.db.shop.global", ALPN: mesh1},
		{Name: "no mesh protocol", SNI: "web-1" + suffix, ALPN: []string{"h2", "http/1.1"}},
		{Name: "no protocol", SNI: "web-1" + suffix},
		{Name: "no server name", ALPN: mesh1},
		{Name: "Istio form, global host", SNI: "outbound_.80_._.web.shop.global", ALPN: mesh1, Want: any2},
		{Name: "Istio form, local host", SNI: "outbound_.80_._.web.shop.svc.cluster.local", ALPN: mesh1, Want: any2},
		{Name: "Istio form, subset", SNI: "outbound_.80_.v1_.web.shop.global", ALPN: mesh1, Want: []string{"web-1"}},
		{Name: "Istio form, empty subset of the rule", SNI: "outbound_.80_.v9_.web.shop.global", ALPN: mesh1},
		{Name: "Istio form, unknown subset", SNI: "outbound_.80_.v3_.web.shop.global", ALPN: mesh1},
		{Name: "Istio form, not exported", SNI: "outbound_.5432_._.db.shop.svc.cluster.local", ALPN: mesh1},
		{Name: "Istio form, no mesh protocol", SNI: "outbound_.80_._.web.shop.global", ALPN: []string{"h2"}},
		{Name: "opened by a Gateway", SNI: "outbound_.90_._.books.open.svc.cluster.local", ALPN: mesh1, Want: []string{"books-1"}},
		{Name: "opened by a Gateway, no mesh protocol", SNI: "outbound_.90_._.books.open.svc.cluster.local", ALPN: []string{"h2"}},
		{Name: "opened by a Gateway, other port", SNI: "outbound_.91_._.books.open.svc.cluster.local", ALPN: mesh1},
		{Name: "a host that the Gateway does not name", SNI: "outbound_.90_._.books.open.global", ALPN: mesh1},
		{Name: "a namespace that the Gateway does not name", SNI: "outbound_.91_._.tills.shop.svc.cluster.local", ALPN: mesh1},
		{Name: "name of an opened cluster in another form", SNI: "outbound|90||books.open.svc.cluster.local", ALPN: mesh1},
		{Name: "join", SNI: "join.birch.mesh", ALPN: []string{"isthmus-join"}, Want: []string{"control"}},
		{Name: "gossip", SNI: "gossip.birch.mesh", ALPN: []string{"isthmus-gossip"}, Want: []string{"control"}},
		{Name: "peer", SNI: "peer.birch.mesh", ALPN: []string{"h2"}, Want: []string{"control"}},
		{Name: "xds", SNI: "xds.birch.mesh", Want: []string{"control"}},
		{Name: "control plane of another cluster", SNI: "join.amber.mesh", ALPN: []string{"isthmus-join"}},
		{Name: "below a control name", SNI: "x.join.birch.mesh", ALPN: []string{"isthmus-join"}},
		{Name: "name of a cluster", SNI: "control-plane", ALPN: mesh1},
		{Name: "hello in small records", SNI: "web-1" + suffix, ALPN: mesh1, Wrap: records(100), Want: []string{"web-1"}},
		{Name: "hello in tiny records", SNI: "web-2" + suffix, ALPN: mesh1, Wrap: records(1), Want: []string{"web-2"}},
		{Name: "hello byte by byte", SNI: "web-2" + suffix, ALPN: mesh1, Wrap: drip, Want: []string{"web-2"}},
		{Name: "large hello", SNI: "web-1" + suffix, ALPN: append(padding(12<<10), mesh1...), Want: []string{"web-1"}},
		{Name: "hello over the limit", SNI: "web-1" + suffix, ALPN: append(padding(20<<10), mesh1...)},
		{Name: "plain HTTP", Raw: "GET / HTTP/1.1\r\nHost: web-1" + suffix + "\r\n\r\n"},
		{Name: "noise", Raw: "\x16\x03\x01\x00\x05\x01\x00\x00\x01\xff"},
		{Name: "alert instead of hello", Raw: "\x15\x03\x01\x00\x02\x01\x00"},
	}
}

// Run starts a gateway and puts it through the table, then through a story of changes.
func Run(t *testing.T, start func(t *testing.T, res gateway.Resources) Gateway) {
	w := NewWorld(t)
	g := start(t, w.Resources(t))
	Eventually(t, "the first pod answers", func() bool { return reaches(g, "web-1"+suffix, "web-1") })
	for _, c := range Cases() {
		t.Run(c.Name, func(t *testing.T) {
			before := w.accepted()
			got, err := c.connect(g.Addr())
			switch {
			case len(c.Want) == 0 && err == nil:
				t.Errorf("answered by %s, want the connection closed", got)
			case len(c.Want) == 0 && !isClosed(err):
				t.Errorf("got %v, want the connection closed without a byte", err)
			case len(c.Want) == 0 && w.accepted() != before:
				t.Error("a server was dialled")
			case len(c.Want) > 0 && err != nil:
				t.Errorf("got %v, want an answer by %v", err, c.Want)
			case len(c.Want) > 0 && !slices.Contains(c.Want, got):
				t.Errorf("answered by %s, want %v", got, c.Want)
			}
		})
	}
	t.Run("pods of a service take turns", func(t *testing.T) {
		count := map[string]int{}
		for range 20 {
			got, err := Case{SNI: "outbound_.80_._.web.shop.global", ALPN: mesh1}.connect(g.Addr())
			if err != nil {
				t.Fatal(err)
			}
			count[got]++
		}
		if count["web-1"] != 10 || count["web-2"] != 10 {
			t.Errorf("20 connections went to %v, want 10 each", count)
		}
	})
	t.Run("changes", func(t *testing.T) { changes(t, w, g) })
}

// changes keeps one connection open while pods and exports change.
func changes(t *testing.T, w *World, g Gateway) {
	s, err := open(g.Addr(), Case{SNI: "web-1" + suffix, ALPN: mesh1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.conn.Close()
	alive := func(when string) {
		t.Helper()
		if got, err := s.ask(); err != nil || got != "web-1" {
			t.Fatalf("open connection %s: answered by %q, %v", when, got, err)
		}
	}
	alive("at first")

	w.up = []string{"web-1", "web-5"}
	g.Update(t, w.Resources(t))
	Eventually(t, "a new pod answers", func() bool { return reaches(g, "web-5"+suffix, "web-5") })
	Eventually(t, "a gone pod is closed", func() bool { return closes(g, "web-2"+suffix) })
	alive("after pods changed")

	old := w.pods["web-1"]
	w.pods["web-1"] = w.pods["web-1b"]
	g.Update(t, w.Resources(t))
	Eventually(t, "a pod that moved answers", func() bool { return reaches(g, "web-1"+suffix, "web-1b") })
	alive("after its pod moved")
	w.pods["web-1"] = old

	w.up = []string{"web-5"}
	g.Update(t, w.Resources(t))
	Eventually(t, "the pod is closed", func() bool { return closes(g, "web-1"+suffix) })
	alive("after its pod was removed")

	w.up, w.exported = []string{"web-1", "web-5"}, false
	g.Update(t, w.Resources(t))
	Eventually(t, "a withdrawn service is closed", func() bool { return closes(g, "web-5"+suffix) })
	alive("after the export was withdrawn")

	w.exported = true
	g.Update(t, w.Resources(t))
	Eventually(t, "the service answers again", func() bool { return reaches(g, "web-1"+suffix, "web-1") })
	alive("after all changes")
}

func reaches(g Gateway, name, want string) bool {
	got, err := Case{SNI: name, ALPN: mesh1}.connect(g.Addr())
	return err == nil && got == want
}

func closes(g Gateway, name string) bool {
	_, err := Case{SNI: name, ALPN: mesh1}.connect(g.Addr())
	return isClosed(err)
}

// errAnswered says that a gateway sent bytes of its own.
var errAnswered = errors.New("the gateway answered")

// isClosed reports whether the gateway closed the connection and said nothing.
func isClosed(err error) bool {
	var timeout net.Error
	switch {
	case err == nil, errors.Is(err, errAnswered), strings.Contains(err.Error(), "remote error"):
		return false
	case errors.As(err, &timeout) && timeout.Timeout():
		return false
	}
	return true
}

// session is an open connection to a Backend.
type session struct {
	conn  *tls.Conn
	lines *bufio.Reader
}

// open makes the TLS connection of the case.
func open(addr string, c Case) (*session, error) {
	raw, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return nil, err
	}
	_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
	if c.Wrap != nil {
		raw = c.Wrap(raw)
	}
	conn := tls.Client(raw, &tls.Config{ServerName: c.SNI, NextProtos: c.ALPN, InsecureSkipVerify: true}) //nolint:gosec // the pod's certificate is not under test
	if err := conn.Handshake(); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return &session{conn: conn, lines: bufio.NewReader(conn)}, nil
}

// ask sends a line and returns the name of the server that answered.
func (s *session) ask() (string, error) {
	_ = s.conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(s.conn, "ping\n"); err != nil {
		return "", err
	}
	line, err := s.lines.ReadString('\n')
	if err != nil {
		return "", err
	}
	name, rest, _ := strings.Cut(line, " ")
	if !strings.HasSuffix(rest, " ping\n") {
		return "", fmt.Errorf("answer %q", line)
	}
	return name, nil
}

// connect runs the case once: a line, its answer, the end of input, and the answer to that.
func (c Case) connect(addr string) (string, error) {
	if c.Raw != "" {
		return "", c.sendRaw(addr)
	}
	s, err := open(addr, c)
	if err != nil {
		return "", err
	}
	defer s.conn.Close()
	name, err := s.ask()
	if err != nil {
		return "", err
	}
	if err := s.conn.CloseWrite(); err != nil {
		return "", err
	}
	if half, ok := s.conn.NetConn().(interface{ CloseWrite() error }); ok {
		if err := half.CloseWrite(); err != nil {
			return "", err
		}
	}
	if bye, err := s.lines.ReadString('\n'); err != nil || bye != "bye\n" {
		return "", fmt.Errorf("after the end of input: %q, %w", bye, err)
	}
	return name, nil
}

func (c Case) sendRaw(addr string) error {
	conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.WriteString(conn, c.Raw); err != nil {
		return err
	}
	n, err := conn.Read(make([]byte, 1))
	if n > 0 {
		return errAnswered
	}
	return err
}

// firstWrite passes the first write, which is the ClientHello, through cut, and each of its parts to the network alone.
type firstWrite struct {
	net.Conn
	cut  func([]byte) [][]byte
	done bool
}

func (f *firstWrite) Write(b []byte) (int, error) {
	if f.done {
		return f.Conn.Write(b)
	}
	f.done = true
	for _, part := range f.cut(b) {
		if _, err := f.Conn.Write(part); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

func (f *firstWrite) CloseWrite() error { return f.Conn.(*net.TCPConn).CloseWrite() }

// records cuts the handshake message into records of size octets.
func records(size int) func(net.Conn) net.Conn {
	return func(c net.Conn) net.Conn {
		return &firstWrite{Conn: c, cut: func(b []byte) [][]byte {
			var out []byte
			for chunk := range slices.Chunk(b[5:], size) {
				out = append(out, b[:3]...)
				out = binary.BigEndian.AppendUint16(out, uint16(len(chunk)))
				out = append(out, chunk...)
			}
			return [][]byte{out}
		}}
	}
}

// drip sends each octet by itself.
func drip(c net.Conn) net.Conn {
	return &firstWrite{Conn: c, cut: func(b []byte) [][]byte { return slices.Collect(slices.Chunk(b, 1)) }}
}

// padding returns protocol names of about size octets in all.
func padding(size int) []string {
	var out []string
	for n := 0; n < size; n += 251 {
		out = append(out, fmt.Sprintf("%0250d", n))
	}
	return out
}
