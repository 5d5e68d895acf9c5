package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/vishvananda/netlink"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/catest"
	"github.com/isthmus-mesh/isthmus/internal/capture"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
)

// The test binary is also the program, and is run again inside a network namespace.
const (
	asProgram = "ISTHMUS_AGENT_TEST_PROGRAM"
	inside    = "ISTHMUS_AGENT_TEST_INSIDE"
)

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// quietControl answers each type once, with nothing.
type quietControl struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
}

func (quietControl) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	seen := map[string]bool{}
	for {
		r, err := s.Recv()
		if err != nil {
			return nil
		}
		if !seen[r.GetTypeUrl()] {
			seen[r.GetTypeUrl()] = true
			if err := s.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: r.GetTypeUrl(), Nonce: "1"}); err != nil {
				return err
			}
		}
	}
}

func freePort(t *testing.T) int { return porttest.Take(t) }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 15 s", what)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func program(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asProgram+"=1")
	return cmd
}

// TestKilledAgent: an agent that is killed leaves Envoy and the capture rules; the next takes Envoy over; SIGTERM ends all.
func TestKilledAgent(t *testing.T) { killedAgent(t, false) }

// TestKilledAgentWithCapture does the same with capture, in a network namespace.
func TestKilledAgentWithCapture(t *testing.T) {
	envoytest.Path(t)
	if os.Getenv(inside) != "" {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			t.Fatal(err)
		}
		if err := capture.Clean(); err != nil {
			t.Skip("no nftables: ", err)
		}
		killedAgent(t, true)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err != nil && !errors.As(err, &exit):
		t.Skipf("no network namespace: %v", err)
	case err != nil:
		t.Fatalf("inside the namespace: %v\n%s", err, out)
	case bytes.Contains(out, []byte("--- SKIP")):
		t.Skipf("inside the namespace:\n%s", out)
	}
}

func killedAgent(t *testing.T, captured bool) {
	envoy := envoytest.Path(t)
	const id = "spiffe://amber.mesh/ns/default/sa/web"
	root := catest.New(t)
	srv := root.Serve(t, "xds.amber.mesh", id, "secret", func(s *grpc.Server) {
		discoveryv3.RegisterAggregatedDiscoveryServiceServer(s, quietControl{})
	})
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	health := freePort(t)
	conf := write("agent.yaml", fmt.Sprintf(`
role: sidecar
name: web-1
serviceAccount: web
cluster: amber
trustDomain: amber.mesh
addresses: [127.0.0.1]
controlPlane: {addresses: [%q]}
rootCert: %s
tokenFile: %s
dataDir: %s
listenHealth: %d
envoy: {path: %s, concurrency: 1, adminPort: %d, statsPort: %d, drainTime: 200ms, logFile: %s}
capture: {enabled: %v}
`, srv.Address, root.RootFile(t), write("token", "secret"), filepath.Join(dir, "data"), health, envoy, freePort(t), freePort(t), filepath.Join(dir, "envoy.log"), captured))

	run := func() *exec.Cmd {
		cmd := program("run", "--config", conf)
		cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() })
		client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		eventually(t, "ready", func() bool {
			r, err := client.Get("http://127.0.0.1:" + strconv.Itoa(health) + "/healthz/ready")
			if err != nil {
				return false
			}
			defer r.Body.Close()
			_, _ = io.Copy(io.Discard, r.Body)
			return r.StatusCode == http.StatusOK
		})
		return cmd
	}
	pid := func() int {
		data, _ := os.ReadFile(filepath.Join(dir, "data", "envoy.pid"))
		n, _ := strconv.Atoi(string(bytes.TrimSpace(data)))
		return n
	}
	rules := func() int {
		if !captured {
			return 0
		}
		chains, err := capture.Installed()
		if err != nil {
			t.Fatal(err)
		}
		return len(chains)
	}

	first := run()
	envoyPID := pid()
	want := rules()
	if captured && want == 0 {
		t.Error("no capture rules")
	}
	if err := first.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	if syscall.Kill(envoyPID, 0) != nil {
		t.Fatal("Envoy ended with the agent")
	}
	if rules() != want {
		t.Error("the capture rules ended with the agent")
	}
	second := run()
	if pid() != envoyPID {
		t.Errorf("Envoy is process %d, was %d", pid(), envoyPID)
	}
	if err := second.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := second.Wait(); err != nil {
		t.Errorf("clean stop: %v", err)
	}
	eventually(t, "Envoy's end", func() bool {
		// Killed agents leave Envoy to whoever reaps orphans here: a zombie has ended, too.
		data, err := os.ReadFile("/proc/" + strconv.Itoa(envoyPID) + "/stat")
		return err != nil || bytes.Contains(data, []byte(") Z "))
	})
	if rules() != 0 {
		t.Error("capture rules are left after a clean stop")
	}
}

func TestCommandLine(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(bad, []byte("role: sidecar\nnames: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"run", "--help"}, 0, "tokenFile"},
		{[]string{"version"}, 0, ""},
		{[]string{"run", "--config", bad}, 1, bad + `:2: unknown field "names"`},
		{[]string{"run", "--config", "/nowhere"}, 1, "/nowhere"},
		{[]string{"bootstrap", "--config", bad}, 1, "hint:"},
		{[]string{"join", "isth1_x"}, 1, "hint:"},
		{[]string{"join"}, 1, "1 arg"},
		{[]string{"join", "--systemd", "--no-run", "isth1_x"}, 1, "one of the two"},
		{[]string{"join", "-o", "json", "isth1_x"}, 1, "no output format"},
		{[]string{"join", "--check", "isth1_x"}, 1, "hint:"},
		{[]string{"nothing"}, 1, `unknown command "nothing"`},
	} {
		out, err := program(c.args...).CombinedOutput()
		code := 0
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		if code != c.code || !strings.Contains(string(out), c.want) {
			t.Errorf("%v: exit %d, %s", c.args, code, out)
		}
	}
}
