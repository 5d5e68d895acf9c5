package token

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
)

// Why a redemption did not come to an answer. Errors of Redeem wrap them.
var (
	// ErrPin: what answers is not the issuer. Nothing was sent to it; the token is still good.
	ErrPin = errors.New("it is not the issuer of this token")
	// ErrReply: the answer is not signed by the issuer.
	ErrReply = errors.New("the reply is not signed by the issuer of this token")
	// ErrUnreachable: no endpoint of the token gave an answer.
	ErrUnreachable = errors.New("no endpoint of the token gave an answer")
)

// RedeemConfig says how to redeem. Its zero value but for Body works.
type RedeemConfig struct {
	// Body is a ClusterJoin or a MachineJoin, as the token's kind wants.
	Body proto.Message
	// Dial opens a connection; nil: TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Timeout is for each endpoint: a longer one waits longer for each address that drops packets. 0: 10 s.
	Timeout time.Duration
	// Now is the joiner's clock, used to warn and to judge the issuer's certificate; nil: time.Now.
	Now func() time.Time
	// Log takes warnings; nil: none.
	Log *slog.Logger
}

// Redeem redeems a token at the first of its endpoints that is the issuer and answers. A refusal is a *Refused; any
// other error says for each address what happened. Calling it again with the same key is safe at any time.
func Redeem(ctx context.Context, token string, c RedeemConfig) (*federationv1.JoinResult, error) {
	p, err := Parse(token)
	if err != nil {
		return nil, err
	}
	switch c.Body.(type) {
	case *federationv1.ClusterJoin:
		if p.Kind != Cluster {
			return nil, fmt.Errorf("join token %s is for machine %s, not for a cluster; run on the machine: isthmus-agent join TOKEN", p.ID, p.Subject)
		}
	case *federationv1.MachineJoin:
		if p.Kind != VM {
			return nil, fmt.Errorf("join token %s is for cluster %s, not for a machine; run in that cluster: isthmus join TOKEN", p.ID, p.Subject)
		}
	default:
		return nil, fmt.Errorf("join token %s: body %T is neither a ClusterJoin nor a MachineJoin", p.ID, c.Body)
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(c.Body)
	if err != nil {
		return nil, fmt.Errorf("join token %s: encode the request: %w", p.ID, err)
	}
	r := redeemer{RedeemConfig: c, token: p, body: body}
	r.setDefaults()
	clock := p.CheckTime(r.Now())
	if clock != nil {
		r.Log.Warn("by this machine's clock the token is not valid; the issuer's clock decides", "token", p.ID, "err", clock)
	}
	return r.tryAll(ctx, clock)
}

type redeemer struct {
	RedeemConfig
	token Payload
	body  []byte
}

func (r *redeemer) setDefaults() {
	if r.Dial == nil {
		r.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	}
	if r.Timeout == 0 {
		r.Timeout = Timeout
	}
	if r.Now == nil {
		r.Now = time.Now
	}
	if r.Log == nil {
		r.Log = slog.New(slog.DiscardHandler)
	}
}

func (r *redeemer) tryAll(ctx context.Context, clock error) (*federationv1.JoinResult, error) {
	var errs []error
	for _, addr := range r.token.Endpoints {
		result, err := r.try(ctx, addr)
		if err == nil {
			if result.GetErrorReason() != "" {
				return nil, &Refused{Reason: clean(result.GetErrorReason()), Message: clean(result.GetError())}
			}
			return result, nil
		}
		r.Log.Debug("join endpoint failed", "addr", addr, "err", err)
		errs = append(errs, fmt.Errorf("%s: %w", addr, err))
		if ctx.Err() != nil {
			break
		}
	}
	if clock != nil {
		errs = append(errs, clock)
	}
	return nil, &unreachable{id: r.token.ID, issuer: string(r.token.Issuer), errs: errs}
}

// unreachable lists what happened at each address.
type unreachable struct {
	id, issuer string
	errs       []error
}

func (u *unreachable) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "redeem join token %s of %s: %v: ", u.id, u.issuer, ErrUnreachable)
	for i, err := range u.errs {
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(err.Error())
	}
	b.WriteString("; the token is not known to be spent: check that the issuer's gateways are reachable from here, then run the same command again")
	return b.String()
}

func (u *unreachable) Unwrap() []error { return append([]error{ErrUnreachable}, u.errs...) }

func (r *redeemer) try(ctx context.Context, addr string) (*federationv1.JoinResult, error) {
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	raw, err := r.Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	conn := tls.Client(raw, &tls.Config{
		ServerName: sni.Join.Name(r.token.Issuer),
		NextProtos: []string{ALPN},
		MinVersion: tls.VersionTLS13,
		// The pin and the SPIFFE id decide, in VerifyConnection, not a name and the system's roots.
		InsecureSkipVerify: true,
		VerifyConnection:   func(cs tls.ConnectionState) error { return r.verify(cs) },
	})
	if err := conn.HandshakeContext(ctx); err != nil {
		if errors.Is(err, ErrPin) {
			return nil, err
		}
		return nil, fmt.Errorf("TLS handshake: %w", cause(ctx, err))
	}
	result, err := r.exchange(conn)
	if err != nil {
		return nil, cause(ctx, err)
	}
	return result, nil
}

// exchange sends the request and reads the reply.
func (r *redeemer) exchange(conn *tls.Conn) (*federationv1.JoinResult, error) {
	exp, err := exporter(conn.ConnectionState())
	if err != nil {
		return nil, err
	}
	request, err := proto.Marshal(&federationv1.JoinRequest{
		Token: r.token.reference,
		Body:  r.body,
		Proof: ed25519.Sign(r.token.Seed.key(), bound(requestLabel, exp, r.body)),
	})
	if err != nil {
		return nil, fmt.Errorf("encode the request: %w", err)
	}
	if len(request) > MaxRequest {
		return nil, fmt.Errorf("the request has %d bytes, at most %d are allowed; shorten the cluster's list of gateways or its bundle", len(request), MaxRequest)
	}
	if err := writeFrame(conn, request); err != nil {
		return nil, fmt.Errorf("send the request: %w", err)
	}
	frame, err := readFrame(conn, MaxReply)
	if err != nil {
		if errors.Is(err, io.EOF) {
			return nil, errors.New("the issuer closed the connection without an answer")
		}
		return nil, fmt.Errorf("read the reply: %w", err)
	}
	var reply federationv1.JoinReply
	if err := proto.Unmarshal(frame, &reply); err != nil {
		return nil, fmt.Errorf("decode the reply: %w", err)
	}
	if !ed25519.Verify(r.token.IssuerKey, bound(replyLabel, exp, reply.GetBody()), reply.GetSignature()) {
		return nil, ErrReply
	}
	var result federationv1.JoinResult
	if err := proto.Unmarshal(reply.GetBody(), &result); err != nil {
		return nil, fmt.Errorf("decode the result: %w", err)
	}
	return &result, nil
}

// verify decides whether the other side is the issuer. It runs inside the handshake, before the joiner sends a byte.
func (r *redeemer) verify(cs tls.ConnectionState) error {
	if len(cs.PeerCertificates) == 0 {
		return notIssuer("it shows no certificate")
	}
	leaf := cs.PeerCertificates[0]
	want := "spiffe://" + string(r.token.Issuer) + "/isthmus/join"
	if !r.pinned(cs.PeerCertificates) {
		return notIssuer("its key does not match the token's pin")
	}
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != want {
		return notIssuer("its certificate does not carry exactly the identity " + want)
	}
	if leaf.IsCA {
		return notIssuer("its certificate is that of a CA")
	}
	if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != ALPN {
		return notIssuer("it does not speak " + ALPN)
	}
	return nil
}

func notIssuer(why string) error {
	return fmt.Errorf("what answers there: %w: %s; nothing was sent to it and the token is still good; check the address and who stands between, or ask the issuer for a new token: isthmus token create", ErrPin, why)
}

// pinned reports whether a pin of the token is the leaf's key, or that of a CA of the chain that the leaf verifies against.
func (r *redeemer) pinned(chain []*x509.Certificate) bool {
	pins := make(map[Pin]bool)
	for _, pin := range r.token.Pins {
		pins[pin] = true
	}
	if pins[PinOf(chain[0])] {
		return true
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	for _, c := range chain[1:] {
		if !pins[PinOf(c)] || !c.IsCA {
			continue
		}
		root := x509.NewCertPool()
		root.AddCert(c)
		// The joiner's clock may be wrong, and the token says when it was issued: either time will do.
		for _, at := range []time.Time{r.Now(), r.inWindow(r.Now())} {
			_, err := chain[0].Verify(x509.VerifyOptions{
				Roots: root, Intermediates: between, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			})
			if err == nil {
				return true
			}
		}
	}
	return false
}

// inWindow returns the time closest to now at which the token is valid.
func (r *redeemer) inWindow(now time.Time) time.Time {
	if now.Before(r.token.NotBefore) {
		return r.token.NotBefore
	}
	if now.After(r.token.Expires) {
		return r.token.Expires
	}
	return now
}

// cause names the end of the context where that is why a connection failed.
func cause(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("no answer in time (%w)", err)
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return err
}
