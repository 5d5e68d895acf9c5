package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"sigs.k8s.io/yaml"
)

const (
	envFake  = "ISTHMUS_LAB_TEST_FAKE"  // act as that program of the product
	envCrash = "ISTHMUS_LAB_TEST_CRASH" // bring a lab up in that folder, and die
)

func TestMain(m *testing.M) {
	os.Exit(Main(func(ctx context.Context) int {
		if name := os.Getenv(envFake); name != "" {
			return fake(ctx, name)
		}
		if base := os.Getenv(envCrash); base != "" {
			return crash(ctx, base)
		}
		return m.Run()
	}))
}

// allowed skips where labs cannot be made; where tools are required that is an error.
func allowed(t *testing.T) {
	t.Helper()
	if err := Allowed(); err != nil && os.Getenv("REQUIRE_TOOLS") != "" {
		t.Fatal(err)
	} else if err != nil {
		t.Skip(err)
	}
}

const bookstore = "../worlds/bookstore"

// base makes a short folder for runs: unix sockets live below it.
func base(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "isth-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("%v is left in %s", left, dir)
		}
		_ = os.RemoveAll(dir)
	})
	return dir
}

func up(t *testing.T, cfg Config) *Lab {
	t.Helper()
	allowed(t)
	var err error
	if cfg.World == nil {
		if cfg.World, err = LoadWorld(bookstore); err != nil {
			t.Fatal(err)
		}
	}
	if cfg.RunDir == "" {
		cfg.RunDir = base(t)
	}
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	})
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	return l
}

// echo answers every line on a port of a node with the address it came from.
func echo(t *testing.T, n *Node, port int) {
	t.Helper()
	var ln net.Listener
	if err := n.Do(func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for s := bufio.NewScanner(c); s.Scan(); {
					from, _, _ := net.SplitHostPort(c.RemoteAddr().String())
					fmt.Fprintln(c, from)
				}
			}()
		}
	}()
}

// ask says one line and returns the answer.
func ask(c net.Conn, within time.Duration) (string, error) {
	if err := c.SetDeadline(time.Now().Add(within)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(c, "hello"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	return strings.TrimSpace(line), err
}

func reach(ctx context.Context, n *Node, address string, within time.Duration) (from string, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return ask(c, within)
}

func TestNetwork(t *testing.T) {
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) }) // runs last
	l := up(t, Config{NetworkOnly: true})
	for _, n := range []string{"amber/productpage-v1", "amber/reviews-v1", "amber/eastwest-1", "birch/reviews-v2-a",
		"birch/eastwest-1", "birch/eastwest-2", "birch/isthmusd", "cedar/reviews-v3", "cedar/eastwest-1", "dune", "amber/router"} {
		if l.Node(n) == nil {
			t.Fatalf("no node %s in %v", n, l.Nodes())
		}
		echo(t, l.Node(n), 9080)
		echo(t, l.Node(n), GatewayPort)
	}
	// A stranger on the WAN who knows where the pods are.
	if err := l.Node("wan").Do(func() error {
		link, err := netlink.LinkByName(linkWAN)
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("172.31.0.250/24")
		if err != nil {
			return err
		}
		_, pods, err := net.ParseCIDR("10.10.0.0/24")
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(link, addr), netlink.RouteAdd(&netlink.Route{Dst: pods, Gw: net.ParseIP("172.31.0.10")}))
	}); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		from, to, want string // want: the address seen there; empty: unreachable
	}{
		{"amber/productpage-v1", "10.10.0.13:9080", "10.10.0.11"},
		{"amber/productpage-v1", "[fd00:10:10::13]:9080", "fd00:10:10::11"},
		{"amber/productpage-v1", "10.20.0.11:9080", ""},
		{"amber/productpage-v1", "10.20.0.11:15443", ""},
		{"amber/productpage-v1", "[fd00:10:20::11]:9080", ""},
		{"amber/productpage-v1", "10.20.0.4:15443", ""},
		{"amber/productpage-v1", "10.29.0.10:9080", ""},
		{"amber/productpage-v1", "172.31.0.21:15443", "172.31.0.10"},
		{"amber/productpage-v1", "172.31.0.22:15443", "172.31.0.10"},
		{"amber/productpage-v1", "172.31.0.11:15443", "172.31.0.10"},
		{"amber/productpage-v1", "172.31.0.31:15443", "172.31.0.10"},
		{"amber/productpage-v1", "172.31.0.21:9080", ""},
		{"birch/isthmusd", "172.31.0.31:15443", "172.31.0.20"},
		{"cedar/reviews-v3", "172.31.0.10:15443", ""},
		{"cedar/reviews-v3", "172.31.0.10:9080", ""},
		{"wan", "10.10.0.11:9080", ""},
		{"wan", "10.10.0.11:15443", ""},
		{"wan", "172.31.0.11:15443", "172.31.0.250"},
		{"wan", "172.31.0.11:9080", ""},
		{"wan", "172.31.0.10:9080", ""},
		{"dune", "10.20.0.11:9080", "10.29.0.10"},
		{"birch/reviews-v2-a", "10.29.0.10:9080", "10.20.0.11"},
		{"birch/eastwest-1", "10.29.0.10:9080", "10.20.0.4"},
		{"dune", "10.20.0.4:15443", "10.29.0.10"},
		{"dune", "172.31.0.21:15443", "172.31.0.20"},
		{"dune", "10.10.0.11:9080", ""},
		{"dune", "172.31.0.11:9080", ""},
		{"amber/productpage-v1", "240.0.0.1:9080", ""},
	}
	t.Run("reach", func(t *testing.T) {
		for _, c := range tests {
			t.Run(strings.ReplaceAll(c.from+" to "+c.to, "/", "."), func(t *testing.T) {
				t.Parallel()
				within := 5 * time.Second
				if c.want == "" {
					within = 300 * time.Millisecond
				}
				got, err := reach(t.Context(), l.Node(c.from), c.to, within)
				if got != c.want {
					t.Errorf("got %q (%v), want %q", got, err, c.want)
				}
			})
		}
	})
	for _, address := range []string{"240.0.0.1:9", "[fd99::1]:9"} { // virtual addresses need a route to be captured
		c, err := l.Node("amber/productpage-v1").Dial(t.Context(), "udp", address)
		if err != nil {
			t.Errorf("no route: %v", err)
			continue
		}
		_ = c.Close()
	}
	t.Run("cut", func(t *testing.T) { testCut(t, l) })
	t.Run("processes", func(t *testing.T) { testProcesses(t, l) })
	t.Run("crash", func(t *testing.T) { testCrash(t, l) })
	t.Run("down", func(t *testing.T) { testDown(t, l) })
}

func testCut(t *testing.T, l *Lab) {
	pod := l.Node("cedar/reviews-v3")
	out, err := pod.Dial(t.Context(), "tcp", "172.31.0.11:15443")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := l.Node("amber/productpage-v1").Dial(t.Context(), "tcp", "172.31.0.31:15443")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	both := func(within time.Duration) (errs []error) {
		for _, c := range []net.Conn{out, in} {
			_, err := ask(c, within)
			errs = append(errs, err)
		}
		return errs
	}
	if err := errors.Join(both(5 * time.Second)...); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(l.CutLink("cedar"), l.CutLink("cedar")); err != nil {
		t.Fatal(err)
	}
	timeout := func(err error) bool {
		var n net.Error
		return errors.As(err, &n) && n.Timeout() || errors.Is(err, context.DeadlineExceeded)
	}
	for i, err := range both(300 * time.Millisecond) {
		if !timeout(err) {
			t.Errorf("open connection %d while cut: %v, want silence", i, err)
		}
	}
	if _, err := reach(t.Context(), pod, "172.31.0.11:15443", 300*time.Millisecond); !timeout(err) {
		t.Errorf("new connection while cut: %v, want silence", err)
	}
	if _, err := reach(t.Context(), l.Node("amber/productpage-v1"), "172.31.0.21:15443", 5*time.Second); err != nil {
		t.Errorf("amber to birch while cedar is cut: %v", err)
	}
	if err := l.RestoreLink("cedar"); err != nil {
		t.Fatal(err)
	}
	for i, err := range both(10 * time.Second) { // the lines sent before are retransmitted
		if err != nil {
			t.Errorf("open connection %d after the link is back: %v", i, err)
		}
	}
	if _, err := reach(t.Context(), pod, "172.31.0.11:15443", 5*time.Second); err != nil {
		t.Errorf("new connection after the link is back: %v", err)
	}
	if err := l.RestoreLink("cedar"); err != nil {
		t.Errorf("restore what is not cut: %v", err)
	}
}

func testProcesses(t *testing.T, l *Lab) {
	ctx := t.Context()
	const node = "amber/productpage-v1"
	before, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code, err := l.Exec(ctx, node, []string{"sh", "-c", "cat /etc/resolv.conf; echo $X >&2; exit 3"}, "X=y")
	if err != nil || code != 3 || stderr != "y\n" || !strings.Contains(stdout, "nameserver 10.10.0.3\nsearch default.svc.cluster.local ") {
		t.Errorf("got %q %q %d %v", stdout, stderr, code, err)
	}
	if after, err := os.ReadFile("/etc/resolv.conf"); err != nil || string(after) != string(before) {
		t.Errorf("resolv.conf outside changed: %v", err)
	}
	install := "mkdir -p /etc/isthmus /var/lib/isthmus-agent && echo x > /etc/isthmus/agent.yaml && head -1 /etc/resolv.conf && ls /etc/passwd"
	if stdout, stderr, code, err := l.Exec(ctx, "dune", []string{"sh", "-c", install}); stdout != "nameserver 10.29.0.1\n/etc/passwd\n" {
		t.Errorf("got %q %q %d %v", stdout, stderr, code, err)
	}
	if _, err := os.Stat(filepath.Join(l.Dir(), "dune/etc/isthmus/agent.yaml")); err != nil {
		t.Errorf("what the machine wrote to /etc: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if _, _, _, err := l.Exec(short, node, []string{"sh", "-c", "sleep 1000 & wait"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("program past its time: %v", err)
	}

	p, err := l.Start(node, "sleeper", []string{"sh", "-c", "echo started; sleep 1000 & wait"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !p.Alive() {
		t.Error("not alive after start")
	}
	if err := Eventually(ctx, 5*time.Second, func(context.Context) error {
		return errIf(len(l.Processes(node)) != 2 || p.Tail(1) != "started", fmt.Sprint(l.Processes(node), p.Tail(3)))
	}); err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code, err := p.Wait(ctx); code != 137 || err != nil || p.Alive() {
		t.Errorf("code %d, %v", code, err)
	}
	if n := len(l.Processes(node)); n != 1 {
		t.Errorf("%d processes after the shell was killed alone, want its child", n)
	}
	if err := p.KillGroup(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := Eventually(ctx, 5*time.Second, func(context.Context) error {
		return errIf(len(l.Processes(node)) != 0, fmt.Sprint(l.Processes(node)))
	}); err != nil {
		t.Error(err)
	}
	again, err := l.Restart(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.KillNode(node, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := again.Wait(ctx); err != nil {
		t.Error(err)
	}
	if err := Eventually(ctx, 5*time.Second, func(context.Context) error {
		return errIf(len(l.Processes(node)) != 0, fmt.Sprint(l.Processes(node)))
	}); err != nil {
		t.Error(err)
	}
	if _, err := l.Start(node, "none", []string{"no-such-program"}, nil); !errors.Is(err, ErrNoProgram) {
		t.Errorf("missing program: %v", err)
	}
	if _, err := l.Start("amber/nobody", "none", []string{"true"}, nil); err == nil || !strings.Contains(err.Error(), "amber/nobody") {
		t.Errorf("missing node: %v", err)
	}
	if _, err := l.Start(node, "stays", []string{"sleep", "1000"}, nil); err != nil { // for testDown
		t.Error(err)
	}
}

// testCrash lets another process bring a lab up and die without cleaning.
func testCrash(t *testing.T, l *Lab) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p, err := l.Start("", "crash", []string{self}, []string{envCrash + "=" + l.base, envUserns + "=" + os.Getenv(envUserns)})
	if err != nil {
		t.Fatal(err)
	}
	if code, err := p.Wait(t.Context()); code != 137 || err != nil {
		t.Fatalf("code %d, %v: %s", code, err, p.Tail(20))
	}
	runs, err := Runs(l.base)
	if err != nil || len(runs) != 2 {
		t.Fatalf("runs %v, %v", runs, err)
	}
	var crashed RunInfo
	for _, r := range runs {
		if r.Name != l.Run {
			crashed = r
		} else if !r.Live {
			t.Errorf("own run is not live: %+v", r)
		}
	}
	left := processes(nil, crashed.Name)
	if crashed.Live || crashed.Kept || len(left) == 0 {
		t.Fatalf("crashed run %+v with processes %v", crashed, left)
	}
	removed, err := RemoveLeftovers(l.base)
	if err != nil || len(removed) != 1 || removed[0] != crashed.Name {
		t.Errorf("removed %v, %v", removed, err)
	}
	if left := processes(nil, crashed.Name); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
	if _, err := os.Stat(crashed.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder is left: %v", err)
	}
	if mounts, err := os.ReadFile("/proc/thread-self/mounts"); err != nil || strings.Contains(string(mounts), crashed.Name) {
		t.Errorf("mounts are left: %v", err)
	}
	if len(l.Processes("amber/productpage-v1")) != 1 {
		t.Error("the live run lost its process")
	}
}

func crash(ctx context.Context, base string) int {
	w, err := ParseWorld([]byte("wan: 172.31.0.0/24\nclusters: [{name: amber, podCIDR: 10.10.0.0/24, wanAddress: 172.31.0.1}]"))
	if err != nil {
		fmt.Println(err)
		return 1
	}
	l, err := New(Config{World: w, RunDir: base, NetworkOnly: true})
	if err == nil {
		err = l.Up(ctx)
	}
	if err == nil {
		_, err = l.Start("amber/isthmusd", "orphan", []string{"sh", "-c", "sleep 1000 & sleep 1000"}, nil)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	return 1
}

func testDown(t *testing.T, l *Lab) {
	inodes := map[uint64]bool{}
	for _, n := range l.nodes {
		inodes[n.inode] = true
	}
	if err := errors.Join(l.Down(), l.Down()); err != nil {
		t.Error(err)
	}
	if left := processes(inodes, l.Run); len(left) > 0 {
		t.Errorf("processes %v are left", left)
	}
	if _, err := os.Stat(l.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder is left: %v", err)
	}
	if mounts, err := os.ReadFile("/proc/thread-self/mounts"); err != nil || strings.Contains(string(mounts), l.Run) {
		t.Errorf("mounts are left: %v", err)
	}
	if _, err := l.Start("", "late", []string{"true"}, nil); err == nil {
		t.Error("a lab that is down starts programs")
	}
}

// TestUp brings the whole bookstore up with stand-ins for the product's programs, which check what they are given.
func TestUp(t *testing.T) {
	allowed(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) }) // runs last
	bin := t.TempDir()
	for _, name := range []string{"isthmusd", "isthmus", "isthmus-agent", "coredns", "bookstore"} {
		script := fmt.Sprintf("#!/bin/sh\nexport %s=%s\nexec %s \"$@\"\n", envFake, name, self)
		if err := os.WriteFile(filepath.Join(bin, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	l := up(t, Config{BinDir: bin, Envoy: "/usr/bin/envoy"})
	var pods []string
	for _, c := range l.Clusters() {
		for _, p := range c.Pods() {
			pods = append(pods, p.Node.Name)
			if !p.Meshed || p.Agent == nil || !p.Agent.Alive() || len(p.Apps) != 1 {
				t.Errorf("pod %+v", p)
			}
		}
	}
	want := "amber/details-v1 amber/productpage-v1 amber/reviews-v1 birch/reviews-v2-a birch/reviews-v2-b birch/reviews-v2-c cedar/reviews-v3"
	if got := strings.Join(pods, " "); got != want {
		t.Errorf("pods %s, want %s", got, want)
	}
	config, err := os.ReadFile(filepath.Join(l.Dir(), "birch", "reviews-v2-b", "agent.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	wantConfig := strings.ReplaceAll(`addresses:
- 10.20.0.12
- fd00:10:20::12
capture:
  enabled: true
cluster: birch
controlPlane:
  addresses:
  - 10.20.0.2:15012
  serverName: xds.birch.mesh
dataDir: DIR/birch/reviews-v2-b/data
envoy:
  concurrency: 1
  path: /usr/bin/envoy
labels:
  app: reviews
  version: v2
name: reviews-v2-b
namespace: default
network: birch
role: sidecar
rootCert: DIR/birch/isthmusd/root-cert.pem
serviceAccount: bookstore-reviews
tokenFile: DIR/birch/reviews-v2-b/token
trustDomain: birch.mesh
`, "DIR", l.Dir())
	if string(config) != wantConfig {
		t.Errorf("agent's configuration:\n%s\nwant:\n%s", config, wantConfig)
	}

	birch := l.Cluster("birch")
	if err := birch.KillGateway("eastwest-2"); err != nil {
		t.Fatal(err)
	}
	if left := l.Processes("birch/eastwest-2"); Eventually(t.Context(), 5*time.Second, func(context.Context) error {
		return errIf(len(l.Processes("birch/eastwest-2")) > 0, "gateway lives")
	}) != nil {
		t.Errorf("gateway still has processes %v", left)
	}
	if err := birch.StartGateway(t.Context(), "eastwest-2"); err != nil {
		t.Error(err)
	}
	old := birch.ControlPlane()
	if err := birch.KillControlPlane(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := old.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := birch.StartControlPlane(t.Context()); err != nil || !birch.ControlPlane().Alive() {
		t.Error(err)
	}

	// One pod less, one more.
	data, err := os.ReadFile(filepath.Join(l.Cluster("cedar").ConfigDir, "reviews.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	more := strings.NewReplacer("name: reviews-v3", "name: reviews-v4", "10.30.0.11", "10.30.0.12").Replace(string(data))
	if err := l.Cluster("cedar").Apply("reviews.yaml", []byte(more)); err != nil {
		t.Fatal(err)
	}
	if err := l.Cluster("cedar").Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if l.Cluster("cedar").Pod("reviews-v3") != nil || l.Node("cedar/reviews-v3") != nil || l.Cluster("cedar").Pod("reviews-v4") == nil {
		t.Errorf("nodes after the change: %v", l.Nodes())
	}
}

// fake acts as one of the product's programs, as far as the lab sees them.
func fake(ctx context.Context, name string) int {
	err := func() error {
		args := strings.Join(os.Args[1:], " ")
		switch name {
		case "isthmus":
			fmt.Println("token of", args)
			return nil
		case "isthmusd":
			var cfg struct {
				DataDir string
				Admin   struct{ Socket string }
			}
			data, err := os.ReadFile(os.Args[2])
			if err == nil {
				err = yaml.Unmarshal(data, &cfg)
			}
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(cfg.DataDir, "root-cert.pem"), []byte("root"), 0o644); err != nil {
				return err
			}
			_ = os.Remove(cfg.Admin.Socket)
			ln, err := net.Listen("unix", cfg.Admin.Socket)
			if err != nil {
				return err
			}
			defer ln.Close()
			<-ctx.Done()
			return nil
		case "isthmus-agent":
			var cfg struct{ TokenFile, RootCert string }
			data, err := os.ReadFile(os.Args[3])
			if err == nil {
				err = yaml.Unmarshal(data, &cfg)
			}
			if err != nil {
				return err
			}
			if token, err := os.ReadFile(cfg.TokenFile); err != nil || !strings.Contains(string(token), "token workload --namespace") {
				return fmt.Errorf("token %q: %w", token, err)
			}
			if _, err := os.Stat(cfg.RootCert); err != nil {
				return err
			}
			return ok(ctx, "127.0.0.1:15021")
		case "coredns":
			text, err := os.ReadFile(os.Args[2])
			if err != nil || !strings.Contains(string(text), "server_name xds.") {
				return fmt.Errorf("corefile %q: %w", text, err)
			}
			return ok(ctx, "127.0.0.1:8181")
		}
		return ok(ctx, ":9080")
	}()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// ok serves status 200 until ctx ends.
func ok(ctx context.Context, address string) error {
	s := &http.Server{Addr: address, ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "ok")
	})}
	context.AfterFunc(ctx, func() { _ = s.Close() })
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func TestUpFailsWithTheReason(t *testing.T) {
	allowed(t)
	w, err := LoadWorld(bookstore)
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "isthmusd"), []byte("#!/bin/sh\necho boom: port in use\nexit 4\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := New(Config{World: w, BinDir: bin, RunDir: base(t), Tolerant: true})
	if err != nil {
		t.Fatal(err)
	}
	err = l.Up(t.Context())
	if err == nil || !strings.Contains(err.Error(), "ended with code 4") || !strings.Contains(err.Error(), "boom: port in use") {
		t.Errorf("got %v", err)
	}
	if err := l.Down(); err != nil {
		t.Error(err)
	}
}

// TestKeep leaves a run, looks into it as another process does, and ends it.
func TestKeep(t *testing.T) {
	allowed(t)
	dir := base(t)
	w, err := ParseWorld([]byte("wan: 172.31.0.0/24\nclusters: [{name: amber, podCIDR: 10.10.0.0/24, wanAddress: 172.31.0.1}]"))
	if err != nil {
		t.Fatal(err)
	}
	l, err := New(Config{World: w, RunDir: dir, NetworkOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := l.Start("amber/isthmusd", "sleeper", []string{"sleep", "1000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Keep(); err != nil {
		t.Fatal(err)
	}
	if removed, err := RemoveLeftovers(dir); err != nil || len(removed) > 0 || !p.Alive() {
		t.Errorf("a kept run was removed: %v, %v", removed, err)
	}
	runs, err := Runs(dir)
	if err != nil || len(runs) != 1 || !runs[0].Kept {
		t.Fatalf("runs %+v, %v", runs, err)
	}
	if names, err := NodesOf(runs[0]); err != nil || strings.Join(names, " ") != "amber/coredns amber/isthmusd amber/router wan" {
		t.Errorf("nodes %v, %v", names, err)
	}
	spec, err := enter(runs[0].Dir, execRequest{Node: "amber/isthmusd", Argv: []string{"cat", "/etc/resolv.conf"}, Env: os.Environ()})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := reexec(spec).Output(); err != nil || !strings.Contains(string(out), "nameserver 10.10.0.3") {
		t.Errorf("got %q, %v", out, err)
	}
	if err := remove(runs[0], time.Second); err != nil { // the owner is this process, and stays
		t.Error(err)
	}
	if _, err := p.Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestParseWorld(t *testing.T) {
	const good = "wan: 172.31.0.0/24\nclusters:\n- {name: amber, podCIDR: 10.10.0.0/24, wanAddress: 172.31.0.1, gateways: [{name: g, kind: relay, address: 10.10.0.4, wanAddress: 172.31.0.2}]}\nmachines:\n- {name: dune, cluster: amber, subnet: 10.29.0.0/24, address: 10.29.0.10}\n"
	w, err := ParseWorld([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	c := w.Clusters[0]
	if c.TrustDomain != "amber.mesh" || c.Network != "amber" || c.ControlPlane != netip.MustParseAddr("10.10.0.2") || c.DNS != netip.MustParseAddr("10.10.0.3") ||
		c.PodCIDR6.String() != "fd00:10:10::/64" || c.v6(netip.MustParseAddr("10.10.0.211")).String() != "fd00:10:10::211" || w.Machines[0].WAN != "gateways" {
		t.Errorf("got %+v", w)
	}
	for _, b := range []struct{ old, new, want string }{
		{"name: amber", "name: Amber", "DNS label"},
		{"wanAddress: 172.31.0.2", "wanAddress: 172.31.0.1", "already that of cluster amber"},
		{"wanAddress: 172.31.0.2", "wanAddress: 172.32.0.2", "not an address of wan"},
		{"kind: relay", "kind: nginx", "choose envoy or relay"},
		{"address: 10.10.0.4", "address: 10.11.0.4", "not in podCIDR"},
		{"address: 10.10.0.4", "address: 10.10.0.2", "is the address of controlPlane"},
		{"cluster: amber", "cluster: birch", `"birch" is not in this world`},
		{"address: 10.29.0.10", "address: 10.29.0.1", "not its first"},
		{"name: dune", "name: amber", "the name is taken"},
		{"podCIDR: 10.10.0.0/24", "podCIDR: 10.10.0.0/30", "at most 28 bits"},
		{"machines:", "machine:", "field machine not found"},
		{"wan: 172.31.0.0/24", "", "give an IPv4 prefix"},
	} {
		text := strings.Replace(good, b.old, b.new, 1)
		if _, err := ParseWorld([]byte(text)); err == nil || !strings.Contains(err.Error(), b.want) {
			t.Errorf("%s: got %v, want %q", b.new, err, b.want)
		}
	}
}

func TestMeshed(t *testing.T) {
	c := &Cluster{Spec: ClusterSpec{Name: "a", PodCIDR: netip.MustParsePrefix("10.0.0.0/24")}}
	for _, k := range []struct {
		meta, namespace string
		want            bool
	}{
		{"{}", "istio-injection: enabled", true},
		{"{}", "isthmus.io/injection: enabled", true},
		{"{}", "istio-injection: disabled", false},
		{`{labels: {sidecar.istio.io/inject: "false"}}`, "istio-injection: enabled", false},
		{`{annotations: {sidecar.istio.io/inject: "false"}}`, "istio-injection: enabled", false},
		{`{labels: {sidecar.istio.io/inject: "true"}}`, "x: y", true},
		{`{labels: {security.istio.io/tlsMode: istio}}`, "x: y", true},
	} {
		p, err := c.newPod([]byte("apiVersion: v1\nkind: Pod\nmetadata: " + k.meta + "\nstatus: {podIP: 10.0.0.9}"))
		if err != nil {
			t.Fatal(err)
		}
		var labels map[string]string
		if err := yaml.Unmarshal([]byte(k.namespace), &labels); err != nil {
			t.Fatal(err)
		}
		if got := meshed(p.object, labels); got != k.want {
			t.Errorf("%s in %s: %v", k.meta, k.namespace, got)
		}
	}
}

func TestGatewayPods(t *testing.T) {
	c := &Cluster{Spec: ClusterSpec{Name: "a", PodCIDR: netip.MustParsePrefix("10.0.0.0/24")}, ConfigDir: t.TempDir()}
	text := ""
	for i, istio := range []string{"ingressgateway", "egressgateway", "eastwestgateway", "other"} {
		text += fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {istio: %s, sidecar.istio.io/inject: 'true'}}\nstatus: {podIP: 10.0.0.%d}\n---\n", istio, istio, i+9)
	}
	if err := os.WriteFile(filepath.Join(c.ConfigDir, "pods.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	pods, err := c.readPods()
	if err != nil || len(pods) != 4 {
		t.Fatal(pods, err)
	}
	for name, want := range map[string]bool{"ingressgateway": true, "egressgateway": true, "eastwestgateway": false, "other": false} {
		if p := pods["a/"+name]; p.Gateway != want || p.Meshed == want {
			t.Errorf("%s: gateway %v, meshed %v", name, p.Gateway, p.Meshed)
		}
	}
}

func TestOverlay(t *testing.T) {
	got := overlay(map[string]any{"a": 1, "b": map[string]any{"c": 1, "d": 2}}, map[string]any{"b": map[string]any{"d": 3}, "e": 4})
	keys := make([]string, 0, len(got))
	for k := range got {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	if fmt.Sprint(keys, got["b"]) != "[a b e] map[c:1 d:3]" {
		t.Errorf("got %v", got)
	}
}
