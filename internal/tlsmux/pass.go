package tlsmux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// hop stands before the ClientHello of a connection that was passed on. It is a PROXY protocol header, version 1, that
// tells no address: who sends it gains nothing but that the connection is not passed on again.
const hop = "PROXY UNKNOWN\r\n"

// maxHello bounds what is kept of the beginning of a connection.
const maxHello = 64 << 10

// nowhere is where a connection goes that nobody serves.
const nowhere = "-"

// passTimeout bounds the dialling of the other Mux.
const passTimeout = 2 * time.Second

// errElsewhere ends a handshake of a connection that is passed on.
var errElsewhere = errors.New("served elsewhere")

// elsewhere returns where a connection of the route is passed on to, nowhere, or "" for here.
func (r *Route) elsewhere(passed bool) string {
	if r.Forward == nil {
		return ""
	}
	to, here := r.Forward()
	switch {
	case here:
		return ""
	case passed || to == "":
		return nowhere
	}
	return to
}

// opening keeps what was read of a connection until it is known who serves it.
type opening struct {
	net.Conn
	ahead []byte // read and not given out yet
	kept  []byte // given out, and to be passed on
	known bool   // keep no more
	muted bool   // write nothing: it is not ours
}

// preamble reads the hop, if there is one, and reports it. A ClientHello begins with another byte.
func (o *opening) preamble() (bool, error) {
	b := make([]byte, len(hop))
	if _, err := io.ReadFull(o.Conn, b[:1]); err != nil {
		return false, err
	}
	if b[0] != hop[0] {
		o.ahead = b[:1]
		return false, nil
	}
	if _, err := io.ReadFull(o.Conn, b[1:]); err != nil {
		return false, err
	}
	if string(b) != hop {
		return false, errors.New("neither TLS nor a connection passed on")
	}
	return true, nil
}

// Read implements net.Conn.
func (o *opening) Read(b []byte) (int, error) {
	var n int
	var err error
	if len(o.ahead) > 0 {
		n = copy(b, o.ahead)
		o.ahead = o.ahead[n:]
	} else {
		n, err = o.Conn.Read(b)
	}
	if !o.known {
		if len(o.kept)+n > maxHello {
			return 0, errors.New("the ClientHello is too large")
		}
		o.kept = append(o.kept, b[:n]...)
	}
	return n, err
}

// Write implements net.Conn.
func (o *opening) Write(b []byte) (int, error) {
	if o.muted {
		return len(b), nil
	}
	return o.Conn.Write(b)
}

// mute keeps the alert that ends our handshake from the client.
func (o *opening) mute() { o.known, o.muted = true, true }

// forget gives the memory back.
func (o *opening) forget() { o.known, o.kept = true, nil }

// pass splices the connection with another Mux, until both ends are done or ctx ends.
func (m *Mux) pass(ctx context.Context, o *opening, to string) error {
	dctx, cancel := context.WithTimeout(ctx, passTimeout)
	up, err := new(net.Dialer).DialContext(dctx, "tcp", to)
	cancel()
	if err != nil {
		return err
	}
	defer up.Close()
	if !m.track(up) {
		return errors.New("too many connections")
	}
	defer m.untrack(up)
	_ = up.SetWriteDeadline(time.Now().Add(passTimeout))
	if _, err := up.Write(append([]byte(hop), o.kept...)); err != nil {
		return fmt.Errorf("pass the beginning on: %w", err)
	}
	_ = up.SetWriteDeadline(time.Time{})
	o.kept = nil
	done := make(chan struct{})
	go func() {
		defer close(done)
		splice(up, o.Conn)
	}()
	splice(o.Conn, up)
	<-done
	return nil
}

// splice copies one way. An end is passed on as an end; after an error neither way goes on.
func splice(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		_ = half.CloseWrite()
		return
	}
	to.Close()
	from.Close()
}
