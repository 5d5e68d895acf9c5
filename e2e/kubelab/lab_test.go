package kubelab_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(func(context.Context) int { return m.Run() })) }

// bin is the folder of the programs; tests without it are skipped, or fail where tools are required.
func bin(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("LAB_BIN")
	if dir == "" {
		dir = "../../build/bin"
	}
	miss := func(format string, a ...any) {
		if os.Getenv("REQUIRE_TOOLS") != "" {
			t.Fatalf(format, a...)
		}
		t.Skipf(format, a...)
	}
	if testing.Short() {
		miss("clusters take a while: -short leaves them out")
	}
	if err := kubelab.Allowed(); err != nil {
		t.Skip(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "kube")); err != nil {
		miss("%v: make kube builds it", err)
	}
	return dir
}

// world has two clusters on one routed network and a third whose Pods have the addresses of the first one's.
const world = `
clusters:
- {name: c1, flat: vpn, nodes: [{name: c1-a, region: r1, zone: z1}, {name: c1-b, region: r1, zone: z2, labels: {disk: fast}}]}
- {name: c2, flat: vpn}
- {name: c3, podCIDR: 10.10.0.0/16, serviceCIDR: 10.101.0.0/16}
machines:
- {name: out, address: 172.30.9.9}
- {name: near, cluster: c1, subnet: 10.77.0.0/24, address: 10.77.0.2}
`

const objects = `
apiVersion: v1
kind: Service
metadata: {name: hello}
spec:
  type: LoadBalancer
  selector: {app: hello}
  ports: [{name: http, port: 80, targetPort: 5000, nodePort: 30080}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: hello}
spec:
  selector: {matchLabels: {app: hello}}
  template:
    metadata: {labels: {app: hello}}
    spec:
      containers:
      - name: hello
        image: isthmus/hello
        env: [{name: VERSION, value: NAME}]
        readinessProbe: {httpGet: {path: /, port: 5000}, periodSeconds: 1}
`

// The limits are those of a developer's machine: three clusters in 6 GiB, up within 30 s. Here other tests may be
// running beside, so that time is given three times over.
const (
	maxMemory = 6 << 30
	maxStart  = 90 * time.Second
)

func TestLab(t *testing.T) {
	topo, err := kubelab.ParseTopology([]byte(world))
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	l, err := kubelab.Up(t.Context(), kubelab.Config{Topology: topo, Bin: bin(t), Logs: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	})
	took := time.Since(start)
	x := lapped{t, l}
	x.deploy()

	memory := l.Net().Memory()
	t.Logf("three clusters: up after %.1f s, %d MiB with a Deployment in each", took.Seconds(), memory>>20)
	if took > maxStart || memory > maxMemory {
		t.Errorf("up after %v with %d MiB, want within %v and %d", took, memory>>20, maxStart, maxMemory>>20)
	}
	t.Run("kubeconfigs", func(t *testing.T) { lapped{t, l}.kubeconfigs() })
	t.Run("networks", func(t *testing.T) { lapped{t, l}.networks() })
	t.Run("cuts", func(t *testing.T) { lapped{t, l}.cuts() })
	t.Run("API server", func(t *testing.T) { lapped{t, l}.apiServer() })
}

type lapped struct {
	*testing.T
	l *kubelab.Lab
}

// deploy runs a server in each cluster that says the cluster's name.
func (x lapped) deploy() {
	x.Helper()
	for _, c := range x.l.Clusters() {
		file := filepath.Join(x.TempDir(), "objects.yaml")
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(objects, "NAME", c.Name())), 0o644); err != nil {
			x.Fatal(err)
		}
		if _, err := c.Kubectl(x.Context(), "apply", "-f", file); err != nil {
			x.Fatal(err)
		}
	}
	for _, c := range x.l.Clusters() {
		if err := lab.Eventually(x.Context(), time.Minute, func(ctx context.Context) error { return c.PodsReady(ctx, "default", "") }); err != nil {
			x.Fatal(err)
		}
	}
}

func (x lapped) kubeconfigs() {
	for _, c := range x.l.Clusters() {
		cfg, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
		if err != nil {
			x.Fatal(err)
		}
		client, err := kubernetes.NewForConfig(cfg)
		if err != nil {
			x.Fatal(err)
		}
		nodes, err := client.CoreV1().Nodes().List(x.Context(), metav1.ListOptions{})
		if err != nil || len(nodes.Items) != len(c.Spec.Nodes) {
			x.Errorf("%s by its kubeconfig: %d nodes (%v)", c.Name(), len(nodes.Items), err)
		}
		if c.Name() == "c1" && nodes.Items[1].Labels["topology.kubernetes.io/zone"] != "z2" {
			x.Errorf("labels of the second node: %v", nodes.Items[1].Labels)
		}
	}
}

// answer is who answers at an address when it is called from a place; "" is nobody.
func (x lapped) answer(place, address string) string {
	x.Helper()
	client := x.l.Net().Node(place).HTTP()
	client.Timeout = 700 * time.Millisecond
	resp, err := client.Get("http://" + address + "/")
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	var a struct{ Version string }
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		x.Errorf("%s: %v", address, err)
	}
	return a.Version
}

// want waits for an answer; that nobody answers must be so at once.
func (x lapped) want(place, address, want string) {
	x.Helper()
	within := 20 * time.Second
	if want == "" {
		within = time.Millisecond
	}
	if err := lab.Eventually(x.Context(), within, func(context.Context) error {
		if got := x.answer(place, address); got != want {
			return fmt.Errorf("%q answers, want %q", got, want)
		}
		return nil
	}); err != nil {
		x.Errorf("%s calls %s: %v", place, address, err)
	}
}

func (x lapped) kubectl(cluster string, args ...string) string {
	x.Helper()
	out, err := x.l.Cluster(cluster).Kubectl(x.Context(), args...)
	if err != nil || strings.TrimSpace(out) == "" {
		x.Fatalf("kubectl %v: %q, %v", args, out, err)
	}
	return strings.TrimSpace(out)
}

func (x lapped) networks() {
	pod := func(c string) string {
		return x.kubectl(c, "get", "pods", "-l", "app=hello", "-o", "jsonpath={.items[0].status.podIP}") + ":5000"
	}
	pod6 := "[" + x.kubectl("c2", "get", "pods", "-l", "app=hello", "-o", "jsonpath={.items[0].status.podIPs[1].ip}") + "]:5000"
	vip := x.kubectl("c3", "get", "service", "hello", "-o", "jsonpath={.spec.clusterIP}")
	balancer := x.kubectl("c3", "get", "service", "hello", "-o", "jsonpath={.status.loadBalancer.ingress[0].ip}")
	node3 := x.l.Cluster("c3").Spec.Nodes[0].Address.String()

	x.want("c1/router", pod("c2"), "c2") // flat
	x.want("c2/router", pod("c1"), "c1")
	x.want("c1/router", pod6, "c2")
	x.want("near", pod("c1"), "c1")
	x.want("c3/router", vip, "c3") // NAT for Pods, and for the API server's webhooks
	x.want("c3/control", vip, "c3")
	for _, from := range []string{"c1/router", "c1/control", "c2/router", "out", "near"} {
		x.want(from, balancer, "c3")
		x.want(from, node3+":30080", "c3")
	}
	x.want("out", pod("c2"), "") // isolated
	x.want("c3/router", pod("c2"), "")
	x.want("c2/router", vip, "")
	x.want("c3/router", pod("c3"), "c3")
	if c1 := pod("c1"); c1 != pod("c3") { // within its own range, but nobody has it here
		x.want("c3/router", c1, "")
	}
}

// reach checks whether a TCP connection can be made.
func (x lapped) reach(from, to string, want bool) {
	x.Helper()
	ctx, cancel := context.WithTimeout(x.Context(), time.Second)
	defer cancel()
	conn, err := x.l.Net().Node(from).Dial(ctx, "tcp", to)
	if err == nil {
		_ = conn.Close()
	}
	if (err == nil) != want {
		x.Errorf("%s reaches %s: %v, want %t", from, to, err, want)
	}
}

func (x lapped) cuts() {
	x.reach("c1/router", "192.168.102.2:6443", true) // API servers on the flat network
	x.reach("c2/control", "192.168.101.2:6443", true)
	x.reach("c1/router", "192.168.103.2:6443", false)
	x.reach("c3/router", "192.168.101.2:6443", false)
	x.reach("c3/router", "172.30.1.100:6443", true) // and on the wire
	x.reach("c3/router", "172.30.1.100:2379", false)
	if err := x.l.Cut("c3", "c1"); err != nil {
		x.Fatal(err)
	}
	x.reach("c3/router", "172.30.1.100:6443", false)
	x.reach("c2/router", "172.30.1.100:6443", true)
	if err := x.l.Heal("c3", "c1"); err != nil {
		x.Fatal(err)
	}
	x.reach("c3/router", "172.30.1.100:6443", true)
	if err := x.l.Cut("c9", "c1"); err == nil {
		x.Error("a cluster that does not exist is cut off")
	}
}

func (x lapped) apiServer() {
	api := x.l.Cluster("c2").APIServer()
	do := func(err error) {
		x.Helper()
		if err != nil {
			x.Fatal(err)
		}
	}
	do(api.Cut())
	x.reach("c2/router", "192.168.102.2:6443", false)
	do(api.Heal())
	x.reach("c2/router", "192.168.102.2:6443", true)
	do(api.Stop(x.Context()))
	x.reach("c2/router", "192.168.102.2:6443", false)
	do(api.Start(x.Context()))
	x.reach("c2/router", "192.168.102.2:6443", true)
	if name := x.kubectl("c2", "get", "service", "hello", "-o", "name"); name != "service/hello" {
		x.Errorf("data of before: %q", name)
	}
}
