// Package plugin is the CoreDNS plugin "isthmus": it answers for the hosts of the mesh from what isthmusd streams to
// it, and goes on answering when isthmusd is away.
package plugin

import (
	"context"
	"sync"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"

	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// Isthmus is the plugin in one server block.
type Isthmus struct {
	Next plugin.Handler

	cfg  Config
	feed *feed
	end  context.CancelFunc
	done chan struct{}
}

// New makes a plugin that starts with the data kept on disk, if there is any.
func New(cfg Config) *Isthmus {
	return &Isthmus{cfg: cfg, feed: newFeed(cfg), done: make(chan struct{})}
}

func (x *Isthmus) start() error {
	ctx, end := context.WithCancel(context.Background())
	x.end = end
	go func() {
		defer close(x.done)
		x.feed.run(ctx)
	}()
	return nil
}

func (x *Isthmus) stop() error {
	if x.end != nil {
		x.end()
		<-x.done
	}
	return nil
}

// Name implements plugin.Handler.
func (x *Isthmus) Name() string { return name }

// Ready implements ready.Readiness: true once there is data to answer from, be it that of the last run.
func (x *Isthmus) Ready() bool { return x.feed.zone.Load() != nil }

// maxUDP is the largest answer over UDP, for those who say that they take as much. The plugin bufsize lowers it.
const maxUDP = 4096

// buffers hold answers while they are sent.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 1024); return &b }}

// ServeDNS implements plugin.Handler. Names below the plugin's zones are answered here or do not exist; reverse names
// that are not virtual addresses, and everything else, go to the next plugin.
func (x *Isthmus) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if len(r.Question) != 1 {
		return plugin.NextOrFailure(name, x.Next, ctx, w, r)
	}
	state := request.Request{W: w, Req: r}
	z := x.feed.zone.Load()
	if z == nil {
		if plugin.Zones(x.cfg.Zones).Matches(state.Name()) == "" {
			return plugin.NextOrFailure(name, x.Next, ctx, w, r)
		}
		countersOf(metrics.WithServer(ctx)).none.Inc()
		return dns.RcodeServerFailure, nil
	}
	buf := buffers.Get().(*[]byte)
	wire, result := z.Reply(*buf, r, zone.Size(r, state.Proto() == "tcp", maxUDP))
	defer func() {
		if cap(wire) <= 1<<16 {
			*buf = wire[:0]
			buffers.Put(buf)
		}
	}()
	if result == zone.NotOurs {
		return plugin.NextOrFailure(name, x.Next, ctx, w, r)
	}
	countersOf(metrics.WithServer(ctx)).by[result].Inc()
	return write(w, wire)
}

// write sends the answer as it is where nobody on the way wants to look at it, else as a message.
func write(w dns.ResponseWriter, wire []byte) (int, error) {
	rcode := int(wire[3] & 15)
	if sendsBytes(w, rcode) {
		if _, err := w.Write(wire); err != nil {
			return dns.RcodeServerFailure, err
		}
		return rcode, nil
	}
	m := new(dns.Msg)
	if err := m.Unpack(wire); err != nil {
		return dns.RcodeServerFailure, err
	}
	m.Compress = true
	if err := w.WriteMsg(m); err != nil {
		return dns.RcodeServerFailure, err
	}
	return m.Rcode, nil
}

// sendsBytes reports whether the writer passes bytes on to the client, and tells prometheus's how they came out, which it would read in a message.
func sendsBytes(w dns.ResponseWriter, rcode int) bool {
	switch w := w.(type) {
	case *request.ScrubWriter: // CoreDNS's server: it would make the answer fit, which it does
		return true
	case *metrics.Recorder:
		if sendsBytes(w.ResponseWriter, rcode) {
			w.Rcode = rcode
			return true
		}
	}
	return false
}
