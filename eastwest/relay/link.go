package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// instancesTried is how many instances of a route are dialled before a connection is given up.
const instancesTried = 3

// keepalive ends connections whose other end is gone after 2 minutes.
var keepalive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 10 * time.Second, Count: 6}

// link is one connection of a client and, once routed, the one to the server.
type link struct {
	client *net.TCPConn
	active atomic.Uint32 // the Relay's tick when octets passed last

	mu     sync.Mutex
	server *net.TCPConn
	closed bool
}

// close ends both connections and reports whether it was the first to do so.
func (l *link) close() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false
	}
	l.closed = true
	_ = l.client.Close()
	if l.server != nil {
		_ = l.server.Close()
	}
	return true
}

// join adds the connection to the server; it is closed at once when the link is.
func (l *link) join(server *net.TCPConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = server.Close()
		return false
	}
	l.server = server
	return true
}

// add registers a link unless there are too many.
func (r *Relay) add(l *link) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.open) >= r.cfg.MaxConnections {
		return false
	}
	r.open[l] = struct{}{}
	r.metrics.open.Set(float64(len(r.open)))
	return true
}

func (r *Relay) remove(l *link) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, l)
	r.metrics.open.Set(float64(len(r.open)))
}

// serve takes one connection from its ClientHello to its end.
func (r *Relay) serve(ctx context.Context, client *net.TCPConn) {
	l := &link{client: client}
	l.active.Store(r.tick.Load())
	if !r.add(l) {
		_ = client.SetLinger(0)
		_ = client.Close()
		r.metrics.connections.WithLabelValues(resultOverLimit).Inc()
		return
	}
	defer r.remove(l)
	defer l.close()
	result := r.route(ctx, l)
	r.metrics.connections.WithLabelValues(result).Inc()
	if result == resultForwarded {
		r.forward(l)
	}
}

// route reads the ClientHello, finds and dials the server, and passes on what was read.
func (r *Relay) route(ctx context.Context, l *link) (result string) {
	buf := r.peeks.get()
	defer r.peeks.put(buf)
	_ = l.client.SetReadDeadline(time.Now().Add(r.cfg.HelloTimeout))
	h, raw, err := peek(l.client, *buf)
	if err != nil {
		r.log.Debug("relay closes a connection", "client", l.client.RemoteAddr().String(), "err", err)
		switch {
		case isTimeout(err):
			return resultTimeout
		case errors.Is(err, errMalformed), errors.Is(err, errTooLong):
			return resultMalformed
		}
		return resultEmpty
	}
	to, ok := (*r.table.Load())[h.name]
	switch {
	case !ok:
		r.log.Debug("relay knows no route", "client", l.client.RemoteAddr().String(), "name", h.name)
		return resultUnknownName
	case !to.chain.offered(h.alpn):
		return resultProtocol
	case to.up == nil || len(to.up.instances) == 0:
		return resultNoAddress
	}
	server := r.dial(ctx, to.up)
	if server == nil {
		r.log.Debug("relay reached no address", "name", h.name)
		return resultUnreachable
	}
	if !l.join(server) {
		return resultUnreachable
	}
	_ = server.SetWriteDeadline(time.Now().Add(r.cfg.DialTimeout))
	if _, err := server.Write(raw); err != nil {
		return resultUnreachable
	}
	_ = server.SetWriteDeadline(time.Time{})
	_ = l.client.SetReadDeadline(time.Time{})
	return resultForwarded
}

// dial connects to the instance whose turn it is, or to one of the next; nil when none takes the connection.
func (r *Relay) dial(ctx context.Context, up *upstream) *net.TCPConn {
	start := up.pick()
	for i := range min(instancesTried, len(up.instances)) {
		for _, addr := range up.instances[(start+i)%len(up.instances)].addrs {
			began := time.Now()
			dialer := net.Dialer{Timeout: r.cfg.DialTimeout, KeepAliveConfig: keepalive}
			c, err := dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, addr)
			if err == nil {
				r.metrics.dialSeconds.Observe(time.Since(began).Seconds())
				return c
			}
			r.metrics.dialFailures.Inc()
			r.log.Debug("relay cannot reach an address", "address", addr.String(), "err", err)
			if ctx.Err() != nil {
				return nil
			}
		}
	}
	return nil
}

// forward passes octets in both directions until both have ended, or one has failed.
func (r *Relay) forward(l *link) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.oneWay(l, l.client, l.server, r.metrics.toClient)
	}()
	r.oneWay(l, l.server, l.client, r.metrics.toServer)
	<-done
}

// oneWay passes octets until src ends, then tells dst; a failure ends the link.
func (r *Relay) oneWay(l *link, dst, src *net.TCPConn, count prometheus.Counter) {
	err := r.pipes.pump(dst, src, func(n int) {
		l.active.Store(r.tick.Load())
		count.Add(float64(n))
	})
	if err == nil {
		err = dst.CloseWrite()
	}
	if err != nil {
		l.close()
	}
}
