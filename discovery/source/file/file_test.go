package file_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/file"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sink remembers what it is told.
type sink struct {
	mu      sync.Mutex
	inputs  map[string]mesh.Input
	said    []string // "report KEY", "forget KEY", "synced"
	least   int      // Services in any report
	changed chan struct{}
}

func newSink() *sink {
	return &sink{inputs: map[string]mesh.Input{}, least: 1 << 30, changed: make(chan struct{})}
}

func (s *sink) do(what string, change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
	s.said = append(s.said, what)
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *sink) Report(key string, in mesh.Input) {
	s.do("report "+key, func() {
		s.inputs[key] = in
		s.least = min(s.least, len(in.Services))
	})
}
func (s *sink) Forget(key string) { s.do("forget "+key, func() { delete(s.inputs, key) }) }
func (s *sink) Synced()           { s.do("synced", func() {}) }

// until waits until ok holds for what the sink was told.
func (s *sink) until(t *testing.T, what string, ok func(*sink) bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		s.mu.Lock()
		done, changed, said := ok(s), s.changed, slices.Clone(s.said)
		s.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("%s: not within 10 s; told %q", what, said)
		}
	}
}

// names lists the Services and Problems that were reported, as KEY:NAME and KEY!REASON.
func (s *sink) names() []string {
	var out []string
	for key, in := range s.inputs {
		for _, x := range in.Services {
			out = append(out, key+":"+x.Object.Name)
		}
		for _, p := range in.Problems {
			out = append(out, key+"!"+p.Reason)
		}
	}
	slices.Sort(out)
	return out
}

func (s *sink) has(t *testing.T, want ...string) {
	t.Helper()
	slices.Sort(want)
	s.until(t, fmt.Sprintf("want %q", want), func(s *sink) bool { return slices.Equal(s.names(), want) })
}

func (s *sink) count(what string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, x := range s.said {
		if x == what {
			n++
		}
	}
	return n
}

func service(name string) string {
	return "apiVersion: v1\nkind: Service\nmetadata: {name: " + name + "}\nspec: {ports: [{port: 80}]}\n"
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start runs a source on dir until the test ends, and waits for its first pass.
func start(t *testing.T, dir string) *sink {
	t.Helper()
	return run(t, file.Config{Dir: dir, Rescan: time.Minute})
}

func run(t *testing.T, cfg file.Config) *sink {
	t.Helper()
	s := newSink()
	cfg.Sink = s
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- file.New(cfg).Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	s.until(t, "synced", func(s *sink) bool { return slices.Contains(s.said, "synced") })
	return s
}

func TestFirstPass(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a.yaml", service("a"))
	write(t, dir+"/sub/deep/b.YML", service("b")+"---\n"+service("b2"))
	write(t, dir+"/c.json", `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "c"}, "spec": {"ports": [{"port": 80}]}}`)
	write(t, dir+"/notes.txt", "not for us")
	write(t, dir+"/.hidden.yaml", service("hidden"))
	write(t, dir+"/..2024/d.yaml", service("d"))
	write(t, dir+"/large.yaml", "# "+strings.Repeat("x", 4<<20))
	write(t, dir+"/bad.yaml", "a: [\n")
	must(t, os.Symlink(dir, dir+"/loop"))
	s := start(t, dir)
	s.has(t, "a.yaml:a", "bad.yaml!InvalidYAML", "c.json:c", "source!HiddenFile", "source!TooDeep", "source!TooLarge", "sub/deep/b.YML:b", "sub/deep/b.YML:b2")
	if s.said[len(s.said)-1] != "synced" {
		t.Errorf("synced is not last: %q", s.said)
	}
	for _, p := range append(s.inputs["source"].Problems, s.inputs["bad.yaml"].Problems...) {
		if p.Object.Source == "" || p.Remedy == "" || p.Message == "" {
			t.Errorf("incomplete: %v", p)
		}
	}
}

func TestChanges(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a.yaml", service("a"))
	write(t, dir+"/b.yaml", service("b"))
	s := start(t, dir)
	s.has(t, "a.yaml:a", "b.yaml:b")

	write(t, dir+"/a.yaml", service("a2"))
	s.has(t, "a.yaml:a2", "b.yaml:b")

	write(t, dir+"/a.yaml.tmp", service("a3")) // as editors save
	must(t, os.Rename(dir+"/a.yaml.tmp", dir+"/a.yaml"))
	s.has(t, "a.yaml:a3", "b.yaml:b")

	write(t, dir+"/new/sub/c.yaml", service("c"))
	s.has(t, "a.yaml:a3", "b.yaml:b", "new/sub/c.yaml:c")
	write(t, dir+"/new/sub/c.yaml", service("c2"))
	s.has(t, "a.yaml:a3", "b.yaml:b", "new/sub/c.yaml:c2")

	reports := s.count("report b.yaml")
	write(t, dir+"/b.yaml", service("b"))
	must(t, os.Remove(dir+"/a.yaml"))
	must(t, os.RemoveAll(dir+"/new"))
	s.has(t, "b.yaml:b")
	if n := s.count("report b.yaml"); n != reports {
		t.Errorf("unchanged content was reported again")
	}
	write(t, dir+"/b.yaml", "")
	s.has(t)
}

// TestMovedAside saves as editors do that keep the old file as a backup: for a moment there is none.
func TestMovedAside(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a.yaml", service("a"))
	s := run(t, file.Config{Dir: dir, Rescan: time.Minute, Quiet: 5 * time.Second})
	must(t, os.Rename(dir+"/a.yaml", dir+"/a.yaml~"))
	write(t, dir+"/a.yaml", service("a2"))
	s.has(t, "a.yaml:a2")
	if n := s.count("forget a.yaml"); n > 0 {
		t.Errorf("the file vanished %d times", n)
	}
}

// TestConfigMap swaps a link to a folder, as mounted ConfigMaps change.
func TestConfigMap(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/..1/a.yaml", service("a"))
	write(t, dir+"/..2/a.yaml", service("z"))
	must(t, os.Symlink("..1", dir+"/..data"))
	must(t, os.Symlink("..data/a.yaml", dir+"/a.yaml"))
	s := start(t, dir)
	s.has(t, "a.yaml:a")
	must(t, os.Symlink("..2", dir+"/..data_tmp"))
	must(t, os.Rename(dir+"/..data_tmp", dir+"/..data"))
	s.has(t, "a.yaml:z")
}

// TestNamespace changes the labels of a namespace that another file's pod is in.
func TestNamespace(t *testing.T) {
	dir := t.TempDir()
	namespace := "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {istio-injection: %s}}\n"
	write(t, dir+"/pod.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: []}\nstatus: {podIP: 10.0.0.1}\n")
	write(t, dir+"/ns.yaml", fmt.Sprintf(namespace, "enabled"))
	s := start(t, dir)
	tls := func(want bool) {
		t.Helper()
		s.until(t, fmt.Sprintf("TLS %v", want), func(s *sink) bool { w := s.inputs["pod.yaml"].Workloads; return len(w) == 1 && w[0].TLS == want })
	}
	tls(true)
	write(t, dir+"/ns.yaml", fmt.Sprintf(namespace, "disabled"))
	tls(false)
	write(t, dir+"/ns.yaml", fmt.Sprintf(namespace, "enabled"))
	tls(true)
	write(t, dir+"/ns.yaml", "kind: [\n")
	s.has(t, "ns.yaml!InvalidYAML")
	tls(true)
	must(t, os.Remove(dir+"/ns.yaml"))
	tls(false)
}

// TestNode moves the node that another file's pod is on.
func TestNode(t *testing.T) {
	dir := t.TempDir()
	node := "apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: %s}}\n"
	write(t, dir+"/pod.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {nodeName: n1, containers: []}\nstatus: {podIP: 10.0.0.1}\n")
	write(t, dir+"/node.yaml", fmt.Sprintf(node, "a"))
	s := start(t, dir)
	in := func(want string) {
		t.Helper()
		s.until(t, "in "+want, func(s *sink) bool {
			w := s.inputs["pod.yaml"].Workloads
			return len(w) == 1 && w[0].Locality == want
		})
	}
	in("eu/a")
	write(t, dir+"/node.yaml", fmt.Sprintf(node, "b"))
	in("eu/b")
	write(t, dir+"/node.yaml", "kind: [\n")
	s.has(t, "node.yaml!InvalidYAML")
	in("eu/b")
	must(t, os.Remove(dir+"/node.yaml"))
	in("")
}

// TestMeshConfig breaks one key of the mesh's ConfigMap: what it said stays, the other key changes.
func TestMeshConfig(t *testing.T) {
	dir := t.TempDir()
	object := "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {mesh: %q, meshNetworks: %q}\n"
	write(t, dir+"/mesh.yaml", fmt.Sprintf(object, "connectTimeout: 3s", "networks: {one: {}}"))
	s := start(t, dir)
	is := func(seconds int64, network mesh.NetworkID) {
		t.Helper()
		s.until(t, fmt.Sprintf("%d s, network %s", seconds, network), func(s *sink) bool {
			in := s.inputs["mesh.yaml"]
			return len(in.MeshConfigs) == 1 && in.MeshConfigs[0].Spec.ConnectTimeout.GetSeconds() == seconds && len(in.Networks) == 1 && in.Networks[0].ID == network
		})
	}
	is(3, "one")
	write(t, dir+"/mesh.yaml", fmt.Sprintf(object, "connectTimeout: soon", "networks: {two: {}}"))
	is(3, "two")
	write(t, dir+"/mesh.yaml", fmt.Sprintf(object, "{}", "networks: ["))
	is(10, "two")
}

// TestLost takes the folder away: what it held stays.
func TestLost(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "config")
	write(t, dir+"/a.yaml", service("a"))
	s := start(t, dir)
	must(t, os.Rename(dir, dir+".gone"))
	s.has(t, "a.yaml:a", "source!Unreadable")
	write(t, dir+".gone/b.yaml", service("b"))
	must(t, os.Rename(dir+".gone", dir))
	s.has(t, "a.yaml:a", "b.yaml:b")
	write(t, dir+"/b.yaml", service("b2"))
	s.has(t, "a.yaml:a", "b.yaml:b2")
	if n := s.count("forget a.yaml"); n > 0 {
		t.Errorf("a.yaml was forgotten")
	}
}

// TestBrokenEdit keeps what was valid, as an API server would refuse the edit.
func TestBrokenEdit(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a.yaml", service("a")+"---\n"+service("b"))
	s := start(t, dir)
	write(t, dir+"/a.yaml", strings.Replace(service("a"), "port:", "prot:", 1)+"---\n"+service("c"))
	s.has(t, "a.yaml!UnknownField", "a.yaml:a", "a.yaml:c")
	write(t, dir+"/a.yaml", "kind: [\n---\n"+service("c"))
	s.has(t, "a.yaml!InvalidYAML", "a.yaml:a", "a.yaml:c")
	write(t, dir+"/a.yaml", service("c"))
	s.has(t, "a.yaml:c")
}

// TestNeverHalf writes without pause, as programs do that truncate first, and wants no half a file reported.
func TestNeverHalf(t *testing.T) {
	dir := t.TempDir()
	content := func(n int) string {
		var b strings.Builder
		for i := range 200 {
			fmt.Fprintf(&b, "%s---\n", service(fmt.Sprintf("s%d-%d", i, n)))
		}
		return b.String()
	}
	write(t, dir+"/a.yaml", content(0))
	s := run(t, file.Config{Dir: dir, Rescan: time.Minute, Quiet: 5 * time.Second})
	for n := 1; n <= 50; n++ {
		f, err := os.Create(dir + "/a.yaml")
		must(t, err)
		for text := content(n); text != ""; { // in pieces
			k := min(len(text), 4096)
			_, err := f.WriteString(text[:k])
			must(t, err)
			text = text[k:]
		}
		must(t, f.Close())
		if n%10 == 0 {
			last := fmt.Sprintf("s199-%d", n)
			s.until(t, last, func(s *sink) bool {
				in := s.inputs["a.yaml"]
				return in.Services[199].Object.Name == last
			})
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.least != 200 {
		t.Errorf("half a file was reported: %d services", s.least)
	}
}

func TestMissing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	err := file.New(file.Config{Dir: dir, Sink: newSink()}).Run(context.Background())
	if err == nil || !strings.Contains(err.Error(), dir) || diag.HintOf(err) == "" {
		t.Errorf("got %v, hint %q", err, diag.HintOf(err))
	}
}

// TestLatency wants a change after a quiet time to be told long before a debounce would end.
func TestLatency(t *testing.T) {
	if testing.Short() {
		t.Skip("measures time")
	}
	dir := t.TempDir()
	write(t, dir+"/a.yaml", service("a"))
	s := start(t, dir)
	var took []time.Duration
	for n := range 20 {
		name := fmt.Sprintf("a%d", n)
		began := time.Now()
		write(t, dir+"/tmp", service(name))
		must(t, os.Rename(dir+"/tmp", dir+"/a.yaml"))
		s.has(t, "a.yaml:"+name)
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("median %s, longest %s", took[len(took)/2], took[len(took)-1])
	if took[len(took)/2] > 100*time.Millisecond {
		t.Errorf("the median change took %s", took[len(took)/2])
	}
}

// TestAnyChanges makes changes of every kind in any order, in bursts: in the end what was told is what is there.
func TestAnyChanges(t *testing.T) {
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 1))
		dir := t.TempDir()
		write(t, dir+"/a.yaml", service("start"))
		s := start(t, dir)
		for i := range 120 {
			name := fmt.Sprintf("%s/%s%c.yaml", dir, []string{"", "sub/", "sub/deep/"}[r.IntN(3)], 'a'+rune(r.IntN(5)))
			switch r.IntN(8) {
			case 0:
				must(t, os.RemoveAll(name))
			case 1:
				must(t, os.RemoveAll(dir+"/sub"))
			case 2:
				_ = os.Rename(dir+"/sub", dir+"/sub2.yaml")
				_ = os.Rename(dir+"/sub2.yaml", dir+"/sub")
			case 3:
				write(t, name+".new", service(fmt.Sprint("s", i)))
				must(t, os.Rename(name+".new", name))
			case 4:
				write(t, name, "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {n: \""+fmt.Sprint(i)+"\"}}\n")
			default:
				write(t, name, service(fmt.Sprint("s", i)))
			}
			if r.IntN(10) == 0 {
				time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond)
			}
		}
		want := newSink()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- file.New(file.Config{Dir: dir, Sink: want, Rescan: time.Minute}).Run(ctx) }()
		want.until(t, "a new source is synced", func(s *sink) bool { return slices.Contains(s.said, "synced") })
		cancel()
		must(t, <-done)
		expected := want.names()
		s.until(t, fmt.Sprintf("seed %d: told of %v", seed, expected), func(s *sink) bool { return slices.Equal(s.names(), expected) })
	}
}
