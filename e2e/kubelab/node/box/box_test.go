package box

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host makes a node's file system, or skips the test where that is not allowed.
func host(t *testing.T, binds map[string]string) *Host {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	h, err := OpenHost(t.TempDir(), binds)
	if err != nil {
		if os.Getenv("REQUIRE_TOOLS") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func netns(t *testing.T, h *Host) *NetNS {
	t.Helper()
	n, err := NewNetNS()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Bind(n, filepath.Base(t.Name())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := KillAll(n); err != nil {
			t.Error(err)
		}
		if err := h.Unbind(n); err != nil {
			t.Error(err)
		}
		_ = n.Close()
	})
	return n
}

func start(t *testing.T, h *Host, s Spec) (*Process, string) {
	t.Helper()
	s.Dir = t.TempDir()
	out := filepath.Join(t.TempDir(), "out")
	f, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s.Output = f
	s.Env = append(s.Env, "PATH=/usr/bin:/bin")
	p, err := h.Start(s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.SignalGroup(syscall.SIGKILL)
		<-p.Done()
	})
	return p, out
}

func wait(t *testing.T, p *Process) int {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the container does not end")
	}
	code, _, _ := p.Exit()
	return code
}

func TestContainer(t *testing.T) {
	h := host(t, nil)
	vol := t.TempDir()
	if err := os.WriteFile(filepath.Join(vol, "token"), []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	p, out := start(t, h, Spec{
		Net: netns(t, h), Hostname: "pod-1", UID: 1337, GID: 1337, Groups: []int{7},
		Mounts: []Mount{
			{Source: vol, Target: "/var/run/secrets/tokens", ReadOnly: true},
			{Source: filepath.Join(vol, "token"), Target: "/app/only/one"},
		},
		Files: map[string]string{"/etc/hosts": "127.0.0.1 localhost\n", "/etc/resolv.conf": "nameserver 10.1.0.10\n"},
		Argv: []string{"sh", "-c", `id -u; id -g; id -G; uname -n; cat /etc/hosts /etc/resolv.conf /var/run/secrets/tokens/token /app/only/one; echo;
			touch /var/run/secrets/tokens/x 2>/dev/null || echo read-only; touch /tmp/mine && echo tmp; pwd; cat /sys/class/net/lo/address >/dev/null; grep CapBnd /proc/self/status`},
		WorkDir: "/made/here", Capabilities: []int{0, 12},
	})
	if code := wait(t, p); code != 0 {
		t.Errorf("exit code %d", code)
	}
	got, _ := os.ReadFile(out)
	want := "1337\n1337\n1337 7\npod-1\n127.0.0.1 localhost\nnameserver 10.1.0.10\noneone\nread-only\ntmp\n/made/here\nCapBnd:\t0000000000001001\n"
	if string(got) != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if _, err := os.Stat("/made/here"); err == nil {
		t.Error("the container wrote to this machine")
	}
}

func TestHostFiles(t *testing.T) {
	conf := t.TempDir()
	h := host(t, map[string]string{"/etc/cni/net.d": conf})
	p, _ := start(t, h, Spec{
		Mounts: []Mount{{Source: "/etc/cni", OfHost: true, Target: "/host/etc/cni"}},
		Argv:   []string{"sh", "-c", "echo written > /host/etc/cni/net.d/10.conflist; echo seen > /host/etc/cni/other"},
	})
	if code := wait(t, p); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	if got, err := os.ReadFile(filepath.Join(conf, "10.conflist")); err != nil || string(got) != "written\n" {
		t.Errorf("got %q, %v", got, err)
	}
	n := netns(t, h)
	out, errOut, code, err := h.Run(context.Background(), n, []string{"/bin/sh", "-c", "cat /etc/cni/other - /etc/cni/net.d/10.conflist; test -e " + n.Path}, nil, strings.NewReader("stdin\n"))
	if err != nil || code != 0 || string(out) != "seen\nstdin\nwritten\n" {
		t.Errorf("got %q %q %d %v", out, errOut, code, err)
	}
}

func TestExecAndKill(t *testing.T) {
	h := host(t, nil)
	n := netns(t, h)
	p, _ := start(t, h, Spec{Net: n, UID: 1000, Argv: []string{"sh", "-c", "echo here > /tmp/f; setsid sleep 1000 & sleep 1000"}, Env: []string{"A=b"}})
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		out, _, code, err := p.Exec(ctx, []string{"sh", "-c", "cat /tmp/f; id -u; echo $A$B"}, nil, "B=c")
		if err != nil {
			t.Fatal(err)
		}
		if code == 0 && string(out) == "here\n1000\nbc\n" {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if _, _, code, _ := p.Exec(ctx, []string{"false"}, nil); code != 1 {
		t.Errorf("false ended with %d", code)
	}
	short, stop := context.WithTimeout(ctx, 100*time.Millisecond)
	defer stop()
	if _, _, _, err := p.Exec(short, []string{"sleep", "100"}, nil); err == nil {
		t.Error("a program outlived its context")
	}
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := wait(t, p); code != 143 {
		t.Errorf("exit code %d, want 143", code)
	}
	if err := KillAll(n); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := p.Exec(ctx, []string{"true"}, nil); err == nil {
		t.Error("exec in an ended container")
	}
}

func TestStartErrors(t *testing.T) {
	h := host(t, nil)
	for name, s := range map[string]Spec{
		"no program": {Argv: []string{"no-such-program"}},
		"no volume":  {Argv: []string{"true"}, Mounts: []Mount{{Source: "/no/such/folder", Target: "/x"}}},
		"nothing":    {},
	} {
		s.Dir = t.TempDir()
		s.Env = []string{"PATH=/bin"}
		if p, err := h.Start(s); err == nil {
			t.Errorf("%s: started %d", name, p.PID)
		}
	}
}

func TestNetNS(t *testing.T) {
	h := host(t, nil)
	a, b := netns(t, h), (*NetNS)(nil)
	l, err := a.Listen("tcp", "127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c, err := l.Accept(); err == nil {
			_, _ = io.WriteString(c, "hello")
			_ = c.Close()
		}
	}()
	c, err := a.DialContext(context.Background(), "tcp", "127.0.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	got, _ := io.ReadAll(c)
	_ = c.Close()
	<-done
	if !bytes.Equal(got, []byte("hello")) {
		t.Errorf("got %q", got)
	}
	if b, err = NewNetNS(); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.DialContext(context.Background(), "tcp", "127.0.0.1:80"); err == nil {
		t.Error("two namespaces share a loopback")
	}
}
