package agent

import (
	"context"
	"errors"
	"fmt"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/envoy"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

const lockFile = "agent.pid"

// lock makes dir and holds it for one agent. The lock ends with the process, however that ends.
func lock(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make dataDir: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("close dataDir to others: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open dataDir: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid := readPID(f)
		f.Close()
		return nil, diag.Hint(fmt.Errorf("another isthmus-agent (process %d) uses %s", pid, dir), "stop it, or give this one another dataDir")
	}
	if err := errors.Join(f.Truncate(0), writeAt(f, strconv.Itoa(os.Getpid())+"\n")); err != nil {
		f.Close()
		return nil, fmt.Errorf("write %s: %w", f.Name(), err)
	}
	return f, nil
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

func readPID(f *os.File) int {
	data, _ := io.ReadAll(io.LimitReader(f, 32))
	pid, _ := strconv.Atoi(strings.TrimSpace(string(data)))
	return pid
}

// RunningPID returns the process id of the agent that holds dir, 0 when there is none.
func RunningPID(dir string) int {
	f, err := os.Open(filepath.Join(dir, lockFile))
	if err != nil {
		return 0
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil {
		return 0
	}
	return readPID(f)
}

// Stop ends the agent that holds dir, cleanly, and waits for it. Without one it ends an Envoy that a killed agent left.
func Stop(ctx context.Context, dir string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for asked := false; ; {
		pid := RunningPID(dir)
		if pid == 0 {
			return envoy.StopLeft(ctx, dir)
		}
		if !asked {
			if err := unix.Kill(pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
				return diag.Hint(fmt.Errorf("stop the agent, process %d: %w", pid, err), "run as the user that started it, or as root")
			}
			asked = true
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the agent, process %d, does not end: %w", pid, ctx.Err())
		}
	}
}
