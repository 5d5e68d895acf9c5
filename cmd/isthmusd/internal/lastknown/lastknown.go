package lastknown

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
)

// Where private keys may be kept.
const (
	// Memory keeps them where the folder is on a file system in memory.
	Memory = "memory"
	// Always keeps them wherever the folder is.
	Always = "always"
	// Never keeps none.
	Never = "never"
)

// ReasonUnusable is the reason of Problems about files that are not used, or cannot be written. It is stable.
const ReasonUnusable = "LastKnownUnusable"

const (
	keysFile = "keys"
	objects  = "objects-" // before the name of the cluster
)

// Config says where the files are.
type Config struct {
	// Dir is the folder, used by nobody else. Empty: nothing is kept.
	Dir string
	// Secrets is Memory, Always or Never: about keys, credentials of gateways and remote secrets.
	Secrets string
	Log     *slog.Logger
	// Quiet is how long changes are collected before objects are written. Raising it saves writing and makes what is
	// kept older. 0: 2 s.
	Quiet time.Duration
}

// Store keeps the files. It is safe for concurrent use.
type Store struct {
	cfg     Config
	dir     *folder // nil: nothing is kept
	secrets bool

	mu       sync.Mutex
	problems map[string]mesh.Problem // by file
	sink     mesh.Sink
}

// Open opens the folder. Where that fails nothing is kept, which is a Problem.
func Open(cfg Config) *Store {
	if cfg.Quiet <= 0 {
		cfg.Quiet = 2 * time.Second
	}
	s := &Store{cfg: cfg, problems: map[string]mesh.Problem{}}
	if cfg.Dir == "" {
		return s
	}
	dir, err := openFolder(cfg.Dir)
	if err != nil {
		s.complain("", "nothing is kept for a start without the API server: "+err.Error(), "make "+cfg.Dir+" a folder of isthmusd's own, or set state.cache.directory to another one")
		return s
	}
	s.dir, s.secrets = dir, cfg.Secrets == Always || cfg.Secrets == Memory && dir.inMemory()
	if !s.secrets {
		if err := dir.remove(keysFile); err != nil { // of another setting, before
			s.complain(keysFile, "keys that were kept before are not deleted: "+err.Error(), "delete "+cfg.Dir+"/"+keysFile)
		}
	}
	return s
}

// KeepsSecrets reports whether private keys are kept, and if not why.
func (s *Store) KeepsSecrets() (bool, string) {
	switch {
	case s.cfg.Dir == "":
		return false, "state.cache.directory is off"
	case s.dir == nil:
		return false, "state.cache.directory cannot be used"
	case s.secrets:
		return true, ""
	case s.cfg.Secrets == Never:
		return false, "state.cache.secrets is " + Never
	}
	return false, "state.cache.directory " + s.cfg.Dir + " is on a disk, and state.cache.secrets is " + Memory
}

// Report has Problems told to sink, those of before, too.
func (s *Store) Report(sink mesh.Sink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sink = sink
	for name, p := range s.problems {
		sink.Report(name, mesh.Input{Problems: []mesh.Problem{p}})
	}
}

// Problems returns what is wrong now.
func (s *Store) Problems() []mesh.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []mesh.Problem
	for _, p := range s.problems {
		out = append(out, p)
	}
	return out
}

func (s *Store) complain(name, message, remedy string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := mesh.Problem{Object: mesh.ObjectRef{Kind: "LastKnown", Name: "folder"}, Reason: ReasonUnusable, Message: message, Remedy: remedy}
	if name != "" {
		p.Object.Name = name
	}
	if s.problems[name] == p {
		return
	}
	s.cfg.Log.Warn("last known state", "part", "lastknown", "err", p.String())
	s.problems[name] = p
	if s.sink != nil {
		s.sink.Report(name, mesh.Input{Problems: []mesh.Problem{p}})
	}
}

func (s *Store) fine(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.problems[name]; ok {
		delete(s.problems, name)
		if s.sink != nil {
			s.sink.Forget(name)
		}
	}
}

// unread notes that a file is there and not used.
func (s *Store) unread(name string, err error) {
	if !errors.Is(err, fs.ErrNotExist) {
		s.complain(name, "what was kept in "+s.cfg.Dir+"/"+name+" is not used: "+err.Error(), "nothing needs to be done: it is written anew when the API server has been read")
	}
}

// write keeps a file and says what is wrong if that fails.
func (s *Store) write(name string, at time.Time, fill func(io.Writer) error) bool {
	if err := s.dir.write(name, at, fill); err != nil {
		s.complain(name, "what is known now is not kept for a start without the API server: "+err.Error(), "give "+s.cfg.Dir+" more room, or set state.cache.directory to another folder")
		return false
	}
	s.fine(name)
	return true
}

// SaveKeys keeps v, as JSON, if keys are kept at all.
func (s *Store) SaveKeys(v any) {
	if s.dir == nil || !s.secrets {
		return
	}
	s.write(keysFile, time.Now(), func(w io.Writer) error { return json.NewEncoder(w).Encode(v) })
}

// LoadKeys reads what SaveKeys kept, and when that was. It returns false where there is none that can be used.
func (s *Store) LoadKeys(v any) (time.Time, bool) {
	if s.dir == nil || !s.secrets {
		return time.Time{}, false
	}
	r, at, err := s.dir.read(keysFile)
	if err == nil {
		if err = json.NewDecoder(io.LimitReader(r, 8<<20)).Decode(v); err != nil {
			err = fmt.Errorf("%w: it does not decode", ErrCorrupt) // a decoder may quote
		}
	}
	if err != nil {
		s.unread(keysFile, err)
		return at, false
	}
	return at, true
}

// meta is the first line of a file of objects.
type meta struct {
	Cluster mesh.ClusterID `json:"cluster"`
	Server  string         `json:"server"`
}

// Load implements kube.Memory.
func (s *Store) Load(id mesh.ClusterID, server string) (out []kube.Object, at time.Time) {
	if s.dir == nil {
		return nil, at
	}
	name := objects + string(id)
	r, at, err := s.dir.read(name)
	if err == nil {
		out, err = decodeObjects(r, id, server)
	}
	if err != nil {
		s.unread(name, err)
		return nil, time.Time{}
	}
	return out, at
}

// errOtherServer says that the objects are those of another API server.
var errOtherServer = errors.New("it is of another API server")

func decodeObjects(r io.Reader, id mesh.ClusterID, server string) ([]kube.Object, error) {
	d := json.NewDecoder(bufio.NewReaderSize(r, 64<<10))
	var m meta
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("%w: its first line does not decode", ErrCorrupt)
	}
	if m.Cluster != id || m.Server != server {
		return nil, fmt.Errorf("%w: cluster %.80q at %.200q", errOtherServer, m.Cluster, m.Server)
	}
	var out []kube.Object
	for {
		var o kube.Object
		err := d.Decode(&o)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: object %d does not decode", ErrCorrupt, len(out))
		}
		out = append(out, o)
	}
}

// Run writes what source reads until ctx ends, and then once more.
func (s *Store) Run(ctx context.Context, source *kube.Source) error {
	if s.dir == nil || source == nil {
		<-ctx.Done()
		return nil
	}
	tick := time.NewTicker(s.cfg.Quiet)
	defer tick.Stop()
	k := keeper{Store: s, written: map[mesh.ClusterID]uint64{}, next: map[mesh.ClusterID]time.Time{}}
	for {
		select {
		case <-ctx.Done():
			k.look(source, true)
			return nil
		case <-tick.C:
			k.look(source, false)
		}
	}
}

// Bounds of writing.
const (
	share  = 50               // at most one part in so many of the time is spent writing one cluster's objects
	renews = 10 * time.Minute // what did not change is written again, for the time at which it was current
)

// keeper is what Run remembers.
type keeper struct {
	*Store
	written map[mesh.ClusterID]uint64    // revision on disk
	next    map[mesh.ClusterID]time.Time // not to be written before
	last    map[mesh.ClusterID]time.Time
}

// look writes the objects of clusters that changed; all of them when it is the last time.
func (k *keeper) look(source *kube.Source, last bool) {
	known, complete := source.Known()
	now := time.Now()
	for _, c := range known {
		had, ever := k.written[c.Cluster]
		due := !ever || had != c.Revision || now.Sub(k.last[c.Cluster]) > renews && !last
		if !c.Complete || !due || now.Before(k.next[c.Cluster]) && !last {
			continue
		}
		started := time.Now()
		if !k.write(objects+string(c.Cluster), c.At, func(w io.Writer) error { return k.encode(w, c) }) {
			k.next[c.Cluster] = started.Add(30 * time.Second)
			continue
		}
		k.written[c.Cluster] = c.Revision
		if k.last == nil {
			k.last = map[mesh.ClusterID]time.Time{}
		}
		k.last[c.Cluster] = started
		k.next[c.Cluster] = time.Now().Add(share * time.Since(started))
	}
	if complete {
		k.forget(known)
	}
}

func (k *keeper) encode(w io.Writer, c kube.Known) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if err := e.Encode(meta{c.Cluster, c.Server}); err != nil {
		return err
	}
	for o, err := range c.Objects() {
		if err != nil {
			return err
		}
		if o.Secret && !k.secrets {
			continue
		}
		if err := e.Encode(o); err != nil {
			return err
		}
	}
	return nil
}

// forget deletes the objects of clusters that are read no more.
func (k *keeper) forget(known []kube.Known) {
	names, err := k.dir.names(objects)
	if err != nil {
		return
	}
	for _, name := range names {
		if slices.ContainsFunc(known, func(c kube.Known) bool { return string(c.Cluster) == name }) {
			continue
		}
		if err := k.dir.remove(objects + name); err != nil {
			k.complain(objects+name, "objects of a cluster that is read no more are not deleted: "+err.Error(), "delete "+k.cfg.Dir+"/"+objects+name)
			continue
		}
		k.fine(objects + name)
		delete(k.written, mesh.ClusterID(name))
	}
}
