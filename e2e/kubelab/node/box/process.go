package box

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
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Mount is a file or folder that a container sees at a path of its own.
type Mount struct {
	Source   string // a path of this machine, or of the node with OfHost
	OfHost   bool
	Target   string // in the container
	ReadOnly bool
}

// Spec is one container.
type Spec struct {
	// Dir is an existing folder for mount points, no other container's.
	Dir string
	Net *NetNS
	// Mounts are made in the order of their targets.
	Mounts []Mount
	// Files are written into the container's root before it starts, by path: /etc/hosts and its like.
	Files    map[string]string
	Hostname string // "" keeps the node's
	Argv     []string
	Env      []string // NAME=VALUE; programs without a slash are looked up in its PATH
	WorkDir  string   // made when missing; "" is /
	UID, GID int
	Groups   []int
	// Capabilities is what root may keep, by their numbers; nil is everything.
	Capabilities []int
	Output       *os.File // standard output and error
}

// Process is a container that was started.
type Process struct {
	PID      int
	Started  time.Time
	spec     Spec
	root     int // of its file system
	mnt      int // its mount namespace
	uts      int
	done     chan struct{}
	code     int
	signal   int
	finished time.Time
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit returns the exit code (128 + signal when a signal ended it), the signal or 0, and the time; after Done.
func (p *Process) Exit() (code, signal int, finished time.Time) { return p.code, p.signal, p.finished }

// Signal signals the process alone. It is no error when it has ended.
func (p *Process) Signal(sig syscall.Signal) error { return p.kill(p.PID, sig) }

// SignalGroup signals the process and those of its children that stayed in its process group.
func (p *Process) SignalGroup(sig syscall.Signal) error { return p.kill(-p.PID, sig) }

func (p *Process) kill(pid int, sig syscall.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.PID, err)
	}
	return nil
}

// Start starts a container. It dies with this process.
func (h *Host) Start(spec Spec) (*Process, error) {
	p := &Process{spec: spec, root: -1, mnt: -1, uts: -1, done: make(chan struct{})}
	started := make(chan error, 1)
	go lockedThread(func() {
		cmd, err := h.prepare(p)
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			p.closeFiles()
			started <- err
			return
		}
		p.PID, p.Started = cmd.Process.Pid, time.Now()
		started <- nil
		// The thread must outlive the process: its end would be taken for the parent's.
		_ = cmd.Wait() // the code is in ProcessState
		p.finished = time.Now()
		_ = syscall.Kill(-p.PID, syscall.SIGKILL) // what it left in its process group
		if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && st.Signaled() {
			p.signal, p.code = int(st.Signal()), 128+int(st.Signal())
		} else {
			p.code = cmd.ProcessState.ExitCode()
		}
		p.closeFiles()
		close(p.done)
	})
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", strings.Join(spec.Argv, " "), err)
	}
	return p, nil
}

func (p *Process) closeFiles() {
	for _, fd := range []int{p.root, p.mnt, p.uts} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// prepare makes the container's file system and moves the thread into it.
func (h *Host) prepare(p *Process) (*exec.Cmd, error) {
	s := &p.spec
	if err := h.enter(); err != nil {
		return nil, err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWUTS); err != nil {
		return nil, err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return nil, err
	}
	if err := layer(s.Dir); err != nil {
		return nil, err
	}
	trees, err := h.clone(s.Mounts)
	defer func() {
		for _, t := range trees {
			_ = unix.Close(t.fd)
		}
	}()
	if err != nil {
		return nil, err
	}
	if err := chroot(filepath.Join(s.Dir, "root")); err != nil {
		return nil, err
	}
	if err := attach(trees); err != nil {
		return nil, err
	}
	for path, text := range s.Files {
		if err := writeFile(path, text); err != nil {
			return nil, err
		}
	}
	if s.Hostname != "" {
		if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
			return nil, fmt.Errorf("set host name: %w", err)
		}
	}
	if s.WorkDir == "" {
		s.WorkDir = "/"
	}
	if err := os.MkdirAll(s.WorkDir, 0o755); err != nil {
		return nil, err
	}
	for path, fd := range map[string]*int{"/proc/thread-self/root": &p.root, "/proc/thread-self/ns/mnt": &p.mnt, "/proc/thread-self/ns/uts": &p.uts} {
		if *fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return nil, err
		}
	}
	return command(s, s.Net, s.Argv, s.Env)
}

type tree struct {
	fd     int
	dir    bool
	target string
}

// clone takes copies of what is to be mounted, while their paths can still be seen.
func (h *Host) clone(mounts []Mount) ([]tree, error) {
	sorted := append([]Mount{}, mounts...)
	sort.SliceStable(sorted, func(i, j int) bool { return sorted[i].Target < sorted[j].Target })
	var out []tree
	for _, m := range sorted {
		source := m.Source
		if m.OfHost {
			source = filepath.Join(h.root, m.Source)
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.AT_RECURSIVE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return out, fmt.Errorf("mount %s: %s: %w", m.Target, m.Source, err)
		}
		out = append(out, tree{fd: fd, target: m.Target})
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return out, err
		}
		out[len(out)-1].dir = st.Mode&unix.S_IFMT == unix.S_IFDIR
		if m.ReadOnly {
			attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
			if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr); err != nil {
				return out, fmt.Errorf("mount %s read-only: %w", m.Target, err)
			}
		}
	}
	return out, nil
}

// attach mounts trees below the thread's root.
func attach(trees []tree) error {
	for _, t := range trees {
		err := os.MkdirAll(filepath.Dir(t.target), 0o755)
		if err == nil && t.dir {
			err = os.MkdirAll(t.target, 0o755)
		} else if err == nil {
			var f *os.File
			if f, err = os.OpenFile(t.target, os.O_CREATE|os.O_RDONLY, 0o644); err == nil {
				_ = f.Close()
			}
		}
		if err == nil {
			err = unix.MoveMount(t.fd, "", unix.AT_FDCWD, t.target, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS)
		}
		if err != nil {
			return fmt.Errorf("mount %s: %w", t.target, err)
		}
	}
	return nil
}

func writeFile(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	_ = os.Remove(path) // it may be a link
	return os.WriteFile(path, []byte(text), 0o644)
}

// command prepares a program on the thread, which is in the file system the program is to see.
func command(s *Spec, net *NetNS, argv, env []string) (*exec.Cmd, error) {
	if len(argv) == 0 {
		return nil, errors.New("no command given")
	}
	path, err := lookPath(argv[0], env)
	if err != nil {
		return nil, err
	}
	if net != nil {
		if err := unix.Setns(net.fd, unix.CLONE_NEWNET); err != nil {
			return nil, fmt.Errorf("enter network namespace: %w", err)
		}
	}
	if s.Capabilities != nil {
		keep := map[int]bool{}
		for _, c := range s.Capabilities {
			keep[c] = true
		}
		for c := 0; c <= unix.CAP_LAST_CAP; c++ {
			if !keep[c] {
				_ = unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0) // unknown to an older kernel
			}
		}
	}
	cmd := &exec.Cmd{Path: path, Args: argv, Env: env, Dir: s.WorkDir}
	cmd.Stdout, cmd.Stderr = s.Output, s.Output
	if s.Output == nil {
		cmd.Stdout, cmd.Stderr = nil, nil
	}
	groups := make([]uint32, 0, len(s.Groups))
	for _, g := range s.Groups {
		groups = append(groups, uint32(g))
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, Pdeathsig: syscall.SIGKILL,
		Credential: &syscall.Credential{Uid: uint32(s.UID), Gid: uint32(s.GID), Groups: groups},
	}
	return cmd, nil
}

// lookPath finds a program in the PATH of an environment.
func lookPath(name string, env []string) (string, error) {
	if strings.ContainsRune(name, '/') {
		return name, nil
	}
	for i := len(env) - 1; i >= 0; i-- {
		dirs, ok := strings.CutPrefix(env[i], "PATH=")
		if !ok {
			continue
		}
		for _, d := range filepath.SplitList(dirs) {
			path := filepath.Join(d, name)
			if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
				return path, nil
			}
		}
		break
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// Exec runs a program in a running container, as its user, to its end and returns what it printed and its exit code.
// The error is nil when the program ran, whatever its code; when ctx ends the program is killed.
func (p *Process) Exec(ctx context.Context, argv []string, stdin io.Reader, env ...string) (stdout, stderr []byte, code int, err error) {
	var out, errOut bytes.Buffer
	code, err = p.Attach(ctx, argv, Streams{In: stdin, Out: &out, Err: &errOut}, env...)
	return out.Bytes(), errOut.Bytes(), code, err
}

// Attach is Exec with streams of the caller's.
func (p *Process) Attach(ctx context.Context, argv []string, io Streams, env ...string) (code int, err error) {
	err = onThread(func() error {
		select {
		case <-p.done:
			return errors.New("the container has ended")
		default:
		}
		if err := p.enter(); err != nil {
			return err
		}
		s := p.spec
		s.Output = nil
		cmd, err := command(&s, s.Net, argv, append(append([]string{}, s.Env...), env...))
		if err != nil {
			return err
		}
		stop, err := io.join(cmd)
		if err != nil {
			return err
		}
		code, err = run(ctx, cmd)
		stop()
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("run %s: %w", strings.Join(argv, " "), err)
	}
	return code, nil
}

// enter moves the thread into the container's file system.
func (p *Process) enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	if err := unix.Setns(p.uts, unix.CLONE_NEWUTS); err != nil {
		return err
	}
	if err := unix.Setns(p.mnt, unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Fchdir(p.root); err != nil {
		return err
	}
	return chroot(".")
}

// Run runs a program in the node's file system and a network namespace to its end, as root: network plugins.
func (h *Host) Run(ctx context.Context, net *NetNS, argv, env []string, stdin io.Reader) (stdout, stderr []byte, code int, err error) {
	var out, errOut bytes.Buffer
	err = h.Do(func() error {
		cmd, err := command(&Spec{WorkDir: "/"}, net, argv, env)
		if err != nil {
			return err
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errOut
		code, err = run(ctx, cmd)
		return err
	})
	if err != nil {
		return out.Bytes(), errOut.Bytes(), -1, fmt.Errorf("run %s: %w", argv[0], err)
	}
	return out.Bytes(), errOut.Bytes(), code, nil
}

func run(ctx context.Context, cmd *exec.Cmd) (int, error) {
	cmd.WaitDelay = 2 * time.Second // a child of the program may hold the pipes
	if err := cmd.Start(); err != nil {
		return -1, err
	}
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	err := cmd.Wait()
	stop()
	if ctx.Err() != nil {
		return -1, ctx.Err()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return -1, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

// KillAll kills every process in a network namespace, those included that started programs made themselves, and
// returns when none is left.
func KillAll(n *NetNS) error {
	var st unix.Stat_t
	if err := unix.Fstat(n.fd, &st); err != nil {
		return err
	}
	deadline := time.Now().Add(10 * time.Second)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		pids := inNetNS(st.Ino)
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

func inNetNS(inode uint64) []int {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	want := fmt.Sprintf("net:[%d]", inode)
	var out []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		// A process that has ended but was not waited for has no namespaces.
		if link, err := os.Readlink("/proc/" + d.Name() + "/ns/net"); err == nil && link == want {
			out = append(out, pid)
		}
	}
	return out
}
