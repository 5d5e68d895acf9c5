package conns

import (
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// counted counts how often it was closed.
type counted struct {
	net.Conn
	mu     sync.Mutex
	closed int
}

func (c *counted) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed++; c.closed > 1 {
		return net.ErrClosed
	}
	return nil
}

// TestKeep: what is open with a trust domain that is trusted no longer is closed, once, and nothing else.
func TestKeep(t *testing.T) {
	var l Conns
	if n := l.Keep(func(mesh.TrustDomain) bool { return false }); n != 0 {
		t.Errorf("%d closed of none", n)
	}
	cedar, birch, held, released, gone := new(counted), new(counted), new(counted), new(counted), new(counted)
	wrapped := l.Wrap("cedar.mesh", cedar)
	l.Wrap("birch.mesh", birch)
	l.Hold("cedar.mesh", held)
	l.Hold("cedar.mesh", released)()
	if err := l.Wrap("cedar.mesh", gone).Close(); err != nil {
		t.Fatal(err)
	}
	trusted := func(td mesh.TrustDomain) bool { return td == "birch.mesh" }
	if n := l.Keep(trusted); n != 2 {
		t.Errorf("%d closed, want 2", n)
	}
	for name, c := range map[string]struct {
		conn *counted
		want int
	}{"wrapped": {cedar, 1}, "held": {held, 1}, "trusted": {birch, 0}, "released": {released, 0}, "closed before": {gone, 1}} {
		if c.conn.closed != c.want {
			t.Errorf("%s: closed %d times, want %d", name, c.conn.closed, c.want)
		}
	}
	if n := l.Keep(trusted); n != 0 {
		t.Errorf("%d closed again", n)
	}
	if err := wrapped.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("its owner closes it, too: %v", err)
	}
	if n := l.Keep(func(mesh.TrustDomain) bool { return false }); n != 1 || birch.closed != 1 {
		t.Errorf("%d closed when nobody is trusted", n)
	}
}

// TestKeepWakes: who reads from a connection that is closed so is woken.
func TestKeepWakes(t *testing.T) {
	var l Conns
	here, there := net.Pipe()
	defer there.Close()
	c := l.Wrap("cedar.mesh", here)
	read := make(chan error)
	go func() { _, err := c.Read(make([]byte, 1)); read <- err }()
	l.Keep(func(mesh.TrustDomain) bool { return false })
	if err := <-read; !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("read: %v", err)
	}
}

// TestConcurrent: connections come and go while the list is gone through.
func TestConcurrent(t *testing.T) {
	var l Conns
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				release := l.Hold("a", new(counted))
				l.Wrap("b", new(counted)).Close()
				l.Keep(func(td mesh.TrustDomain) bool { return td == "b" })
				release()
			}
		})
	}
	wg.Wait()
	if len(l.open) != 0 {
		t.Errorf("%d connections are listed still", len(l.open))
	}
}
