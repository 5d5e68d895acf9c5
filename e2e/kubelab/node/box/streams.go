package box

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"

	"golang.org/x/sys/unix"
)

// Streams are what a program that runs beside a container reads and writes. Any may be nil.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	// Terminal gives the program a terminal: what it prints, errors too, goes to Out.
	Terminal bool
	// Sizes are the terminal's, as they change.
	Sizes <-chan Size
}

// Size is a terminal's, in characters.
type Size struct{ Width, Height uint16 }

// join connects the streams to a command that is about to start. stop ends what copies; it waits for the output.
func (s Streams) join(cmd *exec.Cmd) (stop func(), err error) {
	if s.Terminal {
		return s.terminal(cmd)
	}
	if s.Out != nil {
		cmd.Stdout = s.Out
	}
	if s.Err != nil {
		cmd.Stderr = s.Err
	}
	if s.In == nil {
		return func() {}, nil
	}
	in, err := cmd.StdinPipe() // not cmd.Stdin: the program's end must not wait for the caller's next byte
	if err != nil {
		return nil, err
	}
	go func() {
		_, _ = io.Copy(in, s.In) // either side may end first
		_ = in.Close()
	}()
	return func() {}, nil
}

func (s Streams) terminal(cmd *exec.Cmd) (stop func(), err error) {
	ours, theirs, err := openTerminal()
	if err != nil {
		return nil, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = false, true, true
	var wait sync.WaitGroup
	if s.Out != nil {
		wait.Go(func() { _, _ = io.Copy(s.Out, ours) }) // ends with an error when nobody holds the other side
	}
	if s.In != nil {
		go func() { _, _ = io.Copy(ours, s.In) }()
	}
	done := make(chan struct{})
	go func() {
		for {
			select {
			case z, ok := <-s.Sizes:
				if !ok {
					return
				}
				_ = unix.IoctlSetWinsize(int(ours.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: z.Height, Col: z.Width})
			case <-done:
				return
			}
		}
	}()
	return func() {
		_ = theirs.Close()
		wait.Wait()
		close(done)
		_ = ours.Close()
	}, nil
}

// openTerminal opens both sides of a pseudo terminal.
func openTerminal() (ours, theirs *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open a terminal: %w", err)
	}
	ours = os.NewFile(uintptr(fd), "ptmx")
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		_ = ours.Close()
		return nil, nil, fmt.Errorf("unlock a terminal: %w", err)
	}
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		_ = ours.Close()
		return nil, nil, fmt.Errorf("open the other side of a terminal: %w", errno)
	}
	return ours, os.NewFile(peer, "pts"), nil
}
