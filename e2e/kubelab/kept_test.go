package kubelab_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// TestKept leaves a lab up as "make lab" does, with the real scheduler, uses what it printed, and takes it down after
// its process was killed.
func TestKept(t *testing.T) {
	dir := bin(t)
	base, err := os.MkdirTemp("/tmp", "kept") // unix sockets need short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	topology := filepath.Join(base, "one.yaml")
	if err := os.WriteFile(topology, []byte("clusters: [{name: c1}]"), 0o644); err != nil {
		t.Fatal(err)
	}
	command := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, filepath.Join(dir, "lab"), args...)
		cmd.Env = append(os.Environ(), "ISTHMUS_LAB_DIR="+filepath.Join(base, "runs"))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	t.Cleanup(func() { _, _ = command("down") }) // when the test stops in the middle
	out, err := command("kube", "--keep", "--scheduler", topology)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m := regexp.MustCompile(`export KUBECONFIG=(\S+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no kubeconfig in what it says:\n%s", out)
	}
	kubectl := exec.Command(filepath.Join(dir, "kube"), "kubectl", "--kubeconfig", m[1], "get", "nodes,pods", "-A", "-o", "name")
	if out, err := kubectl.CombinedOutput(); err != nil || !strings.Contains(string(out), "node/c1-1") || !strings.Contains(string(out), "pod/coredns-") {
		t.Errorf("kubectl: %v\n%s", err, out)
	}
	if out, err := command("exec", "c1/router", "--", "cat", "/proc/net/dev"); err != nil || !strings.Contains(out, "control:") {
		t.Errorf("lab exec: %v\n%s", err, out)
	}
	runs, err := lab.Runs(filepath.Join(base, "runs"))
	if err != nil || len(runs) != 1 || !runs[0].Kept || !runs[0].Live {
		t.Fatalf("runs %+v, %v: want one that is kept and served", runs, err)
	}
	serving := 0
	for pid := range processesOf(topology) {
		serving++
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Error(err)
		}
	}
	if serving != 1 {
		t.Errorf("%d processes serve the lab, want 1", serving)
	}
	if out, err := command("down"); err != nil {
		t.Errorf("lab down: %v\n%s", err, out)
	}
	if left := processesOf(runs[0].Name); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	if left, _ := os.ReadDir(filepath.Join(base, "runs")); len(left) > 0 {
		t.Errorf("files are left: %v", left)
	}
}

// processesOf returns the command lines of processes that mention a text, in their arguments or environment.
func processesOf(text string) map[int]string {
	out := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		args, _ := os.ReadFile(filepath.Join(d, "cmdline"))
		env, _ := os.ReadFile(filepath.Join(d, "environ"))
		if strings.Contains(string(args)+string(env), text) {
			var pid int
			for _, r := range filepath.Base(d) {
				pid = pid*10 + int(r-'0')
			}
			out[pid] = string(args)
		}
	}
	return out
}
