package main

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// TestInterrupted ends the demo in the middle, once as Ctrl-C does and once by force: the first cleans up after itself, what the second
// leaves is removed by the next.
func TestInterrupted(t *testing.T) {
	if os.Getenv("REQUIRE_TOOLS") == "" || testing.Short() {
		t.Skip("starts the demo: make e2e runs it, or REQUIRE_TOOLS=1 after make build")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	base, err := os.MkdirTemp("/tmp", "il-") // short: unix sockets live below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := lab.RemoveLeftovers(filepath.Join(base, "r")); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(base); err != nil {
			t.Error(err)
		}
	})
	run := func(sig os.Signal) (said string) {
		cmd := exec.Command(filepath.Join(root, "build", "bin", "demo"), "--logs", filepath.Join(base, "logs"))
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "ISTHMUS_LAB_DIR="+filepath.Join(base, "r"))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		deadline := time.AfterFunc(90*time.Second, func() { _ = cmd.Process.Kill() })
		defer deadline.Stop()
		for lines := bufio.NewScanner(out); lines.Scan(); {
			said += lines.Text() + "\n"
			if strings.HasPrefix(lines.Text(), "pass  1 join by token") { // hosts, processes and a mesh are there
				_ = cmd.Process.Signal(sig)
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Errorf("an interrupted demo ends well:\n%s", said)
		}
		return said
	}
	left := func() int {
		runs, err := lab.Runs(filepath.Join(base, "r"))
		if err != nil {
			t.Fatal(err)
		}
		return len(runs)
	}

	if said := run(syscall.SIGINT); !strings.Contains(said, "interrupted") || left() != 0 {
		t.Errorf("%d runs are left after an interrupt:\n%s", left(), said)
	}
	run(syscall.SIGKILL)
	if left() != 1 {
		t.Fatalf("%d runs are left after a kill", left())
	}
	if said := run(syscall.SIGINT); left() != 0 {
		t.Errorf("%d runs are left:\n%s", left(), said)
	}
}
