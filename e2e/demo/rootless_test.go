package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// TestWithoutRoot checks as an ordinary user: either a user namespace does, or one line says what to do.
func TestWithoutRoot(t *testing.T) {
	if os.Getenv("REQUIRE_TOOLS") == "" || os.Getuid() != 0 || lab.Rootless() {
		t.Skip("wants root, to become somebody else, and the built demo: make e2e")
	}
	dir, err := os.MkdirTemp("/tmp", "il-") // the build folder may be closed to others
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	program, err := os.ReadFile(filepath.Join("..", "..", "build", "bin", "demo"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "demo")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "--check")
	cmd.Dir, cmd.Env = dir, []string{"HOME=" + dir, "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, NoSetGroups: true}}
	out, err := cmd.CombinedOutput()
	said := string(out)
	t.Logf("%v %s", err, said)
	if err != nil && (!strings.Contains(said, "network namespaces are not allowed here; run as root") || strings.Count(strings.TrimSpace(said), "\n") > 1) {
		t.Errorf("without root: %v: %s", err, said)
	}
}
