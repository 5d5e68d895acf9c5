package lab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// entry is one line of a run's journal: what must be removed when the run cannot do it itself.
type entry struct {
	Owner bool   `json:"owner,omitempty"` // PID is the process that keeps the run
	PID   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"` // start time of PID, so that a reused number is told apart
	NS    string `json:"ns,omitempty"`    // file a namespace is bound to
	Inode uint64 `json:"inode,omitempty"`
	Keep  bool   `json:"keep,omitempty"` // left running on purpose
}

// journal is an append-only file: a crash loses nothing that was written.
type journal struct {
	mu sync.Mutex
	f  *os.File
}

const journalFile = "journal"

func openJournal(dir string) (*journal, error) {
	f, err := os.OpenFile(filepath.Join(dir, journalFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open journal of the run: %w", err)
	}
	return &journal{f: f}, nil
}

func (j *journal) add(e entry) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := j.f.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("write journal of the run: %w", err)
	}
	return nil
}

func (j *journal) close() { _ = j.f.Close() }

func readJournal(dir string) ([]entry, error) {
	data, err := os.ReadFile(filepath.Join(dir, journalFile))
	if err != nil {
		return nil, err
	}
	var out []entry
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		var e entry
		if json.Unmarshal(s.Bytes(), &e) == nil { // a line cut off by the crash is skipped
			out = append(out, e)
		}
	}
	return out, nil
}

// RunInfo is one run found in a base folder.
type RunInfo struct {
	Name string
	Dir  string
	Kept bool // left running on purpose
	Live bool // its owner runs

	owner int
}

// Runs lists the runs in a base folder, "" meaning the default one.
func Runs(base string) ([]RunInfo, error) {
	if base == "" {
		base = defaultBase()
	}
	dirs, err := os.ReadDir(base)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list runs: %w", err)
	}
	var out []RunInfo
	for _, d := range dirs {
		info := RunInfo{Name: d.Name(), Dir: filepath.Join(base, d.Name())}
		entries, err := readJournal(info.Dir)
		if err != nil || !d.IsDir() {
			continue // not a run
		}
		for _, e := range entries {
			info.Kept = info.Kept || e.Keep
			if e.Owner {
				info.Live, info.owner = running(e.PID) && startTime(e.PID) == e.Start, e.PID
			}
		}
		out = append(out, info)
	}
	return out, nil
}

// RemoveLeftovers removes what runs left that ended without cleaning up: processes, namespaces, files. Runs that are
// alive or were kept on purpose stay. It returns the names of the runs it removed.
func RemoveLeftovers(base string) ([]string, error) {
	runs, err := Runs(base)
	if err != nil {
		return nil, err
	}
	var removed []string
	var errs []error
	for _, r := range runs {
		if r.Live || r.Kept {
			continue
		}
		if err := Remove(r); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, r.Name)
	}
	return removed, errors.Join(errs...)
}

// Remove ends a run: every process that it started, its namespaces and its files. A run whose owner stays with it is
// taken down by its owner, when that does it within a minute.
func Remove(r RunInfo) error { return remove(r, time.Minute) }

func remove(r RunInfo, patience time.Duration) error {
	if r.Live && r.Kept {
		if err := syscall.Kill(r.owner, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("remove run %s: %w", r.Name, err)
		}
		for deadline := time.Now().Add(patience); time.Now().Before(deadline) && running(r.owner); {
			time.Sleep(20 * time.Millisecond)
		}
		if _, err := os.Stat(r.Dir); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	entries, err := readJournal(r.Dir)
	if err != nil {
		return fmt.Errorf("remove run %s: %w", r.Name, err)
	}
	inodes, pids := map[uint64]bool{}, map[int]bool{}
	var files []string
	for _, e := range entries {
		switch {
		case e.NS != "":
			files = append(files, e.NS)
			var st unix.Stat_t // only while it is bound is the number surely still ours
			if unix.Stat(e.NS, &st) == nil && st.Ino == e.Inode {
				inodes[e.Inode] = true
			}
		case e.PID != 0 && !e.Owner && e.Start != 0 && startTime(e.PID) == e.Start:
			pids[e.PID] = true
		}
	}
	if err := killAll(func() []int {
		found := processes(inodes, r.Name)
		for pid := range pids {
			if running(pid) {
				found = append(found, pid)
			} else {
				delete(pids, pid)
			}
		}
		return found
	}); err != nil {
		return fmt.Errorf("remove run %s: %w", r.Name, err)
	}
	return removeFiles(r.Dir, files)
}

func removeFiles(dir string, namespaces []string) error {
	mounts, err := os.ReadFile("/proc/thread-self/mounts")
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for _, f := range namespaces {
		if !bytes.Contains(mounts, []byte(" "+f+" ")) {
			continue // bound in a mount namespace that ended with its processes
		}
		err := unix.Unmount(f, unix.MNT_DETACH)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("unbind namespace %s: %w", f, err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove files of the run: %w", err)
	}
	return nil
}

// killAll ends the processes that find returns, until it returns none.
func killAll(find func() []int) error {
	deadline := time.Now().Add(10 * time.Second)
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		pids := find()
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v do not end", pids)
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(pause)
	}
}

// processes finds the running processes in network namespaces, or with the mark of a run in their environment;
// itself never.
func processes(inodes map[uint64]bool, run string) []int {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	mark := []byte(envRun + "=" + run + "\x00")
	var out []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		ours := false
		if link, err := os.Readlink("/proc/" + d.Name() + "/ns/net"); err == nil {
			n, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(link, "net:["), "]"), 10, 64)
			ours = inodes[n]
		}
		if !ours && run != "" {
			env, err := os.ReadFile("/proc/" + d.Name() + "/environ")
			ours = err == nil && bytes.Contains(append(env, 0), mark)
		}
		if ours && running(pid) {
			out = append(out, pid)
		}
	}
	return out
}

// startTime returns when a process started, in clock ticks since boot; 0 when there is none.
func startTime(pid int) uint64 {
	f := statFields(pid)
	if len(f) < 20 {
		return 0
	}
	n, _ := strconv.ParseUint(f[19], 10, 64) // field 22 of stat, counted after the name
	return n
}

// running reports whether a process exists and is no zombie.
func running(pid int) bool {
	f := statFields(pid)
	return len(f) > 0 && f[0] != "Z" && f[0] != "X"
}

func statFields(pid int) []string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	_, rest, ok := strings.Cut(string(data), ") ")
	if i := strings.LastIndex(string(data), ") "); ok && i >= 0 {
		rest = string(data)[i+2:]
	}
	return strings.Fields(rest)
}
