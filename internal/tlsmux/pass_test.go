package tlsmux_test

import (
	"crypto/tls"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/internal/tlsmux"
)

// TestForward: a connection that another Mux serves is passed on unopened, once.
func TestForward(t *testing.T) {
	leader := route(t, "leader", speaks("join"), "join")
	addr, _ := run(t, tlsmux.Config{Routes: []tlsmux.Route{leader}})
	type place struct {
		to   string
		here bool
	}
	var now atomic.Pointer[place]
	set := func(to string, here bool) { now.Store(&place{to, here}) }
	set(addr, false)
	follower := route(t, "follower", speaks("join"), "join")
	follower.Forward = func() (string, bool) { p := now.Load(); return p.to, p.here }
	own := route(t, "own", speaks("h2"), "h2")
	front, stop := run(t, tlsmux.Config{Routes: []tlsmux.Route{follower, own}})

	got, conn, err := hello(front, &tls.Config{NextProtos: []string{"join"}, ServerName: "join.amber.mesh"})
	if err != nil || got != "leader" {
		t.Fatalf("served by %q, %v", got, err)
	}
	if name := conn.ConnectionState().PeerCertificates[0].DNSNames[0]; name != "leader" {
		t.Errorf("the certificate is that of %s: the connection was opened on the way", name)
	}
	other, another, err := hello(front, &tls.Config{NextProtos: []string{"h2"}})
	if err != nil || other != "own" {
		t.Errorf("another route: served by %q, %v", other, err)
	} else {
		another.Close()
	}
	if err := conn.CloseWrite(); err != nil { // the end of one direction gets through, and the far side's answer comes back
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conn); err != nil {
		t.Errorf("after the end: %v", err)
	}
	conn.Close()

	// One that was passed on already is not passed on again, and served where it belongs.
	raw := func(first string) string {
		c, err := net.DialTimeout("tcp", front, patience)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(c, first); err != nil {
			t.Fatal(err)
		}
		tc := tls.Client(c, &tls.Config{NextProtos: []string{"join"}, InsecureSkipVerify: true})
		b := make([]byte, 64)
		n, err := tc.Read(b)
		if err != nil {
			return "closed"
		}
		return strings.TrimSpace(string(b[:n]))
	}
	if got := raw("PROXY UNKNOWN\r\n"); got != "closed" {
		t.Errorf("passed on twice: served by %s", got)
	}
	if got := raw("PROXY TCP4 1\r\n\r\n"); got != "closed" {
		t.Errorf("another header: served by %s", got)
	}
	set(addr, true)
	if got := raw("PROXY UNKNOWN\r\n"); got != "follower" {
		t.Errorf("passed on, and here: %s", got)
	}
	set("", false)
	if got := raw(""); got != "closed" {
		t.Errorf("nobody leads: served by %s", got)
	}
	set("127.0.0.1:1", false)
	if got := raw(""); got != "closed" {
		t.Errorf("the leader is away: served by %s", got)
	}
	// Connections under way end with the Mux.
	set(addr, false)
	_, conn, err = hello(front, &tls.Config{NextProtos: []string{"join"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stop()
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a spliced connection outlives its Mux")
	}
}
