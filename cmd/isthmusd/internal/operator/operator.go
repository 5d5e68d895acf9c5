// Package operator answers the operator's tool over a unix socket.
package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/acks"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/audit"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/workload"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/peering"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// maxBody bounds a request.
const maxBody = 1 << 20

// Config is what the answers are made from.
type Config struct {
	Socket    string
	Version   string
	Local     *mesh.Cluster
	Snapshots mesh.Snapshots
	Peering   *peering.Peering
	Alive     func() map[string]string // gossip's opinion by member
	Proxies   func() []xds.ClientStatus
	Machines  func() []workload.State
	Problems  func() []mesh.Problem // found while translating
	Grants    *token.Grants
	// IssueToken, Join and MintWorkload do what the operator asked for.
	IssueToken   func(context.Context, admin.TokenRequest) (admin.TokenReply, error)
	Join         func(context.Context, admin.JoinRequest) (admin.JoinReply, error)
	MintWorkload func(admin.WorkloadTokenRequest) (admin.TokenReply, error)
	// Probe tries a TLS handshake with an endpoint through one of the addresses.
	Probe func(ctx context.Context, addrs []string, serverName string) admin.Probe
	// Sources says how the API servers fare. Nil: none is read.
	Sources func() []admin.Source
	// Others asks the other replicas for a path, and returns the answers of those that have one. Nil: there are none.
	Others func(ctx context.Context, path string) [][]byte
	// Debug answers below /debug/. Nil: nothing does.
	Debug http.Handler
	// Trust is the certificate authority, Behind lists the proxies of this replica that lack that version of the roots.
	Trust  *authority.Authority
	Behind func(version string) []string
	// Audit is where changes are written down; nil: nowhere.
	Audit *audit.Log
	// Wrap stands before the calls on the socket; nil: nothing does.
	Wrap func(http.Handler) http.Handler
	Log  *slog.Logger
}

// Server is the operator's way in.
type Server struct {
	cfg      Config
	listener net.Listener
}

// Listen opens the socket, only for the user that isthmusd runs as.
func Listen(cfg Config) (*Server, error) {
	l, err := listen(cfg.Socket)
	if err != nil {
		if diag.HintOf(err) == "" {
			err = diag.Hint(err, "name another admin.socket, in a folder that isthmusd may write to")
		}
		return nil, err
	}
	return &Server{cfg: cfg, listener: l}, nil
}

func listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, diag.Hint(fmt.Errorf("admin socket %s: another isthmusd listens there", path), "end the other one, or give this one another admin.socket and dataDir")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return l, nil
}

// Close closes the socket of a Server that is not run; Run does it by itself.
func (s *Server) Close() error { return s.listener.Close() }

// Run answers until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	h := s.Handler()
	if s.cfg.Wrap != nil {
		h = s.cfg.Wrap(h)
	}
	srv := &http.Server{Handler: fromSocket(h), ReadHeaderTimeout: 5 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(s.listener) }()
	select {
	case err := <-done:
		return fmt.Errorf("admin socket %s: %w", s.cfg.Socket, err)
	case <-ctx.Done():
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = srv.Shutdown(grace)
		<-done
		return nil
	}
}

// fromSocket says of every call that it came over the socket.
func fromSocket(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set(admin.CallerHeader, "operator")
		r.Header.Set(admin.FromHeader, "socket")
		next.ServeHTTP(w, r)
	})
}

// Handler answers every call by itself.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/tokens", take(audited(s, aboutToken, s.cfg.IssueToken)))
	mux.HandleFunc("GET /v1/tokens", give(s.tokens))
	mux.HandleFunc("DELETE /v1/tokens/{id}", give(auditedCall(s, "token.revoke", "id", s.revoke)))
	mux.HandleFunc("POST /v1/workload-tokens", take(audited(s, aboutWorkloadToken, func(_ context.Context, r admin.WorkloadTokenRequest) (admin.TokenReply, error) {
		return s.cfg.MintWorkload(r)
	})))
	mux.HandleFunc("POST /v1/join", take(audited(s, aboutJoin, s.cfg.Join)))
	mux.HandleFunc("POST /v1/leave", take(audited(s, aboutLeave, s.leave)))
	mux.HandleFunc("GET /v1/peers", give(func(*http.Request) ([]admin.Peer, error) { return s.peers(), nil }))
	mux.HandleFunc("POST /v1/peers/{name}/approve", give(auditedCall(s, "peer.approve", "name", func(r *http.Request) (struct{}, error) {
		return struct{}{}, s.cfg.Peering.Approve(r.Context(), r.PathValue("name"))
	})))
	mux.HandleFunc("POST /v1/peers/{name}/evict", give(auditedCall(s, "peer.evict", "name", s.evict)))
	mux.HandleFunc("POST /v1/peers/{name}/drain", s.drain)
	mux.HandleFunc("GET /v1/trust", give(func(*http.Request) (admin.Trust, error) { return s.trust(), nil }))
	mux.HandleFunc("POST /v1/trust", take(audited(s, aboutRotation, s.rotate)))
	mux.HandleFunc("GET "+acks.Path, give(func(r *http.Request) ([]string, error) { return s.cfg.Behind(r.URL.Query().Get("version")), nil }))
	mux.HandleFunc("GET /v1/status", give(s.status))
	mux.HandleFunc("GET /v1/proxies", give(func(r *http.Request) ([]admin.Proxy, error) { return s.proxies(r), nil }))
	mux.HandleFunc("POST /v1/explain", take(s.explain))
	if s.cfg.Debug != nil {
		mux.Handle("GET /debug/", s.cfg.Debug)
	}
	return mux
}

// take answers a request with a JSON body.
func take[In, Out any](f func(context.Context, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var in In
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
		d.DisallowUnknownFields()
		if err := d.Decode(&in); err != nil {
			fail(w, http.StatusBadRequest, &admin.Error{Reason: "BadRequest", Message: "read the request: " + err.Error()})
			return
		}
		out, err := f(WithCaller(r), in)
		answer(w, out, err)
	}
}

// give answers a request without a body.
func give[Out any](f func(*http.Request) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		out, err := f(r.WithContext(WithCaller(r)))
		answer(w, out, err)
	}
}

func answer(w http.ResponseWriter, out any, err error) {
	if err == nil {
		w.Header().Set("content-type", "application/json")
		_ = json.NewEncoder(w).Encode(out)
		return
	}
	e := &admin.Error{Reason: "Failed", Message: err.Error(), Hint: diag.HintOf(err)}
	var refused *token.Refused
	var refusal *protocol.Refusal
	switch {
	case errors.As(err, &refused):
		e.Reason = refused.Reason
	case errors.As(err, &refusal):
		if e.Reason = refusal.Reason; err == error(refusal) { // nothing around it
			e.Message = refusal.Message
		}
	}
	fail(w, http.StatusUnprocessableEntity, e)
}

func fail(w http.ResponseWriter, code int, e *admin.Error) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(e)
}

func (s *Server) tokens(*http.Request) ([]admin.Token, error) {
	grants, err := s.cfg.Grants.List()
	out := []admin.Token{}
	now := time.Now()
	for _, g := range grants {
		t := admin.Token{ID: g.ID, Kind: string(g.Kind), Name: g.Subject, State: string(g.State(now)), Expires: g.Expires}
		if n := len(g.Redemptions); n > 0 {
			r := g.Redemptions[n-1]
			t.RedeemedBy, t.RedeemedAt, t.From = r.Name, r.At, r.From
		}
		out = append(out, t)
	}
	if err != nil {
		s.cfg.Log.Error("some tokens cannot be read", "part", "operator", "err", err)
	}
	return out, nil
}

// revoke makes a token worthless. One that was redeemed is refused: whoever redeemed it would stay.
func (s *Server) revoke(r *http.Request) (struct{}, error) {
	id := r.PathValue("id")
	grant, err := s.cfg.Grants.Get(id)
	if err == nil && !used(grant) {
		grant, err = s.cfg.Grants.Revoke(r.Context(), id, Who(r.Context()), time.Now())
	}
	switch {
	case errors.Is(err, token.ErrNoGrant):
		err = diag.Hint(err, "isthmus token list shows those that are")
	case err == nil && used(grant): // perhaps a moment before it was revoked
		err = redeemed(grant)
	}
	return struct{}{}, err
}

// used reports whether the token was redeemed as often as it may be.
func used(g token.Grant) bool { return len(g.Redemptions) > 0 && len(g.Redemptions) >= g.Uses }

// redeemed says who is in, and what puts them out.
func redeemed(g token.Grant) error {
	who, hint := g.Subject, "to put that cluster out: isthmus peer evict "+g.Subject
	if g.Kind == token.VM {
		who = "machine " + g.Subject
		hint = "to take " + who + " out, run there: isthmus-agent leave"
	}
	return diag.Hint(fmt.Errorf("token %s was redeemed by %s already: revoking changes nothing", g.ID, who), "%s", hint)
}

// retire revokes the tokens that the cluster redeemed. Until then it may repeat the join with the same key, which would
// undo an eviction.
func (s *Server) retire(ctx context.Context, name string) error {
	grants, err := s.cfg.Grants.List()
	if err != nil {
		s.cfg.Log.Error("some tokens cannot be read", "part", "operator", "err", err)
	}
	for _, g := range grants {
		if g.Kind != token.Cluster || g.Subject != name || !used(g) {
			continue
		}
		_, err := s.cfg.Grants.Revoke(ctx, g.ID, "eviction", time.Now())
		if s.write(ctx, "token.revoke", g.ID, map[string]string{"for": g.Subject, "because": "eviction"}, err); err != nil {
			return err
		}
	}
	return nil
}
