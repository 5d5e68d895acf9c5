package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// ErrNoProgram is wrapped by errors of Start and Exec when the program does not exist.
var ErrNoProgram = errors.New("program not found; build the programs first (make build)")

// Proc is a process that the lab started in a node. It leads a process group of its own.
type Proc struct {
	Name string   // as given to Start
	Node *Node    // where it runs
	Argv []string // with Argv[0] resolved to a path
	Env  []string // NAME=VALUE, as given to Start
	Log  string   // file with its standard output and error, appended to over restarts

	spec Spec
	run  string
	pid  int
	done chan struct{}
	code atomic.Int64
}

// PID returns the process id, in the PID namespace of the lab.
func (p *Proc) PID() int { return p.pid }

// Alive reports whether the process has not ended.
func (p *Proc) Alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill sends a signal to the process alone; its children live on. It is no error when the process has ended.
func (p *Proc) Kill(sig syscall.Signal) error {
	if !p.Alive() { // the number may belong to another by now
		return nil
	}
	return p.signal(p.pid, sig)
}

// KillGroup sends a signal to the process and to those of its children that stayed in its process group.
func (p *Proc) KillGroup(sig syscall.Signal) error {
	if p.Alive() {
		return p.signal(-p.pid, sig)
	}
	for _, pid := range processes(nil, p.run) { // the leader ended before its children
		if f := statFields(pid); len(f) > 2 && f[2] == strconv.Itoa(p.pid) {
			if err := p.signal(pid, sig); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *Proc) signal(pid int, sig syscall.Signal) error {
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal %s (%d): %w", p.Name, p.pid, err)
	}
	return nil
}

// Wait waits for the end of the process and returns its exit code, 128 + signal when a signal ended it.
func (p *Proc) Wait(ctx context.Context) (int, error) {
	select {
	case <-p.done:
		return int(p.code.Load()), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for %s: %w", p.Name, ctx.Err())
	}
}

// Tail returns the last lines of the log file, for messages.
func (p *Proc) Tail(lines int) string {
	data, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// program finds a program: a path as it is, else in BinDir, else in PATH.
func (l *Lab) program(name string) (string, error) {
	if strings.ContainsRune(name, '/') {
		path, err := filepath.Abs(name)
		if err != nil {
			return "", err
		}
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("%w: %s", ErrNoProgram, path)
		}
		return path, nil
	}
	if path := filepath.Join(l.cfg.BinDir, name); l.cfg.BinDir != "" {
		if _, err := os.Stat(path); err == nil {
			return filepath.Abs(path)
		}
	}
	if path, err := exec.LookPath(name); err == nil {
		return filepath.Abs(path)
	}
	return "", fmt.Errorf("%w: %s is neither in %s nor in PATH", ErrNoProgram, name, l.cfg.BinDir)
}

// command prepares a program in a node; argv[0] is looked up in BinDir and PATH.
func (l *Lab) command(n *Node, argv, env []string) (*exec.Cmd, helperSpec, error) {
	if len(argv) == 0 {
		return nil, helperSpec{}, errors.New("no command given")
	}
	path, err := l.program(argv[0])
	if err != nil {
		return nil, helperSpec{}, err
	}
	spec := helperSpec{Mode: "exec", Argv: append([]string{path}, argv[1:]...), Env: l.environment(env)}
	if n != nil {
		spec.NS, spec.Mounts = n.Path, n.mounts
	}
	return reexec(spec), spec, nil
}

func reexec(spec helperSpec) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = "isthmus-lab-helper"
	cmd.Env = append(os.Environ(), envHelper+"="+spec.String())
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// environment is what started programs see: little, so that runs are alike.
func (l *Lab) environment(env []string) []string {
	programs := l.cfg.BinDir
	if l.cfg.Envoy != "" {
		programs += ":" + filepath.Dir(l.cfg.Envoy)
	}
	base := []string{
		"PATH=" + programs + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + l.dir, "LANG=C.UTF-8", envRun + "=" + l.Run,
	}
	return append(base, env...)
}

// Start starts a program in a node ("" is the lab's own namespaces) and returns when it runs. argv[0] is looked up
// in BinDir and PATH. Its output goes to the log file NODE-NAME.log. A program that ends is not started again.
func (l *Lab) Start(node, name string, argv, env []string) (*Proc, error) {
	n, err := l.lookup(node)
	if err != nil {
		return nil, err
	}
	return l.start(n, name, argv, env)
}

func (l *Lab) start(n *Node, name string, argv, env []string) (*Proc, error) {
	return l.launch(Spec{Node: n, Name: name, Argv: argv, Env: env})
}

func (l *Lab) launch(s Spec) (*Proc, error) {
	n, name, where := s.Node, s.Name, "host"
	if n != nil {
		where = n.Name
	}
	fail := func(err error) (*Proc, error) { return nil, fmt.Errorf("start %s in %s: %w", name, where, err) }
	cmd, spec, err := l.command(n, s.Argv, s.Env)
	if err != nil {
		return fail(err)
	}
	spec.Dir, spec.Mounts = s.Dir, append(spec.Mounts[:len(spec.Mounts):len(spec.Mounts)], s.Mounts...)
	if s.Log == "" {
		s.Log = filepath.Join(l.logDir, strings.ReplaceAll(where, "/", "-")+"-"+name+".log")
	}
	s.Argv = spec.Argv
	p := &Proc{Name: name, Node: n, Argv: spec.Argv, Env: s.Env, Log: s.Log, spec: s, run: l.Run, done: make(chan struct{})}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fail(err)
	}
	defer log.Close()
	report, reportW, err := os.Pipe()
	if err != nil {
		return fail(err)
	}
	defer report.Close()
	spec.Report = true
	cmd.Env[len(cmd.Env)-1] = envHelper + "=" + spec.String()
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = log, log, []*os.File{reportW}

	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		_ = reportW.Close()
		return fail(errors.New("the lab is down"))
	}
	err = cmd.Start()
	_ = reportW.Close()
	if err == nil {
		p.pid = cmd.Process.Pid
		l.procs[p] = true
		err = l.journal.add(entry{PID: p.pid, Start: startTime(p.pid)})
	}
	l.mu.Unlock()
	if p.pid == 0 {
		return fail(err)
	}
	l.wait.Go(func() {
		_ = cmd.Wait() // the code is in ProcessState
		p.code.Store(int64(exitCode(cmd.ProcessState)))
		close(p.done)
		l.mu.Lock()
		delete(l.procs, p)
		l.mu.Unlock()
	})
	if err != nil {
		_ = p.KillGroup(syscall.SIGKILL)
		return fail(err)
	}
	if text, err := io.ReadAll(io.LimitReader(report, 4096)); err != nil || len(text) > 0 {
		<-p.done
		return fail(errors.New(string(text)))
	}
	l.log.Debug("process started", "node", where, "name", name, "pid", p.pid)
	return p, nil
}

// Restart starts the program of an ended process again, with the same arguments and log file.
func (l *Lab) Restart(p *Proc) (*Proc, error) {
	if p.Alive() {
		return nil, fmt.Errorf("restart %s: it still runs as %d", p.Name, p.pid)
	}
	return l.launch(p.spec)
}

// Exec runs a program in a node ("" is the lab's own namespaces) to its end and returns what it printed and its exit
// code. The error is nil when the program ran, whatever its code. When ctx ends the program is killed.
func (l *Lab) Exec(ctx context.Context, node string, argv []string, env ...string) (stdout, stderr string, code int, err error) {
	n, err := l.lookup(node)
	if err != nil {
		return "", "", -1, err
	}
	cmd, _, err := l.command(n, argv, env)
	if err != nil {
		return "", "", -1, fmt.Errorf("run in %s: %w", node, err)
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = 2 * time.Second // a child of the program may hold the pipes
	if err := cmd.Start(); err != nil {
		return "", "", -1, fmt.Errorf("run %s in %s: %w", argv[0], node, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	err = cmd.Wait()
	stop()
	if ctx.Err() != nil {
		return out.String(), errOut.String(), -1, fmt.Errorf("run %s in %s: %w", argv[0], node, ctx.Err())
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return out.String(), errOut.String(), -1, fmt.Errorf("run %s in %s: %w", argv[0], node, err)
	}
	return out.String(), errOut.String(), exitCode(cmd.ProcessState), nil
}

// KillNode sends a signal to every process in a node, those included that started programs made themselves. With
// SIGKILL it returns when none is left.
func (l *Lab) KillNode(node string, sig syscall.Signal) error {
	n, err := l.lookup(node)
	if err != nil || n == nil {
		return errors.Join(err, errIf(n == nil, "give a node"))
	}
	inodes := map[uint64]bool{n.inode: true}
	if sig == syscall.SIGKILL { // a process may be forking just now
		return killAll(func() []int { return processes(inodes, "") })
	}
	for _, pid := range processes(inodes, "") {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("signal process %d of %s: %w", pid, node, err)
		}
	}
	return nil
}

func errIf(bad bool, text string) error {
	if bad {
		return errors.New(text)
	}
	return nil
}

// Processes returns the ids of the processes in a node, sorted.
func (l *Lab) Processes(node string) []int {
	n, err := l.lookup(node)
	if err != nil || n == nil {
		return nil
	}
	out := processes(map[uint64]bool{n.inode: true}, "")
	sort.Ints(out)
	return out
}

// Eventually calls fn until it returns nil, at intervals of 10 ms growing to 200 ms, and gives up with fn's last
// error after the time within, or when ctx ends.
func Eventually(ctx context.Context, within time.Duration, fn func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	pause := 10 * time.Millisecond
	var last error
	for {
		err := fn(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %v: %w", within, last)
		case <-time.After(pause):
			pause = min(pause*3/2, 200*time.Millisecond)
		}
	}
}
