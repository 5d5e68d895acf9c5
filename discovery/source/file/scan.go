package file

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const (
	// maxSize is the largest file that is read.
	maxSize = 4 << 20
	// maxDepth and maxFolders bound how deep folders may stand and how many there may be, links among them.
	maxDepth, maxFolders = 32, 10000
)

// state is what is known of one file.
type state struct {
	info   os.FileInfo
	stable bool   // a later change would show in info
	data   []byte // as last taken
	labels map[string]map[string]string
	nodes  map[string]config.Node
	in     mesh.Input // as last reported, without Problems
	taken  bool       // data was reported
}

// found is what one look at the folder saw.
type found struct {
	files    []string // keys, sorted
	lost     []string // folders that could not be read, as keys with a '/' at the end; "" is Dir itself
	folders  int
	problems []mesh.Problem
}

// scan brings what was reported up to the folder. It returns true if something is worth waiting for, which never is
// when final is set: files that look half written, or are gone.
func (w *watch) scan(final bool) (waiting bool) {
	seen := w.list()
	changed := map[string]bool{}
	for _, key := range seen.files {
		took, wait, err := w.read(key, final)
		if err != nil {
			seen.problems = append(seen.problems, w.unreadable(key, err))
		}
		changed[key] = took
		waiting = waiting || wait
	}
	for _, key := range slices.Sorted(maps.Keys(w.files)) {
		if _, there := slices.BinarySearch(seen.files, key); there || seen.covers(key) {
			continue
		}
		if !final {
			waiting = true
			continue
		}
		if w.files[key].taken {
			w.cfg.Sink.Forget(key)
		}
		delete(w.files, key)
	}
	w.retry = len(seen.lost) > 0
	if !waiting {
		clear(w.touched)
		w.all = false
	}
	relabelled := w.relabel()
	for _, key := range slices.Sorted(maps.Keys(w.files)) {
		if st := w.files[key]; changed[key] || relabelled && st.taken {
			w.report(key, st)
		}
	}
	if !reflect.DeepEqual(seen.problems, w.problems) {
		w.problems = seen.problems
		if len(w.problems) == 0 {
			w.cfg.Sink.Forget(KeyProblems)
		} else {
			w.cfg.Sink.Report(KeyProblems, mesh.Input{Problems: slices.Clone(seen.problems)})
		}
		for _, p := range seen.problems {
			w.log.Warn("source folder", "err", p.String())
		}
	}
	return waiting
}

// covers reports whether the file is in a folder that could not be read: lost is not empty.
func (f *found) covers(key string) bool {
	return slices.ContainsFunc(f.lost, func(dir string) bool { return strings.HasPrefix(key, dir) })
}

// list looks for files, and has the kernel tell of changes in every folder before it is read.
func (w *watch) list() *found {
	out := &found{}
	w.folders, w.listed = map[string]bool{}, time.Now()
	w.listDir("", 0, nil, out)
	slices.Sort(out.files)
	return out
}

// listDir lists the folder with that key; above are the folders it stands in.
func (w *watch) listDir(dir string, depth int, above []os.FileInfo, out *found) {
	full := filepath.Join(w.cfg.Dir, filepath.FromSlash(dir))
	info, err := os.Stat(full)
	if err == nil && w.watcher != nil {
		if werr := w.watcher.Add(full); werr != nil && !errors.Is(werr, fs.ErrNotExist) {
			out.problem(w.name(dir), "NotWatched", "changes are seen late: "+werr.Error(), "raise fs.inotify.max_user_watches")
		}
	}
	w.folders[filepath.Clean(full)] = true
	var entries []os.DirEntry
	if err == nil {
		entries, err = os.ReadDir(full)
	}
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist) && depth > 0:
		return // gone since its parent was read
	default:
		out.lost = append(out.lost, dir)
		out.problem(w.name(dir), "Unreadable", text(err)+"; what it held before stays in use", "make the folder readable again")
		return
	}
	for _, e := range entries {
		w.listEntry(dir, e, depth, append(above, info), out)
	}
}

func (w *watch) listEntry(dir string, e os.DirEntry, depth int, above []os.FileInfo, out *found) {
	key := dir + e.Name()
	hidden, wanted := strings.HasPrefix(e.Name(), "."), isConfig(e.Name())
	if hidden && (e.IsDir() || !wanted || strings.HasPrefix(e.Name(), ".#")) {
		return // ConfigMap mounts keep their data in hidden folders; editors keep locks
	}
	info, err := e.Info()
	if err == nil && e.Type()&fs.ModeSymlink != 0 {
		info, err = os.Stat(filepath.Join(w.cfg.Dir, filepath.FromSlash(key)))
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		if wanted {
			out.files = append(out.files, key) // reading it says why
		}
	case hidden && !info.Mode().IsRegular():
	case hidden:
		out.problem(w.name(key), "HiddenFile", "hidden files are not read", "rename or remove it")
	case info.IsDir():
		if out.folders++; depth >= maxDepth || out.folders > maxFolders || slices.ContainsFunc(above, func(a os.FileInfo) bool { return os.SameFile(a, info) }) {
			out.problem(w.name(key), "TooDeep", "the folder stands in itself, or too deep, or is one of too many", "remove the link")
			return
		}
		w.listDir(key+"/", depth+1, above, out)
	case wanted && info.Mode().IsRegular():
		out.files = append(out.files, key)
	case wanted:
		out.problem(w.name(key), "NotAFile", "is neither a file nor a folder", "remove it")
	}
}

func isConfig(name string) bool {
	return slices.Contains([]string{".yaml", ".yml", ".json"}, strings.ToLower(path.Ext(name)))
}

// name is how a file or folder is named in Problems.
func (w *watch) name(key string) mesh.ObjectRef {
	full := filepath.Join(w.cfg.Dir, filepath.FromSlash(key))
	return mesh.ObjectRef{Kind: written.KindFile, Name: cmp.Or(strings.TrimSuffix(key, "/"), full), Source: full}
}

func (f *found) problem(object mesh.ObjectRef, reason, message, remedy string) {
	f.problems = append(f.problems, mesh.Problem{Object: object, Reason: reason, Message: message, Remedy: remedy})
}

// text is what went wrong, without the path that the Problem names anyway.
func text(err error) string {
	if p := (*fs.PathError)(nil); errors.As(err, &p) {
		return p.Err.Error()
	}
	return err.Error()
}

// errTooLarge is the error of files over maxSize.
var errTooLarge = fmt.Errorf("the file is over %d MiB", maxSize>>20)

func (w *watch) unreadable(key string, err error) mesh.Problem {
	p := mesh.Problem{Object: w.name(key), Reason: "Unreadable", Message: text(err), Remedy: "make the file readable"}
	if errors.Is(err, errTooLarge) {
		p.Reason, p.Remedy = "TooLarge", "split it"
	}
	if st := w.files[key]; st != nil && st.taken {
		p.Message += "; what it held before stays in use"
	}
	return p
}

// read takes the file's content if it is new. wait asks for another look: the content looks half written.
func (w *watch) read(key string, final bool) (took, wait bool, err error) {
	full := filepath.Join(w.cfg.Dir, filepath.FromSlash(key))
	st := w.files[key]
	if info, err := os.Stat(full); err == nil && st != nil && st.stable && !w.all && !w.touched[full] && same(st.info, info) {
		return false, false, nil
	}
	info, data, err := load(full)
	if errors.Is(err, fs.ErrNotExist) {
		return false, !final, nil // gone since the folder was read; the next look says so
	}
	if err != nil {
		return false, false, err
	}
	if st == nil {
		st = &state{}
		w.files[key] = st
	}
	if st.taken && bytes.Equal(st.data, data) {
		st.info, st.stable = info, settled(info)
		return false, false, nil
	}
	if !final && halfWritten(st.data, data) {
		return false, true, nil
	}
	st.labels = keepNamed(key, data, config.Namespaces(data), st.labels)
	st.nodes = keepNamed(key, data, config.Nodes(data), st.nodes)
	st.info, st.stable, st.data, st.taken = info, settled(info), data, true
	return true, false, nil
}

// same reports whether nothing happened to the file between the two looks.
func same(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// settled reports whether a further change is sure to have another modification time: file systems count in ticks.
func settled(info os.FileInfo) bool { return time.Since(info.ModTime()) > 50*time.Millisecond }

// halfWritten guesses whether a writer is still at it: the file has become shorter, or ends within a line.
func halfWritten(old, data []byte) bool {
	return len(data) == 0 || len(data) < len(old) || data[len(data)-1] != '\n'
}

// load reads a file of at most maxSize.
func load(full string) (os.FileInfo, []byte, error) {
	f, err := os.Open(full)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if info.Size() > maxSize {
		return nil, nil, errTooLarge
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err == nil && len(data) > maxSize {
		err = errTooLarge
	}
	return info, data, err
}

// relabel gathers the labels of all namespaces, and all nodes, and reports whether they changed. Of two files that
// declare the same one the first by path counts.
func (w *watch) relabel() bool {
	labels, nodes := map[string]map[string]string{}, map[string]config.Node{}
	for _, key := range slices.Backward(slices.Sorted(maps.Keys(w.files))) {
		maps.Copy(labels, w.files[key].labels)
		maps.Copy(nodes, w.files[key].nodes)
	}
	if reflect.DeepEqual(labels, w.labels) && reflect.DeepEqual(nodes, w.nodes) {
		return false
	}
	w.labels, w.nodes = labels, nodes
	return true
}

// report decodes the file and tells the sink. What an edit broke stays in use as it was.
func (w *watch) report(key string, st *state) {
	in, problems := config.Decode(key, st.data, config.Options{Domain: w.cfg.Domain, Namespaces: w.labels, Nodes: w.nodes})
	st.in, problems = keepBroken(in, st.in, problems)
	out := st.in.Clone()
	out.Problems = problems
	w.log.Debug("file read", "source", key, "problems", len(problems))
	w.cfg.Sink.Report(key, out)
}
