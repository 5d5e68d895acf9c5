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

	"github.com/isthmus-mesh/isthmus/dns/zone"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

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
	zone atomic.Pointer[zone.Zone] // nil until something is known
	busy chan struct{}
}

// MaxForwards is how many questions wait for upstream at once; more are answered SERVFAIL.
const MaxForwards = 512

// New returns a Server; it starts nothing.
func New(c Config) *Server { return &Server{c: c, busy: make(chan struct{}, MaxForwards)} }

// Set replaces the zone.
func (s *Server) Set(z *zone.Zone) { s.zone.Store(z) }

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

// maxUDP is the largest answer over UDP, for those who say that they take as much: over loopback nothing is cut in pieces.
const maxUDP = 4096

// Size returns the largest answer to q.
func Size(q *mdns.Msg, tcp bool) int { return zone.Size(q, tcp, maxUDP) }

// ServeDNS answers one question.
func (s *Server) ServeDNS(w mdns.ResponseWriter, q *mdns.Msg) {
	defer func() {
		if p := recover(); p != nil {
			s.c.Log.Error("question not answered", "err", fmt.Errorf("panic: %v", p))
		}
	}()
	tcp := w.LocalAddr().Network() == "tcp"
	if z := s.zone.Load(); z != nil {
		if wire, result := z.Reply(nil, q, Size(q, tcp)); result != zone.NotOurs {
			_, _ = w.Write(wire) // a client that went away needs no answer
			return
		}
	}
	reply := s.other(q, tcp)
	reply.Truncate(Size(q, tcp))
	_ = w.WriteMsg(reply)
}

// other answers what is not the zone's to answer.
func (s *Server) other(q *mdns.Msg, tcp bool) *mdns.Msg {
	failed := func(rcode int) *mdns.Msg { return new(mdns.Msg).SetRcode(q, rcode) }
	switch {
	case q.Response || len(q.Question) != 1:
		return failed(mdns.RcodeFormatError)
	case q.Opcode != mdns.OpcodeQuery:
		return failed(mdns.RcodeNotImplemented)
	case s.zone.Load() == nil && meshName(mdns.CanonicalName(q.Question[0].Name)):
		// Nothing is known yet. "No such name" would be remembered by the asker, this is not.
		return failed(mdns.RcodeServerFailure)
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
