package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Environment of re-executed processes.
const (
	envHelper = "ISTHMUS_LAB_HELPER" // JSON of a helperSpec
	envUserns = "ISTHMUS_LAB_USERNS" // set inside the user namespace, to the base folder of runs
	envRun    = "ISTHMUS_LAB_RUN"    // on everything a lab starts: the name of its run
)

// ErrNotAllowed is returned where neither root nor a user namespace is to be had.
var ErrNotAllowed = errors.New("network namespaces are not allowed here; run as root, or allow user namespaces " +
	"(sysctl user.max_user_namespaces=10000 user.max_net_namespaces=10000 kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0; " +
	"in a container: --cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt apparmor=unconfined --security-opt seccomp=unconfined)")

// Main runs a program that uses labs and returns its exit code; main and TestMain call it first and pass the code to
// os.Exit. It serves the re-executions by which a lab starts programs in namespaces, moves the program into a user
// namespace when it may not make network namespaces itself, and gives run a context that ends on SIGINT and SIGTERM,
// so that run can take its labs down. Where nothing is allowed it still calls run: Allowed and New say so.
func Main(run func(ctx context.Context) int) int {
	if spec := os.Getenv(envHelper); spec != "" {
		return helper(spec)
	}
	if os.Getenv(envUserns) == "" && probe() != nil {
		if code, ok := inUserns(); ok {
			return code
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return run(ctx)
}

// Allowed returns nil when labs can be made in this process, else ErrNotAllowed with the reason.
func Allowed() error {
	if err := probe(); err != nil {
		return fmt.Errorf("%w (%w)", ErrNotAllowed, err)
	}
	return nil
}

// Rootless reports whether the process runs in a user namespace that Main made.
func Rootless() bool { return os.Getenv(envUserns) != "" }

// probe tries what every lab needs, on a thread that is thrown away.
func probe() error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
			return err
		}
		return unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, "")
	})
}

// inUserns runs this program again as root of a new user namespace, with mount and network namespaces of its own.
// ok is false when that is not allowed.
func inUserns() (code int, ok bool) {
	runtime.LockOSThread() // the parent-death signal is bound to this thread
	defer runtime.UnlockOSThread()
	command := func(args ...string) *exec.Cmd {
		cmd := exec.Command("/proc/self/exe", args...)
		cmd.Args[0] = os.Args[0]
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
			Pdeathsig:   syscall.SIGTERM,
		}
		return cmd
	}
	trial := command()
	trial.Env = append(os.Environ(), envHelper+`={"mode":"probe"}`)
	if trial.Run() != nil {
		return 0, false
	}
	cmd := command(os.Args[1:]...)
	cmd.Env = append(os.Environ(), envUserns+"="+defaultBase())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "lab: start in a user namespace:", err)
		return 1, true
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			_ = cmd.Process.Signal(s)
		case err := <-done:
			if cmd.ProcessState == nil {
				fmt.Fprintln(os.Stderr, "lab: wait for the user namespace:", err)
				return 1, true
			}
			return exitCode(cmd.ProcessState), true
		}
	}
}

// defaultBase is where runs keep their state: short, as unix sockets live there.
func defaultBase() string {
	if base := os.Getenv(envUserns); base != "" {
		return base
	}
	if os.Getuid() == 0 && probe() == nil {
		return "/run/isthmus-lab"
	}
	return filepath.Join(os.TempDir(), "isthmus-lab-"+strconv.Itoa(os.Getuid()))
}

// helperSpec is what a re-executed process is to do.
type helperSpec struct {
	Mode   string      `json:"mode"`             // exec, probe or keep
	NS     string      `json:"ns,omitempty"`     // file of the network namespace
	Mounts [][2]string `json:"mounts,omitempty"` // source, target
	Argv   []string    `json:"argv,omitempty"`   // Argv[0] is a path
	Env    []string    `json:"env,omitempty"`
	Dir    string      `json:"dir,omitempty"`
	Report bool        `json:"report,omitempty"` // file 3 takes an error text, and closes when the program runs
}

func (s helperSpec) String() string {
	b, err := json.Marshal(s)
	if err != nil {
		return "{}"
	}
	return string(b)
}

func helper(text string) int {
	runtime.LockOSThread()
	var s helperSpec
	err := json.Unmarshal([]byte(text), &s)
	_ = os.Unsetenv(envHelper)
	if err == nil {
		switch s.Mode {
		case "probe":
			err = probe()
		case "keep":
			return keeper(s.Dir)
		default:
			err = s.exec() // returns only when it failed
		}
	}
	if err == nil {
		return 0
	}
	if s.Report {
		fmt.Fprint(os.NewFile(3, "report"), err)
	} else {
		fmt.Fprintln(os.Stderr, "lab:", err)
	}
	return 127
}

// exec enters the namespace, lays the files of the node over /etc and becomes the program.
func (s helperSpec) exec() error {
	if s.Report {
		unix.CloseOnExec(3)
	}
	if s.NS != "" {
		fd, err := unix.Open(s.NS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open namespace %s: %w", s.NS, err)
		}
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", s.NS, err)
		}
	}
	if len(s.Mounts) > 0 {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("make a mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
	}
	for _, m := range s.Mounts {
		if err := unix.Mount(m[0], m[1], "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s over %s: %w; the file must exist", m[0], m[1], err)
		}
	}
	if s.Dir != "" {
		if err := os.Chdir(s.Dir); err != nil {
			return err
		}
	}
	if err := syscall.Exec(s.Argv[0], s.Argv, s.Env); err != nil {
		return fmt.Errorf("run %s: %w", strings.Join(s.Argv, " "), err)
	}
	return nil
}

// execLocked is exec for a process that has other threads: all of them end.
func (s helperSpec) execLocked() error {
	runtime.LockOSThread()
	return s.exec()
}

func exitCode(s *os.ProcessState) int {
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return s.ExitCode()
}
