package file

import (
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
)

// scanTouched is scan for the files alone that the kernel told of, so that one change costs the same however many files
// there are. done is false when that does not do: folders, links or deletions are among what happened, or a file
// cannot be read, or what was wrong may be right again.
func (w *watch) scanTouched(final bool) (waiting, done bool) {
	if w.all || w.retry || len(w.problems) > 0 {
		return false, false
	}
	var keys []string
	for _, full := range slices.Sorted(maps.Keys(w.touched)) {
		name := filepath.Base(full)
		if w.folders[full] || !w.folders[filepath.Dir(full)] || strings.HasPrefix(name, ".") {
			return false, false
		}
		info, err := os.Lstat(full)
		switch {
		case err == nil && !info.Mode().IsRegular():
			return false, false
		case !isConfig(name):
		case err != nil:
			return false, false
		default:
			key, err := filepath.Rel(w.cfg.Dir, full)
			if err != nil {
				return false, false
			}
			keys = append(keys, filepath.ToSlash(key))
		}
	}
	type names struct{ labels, nodes any }
	relabel, failed := false, false
	var changed []string
	for _, key := range keys {
		var before names
		if st := w.files[key]; st != nil {
			before = names{st.labels, st.nodes}
		}
		took, wait, err := w.read(key, final)
		waiting, failed = waiting || wait, failed || err != nil
		if took {
			changed = append(changed, key)
			relabel = relabel || !reflect.DeepEqual(before, names{w.files[key].labels, w.files[key].nodes})
		}
	}
	if !waiting && !failed {
		clear(w.touched)
	}
	if relabel && w.relabel() {
		changed = slices.DeleteFunc(slices.Sorted(maps.Keys(w.files)), func(key string) bool { return !w.files[key].taken })
	}
	for _, key := range changed {
		w.report(key, w.files[key])
	}
	return waiting, !failed // what cannot be read becomes a Problem by the look at everything
}
