// Package authority gives all replicas of isthmusd one certificate authority, kept in the Kubernetes API, and follows
// one that the operator gives or changes.
package authority

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/kubestate"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Objects of the certificate authority in the root namespace; the first two have Istio's names and form.
const (
	GivenSecret = "cacerts"
	OwnSecret   = "istio-ca-secret"
	rootsMap    = "isthmus-ca-roots"
	rootsKey    = "roots.json"
	poll        = 5 * time.Second
	confirmPoll = time.Second
	maxFile     = 1 << 20
)

// Config says where the authority is, and who is told when its roots change.
type Config struct {
	Client      *kubestate.Client
	TrustDomain mesh.TrustDomain
	// Dir holds a given CA; empty, or without its files: the Secret cacerts is looked at.
	Dir string
	// MaxTTL, Settle and Overlap are those of the configuration's ca; an Overlap of 0 is twice MaxTTL.
	MaxTTL, Settle, Overlap time.Duration
	Log                     *slog.Logger
}

// Authority gives all replicas one certificate authority: the given one (Secret cacerts, or ca.dir), else one that the
// first replica made. One that is given later, or changed, is taken while running: its roots are told to everybody,
// after ca.settle it signs, and for ca.overlap the roots before are trusted still.
type Authority struct {
	cfg   Config
	ca    *identity.CA
	from  string            // names the given one in messages
	data  map[string][]byte // as it was read last; nil: none is given
	used  map[string][]byte // what signs
	keep  func(Kept)        // nil: nobody wants it
	roots []Root            // as the ConfigMap says
	next  *identity.Authority
	later map[string][]byte // what next was made of
	since time.Time         // when next came
}

// Root is one generation of roots in the ConfigMap, which replicas share so that a restart forgets none.
type Root struct {
	ID    string    `json:"id"`             // of the authority
	Roots string    `json:"roots"`          // PEM
	Until time.Time `json:"until,omitzero"` // zero: it is in use
}

// New makes an Authority; nothing is read before Load.
func New(cfg Config) *Authority { return &Authority{cfg: cfg} }

// Load returns the CA to start with. tokenKey is the key of workload tokens, in PEM.
func (c *Authority) Load(ctx context.Context, tokenKey []byte) (*identity.CA, error) {
	conf := identity.Config{TrustDomain: c.cfg.TrustDomain, MaxTTL: c.cfg.MaxTTL, Log: c.cfg.Log}
	var err error
	if c.data, err = c.given(ctx); err != nil {
		return nil, err
	}
	from, data := c.from, c.data
	if data == nil {
		from = "in Secret " + c.cfg.Client.Namespace() + "/" + OwnSecret
		data, err = c.cfg.Client.EnsureSecret(ctx, OwnSecret, func(held map[string][]byte) (map[string][]byte, error) {
			if len(held) > 0 { // all of it is one: nothing is added to another's
				return nil, nil
			}
			m, err := identity.MakeRoot(conf)
			return m.Data(), err
		})
		if err != nil {
			return nil, err
		}
	}
	if c.ca, err = identity.New(conf, from, identity.MaterialOf(data), tokenKey); err != nil {
		return nil, err
	}
	c.used = data
	if err := c.note(ctx, c.ca.Authority()); err != nil {
		return nil, err
	}
	return c.ca, c.ca.Use(c.ca.Authority(), c.others(c.ca.Authority()))
}

// given reads the CA that the operator gave; nil when there is none.
func (c *Authority) given(ctx context.Context) (map[string][]byte, error) {
	if dir := c.cfg.Dir; dir != "" {
		c.from = "in " + dir
		out := map[string][]byte{}
		for _, name := range []string{"ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem"} {
			data, err := os.ReadFile(filepath.Join(dir, name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("given CA: %w", err)
			}
			if len(data) <= maxFile {
				out[name] = data
			}
		}
		if len(out) > 0 {
			return out, nil
		}
	}
	c.from = "in Secret " + c.cfg.Client.Namespace() + "/" + GivenSecret
	return c.cfg.Client.Secret(ctx, GivenSecret)
}

// note makes a the authority in use in the shared list: those before are trusted until the overlap ends.
func (c *Authority) note(ctx context.Context, a *identity.Authority) error {
	now := time.Now().UTC().Truncate(time.Second)
	return c.cfg.Client.UpdateConfigMap(ctx, rootsMap, func(data map[string]string) bool {
		var held []Root
		if err := json.Unmarshal([]byte(data[rootsKey]), &held); err != nil && data[rootsKey] != "" {
			c.cfg.Log.Error("the list of roots does not decode; it is written anew", "part", "ca", "err", err)
		}
		next := []Root{{ID: a.ID(), Roots: string(a.Roots())}}
		changed := true
		for _, e := range held {
			switch {
			case e.ID == a.ID():
				changed = !e.Until.IsZero() || e.Roots != next[0].Roots
				continue
			case e.Until.IsZero():
				e.Until = now.Add(c.overlap())
			case now.After(e.Until):
				continue
			}
			next = append(next, e)
		}
		c.roots = next
		if !changed {
			return false
		}
		text, err := json.MarshalIndent(next, "", " ")
		if err != nil {
			return false
		}
		data[rootsKey] = string(text)
		return true
	})
}

func (c *Authority) overlap() time.Duration {
	return cmp.Or(c.cfg.Overlap, 2*c.cfg.MaxTTL)
}

// others returns the roots beside those of a that are trusted now.
func (c *Authority) others(a *identity.Authority) []byte {
	var out bytes.Buffer
	for _, e := range c.roots {
		if e.ID != a.ID() && (e.Until.IsZero() || time.Now().Before(e.Until)) {
			out.WriteString(e.Roots)
		}
	}
	return out.Bytes()
}

// Kept is what a start without the API needs: what signs, and whom to trust.
type Kept struct {
	// Given: the operator gave it.
	Given bool `json:"given,omitempty"`
	// Data is the content of its Secret, private key and all.
	Data  map[string][]byte `json:"data"`
	Roots []Root            `json:"roots"`
}

// String keeps the key out of every kind of output.
func (Kept) String() string { return "[redacted]" }

// GoString returns [redacted].
func (Kept) GoString() string { return "[redacted]" }

// Kept returns what a start without the API needs. It is not to be called while Run runs, which tells its Listener.
func (c *Authority) Kept() Kept {
	return Kept{Given: c.data != nil, Data: c.used, Roots: slices.Clone(c.roots)}
}

// Resume returns the CA to start with while the API is away.
func (c *Authority) Resume(k Kept, tokenKey []byte) (*identity.CA, error) {
	conf := identity.Config{TrustDomain: c.cfg.TrustDomain, MaxTTL: c.cfg.MaxTTL, Log: c.cfg.Log}
	var err error
	if c.ca, err = identity.New(conf, "as it was kept", identity.MaterialOf(k.Data), tokenKey); err != nil {
		return nil, err
	}
	c.from, c.used, c.roots = "as it was kept", k.Data, k.Roots
	if k.Given {
		c.data = k.Data
	}
	return c.ca, c.ca.Use(c.ca.Authority(), c.others(c.ca.Authority()))
}

// Confirm brings what Resume began with in line with the API, which is back. It fails with ErrOther when the API has
// another CA than was kept.
func (c *Authority) Confirm(ctx context.Context) error {
	if c.data == nil {
		given, err := c.given(ctx)
		if err != nil {
			return err
		}
		if given == nil {
			held, err := c.cfg.Client.EnsureSecret(ctx, OwnSecret, func(held map[string][]byte) (map[string][]byte, error) {
				if len(held) > 0 {
					return nil, nil
				}
				return c.used, nil
			})
			if err != nil {
				return err
			}
			if !maps.EqualFunc(held, c.used, bytes.Equal) {
				return diag.Hint(fmt.Errorf("%w: Secret %s/%s", ErrOther, c.cfg.Client.Namespace(), OwnSecret), "it is used when isthmusd has started again")
			}
		}
	}
	return c.note(ctx, c.ca.Authority())
}

// ErrOther is wrapped when the API has other keys than were kept.
var ErrOther = errors.New("the API server has other keys than were kept")

// Listener is told what changes.
type Listener struct {
	// Keep is told what a start without the API needs, when it changes. Nil: nobody wants it.
	Keep func(Kept)
	// Confirmed returns nil once the API has been read. Until then only the roots that expire are looked after. Nil: it has.
	Confirmed func(context.Context) error
	// Problems gets what is wrong with a given CA.
	Problems mesh.Sink
	// Changed is called with the roots that are trusted now.
	Changed func(roots []byte)
}

// Run follows the given CA until ctx ends.
func (c *Authority) Run(ctx context.Context, l Listener) error {
	c.keep = l.Keep
	every := min(poll, max(c.cfg.Settle/4, 100*time.Millisecond))
	tick := time.NewTicker(every)
	defer tick.Stop()
	if l.Confirmed != nil {
		tick.Reset(min(every, confirmPoll))
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		if l.Confirmed == nil {
			c.look(call, l.Problems)
		} else if err := l.Confirmed(call); err == nil {
			l.Confirmed = nil
			tick.Reset(every)
			c.told()
		} else if !kubestate.Transient(err) && ctx.Err() == nil {
			cancel()
			return err
		}
		cancel()
		if err := c.apply(l.Changed); err != nil {
			c.cfg.Log.Error("the roots are not changed", "part", "ca", "err", err)
		}
	}
}

// look reads what is given, and takes it as the next authority if it is another and good.
func (c *Authority) look(ctx context.Context, problems mesh.Sink) {
	data, err := c.given(ctx)
	if err != nil || (data == nil) == (c.data == nil) && maps.EqualFunc(data, c.data, bytes.Equal) {
		return // an API that is away changes nothing
	}
	object := mesh.ObjectRef{Kind: "Secret", Namespace: c.cfg.Client.Namespace(), Name: GivenSecret}
	problem := func(reason, message, remedy string) {
		c.cfg.Log.Error("the given CA is not taken; the one before stays in use", "part", "ca", "reason", reason, "err", message)
		problems.Report("given", mesh.Input{Problems: []mesh.Problem{{Object: object, Reason: reason, Message: message, Remedy: remedy}}})
	}
	if data == nil {
		c.data = nil
		problem("CAMissing", "the given CA was removed; it stays in use until isthmusd starts again", "put it back, or restart isthmusd to go on with one of its own")
		return
	}
	next, err := c.ca.Parse(c.from, identity.MaterialOf(data))
	var invalid *identity.Invalid
	if errors.As(err, &invalid) {
		c.data = data
		problem(invalid.Reason, invalid.Message, invalid.Remedy)
		return
	}
	if err == nil {
		err = c.note(ctx, next)
	}
	if err != nil {
		c.cfg.Log.Warn("the given CA is not taken yet", "part", "ca", "err", err)
		return // again at the next look
	}
	c.data = data
	problems.Forget("given")
	if next.ID() == c.ca.Authority().ID() {
		next = nil
	} else {
		c.cfg.Log.Info("a new CA is told to everybody before it signs", "part", "ca", "authority", next.ID(), "settle", c.cfg.Settle)
	}
	c.next, c.later, c.since = next, data, time.Now()
}

// told has what is needed for a start kept.
func (c *Authority) told() {
	if c.keep != nil {
		c.keep(c.Kept())
	}
}

// apply brings the CA and all who trust it in line.
func (c *Authority) apply(changed func([]byte)) error {
	by := c.ca.Authority()
	if c.next != nil && time.Since(c.since) >= c.cfg.Settle {
		by, c.next, c.used = c.next, nil, c.later
		c.cfg.Log.Info("certificates are signed by the new CA", "part", "ca", "authority", by.ID(), "overlap", c.overlap())
	}
	before := c.ca.Roots()
	if err := c.ca.Use(by, c.others(by)); err != nil {
		return err
	}
	if roots := c.ca.Roots(); !bytes.Equal(before, roots) {
		c.told()
		changed(roots)
	}
	return nil
}
