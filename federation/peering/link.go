package peering

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

// silence is how long a record stream may be without a beat before it is dialled anew, by the next gateway.
const silence = 2500 * time.Millisecond

// link is the record stream from one member.
type link struct {
	p    *Peering
	to   protocol.Connect
	via  atomic.Pointer[string]
	why  atomic.Pointer[string] // the stream is not up; nil: it is
	end  context.CancelFunc
	wg   sync.WaitGroup
	next int // gateway to try
	// compressed: what passes is compressed, both ways.
	compressed bool
}

func (p *Peering) connect(ctx context.Context, c protocol.Connect) {
	if old := p.links[c.Peer]; old != nil {
		if slices.Equal(old.to.Gateways, p.dialable(c.Gateways)) && old.to.TrustDomain == c.TrustDomain {
			return
		}
		old.stop()
	}
	c.Gateways = p.dialable(c.Gateways)
	l := &link{p: p, to: c}
	p.links[c.Peer] = l
	l.start(ctx)
}

func (p *Peering) disconnect(peer mesh.ClusterID) {
	if l := p.links[peer]; l != nil {
		l.stop()
		delete(p.links, peer)
	}
}

func (p *Peering) stopLinks() {
	for id := range p.links {
		p.disconnect(id)
	}
}

// restart opens the stream anew, resuming from the versions that the core holds.
func (l *link) restart(ctx context.Context) {
	l.stop()
	l.start(ctx)
}

func (l *link) stop() {
	l.end()
	l.wg.Wait()
}

func (l *link) gateway() string {
	if g := l.via.Load(); g != nil {
		return *g
	}
	return ""
}

// start runs in the goroutine of Run, so it may read the core.
func (l *link) start(ctx context.Context) {
	ctx, l.end = context.WithCancel(ctx)
	l.compressed = l.p.understands(l.to.Peer, capGzip)
	held := map[string]string{}
	for _, r := range l.p.core.RecordsFor(l.to.Peer) {
		if x := xds.NewResource(protocol.ResourceName(r), r); x != nil {
			held[x.Name] = x.Version
		}
	}
	client := xdsclient.New(xdsclient.Config{
		Dial:             l.dial,
		Node:             &corev3.Node{Id: "peer~" + string(l.p.cfg.Core.Name), Cluster: string(l.p.cfg.Core.Name)},
		Subscribe:        map[string][]string{RecordType: nil, DigestType: nil},
		Resume:           map[string]map[string]string{RecordType: held},
		OnUpdate:         func(u xdsclient.Update) error { l.update(ctx, u); return nil },
		OnState:          func(up bool, err error) { l.state(ctx, up, err) },
		HeartbeatTimeout: silence,
		ConnectTimeout:   2 * time.Second,
		Backoff:          xdsclient.Backoff{Base: 100 * time.Millisecond, Max: time.Second},
		Log:              l.p.cfg.Logger,
	})
	l.wg.Go(func() {
		if err := client.Run(ctx); err != nil {
			l.p.cfg.Logger.Error("record stream ended", "peer", l.to.Peer, "err", err)
		}
	})
}

// dial takes the gateways in turn.
func (l *link) dial(context.Context) (*grpc.ClientConn, error) {
	if len(l.to.Gateways) == 0 {
		return nil, errors.New("no gateway is known")
	}
	addr := l.to.Gateways[l.next%len(l.to.Gateways)]
	l.next++
	l.via.Store(&addr)
	cfg := l.p.cfg.TLS(l.to.TrustDomain)
	cfg.ServerName = sni.Peer.Name(l.to.TrustDomain)
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(cfg)), grpc.WithMaxHeaderListSize(64 << 10),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse), grpc.ForceCodecV2(codec{})),
	}
	if l.compressed {
		opts = append(opts, grpc.WithDefaultCallOptions(grpc.UseCompressor(gzip.Name)))
	}
	if l.p.cfg.Dial != nil {
		opts = append(opts, grpc.WithContextDialer(l.p.cfg.Dial))
	}
	return grpc.NewClient("passthrough:///"+addr, opts...)
}

// state tells the core that the stream is up or down.
func (l *link) state(ctx context.Context, up bool, err error) {
	if up {
		l.why.Store(nil)
		l.p.cfg.Logger.Info("record stream is up", "peer", l.to.Peer, "gateway", l.gateway())
	} else if ctx.Err() == nil {
		why := status.Convert(errors.Unwrap(err)).Message()
		if strings.Contains(why, "remote error: tls:") {
			why = "it does not accept this cluster: a join waits for approval there, or this cluster was evicted"
		}
		if strings.Contains(why, "authentication handshake failed") && !cutOff(why) {
			l.p.send(ctx, protocol.Refused{From: l.to.Peer, Refusal: &protocol.Refusal{Reason: protocol.ReasonHandshake, Message: why}})
		}
		l.why.Store(&why)
		l.p.cfg.Logger.Debug("record stream is down", "peer", l.to.Peer, "gateway", l.gateway(), "err", err)
	}
	l.p.send(ctx, protocol.Link{Peer: l.to.Peer, Up: up, Path: "direct"})
}

// update hands over what came. Nothing is refused here: the core says what it does not take, and a removal means
// nothing, since only a tombstone deletes.
func (l *link) update(ctx context.Context, u xdsclient.Update) {
	for _, r := range u.Added {
		body := r.GetResource().GetValue()
		switch u.TypeURL {
		case RecordType:
			if rec, err := protocol.Decode(body); err == nil {
				l.p.send(ctx, protocol.Received{From: l.to.Peer, Way: protocol.Stream, Record: rec})
			} else {
				ref := &protocol.Refusal{Reason: protocol.ReasonMalformed, Message: err.Error()}
				errors.As(err, &ref)
				l.p.send(ctx, protocol.Refused{From: l.to.Peer, Refusal: ref})
			}
		case DigestType:
			d := new(federationv1.Digest)
			if len(body) <= 4096 && r.GetResource().UnmarshalTo(d) == nil {
				l.p.send(ctx, protocol.Heard{Origin: mesh.ClusterID(d.Origin), Digest: d, From: l.to.Peer})
			}
		}
	}
}

// cutOff reports whether a handshake ended because the connection did: a gateway whose control plane is away for a moment
// proves nothing about the member.
func cutOff(why string) bool {
	for _, end := range []string{": EOF", "connection reset by peer", "broken pipe", "i/o timeout", "deadline exceeded"} {
		if strings.Contains(why, end) {
			return true
		}
	}
	return false
}
