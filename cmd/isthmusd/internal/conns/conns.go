// Package conns knows the open connections of this isthmusd with other clusters, so that those with a trust domain that is
// trusted no longer can be closed: a handshake is verified once, a connection lives on.
package conns

import (
	"net"
	"sync"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Conns is the list. Its zero value is ready; it is safe for concurrent use.
type Conns struct {
	mu   sync.Mutex
	open map[*conn]bool
}

// conn leaves the list when it is closed.
type conn struct {
	net.Conn
	domain mesh.TrustDomain
	list   *Conns
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.list.drop(c)
	return c.Conn.Close()
}

// Wrap lists a connection until it is closed.
func (l *Conns) Wrap(td mesh.TrustDomain, c net.Conn) net.Conn {
	out := &conn{c, td, l}
	l.add(out)
	return out
}

// Hold lists a connection until release is called.
func (l *Conns) Hold(td mesh.TrustDomain, c net.Conn) (release func()) {
	out := &conn{c, td, l}
	l.add(out)
	return func() { l.drop(out) }
}

func (l *Conns) add(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open == nil {
		l.open = map[*conn]bool{}
	}
	l.open[c] = true
}

func (l *Conns) drop(c *conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.open, c)
}

// Keep closes the connections with trust domains that trusted does not know, and returns how many these were.
func (l *Conns) Keep(trusted func(mesh.TrustDomain) bool) int {
	l.mu.Lock()
	var out []*conn
	for c := range l.open {
		if !trusted(c.domain) {
			out = append(out, c)
			delete(l.open, c)
		}
	}
	l.mu.Unlock()
	for _, c := range out {
		c.Conn.Close()
	}
	return len(out)
}
