// Package file is the source that reads a folder of Kubernetes and Istio YAML: the same objects that a cluster would
// hold, for clusters without an API server, for tests and for machines.
//
// It knows the folder and how to watch it; what the objects mean is discovery/config's.
package file

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// settle is how long a writer must pause before what it wrote is read.
const settle = 3 * time.Millisecond

// KeyProblems is the key under which Problems of the folder itself are reported, and of files that cannot be read.
const KeyProblems = "source"

// Config says which folder is read and who is told.
type Config struct {
	// Dir holds *.yaml, *.yml and *.json files, in folders of any depth.
	Dir string
	// Sink is told the content of each file under its path relative to Dir, with '/' between the parts.
	Sink mesh.Sink
	// Log gets what an operator would act on. Nil: nothing is logged.
	Log *slog.Logger
	// Domain is the cluster's DNS domain; empty means "cluster.local".
	Domain string
	// Quiet is how long a file that looks half written, or that is gone, is given to be completed or to come back;
	// other changes are read at once. It is never waited for longer than ten times as long. Lowering it risks to
	// report half a file of a slow writer, raising it delays deletions. 0 means 20 ms.
	Quiet time.Duration
	// Rescan is the time between two looks at the whole folder, which find what the kernel does not tell of, as on
	// network file systems. Lowering it costs a stat of every file each time. 0 means 5 s.
	Rescan time.Duration
}

// Source keeps a Sink told of what a folder holds.
type Source struct {
	cfg Config
	log *slog.Logger
}

// New makes a source; it reads nothing until Run.
func New(cfg Config) *Source {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Quiet <= 0 {
		cfg.Quiet = 20 * time.Millisecond
	}
	if cfg.Rescan <= 0 {
		cfg.Rescan = 5 * time.Second
	}
	return &Source{cfg: cfg, log: cfg.Log.With("part", "discovery/source/file")}
}

// Run reports every file once, says Synced, and then reports what changes until ctx ends; then it returns nil. A
// folder that is missing at the start is an error; one that is lost later keeps what was reported of it.
func (s *Source) Run(ctx context.Context) error {
	if info, err := os.Stat(s.cfg.Dir); errors.Is(err, fs.ErrNotExist) {
		return diag.Hint(fmt.Errorf("read source folder %q: it does not exist", s.cfg.Dir), "create it, or set source.dir to the folder with the YAML files")
	} else if err != nil {
		return diag.Hint(fmt.Errorf("read source folder: %w", err), "make it readable, or set source.dir to the folder with the YAML files")
	} else if !info.IsDir() {
		return diag.Hint(fmt.Errorf("read source folder %q: it is not a folder", s.cfg.Dir), "set source.dir to the folder with the YAML files")
	}
	w := &watch{Source: s, files: map[string]*state{}, touched: map[string]bool{}, rescan: s.cfg.Rescan}
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		defer watcher.Close()
		w.watcher, w.events, w.errors = watcher, watcher.Events, watcher.Errors
	} else {
		s.log.Warn("the kernel does not tell of changes; looking every second", "err", err)
		w.rescan = min(w.rescan, time.Second)
	}
	w.scan(true)
	s.cfg.Sink.Synced()
	w.loop(ctx)
	return nil
}

// watch is one Run.
type watch struct {
	*Source
	watcher *fsnotify.Watcher // nil: the kernel tells nothing
	events  <-chan fsnotify.Event
	errors  <-chan error
	rescan  time.Duration

	files    map[string]*state // by key
	folders  map[string]bool   // paths that the kernel tells of
	listed   time.Time         // when all folders were last read
	touched  map[string]bool   // paths the kernel told of since they were last read
	all      bool              // read every file: events were lost
	retry    bool              // a folder is lost
	labels   map[string]map[string]string
	nodes    map[string]config.Node
	problems []mesh.Problem // reported under KeyProblems
}

// loop reads the folder when it changes, and every now and then.
func (w *watch) loop(ctx context.Context) {
	var first, last time.Time // events not read yet
	quiet, longest := w.cfg.Quiet, 10*w.cfg.Quiet
	timer := time.NewTimer(w.rescan)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-w.events:
			if !ok {
				w.events = nil
				continue
			}
			if e.Op == fsnotify.Chmod {
				continue // readers' access times; the rescan sees permissions
			}
			w.touched[filepath.Clean(e.Name)] = true
			last = time.Now()
			if first.IsZero() {
				first = last
			}
			timer.Reset(min(settle, time.Until(first.Add(longest))))
		case err, ok := <-w.errors:
			if !ok {
				w.errors = nil
				continue
			}
			w.log.Warn("events were lost; reading every file", "err", err)
			w.all = true
			timer.Reset(settle)
		case now := <-timer.C:
			final := now.Sub(last) >= quiet || now.Sub(first) >= longest
			waiting, done := false, false
			if !first.IsZero() && now.Sub(w.listed) < w.rescan {
				waiting, done = w.scanTouched(final)
			}
			if !done {
				waiting = w.scan(final)
			}
			if waiting {
				timer.Reset(max(min(time.Until(last.Add(quiet)), time.Until(first.Add(longest))), time.Millisecond))
				continue
			}
			first = time.Time{}
			timer.Reset(w.pause())
		}
	}
}

// pause is how long to wait for the kernel before looking again.
func (w *watch) pause() time.Duration {
	if w.retry {
		return min(w.rescan, 250*time.Millisecond) // the kernel no longer tells of a folder that is lost
	}
	return w.rescan
}
