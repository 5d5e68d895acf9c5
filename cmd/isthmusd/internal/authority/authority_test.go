package authority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// watched is an Authority that runs, and what it tells.
type watched struct {
	*Authority
	asked   sync.Mutex
	lags    []Lag
	follows bool
	told    [][]byte
	notes   []string
	kept    int
	stop    func()
}

// start runs one in the folder, in a bubble.
func start(t *testing.T, c Config) *watched {
	t.Helper()
	c.TrustDomain, c.MaxTTL = "amber.mesh", time.Hour
	w := &watched{Authority: New(c)}
	if _, err := w.Load(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error)
	go func() {
		ran <- w.Run(ctx, Listener{
			Keep: func(Kept) { w.kept++ }, Problems: problems{}, Changed: func(roots []byte) { w.told = append(w.told, roots) },
			Leads:   func() bool { w.asked.Lock(); defer w.asked.Unlock(); return !w.follows },
			Lagging: func(context.Context) []Lag { w.asked.Lock(); defer w.asked.Unlock(); return w.lags },
			Note: func(verb, who string, _ map[string]string) {
				w.notes = append(w.notes, strings.TrimSpace(verb+" "+who))
			},
		})
	}()
	w.stop = func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	}
	synctest.Wait()
	return w
}

// set says who lags, and whether this replica follows another.
func (w *watched) set(follows bool, lags ...Lag) {
	w.asked.Lock()
	defer w.asked.Unlock()
	w.follows, w.lags = follows, lags
}

type problems struct{}

func (problems) Report(string, mesh.Input) {}
func (problems) Forget(string)             {}
func (problems) Synced()                   {}

// states names the roots that are trusted, first the one that signs.
func (w *watched) states() string {
	s := w.Status()
	out := []string{s.Phase}
	for _, r := range s.Roots {
		out = append(out, r.State)
	}
	return strings.Join(out, " ")
}

func (w *watched) want(t *testing.T, when, states string) {
	t.Helper()
	synctest.Wait()
	if got := w.states(); got != states {
		t.Errorf("%s: %q, want %q", when, got, states)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.told); n > 0 && string(w.told[n-1]) != string(w.ca.Roots()) {
		t.Errorf("%s: other roots are trusted than were told", when)
	}
}

// TestRotation: a new root is told, signs when everybody has it, and the one before is trusted until the overlap ends; a
// restart at any point goes on.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := Config{DataDir: t.TempDir(), Overlap: time.Minute}
		w := start(t, c)
		w.want(t, "at first", "steady signs")
		first := w.Status().Roots[0].Fingerprint
		w.set(false, Lag{Kind: "proxy", Name: "a"})
		if err := w.Rotate(t.Context(), Options{By: "anna"}); err != nil {
			t.Fatal(err)
		}
		w.want(t, "begun", "telling signs next")
		second := w.Status().Roots[1].Fingerprint
		time.Sleep(5 * time.Second)
		w.want(t, "while somebody lags", "telling signs next")
		if s := w.Status(); s.By != "anna" || len(s.Lags) != 1 {
			t.Errorf("status: %+v", s)
		}
		if err := w.Rotate(t.Context(), Options{By: "ben"}); err != nil {
			t.Fatal(err)
		}
		if s := w.Status(); s.Roots[1].Fingerprint != second || s.By != "anna" {
			t.Errorf("asked for again: %+v", s)
		}
		w.stop()

		again := start(t, c)
		again.want(t, "after a restart", "telling signs next")
		again.set(true)
		time.Sleep(5 * time.Second)
		again.want(t, "while it follows", "telling signs next")
		again.set(false)
		time.Sleep(time.Second)
		again.want(t, "when nobody lags", "overlap signs old")
		if s := again.Status(); s.Roots[0].Fingerprint != second || s.Roots[1].Fingerprint != first || s.Roots[1].Until.Sub(time.Now()) > time.Minute {
			t.Errorf("switched: %+v", s)
		}
		again.stop()

		last := start(t, c)
		last.want(t, "after another restart", "overlap signs old")
		time.Sleep(57 * time.Second)
		last.want(t, "before the overlap ends", "overlap signs old")
		time.Sleep(5 * time.Second)
		last.want(t, "after", "steady signs")
		if s := last.Status(); s.Roots[0].Fingerprint != second {
			t.Errorf("at last: %+v", s)
		}
		last.stop()
		for name, c := range map[string]struct{ got, want []string }{
			"of the first": {w.notes, []string{"rotate anna"}}, "of the second": {again.notes, []string{"switch anna"}}, "of the last": {last.notes, []string{"retire"}},
		} {
			if !slices.Equal(c.got, c.want) {
				t.Errorf("notes %s: %q, want %q", name, c.got, c.want)
			}
		}
		if w.kept == 0 || again.kept == 0 || last.kept == 0 {
			t.Error("what a start without the API needs is not kept")
		}
	})
}

// TestRotateNow: after an emergency the new root signs at once, is vouched for by nobody, and the old one has a minute.
func TestRotateNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, Config{DataDir: t.TempDir(), Overlap: time.Hour})
		defer w.stop()
		w.set(false, Lag{Kind: "proxy", Name: "a"})
		if err := w.Rotate(t.Context(), Options{Now: true}); err != nil {
			t.Fatal(err)
		}
		w.want(t, "at once", "overlap signs old")
		if parts, err := w.keeper.Own(t.Context(), nil); err != nil || len(parts[partCross]) > 0 {
			t.Errorf("the old root vouches for the new one, or %v", err)
		}
		time.Sleep(58 * time.Second)
		w.want(t, "within the minute", "overlap signs old")
		time.Sleep(3 * time.Second)
		w.want(t, "after it", "steady signs")
	})
}

// TestCancel: a root that does not sign yet is given up, and the next one is another.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, Config{DataDir: t.TempDir()})
		defer w.stop()
		if err := w.Cancel(t.Context(), "anna"); err == nil || !strings.Contains(err.Error(), "no new root") {
			t.Errorf("nothing to give up: %v", err)
		}
		w.set(false, Lag{})
		var prints []string
		for range 2 {
			if err := w.Rotate(t.Context(), Options{}); err != nil {
				t.Fatal(err)
			}
			w.want(t, "begun", "telling signs next")
			prints = append(prints, w.Status().Roots[1].Fingerprint)
			if err := w.Cancel(t.Context(), "anna"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			w.want(t, "given up", "steady signs")
		}
		if prints[0] == prints[1] {
			t.Error("the root that was given up came again")
		}
	})
}

// TestGivenFollowed: the next CA that is put into the folder is told for the settle time, then signs; a bad one changes
// nothing, and one that is given is not rotated here.
func TestGivenFollowed(t *testing.T) {
	give := func(t *testing.T, dir string) {
		t.Helper()
		m, err := identity.MakeRoot(identity.Config{TrustDomain: "amber.mesh"})
		if err != nil {
			t.Fatal(err)
		}
		for name, data := range m.Data() {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	synctest.Test(t, func(t *testing.T) {
		c := Config{DataDir: t.TempDir(), Dir: t.TempDir(), Settle: 20 * time.Second, Overlap: 20 * time.Second}
		give(t, c.Dir)
		w := start(t, c)
		defer w.stop()
		w.want(t, "at first", "steady signs")
		if err := w.Rotate(t.Context(), Options{}); err == nil || !strings.Contains(err.Error(), c.Dir) {
			t.Errorf("rotate: %v", err)
		}
		give(t, c.Dir)
		time.Sleep(10 * time.Second)
		w.want(t, "soon", "telling signs next")
		next := w.Status().Roots[1].Fingerprint
		time.Sleep(20 * time.Second)
		w.want(t, "after the settle time", "overlap signs old")
		if got := w.Status().Roots[0].Fingerprint; got != next {
			t.Errorf("%s signs, want %s", got, next)
		}
		if err := os.WriteFile(filepath.Join(c.Dir, PartKey), []byte("no key"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		w.want(t, "a bad one", "steady signs")
		if got := w.Status(); got.Roots[0].Fingerprint != next || got.Given == "" {
			t.Errorf("%+v, want %s", got, next)
		}
	})
}

// TestKept: a start without the API has what signs and whom to trust, and the key is in no output.
func TestKept(t *testing.T) {
	w := New(Config{DataDir: t.TempDir(), TrustDomain: "amber.mesh"})
	if _, err := w.Load(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	k := w.Kept()
	for _, text := range []string{fmt.Sprint(k), fmt.Sprintf("%+v %#v %s", k, k, &k)} {
		if strings.Contains(text, "PRIVATE") || !strings.Contains(text, "redacted") {
			t.Errorf("printed: %s", text)
		}
	}
	body, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	var back Kept
	if err := json.Unmarshal(body, &back); err != nil {
		t.Fatal(err)
	}
	next := New(Config{TrustDomain: "amber.mesh", DataDir: t.TempDir()})
	ca, err := next.Resume(back, k.Data[PartKey]) // the other key is of the same kind
	if err != nil {
		t.Fatal(err)
	}
	if ca.Authority().ID() != w.ca.Authority().ID() || string(ca.Roots()) != string(w.ca.Roots()) {
		t.Error("another authority, or others are trusted")
	}
}

// TestFiles: what is kept in files is whole, private and never guessed.
func TestFiles(t *testing.T) {
	f := &files{dir: t.TempDir(), given: t.TempDir()}
	ctx := t.Context()
	if parts, _, err := f.Given(ctx); err != nil || parts != nil {
		t.Errorf("an empty folder gives %v, %v", parts, err)
	}
	set := func(parts map[string][]byte) (bool, error) { parts["x"] = []byte("1"); return true, nil }
	if parts, err := f.Own(ctx, set); err != nil || string(parts["x"]) != "1" {
		t.Errorf("written: %v %v", parts, err)
	}
	failing := errors.New("no")
	for name, change := range map[string]func(map[string][]byte) (bool, error){
		"not to write": func(parts map[string][]byte) (bool, error) { parts["x"] = []byte("2"); return false, nil },
		"failing":      func(parts map[string][]byte) (bool, error) { parts["x"] = []byte("3"); return true, failing },
	} {
		if _, err := f.Own(ctx, change); err != nil && !errors.Is(err, failing) {
			t.Errorf("%s: %v", name, err)
		}
		if parts, err := f.Own(ctx, nil); err != nil || string(parts["x"]) != "1" {
			t.Errorf("after a change %s: %s, %v", name, parts["x"], err)
		}
	}
	if err := f.Roots(ctx, func(text string) (string, bool) { return text + "list", true }); err != nil {
		t.Fatal(err)
	}
	if err := f.Roots(ctx, func(text string) (string, bool) {
		if text != "list" {
			t.Errorf("the list is %q", text)
		}
		return "", false
	}); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(f.dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("%v, %v: nothing else is left", entries, err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), info.Mode(), err)
		}
	}
	if err := os.WriteFile(filepath.Join(f.dir, stateFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Own(ctx, set); err == nil || !strings.Contains(err.Error(), "backup") {
		t.Errorf("a damaged file: %v", err)
	}
}

// TestFingerprints: each certificate has one, and what is none has none.
func TestFingerprints(t *testing.T) {
	m, err := identity.MakeRoot(identity.Config{TrustDomain: "amber.mesh"})
	if err != nil {
		t.Fatal(err)
	}
	if got := Fingerprints(append(slices.Clone(m.Root), m.Root...)); len(got) != 2 || got[0] != got[1] || len(got[0]) != 64 {
		t.Errorf("%q", got)
	}
	if got := Fingerprints([]byte("none")); got == nil || len(got) != 0 {
		t.Errorf("%q", got)
	}
}
