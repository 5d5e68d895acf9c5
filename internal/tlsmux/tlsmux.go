// Package tlsmux serves several protocols on one TLS port, told apart by the server name and the application
// protocols of the ClientHello, before any certificate is chosen.
package tlsmux

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// Route is one protocol on the port.
type Route struct {
	// Name is for logs.
	Name string
	// Match says whether the ClientHello asks for this route; the first match is taken.
	Match func(*tls.ClientHelloInfo) bool
	// TLS gives the configuration of each new connection, so that rotated certificates and roots bite at once.
	TLS func() *tls.Config
	// Serve takes over a connection whose handshake is done and returns when it is finished with it.
	Serve func(*tls.Conn)
	// Forward says where the route is served: here, or at another Mux to which the connection is passed on unopened. ""
	// and not here closes it. What was passed on once is not passed on again. nil: here.
	Forward func() (to string, here bool)
}

// Config describes a Mux.
type Config struct {
	Addr     string       // host:port to listen on
	Listener net.Listener // a port that is open already, in place of Addr
	Routes   []Route
	// HandshakeTimeout bounds the time from accept to the end of the handshake. Raising it lets slow links in and
	// idle attackers stay longer.
	HandshakeTimeout time.Duration
	// MaxConns bounds the connections served at once; more are closed at accept.
	MaxConns int
	Log      *slog.Logger
}

// Mux is one TLS port.
type Mux struct {
	cfg  Config
	base net.Listener

	mu    sync.Mutex
	conns map[net.Conn]bool
	wg    sync.WaitGroup
}

// errNoRoute ends handshakes that ask for nothing we serve.
var errNoRoute = errors.New("no service under this server name and protocol")

// Listen opens the port; nothing is accepted until Run.
func Listen(cfg Config) (*Mux, error) {
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = 5 * time.Second
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 20000
	}
	if cfg.Listener == nil {
		var err error
		if cfg.Listener, err = net.Listen("tcp", cfg.Addr); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", cfg.Addr, err)
		}
	}
	return &Mux{cfg: cfg, base: cfg.Listener, conns: map[net.Conn]bool{}}, nil
}

// Addr returns the address the port has.
func (m *Mux) Addr() net.Addr { return m.base.Addr() }

// Close closes the port of a Mux that is not run; Run does it by itself.
func (m *Mux) Close() error { return m.base.Close() }

// Run accepts connections until ctx ends, then closes all of them and waits for their routes to return.
func (m *Mux) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { m.base.Close() })
	defer stop()
	defer m.wg.Wait()
	defer m.closeAll()
	for {
		conn, err := m.base.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept on %s: %w", m.base.Addr(), err)
		case err != nil: // out of descriptors, or reset before accept: both pass
			m.cfg.Log.Warn("accept", "err", err)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
				return nil
			}
			continue
		}
		if !m.track(conn) {
			conn.Close()
			continue
		}
		m.wg.Go(func() {
			defer m.untrack(conn)
			m.serve(ctx, conn)
		})
	}
}

func (m *Mux) serve(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	start := &opening{Conn: conn}
	_ = conn.SetReadDeadline(time.Now().Add(m.cfg.HandshakeTimeout))
	passed, err := start.preamble()
	if err != nil {
		return
	}
	_ = conn.SetReadDeadline(time.Time{})
	var route *Route
	var to string
	tc := tls.Server(start, &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if route = m.match(hello); route == nil {
				return nil, errNoRoute
			}
			if to = route.elsewhere(passed); to != "" {
				start.mute()
				return nil, errElsewhere
			}
			start.forget()
			c := route.TLS()
			if c.MinVersion < tls.VersionTLS13 { // what is returned replaces the outer configuration whole
				c = c.Clone()
				c.MinVersion = tls.VersionTLS13
			}
			return c, nil
		},
	})
	hctx, cancel := context.WithTimeout(ctx, m.cfg.HandshakeTimeout)
	err = tc.HandshakeContext(hctx)
	cancel()
	name := ""
	if route != nil {
		name = route.Name
	}
	if to != "" && to != nowhere {
		if err := m.pass(ctx, start, to); err != nil {
			m.cfg.Log.Debug("connection not passed on", "part", name, "to", to, "err", err)
		}
		return
	}
	if err != nil {
		m.cfg.Log.Debug("handshake refused", "part", name, "peer", conn.RemoteAddr().String(), "err", err)
		return
	}
	route.Serve(tc)
}

func (m *Mux) match(hello *tls.ClientHelloInfo) *Route {
	for i := range m.cfg.Routes {
		if m.cfg.Routes[i].Match(hello) {
			return &m.cfg.Routes[i]
		}
	}
	return nil
}

func (m *Mux) track(c net.Conn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.conns) >= m.cfg.MaxConns {
		return false
	}
	m.conns[c] = true
	return true
}

func (m *Mux) untrack(c net.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.conns, c)
}

func (m *Mux) closeAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for c := range m.conns {
		c.Close()
	}
}

// Queue is a net.Listener fed with connections that were accepted elsewhere.
type Queue struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

// NewQueue makes a listener that claims to listen on addr.
func NewQueue(addr net.Addr) *Queue {
	return &Queue{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

// Serve hands the connection to Accept and returns when it is closed. It is a Route's Serve.
func (q *Queue) Serve(c *tls.Conn) {
	held := &conn{Conn: c, closed: make(chan struct{})}
	select {
	case q.conns <- held:
	case <-q.done:
		return
	}
	select {
	case <-held.closed:
	case <-q.done:
	}
}

// Accept implements net.Listener.
func (q *Queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (q *Queue) Close() error { q.once.Do(func() { close(q.done) }); return nil }

// Addr implements net.Listener.
func (q *Queue) Addr() net.Addr { return q.addr }

// conn tells Serve when its user is done with it.
type conn struct {
	*tls.Conn
	once   sync.Once
	closed chan struct{}
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// Credentials returns gRPC server credentials for connections out of a Queue: the handshake is already done, its
// result becomes the call's credentials.TLSInfo.
func Credentials() credentials.TransportCredentials { return done{} }

type done struct{}

// ServerHandshake implements credentials.TransportCredentials.
func (done) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	held, ok := c.(*conn)
	if !ok {
		return nil, nil, fmt.Errorf("connection from %s has no finished handshake", c.RemoteAddr())
	}
	info := credentials.TLSInfo{State: held.ConnectionState(), CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
	if certs := info.State.PeerCertificates; len(certs) > 0 && len(certs[0].URIs) == 1 {
		info.SPIFFEID = certs[0].URIs[0]
	}
	return c, info, nil
}

// ClientHandshake implements credentials.TransportCredentials; it is never used.
func (done) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("server credentials cannot dial")
}

// Info implements credentials.TransportCredentials.
func (done) Info() credentials.ProtocolInfo { return credentials.ProtocolInfo{SecurityProtocol: "tls"} }

// Clone implements credentials.TransportCredentials.
func (d done) Clone() credentials.TransportCredentials { return d }

// OverrideServerName implements credentials.TransportCredentials.
func (done) OverrideServerName(string) error { return nil }
