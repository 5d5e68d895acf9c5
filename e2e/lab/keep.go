package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// execServer lets "lab exec" into the nodes of a rootless run, whose user namespace another process cannot enter:
// it starts the program itself, on the terminal whose descriptors the caller sends.
type execServer struct {
	dir      string
	listener *net.UnixListener
	wait     sync.WaitGroup
}

const execSocket = "exec.sock"

// execRequest travels with the caller's three standard descriptors.
type execRequest struct {
	Node string   `json:"node"`
	Argv []string `json:"argv"`
	Env  []string `json:"env"`
}

type execReply struct {
	Code  int    `json:"code"`
	Error string `json:"error,omitempty"`
}

func serveExec(dir string) (*execServer, error) {
	path := filepath.Join(dir, execSocket)
	_ = os.Remove(path) // of the process that kept the run before
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for lab exec: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	s := &execServer{dir: dir, listener: l}
	s.wait.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			s.wait.Go(func() { s.serve(conn) })
		}
	})
	return s, nil
}

// close stops listening. Programs that still run are not waited for: Down has ended them.
func (s *execServer) close() {
	_ = s.listener.Close()
	s.wait.Wait()
}

func (s *execServer) serve(conn *net.UnixConn) {
	defer conn.Close()
	code, err := s.run(conn)
	reply := execReply{Code: code}
	if err != nil {
		reply.Error = err.Error()
	}
	_ = json.NewEncoder(conn).Encode(reply)
}

func (s *execServer) run(conn *net.UnixConn) (int, error) {
	buf, oob := make([]byte, 1<<16), make([]byte, unix.CmsgSpace(3*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 {
		return -1, errors.New("no descriptors came with the request")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	var files []*os.File
	for _, fd := range fds {
		unix.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "stdio")
		defer f.Close()
		files = append(files, f)
	}
	var r execRequest
	if err := json.Unmarshal(buf[:n], &r); err != nil || len(files) != 3 {
		return -1, fmt.Errorf("bad request: %w", err)
	}
	spec, err := enter(s.dir, r)
	if err != nil {
		return -1, err
	}
	cmd := reexec(spec)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = files[0], files[1], files[2]
	if err := cmd.Start(); err != nil {
		return -1, err
	}
	done := make(chan struct{})
	go func() { // the caller went away: so does its program
		_, _ = conn.Read(make([]byte, 1))
		select {
		case <-done:
		default:
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGHUP)
		}
	}()
	_ = cmd.Wait()
	close(done)
	return exitCode(cmd.ProcessState), nil
}

// NodesOf lists the nodes of a run that another process keeps, sorted.
func NodesOf(run RunInfo) ([]string, error) {
	nodes, err := readNodes(run.Dir)
	var names []string
	for name := range nodes {
		names = append(names, name)
	}
	sort.Strings(names)
	return names, err
}

func readNodes(dir string) (map[string]nodeFile, error) {
	var nodes map[string]nodeFile
	data, err := os.ReadFile(filepath.Join(dir, nodesFile))
	if err == nil {
		err = json.Unmarshal(data, &nodes)
	}
	if err != nil {
		return nil, fmt.Errorf("read nodes of run %s: %w", filepath.Base(dir), err)
	}
	return nodes, nil
}

// enter prepares a helper that runs a program in a node of a run found in a folder.
func enter(dir string, r execRequest) (helperSpec, error) {
	nodes, err := readNodes(dir)
	if err != nil {
		return helperSpec{}, err
	}
	n, ok := nodes[r.Node]
	if !ok {
		names, _ := NodesOf(RunInfo{Dir: dir})
		return helperSpec{}, fmt.Errorf("no node %q in run %s; it has %s", r.Node, filepath.Base(dir), strings.Join(names, ", "))
	}
	if len(r.Argv) == 0 {
		return helperSpec{}, errors.New("no command given")
	}
	path, err := exec.LookPath(r.Argv[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return helperSpec{}, fmt.Errorf("%w: %w", ErrNoProgram, err)
	}
	env := append(r.Env, envRun+"="+filepath.Base(dir))
	return helperSpec{Mode: "exec", NS: n.NS, Mounts: n.Mounts, Argv: append([]string{path}, r.Argv[1:]...), Env: env}, nil
}

// ExecIn runs a program in a node of a run that another process keeps, on this process's terminal, and returns its
// exit code.
func ExecIn(run RunInfo, node string, argv []string) (int, error) {
	r := execRequest{Node: node, Argv: argv, Env: os.Environ()}
	if len(argv) > 0 {
		if path, err := exec.LookPath(argv[0]); err == nil {
			if r.Argv[0], err = filepath.Abs(path); err != nil {
				return -1, err
			}
		}
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(run.Dir, execSocket), Net: "unix"})
	if errors.Is(err, os.ErrNotExist) { // not rootless: enter directly
		spec, err := enter(run.Dir, r)
		if err != nil {
			return -1, err
		}
		return 127, spec.execLocked()
	}
	if err != nil {
		return -1, fmt.Errorf("reach run %s: %w", run.Name, err)
	}
	defer conn.Close()
	b, err := json.Marshal(r)
	if err != nil {
		return -1, err
	}
	if len(b) >= 1<<16 {
		return -1, errors.New("the environment or the command is too long")
	}
	if _, _, err := conn.WriteMsgUnix(b, unix.UnixRights(0, 1, 2), nil); err != nil {
		return -1, err
	}
	var reply execReply
	if err := json.NewDecoder(conn).Decode(&reply); err != nil {
		return -1, fmt.Errorf("run %s ended: %w", run.Name, err)
	}
	if reply.Error != "" {
		return -1, errors.New(reply.Error)
	}
	return reply.Code, nil
}

// Keep leaves everything running and lets go of it: the run stays until Remove, "lab down" in a shell. The Lab can
// be used no longer.
func (l *Lab) Keep() error {
	l.mu.Lock()
	if l.closed || l.journal == nil {
		l.mu.Unlock()
		return errors.New("keep the run: the lab is not up")
	}
	l.closed = true
	l.mu.Unlock()
	if Rootless() { // the namespaces' files are visible only inside; somebody has to stay there
		l.keeping.close()
		cmd := reexec(helperSpec{Mode: "keep", Dir: l.dir})
		cmd.Env = append(cmd.Env, envRun+"="+l.Run)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("keep the run: %w", err)
		}
		if err := cmd.Process.Release(); err != nil {
			return err
		}
	}
	if err := l.journal.add(entry{Keep: true}); err != nil {
		return err
	}
	l.release()
	return nil
}

// keeper serves "lab exec" until it is killed.
func keeper(dir string) int {
	s, err := serveExec(dir)
	if err != nil {
		return 1
	}
	s.wait.Wait()
	return 0
}
