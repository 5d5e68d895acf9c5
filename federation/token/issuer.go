package token

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// IssuerConfig says how joins are answered.
type IssuerConfig struct {
	TrustDomain mesh.TrustDomain
	Key         crypto.Signer // the federation key, Ed25519; signs replies
	Grants      *Grants
	// VerifyRecord checks a record's signature by a federation key.
	VerifyRecord func(*federationv1.Record, ed25519.PublicKey) error
	// AdmitCluster makes a cluster a member. It must be idempotent for the same grant and key: a joiner that lost its
	// answer comes again. A *Refused is told to the joiner and leaves the token as it was; any other error is logged,
	// and the joiner is told to try again. nil: clusters are refused.
	AdmitCluster func(context.Context, Grant, *federationv1.ClusterJoin) (*federationv1.JoinResult, error)
	// AdmitMachine gives a machine its certificate; the rest as for AdmitCluster.
	AdmitMachine func(context.Context, Grant, *federationv1.MachineJoin) (*federationv1.JoinResult, error)
	// OnReuse is told when a key holds the seed of a token that another key has spent: the token leaked, or was used
	// twice by mistake. It must not block. May be nil.
	OnReuse func(Grant, Redemption)
	// Decided is told each decision about one who holds the seed of a token of ours: err is a *Refused where it was
	// refused. It must not block. May be nil.
	Decided func(g Grant, by Redemption, pending bool, err error)
	// Connections is how many joins are served at once: more lets more joiners in at the same time, each costs up to
	// 100 KiB and a descriptor. Above it, those that have not asked for anything yet make room, of the source that has
	// most of them. 0: 256.
	Connections int
	// Timeout is for each step of a join; a longer one lets idle connections hold their place longer. 0: 10 s.
	Timeout time.Duration
	Now     func() time.Time // nil: time.Now
	Log     *slog.Logger     // nil: none
	Reg     prometheus.Registerer
}

// Issuer answers joins.
type Issuer struct {
	IssuerConfig
	places  places
	answers *prometheus.CounterVec

	mu      sync.Mutex
	admits  map[string]*admission // token ID -> who is being admitted
	reasons map[string]bool       // seen as metric labels
}

// admission is held by one join of a token at a time, so that a refusal can take its own redemption back.
type admission struct {
	turn  chan struct{}
	users int
}

// maxReasons limits the label of the metric, as Admit functions bring reasons of their own.
const maxReasons = 64

// NewIssuer returns an Issuer; it starts nothing.
func NewIssuer(c IssuerConfig) (*Issuer, error) {
	if c.Key == nil || c.Grants == nil || c.VerifyRecord == nil {
		return nil, errors.New("join issuer: Key, Grants and VerifyRecord are needed")
	}
	if _, ok := c.Key.Public().(ed25519.PublicKey); !ok {
		return nil, fmt.Errorf("join issuer: the federation key is %T, not Ed25519", c.Key.Public())
	}
	if c.Connections == 0 {
		c.Connections = 256
	}
	if c.Timeout == 0 {
		c.Timeout = Timeout
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Issuer{
		IssuerConfig: c,
		places:       places{limit: c.Connections},
		answers: promauto.With(c.Reg).NewCounterVec(prometheus.CounterOpts{
			Namespace: "isthmus", Subsystem: "token", Name: "joins_total",
			Help: "Join connections by outcome: admitted, closed without an answer, or the reason of the refusal.",
		}, []string{"outcome"}),
		admits:  make(map[string]*admission),
		reasons: make(map[string]bool),
	}, nil
}

// Serve answers the one join that a connection carries and closes the connection. The handshake may be done or not.
func (i *Issuer) Serve(ctx context.Context, conn *tls.Conn) {
	// Close would wait to send its alert to a peer that does not read; the deadline set below bounds it.
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(i.Timeout))
	mine := i.places.take(conn.NetConn())
	if mine == nil {
		i.count("TooBusy")
		return
	}
	defer i.places.leave(mine)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := i.serve(ctx, conn, mine); err != nil {
		i.count("Closed")
		i.Log.Debug("join connection failed", "from", conn.RemoteAddr().String(), "err", err)
	}
}

func (i *Issuer) serve(ctx context.Context, conn *tls.Conn, mine *place) error {
	hctx, cancel := context.WithTimeout(ctx, i.Timeout)
	defer cancel()
	if err := conn.HandshakeContext(hctx); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	exp, err := exporter(conn.ConnectionState())
	if err != nil {
		return err
	}
	frame, err := readFrame(conn, MaxRequest)
	var result *federationv1.JoinResult
	switch {
	case errors.Is(err, errFrame):
		err = refuse(ReasonTooLarge, "the join request is larger than %d bytes", MaxRequest)
	case err != nil:
		return fmt.Errorf("read the request: %w", err)
	case !i.places.asks(mine):
		return errors.New("made room for another join")
	default:
		actx, done := context.WithTimeout(ctx, i.Timeout)
		defer done()
		result, err = i.answer(actx, frame, exp, conn.RemoteAddr().String())
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return i.reply(conn, exp, i.result(result, err))
}

// result turns what admission gave into what the joiner is told, and accounts for it.
func (i *Issuer) result(result *federationv1.JoinResult, err error) *federationv1.JoinResult {
	var refused *Refused
	switch {
	case errors.As(err, &refused):
	case err != nil:
		i.Log.Error("join failed", "err", err)
		refused = refuse(ReasonInternal, "the issuer could not finish the join; run the same command again, and if it fails again look at the log of its isthmusd")
	case result.GetErrorReason() != "":
		refused = &Refused{Reason: result.GetErrorReason(), Message: result.GetError()}
	case proto.Size(result) > MaxReply-1024:
		i.Log.Error("join reply too large", "bytes", proto.Size(result), "limit", MaxReply)
		refused = refuse(ReasonInternal, "the mesh is too large for one reply")
	default:
		i.count("Admitted")
		return result
	}
	i.count(refused.Reason)
	return &federationv1.JoinResult{ErrorReason: clean(refused.Reason), Error: clean(refused.Message)}
}

func (i *Issuer) reply(conn *tls.Conn, exp []byte, result *federationv1.JoinResult) error {
	body, err := proto.Marshal(result)
	if err != nil {
		return fmt.Errorf("encode the result: %w", err)
	}
	sig, err := i.Key.Sign(rand.Reader, bound(replyLabel, exp, body), crypto.Hash(0))
	if err != nil {
		return fmt.Errorf("sign the reply: %w", err)
	}
	frame, err := proto.Marshal(&federationv1.JoinReply{Body: body, Signature: sig})
	if err != nil {
		return fmt.Errorf("encode the reply: %w", err)
	}
	_ = conn.SetDeadline(time.Now().Add(i.Timeout))
	if err := writeFrame(conn, frame); err != nil {
		return fmt.Errorf("send the reply: %w", err)
	}
	return nil
}

// answer decides about one request. The cheap checks come first: form, one look-up, the clock, the proof; only who
// holds the seed makes the issuer read the body, learns who redeemed the token, or writes to the store.
func (i *Issuer) answer(ctx context.Context, frame, exp []byte, from string) (*federationv1.JoinResult, error) {
	var req federationv1.JoinRequest
	if err := proto.Unmarshal(frame, &req); err != nil {
		return nil, refuse(ReasonRequest, "the join request does not decode; use an isthmus of the issuer's version")
	}
	g, err := i.lookUp(req.GetToken())
	if err != nil {
		return nil, err
	}
	if !ed25519.Verify(g.SeedPublic, bound(requestLabel, exp, req.GetBody()), req.GetProof()) {
		return nil, refuse(ReasonProof, "the proof does not fit token %s and this connection; %s", g.ID, remedy(g.Kind, g.Subject))
	}
	j, err := i.joiner(g, req.GetBody())
	if err != nil {
		return nil, err
	}
	j.From, j.At = from, i.Now().UTC()
	release, err := i.turn(ctx, g.ID)
	if err != nil {
		return nil, err
	}
	defer release()
	result, err := i.decide(ctx, g, j)
	if i.Decided != nil {
		i.Decided(g, j.Redemption, result.GetPending(), err)
	}
	return result, err
}

// decide binds the token to the joiner and admits it.
func (i *Issuer) decide(ctx context.Context, g Grant, j joiner) (*federationv1.JoinResult, error) {
	g, first, err := i.bind(ctx, g.ID, j.Redemption)
	if err != nil {
		return nil, err
	}
	result, err := j.admit(ctx, g)
	var refused *Refused
	if result == nil && err == nil {
		err = errors.New("admission gave no result")
	}
	if err == nil && result.GetErrorReason() != "" {
		err = &Refused{Reason: result.GetErrorReason(), Message: result.GetError()}
	}
	switch {
	case errors.As(err, &refused):
		i.Log.Info("join refused", "token", g.ID, "subject", g.Subject, "from", j.From, "reason", refused.Reason)
		if first {
			if err := i.unbind(ctx, g.ID, j.Key); err != nil {
				i.Log.Warn("a refused join keeps its token spent for other keys", "token", g.ID, "err", err)
			}
		}
	case err == nil:
		i.Log.Info("join admitted", "token", g.ID, "subject", g.Subject, "name", j.Name, "from", j.From, "again", !first, "pending", result.GetPending())
	default:
		err = fmt.Errorf("admit %s with token %s: %w", g.Subject, g.ID, err)
	}
	return result, err
}

// lookUp finds the grant and checks what needs no proof.
func (i *Issuer) lookUp(ref string) (Grant, error) {
	if len(ref) > maxToken {
		return Grant{}, refuse(ReasonMalformed, "the token is longer than %d characters", maxToken)
	}
	p, err := parseReference(ref)
	if err != nil {
		return Grant{}, refuse(ReasonMalformed, "%v", err)
	}
	if p.Issuer != i.TrustDomain {
		return Grant{}, refuse(ReasonForeign, "the token was issued by %s, this is %s; redeem it there, or ask here for a new token: isthmus token create --for %s", p.Issuer, i.TrustDomain, p.Subject)
	}
	g, _, err := i.Grants.get(p.ID)
	if errors.Is(err, ErrNoGrant) {
		return Grant{}, refuse(ReasonUnknown, "%s has not issued token %s, or has deleted it; %s", i.TrustDomain, p.ID, remedy(p.Kind, p.Subject))
	}
	if err != nil {
		return Grant{}, err
	}
	digest := sha256.Sum256([]byte(ref))
	if subtle.ConstantTimeCompare(digest[:], g.Reference) != 1 {
		return Grant{}, refuse(ReasonEdited, "this is not token %s as %s issued it; copy the whole line again, or %s", p.ID, i.TrustDomain, remedy(g.Kind, g.Subject))
	}
	return g, i.inForce(g)
}

// inForce checks revocation and time. Expiry ends the first redemption of a token; a key that has redeemed it and lost
// the answer may come again for as long as the token lived, so a spent token is judged when the key is known.
func (i *Issuer) inForce(g Grant) error {
	now := i.Now()
	switch {
	case !g.RevokedAt.IsZero():
		return refuse(ReasonRevoked, "token %s was revoked at %s; %s", g.ID, stamp(g.RevokedAt), remedy(g.Kind, g.Subject))
	case now.Before(g.NotBefore):
		return refuse(ReasonNotYetValid, "token %s is valid from %s, and by the clock of %s it is %s; try again then", g.ID, stamp(g.NotBefore), i.TrustDomain, stamp(now))
	case !now.Before(g.Expires) && (len(g.Redemptions) == 0 || now.After(g.Expires.Add(g.Expires.Sub(g.NotBefore)))):
		return expired(g)
	}
	return nil
}

func expired(g Grant) error {
	return refuse(ReasonExpired, "token %s expired at %s by the clock of %s; %s", g.ID, stamp(g.Expires), g.Issuer, remedy(g.Kind, g.Subject))
}

// joiner is a request whose sender holds the seed.
type joiner struct {
	Redemption
	admit func(context.Context, Grant) (*federationv1.JoinResult, error)
}

func (i *Issuer) joiner(g Grant, body []byte) (joiner, error) {
	switch {
	case g.Kind == Cluster && i.AdmitCluster != nil:
		return i.clusterJoiner(g, body)
	case g.Kind == VM && i.AdmitMachine != nil:
		return i.machineJoiner(g, body)
	}
	return joiner{}, refuse(ReasonRequest, "%s does not admit a %s", i.TrustDomain, g.Kind)
}

func (i *Issuer) clusterJoiner(g Grant, body []byte) (joiner, error) {
	var join federationv1.ClusterJoin
	var cluster federationv1.Cluster
	if err := proto.Unmarshal(body, &join); err != nil {
		return joiner{}, refuse(ReasonRequest, "the request is not that of a cluster; use an isthmus of the issuer's version")
	}
	if join.GetName() != g.Subject {
		return joiner{}, refuse(ReasonName, "token %s is for cluster %s, not for %.64q; run isthmus join in %s, or %s", g.ID, g.Subject, join.GetName(), g.Subject, remedy(g.Kind, "NAME"))
	}
	rec := join.GetCluster()
	if rec.GetKind() != "cluster" || rec.GetOrigin() != join.GetName() || rec.GetKey() != "" || proto.Unmarshal(rec.GetBody(), &cluster) != nil {
		return joiner{}, refuse(ReasonRecord, "the join of cluster %s carries no cluster record of its own; use an isthmus of the issuer's version", join.GetName())
	}
	key := cluster.GetFederationKey()
	if len(key) != ed25519.PublicKeySize {
		return joiner{}, refuse(ReasonRecord, "the record of cluster %s holds no federation key", join.GetName())
	}
	if err := i.VerifyRecord(rec, key); err != nil {
		return joiner{}, refuse(ReasonRecord, "the record of cluster %s is not signed by its federation key: %v", join.GetName(), err)
	}
	digest := sha256.Sum256(key)
	return joiner{
		Redemption: Redemption{Key: digest[:], Name: join.GetName()},
		admit: func(ctx context.Context, g Grant) (*federationv1.JoinResult, error) {
			return i.AdmitCluster(ctx, g, &join)
		},
	}, nil
}

func (i *Issuer) machineJoiner(g Grant, body []byte) (joiner, error) {
	var join federationv1.MachineJoin
	if err := proto.Unmarshal(body, &join); err != nil {
		return joiner{}, refuse(ReasonRequest, "the request is not that of a machine; use an isthmus-agent of the issuer's version")
	}
	if len(join.GetHostname()) > 253 || len(join.GetAddresses()) > 64 {
		return joiner{}, refuse(ReasonRequest, "the host name is over 253 bytes, or there are more than 64 addresses")
	}
	block, _ := pem.Decode([]byte(join.GetCsrPem()))
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(block.Bytes) > 16<<10 {
		return joiner{}, refuse(ReasonRequest, "the request carries no certificate request in PEM of at most 16 KiB")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return joiner{}, refuse(ReasonRequest, "the certificate request does not parse: %v", err)
	}
	if key, ok := csr.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() > 8192 { // checking it would be costly
		return joiner{}, refuse(ReasonRequest, "the RSA key of the certificate request has %d bits, at most 8192 are allowed", key.N.BitLen())
	}
	if err := csr.CheckSignature(); err != nil {
		return joiner{}, refuse(ReasonRequest, "the certificate request is not signed by its own key: %v", err)
	}
	digest := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	return joiner{
		Redemption: Redemption{Key: digest[:], Name: join.GetHostname()},
		admit: func(ctx context.Context, g Grant) (*federationv1.JoinResult, error) {
			return i.AdmitMachine(ctx, g, &join)
		},
	}, nil
}

// bind redeems the token for one key by compare-and-swap. first is false for a key that comes again.
func (i *Issuer) bind(ctx context.Context, id string, by Redemption) (g Grant, first bool, err error) {
	g, err = i.Grants.update(ctx, id, func(g *Grant) (bool, error) {
		if first = false; g.redeemedBy(by.Key) != nil {
			return false, i.inForce(*g)
		}
		if len(g.Redemptions) >= g.Uses {
			if g.RevokedAt.IsZero() && i.OnReuse != nil {
				i.OnReuse(*g, by)
			}
			return false, i.spent(*g, by)
		}
		if err := i.inForce(*g); err != nil {
			return false, err
		}
		if !i.Now().Before(g.Expires) {
			return false, expired(*g)
		}
		first = true
		g.Redemptions = append(g.Redemptions, by)
		return true, nil
	})
	if errors.Is(err, ErrNoGrant) { // deleted since it was looked up
		err = refuse(ReasonUnknown, "%s has deleted token %s; ask it for a new token: isthmus token create", i.TrustDomain, id)
	}
	return g, first, err
}

func (i *Issuer) spent(g Grant, by Redemption) error {
	last := g.Redemptions[len(g.Redemptions)-1]
	i.Log.Warn("a spent token was redeemed again by another key", "reason", "TokenReuse", "token", g.ID, "subject", g.Subject, "by", by.String(), "redeemed", last.String())
	return refuse(ReasonSpent, "token %s was redeemed by %s; if that was not you the token leaked: have the issuer evict %s; otherwise %s", g.ID, last, g.Subject, remedy(g.Kind, g.Subject))
}

// unbind takes a redemption back that led to a refusal, so that the token stays good for the right joiner.
func (i *Issuer) unbind(ctx context.Context, id string, key []byte) error {
	_, err := i.Grants.update(ctx, id, func(g *Grant) (bool, error) {
		for n := range g.Redemptions {
			if string(g.Redemptions[n].Key) == string(key) {
				g.Redemptions = append(g.Redemptions[:n:n], g.Redemptions[n+1:]...)
				return true, nil
			}
		}
		return false, nil
	})
	return err
}

// turn waits until no other join of the token is being decided in this process.
func (i *Issuer) turn(ctx context.Context, id string) (release func(), err error) {
	i.mu.Lock()
	a := i.admits[id]
	if a == nil {
		a = &admission{turn: make(chan struct{}, 1)}
		i.admits[id] = a
	}
	a.users++
	i.mu.Unlock()
	leave := func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		if a.users--; a.users == 0 {
			delete(i.admits, id)
		}
	}
	select {
	case a.turn <- struct{}{}:
		return func() { <-a.turn; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("wait for another join of token %s: %w", id, ctx.Err())
	}
}

func (i *Issuer) count(outcome string) {
	i.mu.Lock()
	if !i.reasons[outcome] {
		if len(i.reasons) >= maxReasons {
			outcome = "Other"
		}
		i.reasons[outcome] = true
	}
	i.mu.Unlock()
	i.answers.WithLabelValues(outcome).Inc()
}
