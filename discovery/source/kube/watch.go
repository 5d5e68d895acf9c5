package kube

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/cache"
)

// watcher keeps one table filled over one connection.
type watcher struct {
	*table
	conn *connection
	// gone is set when the server itself said that the kind does not exist; discovery alone is not believed, for it is
	// incomplete while a server starts.
	gone bool
}

// run lists and watches until ctx ends, at whatever version is served.
func (w *watcher) run(ctx context.Context) {
	for ctx.Err() == nil {
		version, known, news := w.choose()
		if version == "" {
			w.absent(known)
			select {
			case <-news:
			case <-ctx.Done():
			}
			continue
		}
		err := w.watch(ctx, version)
		if ctx.Err() != nil {
			return
		}
		if w.vanished(ctx, version, err) {
			continue
		}
		w.failed(err)
		pause(ctx, w.c.src.cfg.Retry)
	}
}

// choose returns the version to read: the best one that is served, or one to try where nothing is known. known are
// the versions that are served. news is closed when that changes.
func (w *watcher) choose() (version string, known []string, news <-chan struct{}) {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	if !w.optional {
		return w.versions[0], nil, w.c.news
	}
	known = w.c.served.versions(w.group, w.resource)
	if v := best(w.versions, known); v != "" {
		w.gone = false
		return v, known, w.c.news
	}
	if w.gone || len(known) > 0 {
		return "", known, w.c.news
	}
	return w.versions[0], known, w.c.news
}

// best returns the first of the wanted versions that is served.
func best(wanted, served []string) string {
	for _, v := range wanted {
		for _, s := range served {
			if v == s {
				return v
			}
		}
	}
	return ""
}

// watch reads at that version until it fails or a better version is served.
func (w *watcher) watch(ctx context.Context, version string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.c.mu.Lock()
	w.version = version
	w.c.mu.Unlock()
	done := make(chan struct{})
	go func() { // ends with this call
		defer close(done)
		for {
			other, known, news := w.choose()
			if len(known) > 0 && other != "" && other != version {
				cancel()
			}
			select {
			case <-news:
			case <-ctx.Done():
				return
			}
		}
	}()
	defer func() { cancel(); <-done }()
	lw := w.conn.lister(w.kind, version, w.c.src.cfg.Namespace, w.told)
	opts := cache.ReflectorOptions{
		Name: w.String(), TypeDescription: w.fullName(),
		Backoff: &wait.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Jitter: 0.2, Steps: 30, Cap: w.c.src.cfg.Retry},
	}
	var expected any
	if w.typed != nil {
		expected = w.typed()
	}
	r := cache.NewReflectorWithOptions(lw, expected, w.table, opts)
	return r.ListAndWatchWithContext(ctx)
}

// told hears the result of each list and watch request.
func (w *watcher) told(verb string, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	switch {
	case apierrors.IsForbidden(err) && w.unlisted():
	case apierrors.IsForbidden(err):
		w.c.set(w.table, StateForbidden, verb, err)
	case err == nil && w.verb == verb && (w.state == StateForbidden || w.state == StateFailed):
		w.c.set(w.table, StateSyncing, "", nil)
	}
	if err == nil && verb == "watch" && len(w.entries) > 0 && w.state == StateSyncing {
		w.c.set(w.table, StateSynced, "", nil)
	}
}

// unlisted reports whether discovery knows nothing of a kind that need not exist. Then "forbidden" says nothing: what
// does not exist is forbidden first. The caller holds mu.
func (w *watcher) unlisted() bool {
	return w.optional && w.c.served.complete && len(w.c.served.versions(w.group, w.resource)) == 0
}

// failed notes why listing and watching ended.
func (w *watcher) failed(err error) {
	if err == nil {
		return // the server ends watches every few minutes
	}
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	if apierrors.IsForbidden(err) && w.unlisted() {
		w.gone = true // until discovery knows better
		return
	}
	if !apierrors.IsForbidden(err) && w.c.up {
		w.c.set(w.table, StateFailed, "list", err)
	}
}

// vanished handles a kind, or a version of it, that the server says it does not have; then it returns true.
func (w *watcher) vanished(ctx context.Context, version string, err error) bool {
	if err == nil || !apierrors.IsNotFound(err) || !w.optional {
		return false
	}
	// Another version may be served instead: what is known is kept until discovery has looked again.
	w.c.mu.Lock()
	enough := w.c.served.looked + 2 // the look that begins after the answer
	if len(w.entries) == 0 {
		enough = 1 // nothing is at stake
	}
	w.c.mu.Unlock()
	for ctx.Err() == nil {
		w.c.mu.Lock()
		if w.c.served.looked >= enough {
			break
		}
		w.c.mu.Unlock()
		pause(ctx, w.c.src.cfg.Beat/8)
	}
	if ctx.Err() != nil {
		return true
	}
	known := w.c.served.versions(w.group, w.resource)
	if len(known) == 0 {
		w.gone = true
		w.table.version = ""
		w.clear()
		w.c.set(w.table, StateAbsent, "", nil)
	}
	w.c.mu.Unlock()
	if len(known) > 0 && best(known, []string{version}) != "" {
		pause(ctx, w.c.src.cfg.Retry) // discovery is ahead of what serves
	}
	return true
}

// absent notes that the kind is not installed, or only at versions that nobody here understands.
func (w *watcher) absent(known []string) {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	if len(known) == 0 {
		w.c.set(w.table, StateAbsent, "", nil)
		return
	}
	w.c.set(w.table, StateFailed, "list", &unknownVersion{kind: w.kind, served: known})
}

// unknownVersion: a kind is served at versions that are not understood.
type unknownVersion struct {
	kind   *kind
	served []string
}

func (e *unknownVersion) Error() string {
	return fmt.Sprintf("%s is served at %v, of which none is understood", e.kind.fullName(), e.served)
}

// pause waits for about d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d*3/4 + time.Duration(rand.Int64N(int64(d/2)+1)))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
