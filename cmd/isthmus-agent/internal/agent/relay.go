package agent

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/eastwest/relay"
	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

// addRelay adds the built-in gateway in place of Envoy, fed by a stream of its own.
func (a *agent) addRelay() error {
	log := a.log.With("part", "relay")
	r := relay.New(relay.Config{Listen: a.c.Relay.Listen, DrainTimeout: max(time.Duration(a.c.Relay.DrainTime), time.Millisecond), Log: log, Reg: a.reg})
	node, err := a.xdsNode(nil)
	if err != nil {
		return err
	}
	client := xdsclient.New(xdsclient.Config{
		Node: node, Log: log,
		// Clusters first: a chain then finds what it leads to.
		Subscribe: map[string][]string{relay.ClusterType: nil, relay.ListenerType: nil},
		Dial:      func(ctx context.Context) (*grpc.ClientConn, error) { return a.connect(ctx) },
		OnUpdate:  func(u xdsclient.Update) error { return r.Apply(u.TypeURL, u.Added, u.Removed) },
		OnState: func(connected bool, err error) {
			if connected {
				log.Info("stream to the control plane open")
			} else {
				log.Debug("no stream to the control plane", "err", err)
			}
		},
	})
	a.main = part{"relay", r.Run}
	a.parts = append(a.parts, part{"xds", client.Run})
	a.checks = append(a.checks, func(context.Context) error {
		if !r.Ready() {
			return errors.New("the relay has no routes from the control plane yet")
		}
		return nil
	})
	return nil
}
