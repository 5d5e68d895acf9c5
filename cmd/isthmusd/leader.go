package main

import (
	"context"
	"net"
	"sync/atomic"

	"github.com/isthmus-mesh/isthmus/federation/gossip"
	"github.com/isthmus-mesh/isthmus/federation/kubestate"
)

// whileLeading runs f in each term of this replica, until ctx ends. Without an election it runs it once.
func whileLeading(ctx context.Context, e *kubestate.Election, f func(context.Context) error) error {
	if e == nil {
		return f(ctx)
	}
	for ctx.Err() == nil {
		t, changed := e.Current()
		if !t.Leading {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		term, end := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- f(term) }()
		for running := true; running; {
			now, changed := e.Current()
			if now.Leading != t.Leading || now.Number != t.Number {
				end()
			}
			select {
			case <-changed:
			case err := <-done:
				if err != nil {
					end()
					return err
				}
				running = false
			}
		}
		end()
	}
	return nil
}

// gossiper is this cluster's member of the gossip, while this replica leads.
type gossiper struct {
	cfg  gossip.Config
	lead *kubestate.Election // nil: always
	now  atomic.Pointer[gossip.Gossip]
}

// Run is the member in each term.
func (g *gossiper) Run(ctx context.Context) error {
	return whileLeading(ctx, g.lead, func(ctx context.Context) error {
		member := gossip.New(g.cfg)
		g.now.Store(member)
		defer g.now.Store(nil)
		return member.Run(ctx)
	})
}

// Serve takes over an incoming connection.
func (g *gossiper) Serve(conn net.Conn) {
	if member := g.now.Load(); member != nil {
		member.Serve(conn)
		return
	}
	conn.Close()
}

// Broadcast spreads a packet.
func (g *gossiper) Broadcast(key string, b []byte) {
	if member := g.now.Load(); member != nil {
		member.Broadcast(key, b)
	}
}

// Alive returns what gossip believes of each member.
func (g *gossiper) Alive() map[string]string {
	if member := g.now.Load(); member != nil {
		return member.Alive()
	}
	return map[string]string{}
}
