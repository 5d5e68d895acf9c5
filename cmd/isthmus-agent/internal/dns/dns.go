// Package dns answers a machine's questions: names of the mesh from a zone, all others from the name servers that the
// machine had before.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	mdns "github.com/miekg/dns"
	"golang.org/x/sync/errgroup"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Answerer answers what is its own to answer, as *zone.Zone does.
type Answerer interface {
	Answer(q *mdns.Msg) (*mdns.Msg, bool)
}

// Config is what a Server needs.
type Config struct {
	Port     int
	Upstream []string          // host:port, tried in turn
	Dialer   func() net.Dialer // makes the dialer for upstream, with its timeout
	Log      *slog.Logger
}

// Server answers on loopback, UDP and TCP.
type Server struct {
	c    Config
	zone atomic.Pointer[Answerer]
	busy chan struct{}
}

// MaxForwards is how many questions wait for upstream at once; more are answered SERVFAIL.
const MaxForwards = 512

// New returns a Server; it starts nothing.
func New(c Config) *Server { return &Server{c: c, busy: make(chan struct{}, MaxForwards)} }

// Set replaces the zone.
func (s *Server) Set(a Answerer) { s.zone.Store(&a) }

// Resolvers reads the name servers of a resolv.conf as host:port.
func Resolvers(path string) ([]string, error) {
	c, err := mdns.ClientConfigFromFile(path)
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("read name servers: %w", err), "set dns.upstream")
	}
	var out []string
	for _, server := range c.Servers {
		out = append(out, net.JoinHostPort(server, c.Port))
	}
	return out, nil
}

// CaptureOnly returns to which name servers questions are captured: to any (nil), unless one of them is on this machine
// and asks on by itself, which must not be led back to us.
func CaptureOnly(upstream []string) []netip.Addr {
	var all []netip.Addr
	local := false
	for _, u := range upstream {
		if a, err := netip.ParseAddrPort(u); err == nil {
			all = append(all, a.Addr().WithZone(""))
			local = local || a.Addr().IsLoopback()
		}
	}
	if !local {
		return nil
	}
	return all
}

// Run answers until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, host := range []string{"127.0.0.1", "::1"} {
		addr := net.JoinHostPort(host, fmt.Sprint(s.c.Port))
		pc, err := net.ListenPacket("udp", addr)
		if err != nil && host == "::1" {
			s.c.Log.Info("no DNS on IPv6 loopback", "err", err)
			break
		}
		l, lerr := net.Listen("tcp", addr)
		if err := errors.Join(err, lerr); err != nil {
			if pc != nil {
				pc.Close()
			}
			if l != nil {
				l.Close()
			}
			g.Go(func() error {
				return diag.Hint(fmt.Errorf("listen for DNS: %w", err), "stop the program that uses port %d, or set dns.port", s.c.Port)
			})
			break
		}
		for _, srv := range []*mdns.Server{{PacketConn: pc}, {Listener: l, MaxTCPQueries: 1024}} {
			srv.Handler = s
			srv.ReadTimeout, srv.WriteTimeout = 5*time.Second, 5*time.Second
			started := make(chan struct{})
			srv.NotifyStartedFunc = func() { close(started) }
			g.Go(func() error {
				if err := srv.ActivateAndServe(); err != nil && ctx.Err() == nil {
					return fmt.Errorf("serve DNS on %s: %w", addr, err)
				}
				return nil
			})
			g.Go(func() error {
				<-ctx.Done()
				<-started
				stop, cancel := context.WithTimeout(context.Background(), 2*time.Second)
				defer cancel()
				_ = srv.ShutdownContext(stop)
				return nil
			})
		}
	}
	return g.Wait()
}

// ServeDNS answers one question.
func (s *Server) ServeDNS(w mdns.ResponseWriter, q *mdns.Msg) {
	reply := s.answer(q, w.LocalAddr().Network() == "tcp")
	size := mdns.MinMsgSize
	if w.LocalAddr().Network() == "tcp" {
		size = mdns.MaxMsgSize
	} else if opt := q.IsEdns0(); opt != nil {
		size = min(max(size, int(opt.UDPSize())), 4096)
	}
	reply.Truncate(size)
	_ = w.WriteMsg(reply) // a client that went away needs no answer
}

func (s *Server) answer(q *mdns.Msg, tcp bool) *mdns.Msg {
	failed := func(rcode int) *mdns.Msg { return new(mdns.Msg).SetRcode(q, rcode) }
	if q.Response || len(q.Question) != 1 {
		return failed(mdns.RcodeFormatError)
	}
	if zone := s.zone.Load(); zone == nil {
		// Nothing is known yet. "No such name" would be remembered by the asker, this is not.
		if name := mdns.CanonicalName(q.Question[0].Name); meshName(name) {
			return failed(mdns.RcodeServerFailure)
		}
	} else if reply, ours := (*zone).Answer(q); ours {
		reply.RecursionAvailable = true
		return reply
	}
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	default:
		return failed(mdns.RcodeServerFailure)
	}
	if reply := s.forward(q, tcp); reply != nil {
		return reply
	}
	return failed(mdns.RcodeServerFailure)
}

// Zones are the suffixes under which only the mesh has names.
var Zones = []string{"global", "clusterset.local", "svc.cluster.local"}

func meshName(name string) bool {
	for _, z := range Zones {
		if name == z+"." || strings.HasSuffix(name, "."+z+".") {
			return true
		}
	}
	return false
}

func (s *Server) forward(q *mdns.Msg, tcp bool) *mdns.Msg {
	for _, server := range s.c.Upstream {
		network := "udp"
		if tcp {
			network = "tcp"
		}
		dialer := s.c.Dialer()
		dialer.Timeout = 2 * time.Second
		client := mdns.Client{Net: network, Dialer: &dialer, Timeout: 2 * time.Second, UDPSize: 4096}
		reply, _, err := client.Exchange(q, server)
		if err != nil {
			s.c.Log.Debug("name server does not answer", "server", server, "err", err)
			continue
		}
		return reply
	}
	return nil
}
