package main

import (
	"context"
	"crypto"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/probe"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/views"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/federation/ledger"
	"github.com/isthmus-mesh/isthmus/federation/peering"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/federation/trust"
	"github.com/isthmus-mesh/isthmus/internal/tlsmux"
)

// Application protocols on the one TLS port.
const (
	alpnJoin   = "isthmus-join"
	alpnGossip = "isthmus-gossip"
)

// Paths of control identities.
const (
	pathPeer         = "/isthmus/peer"
	pathJoin         = "/isthmus/join"
	pathControlPlane = "/isthmus/controlplane"
)

// certificates are this process's own, renewed by use.
type certificates struct {
	join, peer, control *identity.Rotating
}

func newCertificates(ca *identity.CA, td mesh.TrustDomain, namespace string) (certificates, error) {
	var c certificates
	for _, x := range []struct {
		to   **identity.Rotating
		path string
		dns  []string
	}{
		{&c.join, pathJoin, []string{sni.Join.Name(td)}},
		{&c.peer, pathPeer, []string{sni.Peer.Name(td), sni.Gossip.Name(td)}},
		{&c.control, pathControlPlane, controlNames(sni.XDS.Name(td), namespace)},
	} {
		r, err := ca.Rotating("spiffe://"+string(td)+x.path, x.dns, 0)
		if err != nil {
			return c, err
		}
		*x.to = r
	}
	return c, nil
}

// ed25519Signer is the federation key as a crypto.Signer.
type ed25519Signer struct{ key ledger.Key }

// Public implements crypto.Signer.
func (s ed25519Signer) Public() crypto.PublicKey { return s.key.Public() }

// Sign implements crypto.Signer: Ed25519 signs the message itself.
func (s ed25519Signer) Sign(_ io.Reader, msg []byte, _ crypto.SignerOpts) ([]byte, error) {
	return s.key.Sign(msg), nil
}

// routes tells the protocols of the port apart.
func (d *daemon) routes(ctx context.Context, issuer *token.Issuer, queue *tlsmux.Queue) []tlsmux.Route {
	td := d.local.TrustDomain
	speaks := func(proto string) func(*tls.ClientHelloInfo) bool {
		return func(h *tls.ClientHelloInfo) bool { return slices.Contains(h.SupportedProtos, proto) }
	}
	return []tlsmux.Route{
		{Name: "join", Match: speaks(alpnJoin), Forward: d.leader, Serve: func(c *tls.Conn) { issuer.Serve(ctx, c) }, TLS: func() *tls.Config {
			return &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, NextProtos: []string{alpnJoin}, GetCertificate: d.certs.join.GetCertificate}
		}},
		{Name: "gossip", Match: speaks(alpnGossip), Forward: d.leader, Serve: d.held(func(c *tls.Conn) { d.gossip.Serve(c) }), TLS: func() *tls.Config {
			return d.peerServerTLS(alpnGossip)
		}},
		{Name: "peer", Forward: d.leader, Match: func(h *tls.ClientHelloInfo) bool { return h.ServerName == sni.Peer.Name(td) && speaks("h2")(h) }, Serve: d.held(queue.Serve), TLS: func() *tls.Config {
			return d.peerServerTLS("h2")
		}},
		{Name: "xds", Match: speaks("h2"), Serve: queue.Serve, TLS: func() *tls.Config {
			c := trust.ServerConfig(trust.Config{Local: d.certs.control.Certificate, Bundles: d.bundles, Authorize: d.ownWorkload, Optional: true})
			c.NextProtos = []string{"h2"}
			return c
		}},
	}
}

// held lists a connection of a peer while it is served.
func (d *daemon) held(serve func(*tls.Conn)) func(*tls.Conn) {
	return func(c *tls.Conn) {
		id, err := trust.PeerID(c.ConnectionState())
		if err != nil {
			return
		}
		td := mesh.TrustDomain(id.TrustDomain().Name())
		defer d.conns.Hold(td, c)()
		if !d.trusts(td) { // put out since the handshake
			c.Close()
			return
		}
		serve(c)
	}
}

// trusts reports whether there are roots of the trust domain.
func (d *daemon) trusts(td mesh.TrustDomain) bool {
	name, err := spiffeid.TrustDomainFromString(string(td))
	if err == nil {
		_, err = d.bundles.GetX509BundleForTrustDomain(name)
	}
	return err == nil
}

// leader says where joins, gossip and peers are served: by the replica that leads.
func (d *daemon) leader() (to string, here bool) {
	if d.kept.kube == nil {
		return "", true
	}
	t, _ := d.kept.kube.term()
	if a := t.Address(); !t.Leading && a.IsValid() {
		return a.String(), false
	}
	return "", t.Leading
}

func (d *daemon) peerServerTLS(proto string) *tls.Config {
	c := trust.ServerConfig(trust.Config{Local: d.certs.peer.Certificate, Bundles: d.bundles, Authorize: trust.Path(pathPeer)})
	c.NextProtos = []string{proto}
	return c
}

// ownWorkload lets only this cluster's own identities use the control plane.
func (d *daemon) ownWorkload(id spiffeid.ID) error {
	if id.TrustDomain().Name() != string(d.local.TrustDomain) {
		return fmt.Errorf("this control plane serves trust domain %s", d.local.TrustDomain)
	}
	return nil
}

// peerTLS is for the client side of a link to a member.
func (d *daemon) peerTLS(td mesh.TrustDomain) *tls.Config {
	return trust.ClientConfig(trust.Config{Local: d.certs.peer.Certificate, Bundles: d.bundles, Authorize: trust.Exactly("spiffe://" + string(td) + pathPeer)})
}

// dialGossip opens a gossip connection to a member through the first of its gateways that answers.
func (d *daemon) dialGossip(ctx context.Context, name string) (net.Conn, error) {
	gateways, td := d.peering.Gateways(name)
	if len(gateways) == 0 {
		return nil, fmt.Errorf("cluster %s is no member, or has no gateway", name)
	}
	cfg := d.peerTLS(td)
	cfg.ServerName, cfg.NextProtos = sni.Gossip.Name(td), []string{alpnGossip}
	dialer := tls.Dialer{Config: cfg}
	var err error
	for _, g := range gateways {
		var conn net.Conn
		if conn, err = dialer.DialContext(ctx, "tcp", g.String()); err == nil {
			return d.conns.Wrap(td, conn), nil
		}
	}
	return nil, fmt.Errorf("gossip with %s: %w", name, err)
}

// setTrust takes the roots of every member; our own stay. nil: those of members as before.
func (d *daemon) setTrust(roots map[mesh.TrustDomain][]byte) {
	d.trusting.Lock()
	defer d.trusting.Unlock()
	if roots != nil {
		d.peerRoots = roots
	}
	all := map[mesh.TrustDomain][]byte{}
	for td, pem := range d.peerRoots {
		all[td] = pem
	}
	all[d.local.TrustDomain] = d.ca.Roots()
	if err := d.bundles.Set(all); err != nil {
		d.log.Error("roots of a member not taken", "part", "trust", "err", err)
	}
	if n := d.conns.Keep(d.trusts); n > 0 {
		d.log.Info("connections closed: their trust domain is trusted no longer", "part", "trust", "connections", n)
	}
}

// identify says who opened a stream. What TLS verified is believed; without a certificate a token must say it. On the plaintext
// port nobody is known.
func (d *daemon) identify(ctx context.Context) (string, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", fmt.Errorf("no transport")
	}
	info, secured := p.AuthInfo.(credentials.TLSInfo)
	if !secured {
		return "", nil
	}
	if info.SPIFFEID != nil {
		return info.SPIFFEID.String(), nil
	}
	caller, err := d.authenticator().Authenticate(ctx)
	return caller.Identity, err
}

func (d *daemon) authenticator() identity.Authenticator {
	if d.reviews != nil {
		return identity.AnyOf(d.ca.Certificates(), d.ca.Tokens(), d.reviews)
	}
	return identity.AnyOf(d.ca.Certificates(), d.ca.Tokens())
}

// feed gives members the record stream and proxies their view.
func (d *daemon) feed(vs *views.Views) func(xds.Client) (xds.Feed, func(), error) {
	return func(c xds.Client) (xds.Feed, func(), error) {
		if strings.HasPrefix(c.Node.GetId(), peering.ReplicaNode) && c.Identity == "spiffe://"+string(d.local.TrustDomain)+pathControlPlane {
			f, err := d.peering.Replicas()
			return f, nil, err
		}
		if rest, ok := strings.CutPrefix(c.Identity, "spiffe://"); ok && strings.HasSuffix(rest, pathPeer) {
			f, err := d.peering.Feed(mesh.TrustDomain(strings.TrimSuffix(rest, pathPeer)))
			return f, nil, err
		}
		return vs.Feed(c.Node, c.Identity)
	}
}

// probe tries a TLS handshake with an endpoint as this control plane.
func (d *daemon) probe(ctx context.Context, addrs []string, serverName string) admin.Probe {
	return probe.TLS(ctx, d.certs.control.Certificate, d.bundles, addrs, serverName)
}
