package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// keptLogs is how many runs keep their logs.
const keptLogs = 5

// newLogs makes the folder for the logs of this run and removes those of runs long ago. Runs at the same time, and
// runs that were left running, keep theirs.
func newLogs(base string, now time.Time) (string, error) {
	if err := os.MkdirAll(base, 0o755); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(base, now.Format("20060102-150405-*"))
	if err != nil {
		return "", fmt.Errorf("make a folder for logs: %w", err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	old, err := filepath.Glob(filepath.Join(base, "2*-*-*")) // sorted, so by age
	if err != nil {
		return "", err
	}
	for len(old) > keptLogs {
		if err := os.RemoveAll(old[0]); err != nil {
			return "", err
		}
		old = old[1:]
	}
	return dir, nil
}

// sizes tells how long each log is now.
func sizes(dir string) map[string]int64 {
	out := map[string]int64{}
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, f := range files {
		if st, err := os.Stat(f); err == nil && st.Mode().IsRegular() {
			out[f] = st.Size()
		}
	}
	return out
}

// tails returns commands that show what was logged since the sizes were taken: the logs with most warnings and errors.
func tails(dir string, before map[string]int64) []string {
	type log struct {
		path     string
		from     int64
		warnings int
	}
	var logs []log
	for path, size := range sizes(dir) {
		from := before[path]
		if size <= from {
			continue
		}
		if n := warnings(path, from); n > 0 {
			logs = append(logs, log{path, from, n})
		}
	}
	slices.SortFunc(logs, func(a, b log) int { return cmp.Or(b.warnings-a.warnings, cmp.Compare(a.path, b.path)) })
	var out []string
	for _, l := range logs[:min(len(logs), 5)] {
		out = append(out, fmt.Sprintf("tail -c +%d %s  # %d warnings and errors", l.from+1, l.path, l.warnings))
	}
	return out
}

func warnings(path string, from int64) int {
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, from, 16<<20))
	if err != nil {
		return 0
	}
	n := 0
	for _, mark := range []string{"level=WARN", "level=ERROR", "[warning]", "[error]", "[critical]", "[WARNING]", "[ERROR]"} {
		n += bytes.Count(data, []byte(mark))
	}
	return n
}
