// Package authority keeps the certificate authority of one cluster in use while it changes: one that is given anew, and
// the rotation of a root that was made here. What comes is told to everybody before it signs, what signed before is
// trusted until no certificate under it can be in use. It does not know who everybody is.
package authority

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/kubestate"
)

// Times of an Authority that are not configured.
const (
	poll      = 5 * time.Second
	fastPoll  = 250 * time.Millisecond // while a root is told to everybody
	keepCalls = 5 * time.Second
	// maxOld bounds the roots that are trusted beside the one that signs: a bundle holds 16.
	maxOld = 6
	// urgentOverlap is how long the old root is trusted after an emergency, unless said otherwise.
	urgentOverlap = time.Minute
	confirmPoll   = time.Second // while the API is away since the start
)

// Lag is somebody who does not have the newest roots yet.
type Lag struct {
	Kind string // peer, proxy or replica
	Name string
	Why  string
}

// Config says where the authority is and how it changes.
type Config struct {
	// Client keeps it in the Kubernetes API, for all replicas; nil: it is kept in DataDir.
	Client  *kubestate.Client
	DataDir string
	// Dir holds a given CA; empty, or without its files: with a Client, the Secret cacerts is looked at.
	Dir         string
	TrustDomain mesh.TrustDomain
	// MaxTTL, Settle and Overlap are those of the configuration's ca; an Overlap of 0 is twice MaxTTL.
	MaxTTL, Settle, Overlap time.Duration
	Log                     *slog.Logger
}

func (c Config) identity() identity.Config {
	return identity.Config{Dir: c.DataDir, Given: c.Dir, TrustDomain: c.TrustDomain, MaxTTL: c.MaxTTL, Log: c.Log}
}

// Listener is told what changes, and asked who is to be waited for.
type Listener struct {
	// Keep is told what a start without the API needs, when it changes. Nil: nobody wants it.
	Keep func(Kept)
	// Confirmed returns nil once the API has been read. Until then only the roots that expire are looked after. Nil: it has.
	Confirmed func(context.Context) error
	// Problems gets what is wrong with a given CA.
	Problems mesh.Sink
	// Changed is called with the roots that are trusted now, when they are others.
	Changed func(roots []byte)
	// Leads says whether this replica moves a rotation on.
	Leads func() bool
	// Lagging lists who does not have the roots that Changed was told last.
	Lagging func(context.Context) []Lag
	// Note is told each step of a rotation. Nil: nobody wants it.
	Note func(verb, who string, facts map[string]string)
}

// Authority gives all replicas one certificate authority: the given one, else one that the first replica made. It is safe
// for concurrent use from Run on.
type Authority struct {
	cfg    Config
	keeper keeper
	ca     *identity.CA
	wake   chan struct{}

	mu    sync.Mutex
	l     Listener
	runs  bool
	given map[string][]byte   // as it was read last; nil: none is given
	from  string              // names the given one in messages
	used  map[string][]byte   // what signs
	roots []Root              // as the shared list says
	next  *identity.Authority // comes: told, and not signing
	later map[string][]byte   // what a given next was made of
	since time.Time           // when next came
	own   *rotation           // next is of a rotation; nil: it was given
	lags  []Lag
	// overlapFor is the overlap that was asked for with the rotation to an authority.
	overlapFor map[string]time.Duration
}

// Root is one generation of roots in the shared list, so that a restart forgets none.
type Root struct {
	ID    string    `json:"id"`             // of the authority
	Roots string    `json:"roots"`          // PEM
	Until time.Time `json:"until,omitzero"` // zero: it is in use
}

// New makes an Authority; nothing is read before Load.
func New(cfg Config) *Authority {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a := &Authority{cfg: cfg, wake: make(chan struct{}, 1), overlapFor: map[string]time.Duration{}}
	if a.keeper = (kube{cfg.Client, cfg.Dir}); cfg.Client == nil {
		a.keeper = &files{dir: cfg.DataDir, given: cfg.Dir}
	}
	return a
}

// Load returns the CA to start with. tokenKey is the key of workload tokens, in PEM; without a Client it is in DataDir.
func (a *Authority) Load(ctx context.Context, tokenKey []byte) (*identity.CA, error) {
	var err error
	if a.given, a.from, err = a.keeper.Given(ctx); err != nil {
		return nil, err
	}
	if a.cfg.Client == nil {
		a.ca, err = identity.LoadOrCreate(a.cfg.identity())
	} else {
		a.ca, err = a.begin(ctx, tokenKey)
	}
	if err != nil {
		return nil, err
	}
	a.used = a.given
	if a.given == nil {
		if a.used, err = a.keeper.Own(ctx, nil); err != nil {
			return nil, err
		}
		by, err := a.ca.Parse("made here", identity.MaterialOf(a.used))
		if err != nil {
			return nil, err
		}
		if err := a.ca.Use(by, nil); err != nil {
			return nil, err
		}
		a.takeNext(a.used)
	}
	by := a.ca.Authority()
	if err := a.note(ctx, by); err != nil {
		return nil, err
	}
	return a.ca, a.ca.Use(by, a.others(by))
}

// begin makes the CA of what is given, else of what is kept in the API; the first replica makes it.
func (a *Authority) begin(ctx context.Context, tokenKey []byte) (*identity.CA, error) {
	conf := a.cfg.identity()
	parts, from := a.given, a.from
	if parts == nil {
		from = "in Secret " + a.cfg.Client.Namespace() + "/" + OwnSecret
		var err error
		parts, err = a.cfg.Client.EnsureSecret(ctx, OwnSecret, func(held map[string][]byte) (map[string][]byte, error) {
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
	return identity.New(conf, from, identity.MaterialOf(parts), tokenKey)
}

// note makes by the authority in use in the shared list: those before are trusted until the overlap ends.
func (a *Authority) note(ctx context.Context, by *identity.Authority) error {
	now := time.Now().UTC()
	return a.keeper.Roots(ctx, func(text string) (string, bool) {
		var held []Root
		if err := json.Unmarshal([]byte(text), &held); err != nil && text != "" {
			a.cfg.Log.Error("the list of roots does not decode; it is written anew", "part", "ca", "err", err)
		}
		next := []Root{{ID: by.ID(), Roots: string(by.Roots())}}
		changed, over := true, false
		for _, e := range held {
			switch {
			case e.ID == by.ID():
				changed = !e.Until.IsZero() || e.Roots != next[0].Roots
				continue
			case e.Until.IsZero():
				e.Until = now.Add(a.overlap(by.ID()))
			case now.After(e.Until):
				over = true
				continue
			}
			next = append(next, e)
		}
		a.roots = next
		if !changed && !over {
			return "", false
		}
		out, err := json.MarshalIndent(next, "", " ")
		return string(out), err == nil
	})
}

// object names a given CA in problems.
func (a *Authority) object() mesh.ObjectRef {
	if a.cfg.Client == nil {
		return mesh.ObjectRef{Kind: "CA", Name: a.cfg.Dir}
	}
	return mesh.ObjectRef{Kind: "Secret", Namespace: a.cfg.Client.Namespace(), Name: GivenSecret}
}

func (a *Authority) overlap(id string) time.Duration {
	if d, ok := a.overlapFor[id]; ok {
		return d
	}
	return cmp.Or(a.cfg.Overlap, 2*a.cfg.MaxTTL)
}

// others returns the roots beside those of by that are trusted now.
func (a *Authority) others(by *identity.Authority) []byte {
	var out bytes.Buffer
	if a.next != nil {
		out.Write(a.next.Roots())
	}
	for _, e := range a.roots {
		if e.ID != by.ID() && (e.Until.IsZero() || time.Now().Before(e.Until)) {
			out.WriteString(e.Roots)
		}
	}
	return out.Bytes()
}

// Run follows what is given and kept, and moves a rotation on, until ctx ends.
func (a *Authority) Run(ctx context.Context, l Listener) error {
	a.mu.Lock()
	a.l, a.runs = l, true
	a.mu.Unlock()
	for confirmed := l.Confirmed == nil; ; {
		timer := time.NewTimer(a.pause(confirmed))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-a.wake:
			timer.Stop()
		}
		call, cancel := context.WithTimeout(ctx, keepCalls)
		if !confirmed {
			err := l.Confirmed(call)
			if confirmed = err == nil; confirmed {
				a.mu.Lock()
				a.told()
				a.mu.Unlock()
			} else if !kubestate.Transient(err) && ctx.Err() == nil {
				cancel()
				return err
			}
		}
		a.step(call, confirmed)
		cancel()
	}
}

// pause is the time until the next look.
func (a *Authority) pause(confirmed bool) time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	wait := min(poll, max(a.cfg.Settle/4, 100*time.Millisecond))
	if !confirmed {
		wait = min(wait, confirmPoll)
	}
	if a.next != nil || len(a.roots) > 1 {
		wait = min(wait, fastPoll)
	}
	return wait
}

// step does one look; unless confirmed, only at what is here.
func (a *Authority) step(ctx context.Context, confirmed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if confirmed {
		a.look(ctx)
		if a.given == nil {
			a.follow(ctx)
		}
	}
	if err := a.apply(ctx, confirmed); err != nil {
		a.cfg.Log.Error("the roots are not changed", "part", "ca", "err", err)
	}
}

// look reads what is given, and takes it as the next authority if it is another and good.
func (a *Authority) look(ctx context.Context) {
	data, from, err := a.keeper.Given(ctx)
	if err != nil || (data == nil) == (a.given == nil) && maps.EqualFunc(data, a.given, bytes.Equal) {
		return // what is away changes nothing
	}
	problem := func(reason, message, remedy string) {
		a.cfg.Log.Error("the given CA is not taken; the one before stays in use", "part", "ca", "reason", reason, "err", message)
		a.l.Problems.Report("given", mesh.Input{Problems: []mesh.Problem{{Object: a.object(), Reason: reason, Message: message, Remedy: remedy}}})
	}
	if data == nil {
		a.given = map[string][]byte{} // not nil: its authority is in use until a restart
		problem("CAMissing", "the given CA was removed; it stays in use until isthmusd starts again", "put it back, or restart isthmusd to go on with one of its own")
		return
	}
	next, err := a.ca.Parse(from, identity.MaterialOf(data))
	var invalid *identity.Invalid
	if errors.As(err, &invalid) {
		a.given = data
		problem(invalid.Reason, invalid.Message, invalid.Remedy)
		return
	}
	if err != nil {
		a.cfg.Log.Warn("the given CA is not taken yet", "part", "ca", "err", err)
		return // again at the next look
	}
	a.given, a.from, a.own = data, from, nil
	a.l.Problems.Forget("given")
	if next.ID() == a.ca.Authority().ID() {
		next = nil
	} else {
		a.cfg.Log.Info("a new CA is told to everybody before it signs", "part", "ca", "authority", next.ID(), "settle", a.cfg.Settle)
	}
	a.next, a.later, a.since = next, data, time.Now()
}

// follow takes over what this or another replica has kept: a root that comes, and one that signs.
func (a *Authority) follow(ctx context.Context) {
	parts, err := a.keeper.Own(ctx, nil)
	if err != nil {
		return
	}
	a.takeNext(parts)
	by, err := a.ca.Parse("made here", identity.MaterialOf(parts))
	if err != nil || by.ID() == a.ca.Authority().ID() {
		return
	}
	a.used = parts
	if err := a.switchTo(ctx, by); err != nil {
		a.cfg.Log.Warn("the new root does not sign yet", "part", "ca", "err", err)
	}
}

// switchTo has by sign from now on.
func (a *Authority) switchTo(ctx context.Context, by *identity.Authority) error {
	if err := a.note(ctx, by); err != nil {
		return err
	}
	a.cfg.Log.Info("certificates are signed by the new CA", "part", "ca", "authority", by.ID(), "overlap", a.overlap(by.ID()))
	before := a.ca.Roots()
	if err := a.ca.Use(by, a.others(by)); err != nil {
		return err
	}
	a.tell(before)
	return nil
}

// tell says that the roots changed, if they did.
func (a *Authority) tell(before []byte) {
	if roots := a.ca.Roots(); !bytes.Equal(before, roots) {
		a.told()
		a.l.Changed(roots)
	}
}

// apply brings the CA and all who trust it in line.
func (a *Authority) apply(ctx context.Context, confirmed bool) error {
	before := a.ca.Roots()
	by := a.ca.Authority()
	var retired []string
	if confirmed {
		retired = a.retire(ctx)
	}
	if err := a.ca.Use(by, a.others(by)); err != nil {
		return err
	}
	a.tell(before)
	for _, id := range retired {
		a.audit("retire", "", map[string]string{"authority": id})
	}
	if a.next == nil || !confirmed {
		a.lags = nil
		return nil
	}
	if a.own == nil { // given: every replica sees it, and waits alike
		if time.Now().Sub(a.since) < a.cfg.Settle {
			return nil
		}
		next := a.next
		a.next, a.used = nil, a.later
		return a.switchTo(ctx, next)
	}
	if !a.l.Leads() {
		return nil
	}
	if a.lags = a.l.Lagging(ctx); len(a.lags) > 0 {
		return nil
	}
	return a.promote(ctx)
}

// retire drops generations whose time is over from the list, and says which.
func (a *Authority) retire(ctx context.Context) (gone []string) {
	due := false
	for _, e := range a.roots {
		due = due || !e.Until.IsZero() && time.Now().After(e.Until)
	}
	if !due || !a.l.Leads() {
		return nil
	}
	old := a.roots
	if err := a.note(ctx, a.ca.Authority()); err != nil {
		return nil
	}
	for _, e := range old {
		if !e.Until.IsZero() && time.Now().After(e.Until) {
			gone = append(gone, e.ID)
			a.cfg.Log.Info("an old root is trusted no longer", "part", "ca", "authority", e.ID)
		}
	}
	return gone
}
