// Package plugin is the CoreDNS plugin "isthmus": it answers for the hosts of the mesh from what isthmusd streams to
// it, and goes on answering when isthmusd is away.
package plugin

import (
	"context"
	"sync/atomic"
	"time"

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
	zone atomic.Pointer[zone.Zone] // nil until the first data
	feed *feed
	end  context.CancelFunc
	done chan struct{}
}

// New makes a plugin that starts with the data kept on disk, if there is any.
func New(cfg Config) (*Isthmus, error) {
	x := &Isthmus{cfg: cfg, done: make(chan struct{})}
	f, err := newFeed(cfg, func(z *zone.Zone) {
		x.zone.Store(z)
		hosts.Set(float64(z.Len()))
		lastChange.Set(float64(time.Now().Unix()))
	})
	if err != nil {
		return nil, err
	}
	x.feed = f
	return x, nil
}

func (x *Isthmus) start() error {
	ctx, end := context.WithCancel(context.Background())
	x.end = end
	go func() {
		defer close(x.done)
		if err := x.feed.run(ctx); err != nil {
			log.Errorf("feed from isthmusd ended: %v", err)
		}
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

// Ready implements ready.Readiness: true once there is data to answer from.
func (x *Isthmus) Ready() bool { return x.zone.Load() != nil }

// ServeDNS implements plugin.Handler. Names below the plugin's zones are answered here or do not exist; reverse names
// that are not virtual addresses, and everything else, go to the next plugin.
func (x *Isthmus) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	state := request.Request{W: w, Req: r}
	z := x.zone.Load()
	if z == nil {
		if plugin.Zones(x.cfg.Zones).Matches(state.Name()) == "" {
			return plugin.NextOrFailure(name, x.Next, ctx, w, r)
		}
		answers.WithLabelValues(metrics.WithServer(ctx), "no_data").Inc()
		return dns.RcodeServerFailure, nil
	}
	m, ours := z.Answer(r)
	if !ours {
		return plugin.NextOrFailure(name, x.Next, ctx, w, r)
	}
	state.SizeAndDo(m)
	m = state.Scrub(m)
	answers.WithLabelValues(metrics.WithServer(ctx), result(m)).Inc()
	if err := w.WriteMsg(m); err != nil {
		return dns.RcodeServerFailure, err
	}
	return m.Rcode, nil
}

func result(m *dns.Msg) string {
	switch {
	case m.Rcode == dns.RcodeNameError:
		return "nxdomain"
	case len(m.Answer) == 0:
		return "nodata"
	}
	return "answer"
}
