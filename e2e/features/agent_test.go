package features

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// envoyPID reads which process is the Envoy of a pod in amber, NAMESPACE.NAME.
func (w *world) envoyPID(pod string) int {
	w.t.Helper()
	data, err := os.ReadFile(filepath.Join(w.Cluster("amber").Dir, pod, "data", "envoy.pid"))
	if err != nil {
		w.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || syscall.Kill(pid, 0) != nil {
		w.t.Fatalf("envoy of %s: process %d, %v", pod, pid, err)
	}
	return pid
}

// ready asks an agent how it is, from another pod.
func (w *world) ready(ctx context.Context, node string) (int, error) {
	a, err := w.get(ctx, client("legacy"), fmt.Sprintf("http://%s:15021/healthz/ready", w.Node(node).IP()))
	return a.status, err
}

const teapot = `apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: teapot, namespace: bar}
spec:
  hosts: [httpbin.foo.svc.cluster.local]
  http:
  - match: [{uri: {exact: /teapot}}]
    directResponse: {status: 418}
  - route: [{destination: {host: httpbin.foo.svc.cluster.local}}]
`

// TestAgentAndEnvoy: what the sidecar consists of, and what happens when one of its two processes dies.
func TestAgentAndEnvoy(t *testing.T) {
	w := up(t, "namespaces", nil)
	url := "http://" + host("foo") + ":8000/"
	w.want(client("bar"), url, 200)

	text, err := w.admin(t.Context(), server("foo"), "/server_info")
	var info struct {
		Version, State string
		Node           struct{ ID string }
	}
	if err != nil || json.Unmarshal([]byte(text), &info) != nil {
		t.Fatal(err, text)
	}
	id := fmt.Sprintf("sidecar~%s~httpbin.foo~foo.svc.cluster.local", w.Node(server("foo")).IP())
	if info.Node.ID != id || !strings.Contains(info.Version, "/1.40.") || info.State != "LIVE" {
		t.Errorf("envoy is %s %s, node id %s; want 1.40, %s", info.Version, info.State, info.Node.ID, id)
	}
	for _, from := range []string{client("bar"), client("legacy"), "amber/isthmusd"} {
		for _, ip := range w.Node(server("foo")).Addresses {
			if a, err := w.get(t.Context(), from, "http://"+netip.AddrPortFrom(ip, 15000).String()+"/server_info"); err == nil && a.status == 200 {
				t.Errorf("%s reaches the admin interface of foo's server at %s: %.80q", from, ip, a.body)
			}
		}
	}

	t.Run("the agents are killed", func(t *testing.T) {
		w := &world{w.Lab, t}
		pods := []string{"foo.httpbin", "bar.sleep"}
		before := map[string]int{}
		w.underLoad(client("bar"), url, 50, 4*time.Second, func() {
			for _, name := range pods {
				before[name] = w.envoyPID(name)
				agent := w.Cluster("amber").Pod(name).Agent
				if err := agent.Kill(syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				if _, err := agent.Wait(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if code, err := w.ready(t.Context(), server("foo")); err == nil {
				t.Errorf("a dead agent answers %d", code)
			}
			w.apply("amber", "teapot.yaml", teapot) // waits until somebody carries it
			for _, name := range pods {
				if _, err := w.Restart(w.Cluster("amber").Pod(name).Agent); err != nil {
					t.Fatal(err)
				}
				w.eventually(func(ctx context.Context) error {
					code, err := w.ready(ctx, "amber/"+name)
					if err == nil && code != 200 {
						err = fmt.Errorf("%s is not ready: %d", name, code)
					}
					return err
				})
			}
			w.want(client("bar"), url+"teapot", 418)
		})
		for _, name := range pods {
			if now := w.envoyPID(name); now != before[name] {
				t.Errorf("envoy of %s was %d and is %d", name, before[name], now)
			}
		}
	})

	t.Run("Envoy is killed", func(t *testing.T) {
		w := &world{w.Lab, t}
		before := w.envoyPID("foo.httpbin")
		if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for _, code := range []int{503, 200} {
			w.eventually(func(ctx context.Context) error {
				got, err := w.ready(ctx, server("foo"))
				if err == nil && got != code {
					err = fmt.Errorf("ready says %d, want %d", got, code)
				}
				return err
			})
		}
		if now := w.envoyPID("foo.httpbin"); now == before {
			t.Error("it is the same Envoy")
		}
		if a := w.want(client("bar"), url, 200); a.Caller != "spiffe://amber.mesh/ns/bar/sa/sleep" {
			t.Errorf("afterwards the server sees %q", a.Caller)
		}
	})
}
