package node_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab"
	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// appEnv makes this program the test's application instead.
const appEnv = "ISTHMUS_NODE_TEST_APP"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(appEnv) != "":
		os.Exit(app())
	case os.Getenv("CNI_COMMAND") != "":
		os.Exit(recorder())
	}
	os.Exit(lab.Main(func(context.Context) int { return m.Run() }))
}

// recorder is a chained network plugin: it writes down what it was called with, and fails while a file "fail" is there.
func recorder() int {
	const dir = "/opt/cni/bin/"
	stdin, _ := io.ReadAll(os.Stdin)
	var conf map[string]json.RawMessage
	_ = json.Unmarshal(stdin, &conf)
	f, err := os.OpenFile(dir+"recorded", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 1
	}
	defer f.Close()
	_, netnsErr := os.Stat(os.Getenv("CNI_NETNS"))
	var prev bytes.Buffer
	_ = json.Compact(&prev, conf["prevResult"])
	fmt.Fprintf(f, "%s %s %s netns=%v %s\n", os.Getenv("CNI_COMMAND"), os.Getenv("CNI_IFNAME"), os.Getenv("CNI_ARGS"), netnsErr == nil, prev.String())
	if _, err := os.Stat(dir + "fail"); err == nil && os.Getenv("CNI_COMMAND") == "ADD" {
		fmt.Println(`{"cniVersion":"1.0.0","code":101,"msg":"told to fail"}`)
		return 1
	}
	if os.Getenv("CNI_COMMAND") == "ADD" {
		fmt.Printf("%s", conf["prevResult"])
	}
	return 0
}

// app answers HTTP on port 8080 of every address: who it is, who asks, and on /health what it was told. The same over
// TLS on 8443; on 9090 gRPC health checks; on UDP 8081 its name.
func app() int {
	var healthy atomic.Bool
	healthy.Store(true)
	name, _ := os.Hostname()
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "%s %s", name, from)
	})
	mux.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) {
		if !healthy.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/set", func(_ http.ResponseWriter, r *http.Request) { healthy.Store(r.URL.Query().Get("healthy") == "true") })
	go func() {
		l, err := net.Listen("tcp", "[::]:8443")
		if err != nil {
			panic(err)
		}
		s := httptest.NewUnstartedServer(mux)
		s.Listener = l
		s.StartTLS()
	}()
	go func() {
		l, err := net.Listen("tcp", "[::]:9090")
		if err != nil {
			panic(err)
		}
		s := grpc.NewServer()
		healthv1.RegisterHealthServer(s, health.NewServer())
		panic(s.Serve(l))
	}()
	go func() {
		c, err := net.ListenPacket("udp", "[::]:8081")
		if err != nil {
			panic(err)
		}
		for b := make([]byte, 100); ; {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				panic(err)
			}
			_, _ = c.WriteTo([]byte(name), from)
		}
	}()
	fmt.Println("serving as", name)
	fmt.Println(http.ListenAndServe("[::]:8080", mux))
	return 1
}

// world is one cluster with two nodes.
type world struct {
	t      *testing.T
	c      *kubelab.Cluster
	client kubernetes.Interface
	n      *node.Node
	logs   string
	cni    string // configuration
	bin    string // plugins
	files  string // /var/lib/test of the nodes
	out    *lab.Node
}

// cluster brings up the world of a test, or skips it where tools are missing.
func cluster(t *testing.T) *world {
	t.Helper()
	miss := func(format string, a ...any) {
		if os.Getenv("REQUIRE_TOOLS") != "" {
			t.Fatalf(format, a...)
		}
		t.Skipf(format, a...)
	}
	bin := os.Getenv("LAB_BIN")
	if bin == "" {
		bin = "../../../build/bin"
	}
	if testing.Short() {
		miss("a cluster takes a while: -short leaves it out")
	}
	if os.Getuid() != 0 || lab.Rootless() {
		miss("nodes need root")
	}
	if _, err := os.Stat(filepath.Join(bin, "kube")); err != nil {
		miss("%v: make kube builds it", err)
	}
	topo, err := kubelab.ParseTopology([]byte(`{clusters: [{name: c1, nodes: [{name: n1, zone: a}, {name: n2, zone: b}]}],
		machines: [{name: outside, address: 172.30.200.5}]}`))
	if err != nil {
		t.Fatal(err)
	}
	l, err := kubelab.Up(t.Context(), kubelab.Config{Topology: topo, Bin: bin, Logs: t.TempDir(), ControlOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	})
	w := &world{t: t, c: l.Cluster("c1"), logs: t.TempDir(), cni: t.TempDir(), bin: t.TempDir(), files: t.TempDir(), out: l.Net().Node("outside")}
	plugin := filepath.Join(t.TempDir(), "labcni")
	build := exec.Command("go", "build", "-o", plugin, "github.com/isthmus-mesh/isthmus/e2e/kubelab/cmd/labcni")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the plugin: %v\n%s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := w.c.Spec
	pod := s.PodCIDR.Addr().As4()
	pod6 := s.PodCIDR6.Addr().As16()
	address := func(k byte) []netip.Addr {
		a := netip.MustParsePrefix("fd30::/64").Addr().As16()
		a[13], a[15] = 1, k
		return []netip.Addr{s.Nodes[k-1].Address, netip.AddrFrom16(a)}
	}
	subnet := func(k byte) []netip.Prefix {
		a, b := pod, pod6
		a[2], b[7] = k, k
		return []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4(a), 24), netip.PrefixFrom(netip.AddrFrom16(b), 64)}
	}
	w.n, err = node.New(node.Config{
		REST: w.c.REST(), Router: w.c.Router.Path, ProxyNamespaces: []string{w.c.Control.Path},
		Nodes: []node.Spec{
			{Name: "n1", Labels: map[string]string{"topology.kubernetes.io/zone": "a"}, PodCIDRs: subnet(1), Addresses: address(1)},
			{Name: "n2", Labels: map[string]string{"topology.kubernetes.io/zone": "b"}, PodCIDRs: subnet(2), Addresses: address(2)},
		},
		Images: map[string]node.Program{
			"app":   {Command: []string{self}, Env: []string{appEnv + "=1"}},
			"shell": {Command: []string{"/bin/sh", "-c"}, Args: []string{"exec sleep 100000"}},
		},
		CNIConfDir: w.cni, CNIBinDir: w.bin, CNIPlugin: plugin, RunDir: t.TempDir(), LogDir: w.logs,
		ServiceCIDRs: []netip.Prefix{s.ServiceCIDR, s.ServiceCIDR6}, LoadBalancer: s.LoadBalancer, WANLink: lab.LinkWAN,
		HostPaths: map[string]string{"/var/lib/test": w.files}, Backoff: 200 * time.Millisecond,
		Scheduler: true, Log: slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.n.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error("the nodes ended:", err)
		}
	})
	if w.client, err = w.c.Client(); err != nil {
		t.Fatal(err)
	}
	w.within(30*time.Second, "the nodes are ready", func() error {
		select {
		case <-w.n.Ready():
			return nil
		default:
			return fmt.Errorf("not yet")
		}
	})
	w.within(30*time.Second, "the default service account exists", func() error {
		_, err := w.client.CoreV1().ServiceAccounts("default").Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return w
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	if testing.Verbose() {
		_, _ = os.Stderr.Write(b)
	}
	return len(b), nil
}

// within waits for a condition.
func (w *world) within(d time.Duration, what string, check func() error) {
	w.t.Helper()
	if err := lab.Eventually(w.t.Context(), d, func(context.Context) error { return check() }); err != nil {
		w.dump()
		w.t.Fatalf("%s: %v", what, err)
	}
}

// dump shows what there is when a test fails.
func (w *world) dump() {
	pods, err := w.client.CoreV1().Pods("").List(w.t.Context(), metav1.ListOptions{})
	if err != nil {
		return
	}
	for _, p := range pods.Items {
		status, _ := yaml.Marshal(p.Status)
		w.t.Logf("pod %s/%s on %s:\n%s", p.Namespace, p.Name, p.Spec.NodeName, status)
	}
	events, _ := w.client.CoreV1().Events("").List(w.t.Context(), metav1.ListOptions{})
	for _, e := range events.Items {
		w.t.Logf("event %s %s: %s", e.InvolvedObject.Name, e.Reason, e.Message)
	}
}

// apply makes objects from YAML documents.
func (w *world) apply(text string) {
	w.t.Helper()
	for _, doc := range strings.Split(text, "\n---\n") {
		var kind metav1.TypeMeta
		must(w.t, yaml.Unmarshal([]byte(doc), &kind))
		ctx, o, err := w.t.Context(), metav1.CreateOptions{}, error(nil)
		switch kind.Kind {
		case "Pod":
			_, err = w.client.CoreV1().Pods("default").Create(ctx, decode[corev1.Pod](w.t, doc), o)
		case "Service":
			_, err = w.client.CoreV1().Services("default").Create(ctx, decode[corev1.Service](w.t, doc), o)
		case "Endpoints":
			_, err = w.client.CoreV1().Endpoints("default").Create(ctx, decode[corev1.Endpoints](w.t, doc), o) //nolint:staticcheck // old, not gone
		case "ConfigMap":
			_, err = w.client.CoreV1().ConfigMaps("default").Create(ctx, decode[corev1.ConfigMap](w.t, doc), o)
		case "Secret":
			_, err = w.client.CoreV1().Secrets("default").Create(ctx, decode[corev1.Secret](w.t, doc), o)
		case "Deployment":
			_, err = w.client.AppsV1().Deployments("default").Create(ctx, decode[appsv1.Deployment](w.t, doc), o)
		case "DaemonSet":
			_, err = w.client.AppsV1().DaemonSets("default").Create(ctx, decode[appsv1.DaemonSet](w.t, doc), o)
		default:
			w.t.Fatalf("unknown kind %q", kind.Kind)
		}
		if err != nil {
			w.t.Fatalf("%s: %v", kind.Kind, err)
		}
	}
}

func decode[T any](t *testing.T, doc string) *T {
	t.Helper()
	out := new(T)
	must(t, yaml.UnmarshalStrict([]byte(doc), out))
	return out
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pod waits until a Pod is as check wants it.
func (w *world) pod(name, what string, check func(*corev1.Pod) bool) *corev1.Pod {
	w.t.Helper()
	var pod *corev1.Pod
	w.within(60*time.Second, name+" "+what, func() (err error) {
		pod, err = w.client.CoreV1().Pods("default").Get(w.t.Context(), name, metav1.GetOptions{})
		if err == nil && !check(pod) {
			err = fmt.Errorf("phase %s", pod.Status.Phase)
		}
		return err
	})
	return pod
}

func (w *world) delete(name string) {
	w.t.Helper()
	must(w.t, w.client.CoreV1().Pods("default").Delete(w.t.Context(), name, metav1.DeleteOptions{}))
	w.within(60*time.Second, name+" is gone", func() error {
		if _, err := w.client.CoreV1().Pods("default").Get(w.t.Context(), name, metav1.GetOptions{}); err == nil {
			return fmt.Errorf("still there")
		}
		return nil
	})
}

func ready(p *corev1.Pod) bool { return condition(p, corev1.PodReady) == corev1.ConditionTrue }

func condition(p *corev1.Pod, t corev1.PodConditionType) corev1.ConditionStatus {
	for _, c := range p.Status.Conditions {
		if c.Type == t {
			return c.Status
		}
	}
	return ""
}

// exec runs a shell command in a Pod.
func (w *world) exec(pod, container, script string) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	out, errOut, code, err := w.n.Exec(ctx, "default", pod, container, []string{"sh", "-c", script}, nil)
	if err != nil || code != 0 {
		w.t.Fatalf("in %s: %s: %d, %v\n%s%s", pod, script, code, err, out, errOut)
	}
	return out
}

// get asks an address over HTTP from inside a Pod, or from the router ("") or another node of the lab.
func (w *world) get(from, url string) (string, error) {
	dial := w.n.Router().DialContext
	if from == "control" {
		dial = w.c.Control.Dial
	} else if from == "outside" {
		dial = w.out.Dial
	} else if from != "" {
		ns, _, err := w.n.NetNS("default", from)
		if err != nil {
			return "", err
		}
		dial = ns.DialContext
	}
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	res, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", res.StatusCode)
	}
	return string(body), err
}
