package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	authenticationclient "k8s.io/client-go/kubernetes/typed/authentication/v1"
	authorizationclient "k8s.io/client-go/kubernetes/typed/authorization/v1"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/guard"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/peering"
	"github.com/isthmus-mesh/isthmus/federation/trust"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/tlsmux"
)

// alpnAdmin is what replicas speak with each other about calls of the operator.
const alpnAdmin = "isthmus-admin"

// askReplica bounds a question to another replica.
const askReplica = 2 * time.Second

// controlID is the identity of the control plane, in every replica.
func (d *daemon) controlID() string { return "spiffe://" + d.cfg.TrustDomain + pathControlPlane }

// adminRoutes are where other replicas call; none where there are none.
func (d *daemon) adminRoutes(queue *tlsmux.Queue) []tlsmux.Route {
	if d.kept.kube == nil {
		return nil
	}
	return []tlsmux.Route{{Name: "admin", Serve: queue.Serve, Match: func(h *tls.ClientHelloInfo) bool { return slices.Contains(h.SupportedProtos, alpnAdmin) }, TLS: func() *tls.Config {
		c := trust.ServerConfig(trust.Config{Local: d.certs.control.Certificate, Bundles: d.bundles, Authorize: trust.Exactly(d.controlID())})
		c.NextProtos = []string{alpnAdmin}
		return c
	}}}
}

// replica is the way to the admin API of another replica.
func (d *daemon) replica(addr string) *http.Transport {
	return &http.Transport{DisableKeepAlives: true, DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		c := trust.ClientConfig(trust.Config{Local: d.certs.control.Certificate, Bundles: d.bundles, Authorize: trust.Exactly(d.controlID())})
		c.NextProtos = []string{alpnAdmin}
		return (&tls.Dialer{Config: c, NetDialer: &net.Dialer{Timeout: askReplica}}).DialContext(ctx, "tcp", addr)
	}}
}

// byLeader answers here if this replica leads, else has the leader answer.
func (d *daemon) byLeader(local http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		to, here := d.leader()
		if here {
			local.ServeHTTP(w, r)
			return
		}
		switch {
		case to != "":
		case r.Method == http.MethodGet: // nobody knows more than this replica
			local.ServeHTTP(w, r)
			return
		case d.kept.kube != nil && d.kept.kube.cold():
			noLeader(w, "the API server is away since this isthmusd started: what must be written waits for it")
			return
		default:
			noLeader(w, "no replica of isthmusd leads")
			return
		}
		proxy := &httputil.ReverseProxy{
			Rewrite:   func(p *httputil.ProxyRequest) { p.SetURL(&url.URL{Scheme: "https", Host: to}) },
			Transport: d.replica(to),
			ModifyResponse: func(resp *http.Response) error {
				if resp.StatusCode == http.StatusServiceUnavailable {
					return errors.New("it does not lead")
				}
				return nil
			},
			ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
				if r.Method == http.MethodGet {
					local.ServeHTTP(w, r)
					return
				}
				noLeader(w, "the replica that leads does not answer: "+err.Error())
			},
		}
		proxy.ServeHTTP(w, r)
	})
}

// forReplicas answers other replicas: never by a third.
func (d *daemon) forReplicas(local http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, here := d.leader(); !here && r.URL.Query().Get(admin.LocalOnly) == "" {
			noLeader(w, "this replica does not lead any more")
			return
		}
		local.ServeHTTP(w, r)
	})
}

func noLeader(w http.ResponseWriter, message string) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(http.StatusServiceUnavailable)
	_ = json.NewEncoder(w).Encode(&admin.Error{Reason: "NoLeader", Message: message, Hint: "run the command again: another leads within ten seconds"})
}

// others asks the replicas that follow this one for a path. One that does not answer, or has no such thing, is left out.
func (d *daemon) others(clients func() []xds.ClientStatus) func(context.Context, string) [][]byte {
	return func(ctx context.Context, path string) [][]byte {
		ctx, cancel := context.WithTimeout(ctx, askReplica)
		defer cancel()
		var mu sync.Mutex
		var wg sync.WaitGroup
		var out [][]byte
		for _, c := range clients() {
			id, follows := strings.CutPrefix(c.Node.GetId(), peering.ReplicaNode)
			_, at, _ := strings.Cut(id, "@")
			if _, err := netip.ParseAddrPort(at); !follows || err != nil || c.Identity != d.controlID() {
				continue
			}
			wg.Go(func() {
				found, err := d.askOne(ctx, at, path)
				if err != nil {
					d.log.Warn("a replica does not answer", "part", "operator", "replica", id, "path", path, "err", err)
				}
				mu.Lock()
				defer mu.Unlock()
				if found != nil {
					out = append(out, found)
				}
			})
		}
		wg.Wait()
		return out
	}
}

// askOne asks one replica for what it alone knows; nil is that it has no such thing.
func (d *daemon) askOne(ctx context.Context, addr, path string) ([]byte, error) {
	u, err := url.Parse("https://" + addr + path)
	if err != nil {
		return nil, err
	}
	q := u.Query()
	q.Set(admin.LocalOnly, "true")
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: d.replica(addr)}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return nil, nil
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answers %s", resp.Status)
	}
	return io.ReadAll(http.MaxBytesReader(nil, resp.Body, 64<<20))
}

// adminParts serve the admin API to replicas, and over TLS to whoever the API server vouches for.
func (d *daemon) adminParts(queue *tlsmux.Queue, l net.Listener, local http.Handler) ([]part, error) {
	if d.kept.kube == nil {
		return nil, nil
	}
	out := []part{{"admin of replicas", serveHTTP(queue, d.forReplicas(local))}}
	if l == nil {
		return out, nil
	}
	s := d.kept.kube
	tokens, err := authenticationclient.NewForConfig(s.rest)
	if err != nil {
		return nil, fmt.Errorf("admin.listen: %w", err)
	}
	access, err := authorizationclient.NewForConfig(s.rest)
	if err != nil {
		return nil, fmt.Errorf("admin.listen: %w", err)
	}
	g := guard.New(guard.Config{Tokens: tokens.TokenReviews(), Access: access.SubjectAccessReviews(), Namespace: s.client.Namespace(), Log: d.log})
	secure := tls.NewListener(l, &tls.Config{MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true, NextProtos: []string{"http/1.1"}, GetCertificate: d.certs.control.GetCertificate})
	return append(out, part{"admin over TLS", serveHTTP(secure, g.Handler(d.byLeader(local)))}), nil
}

// serveHTTP serves until ctx ends.
func serveHTTP(l net.Listener, h http.Handler) func(context.Context) error {
	srv := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10}
	return func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { srv.Close() })
		defer stop()
		if err := srv.Serve(l); err != nil && ctx.Err() == nil {
			return diag.Hint(err, "another process may have the port: set admin.listen")
		}
		return nil
	}
}
