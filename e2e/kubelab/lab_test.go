package kubelab_test

import (
	"context"
	"os"
	"path/filepath"
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
	if err := lab.Allowed(); err != nil {
		miss("%v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "kube")); err != nil {
		miss("%v: make kube builds it", err)
	}
	return dir
}

func TestControlPlanes(t *testing.T) {
	topo, err := kubelab.ParseTopology([]byte(`
clusters:
- {name: c1, flat: vpn}
- {name: c2, flat: vpn}
- {name: c3}
`))
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	l, err := kubelab.Up(t.Context(), kubelab.Config{Topology: topo, Bin: bin(t), Logs: t.TempDir(), ControlOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	})
	t.Logf("three control planes after %.1f s", time.Since(start).Seconds())
	for _, c := range l.Clusters() {
		cfg, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
		if err != nil {
			t.Fatal(err)
		}
		client, err := kubernetes.NewForConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{}); err != nil {
			t.Errorf("%s by its kubeconfig: %v", c.Name(), err)
		}
	}
	reach := func(from, to string, want bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		conn, err := l.Net().Node(from).Dial(ctx, "tcp", to)
		if err == nil {
			_ = conn.Close()
		}
		if (err == nil) != want {
			t.Errorf("%s reaches %s: %v, want %t", from, to, err, want)
		}
	}
	reach("c1/router", "192.168.102.2:6443", true) // flat
	reach("c2/control", "192.168.101.2:6443", true)
	reach("c1/router", "192.168.103.2:6443", false) // isolated
	reach("c3/router", "192.168.101.2:6443", false)
	reach("c3/router", "172.30.1.100:6443", true) // on the wire
	reach("c3/router", "172.30.1.100:2379", false)
	if err := l.Cut("c3", "c1"); err != nil {
		t.Fatal(err)
	}
	reach("c3/router", "172.30.1.100:6443", false)
	reach("c2/router", "172.30.1.100:6443", true)
	if err := l.Heal("c3", "c1"); err != nil {
		t.Fatal(err)
	}
	reach("c3/router", "172.30.1.100:6443", true)

	api := l.Cluster("c2").APIServer()
	if err := api.Cut(); err != nil {
		t.Fatal(err)
	}
	reach("c2/router", "192.168.102.2:6443", false)
	if err := api.Heal(); err != nil {
		t.Fatal(err)
	}
	reach("c2/router", "192.168.102.2:6443", true)
	if err := api.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	reach("c2/router", "192.168.102.2:6443", false)
	if err := api.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	reach("c2/router", "192.168.102.2:6443", true)
}
