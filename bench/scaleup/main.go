// Command scaleup measures, on two Kubernetes clusters of the lab that share no network, how long it takes from kubectl
// apply of a Deployment with one more replica in one cluster to the first request that the new pod serves for a client
// in the other cluster, and what the programs weigh at rest.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

const (
	changes = 50
	batch   = 5 // replicas that come one after another before all but one go
	rate    = 200
	topo    = `clusters: [{name: c1, hideAPIServer: true}, {name: c2, hideAPIServer: true}]`
	objects = `apiVersion: v1
kind: Namespace
metadata: {name: bench, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Service
metadata: {name: hello, namespace: bench, labels: {isthmus.io/export: "true"}}
spec: {selector: {app: hello}, ports: [{name: http, port: 5000}]}
---
`
	deployment = `apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: bench}
spec:
  replicas: %[3]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: %[1]s, image: %[2]s}]
`
)

func main() {
	os.Exit(lab.Main(func(ctx context.Context) int {
		if err := run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			return 1
		}
		return 0
	}))
}

// bench is the lab with the mesh on it.
type bench struct {
	lab      *kubelab.Lab
	from, to *kubelab.Cluster // the client's cluster, and that of the pods
	bin, dir string
	ready    sync.Map // pod name -> time at which the API server said that it is ready
}

func run(ctx context.Context) (err error) {
	b := &bench{bin: "build/bin"}
	if dir := os.Getenv("LAB_BIN"); dir != "" {
		b.bin = dir
	}
	if b.dir, err = os.MkdirTemp("", "scaleup"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	topology, err := kubelab.ParseTopology([]byte(topo))
	if err != nil {
		return err
	}
	if b.lab, err = kubelab.Up(ctx, kubelab.Config{Topology: topology, Bin: b.bin}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.lab.Down()) }()
	b.from, b.to = b.lab.Cluster("c1"), b.lab.Cluster("c2")
	if err := b.setUp(ctx); err != nil {
		return err
	}
	fmt.Printf("%d processors, %s; two clusters of the lab, separate networks and roots; %d new pods, one after another\n\n", runtime.NumCPU(), runtime.Version(), changes)
	total, ready, err := b.scale(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("%-76s %8s %8s %8s\n", "a Deployment in c2 gets one replica more; a client in c1 sends 200 a second", "p50", "p99", "max")
	row("kubectl apply begins: first request that the new pod serves", total)
	row("API server says that the pod is ready: first request that it serves", ready)
	return nil
}

// row prints quantiles by nearest rank.
func row(what string, d []time.Duration) {
	slices.Sort(d)
	ms := func(percent int) string {
		return fmt.Sprintf("%.0f ms", d[max(0, (len(d)*percent+99)/100-1)].Seconds()*1000)
	}
	fmt.Printf("%-76s %8s %8s %8s\n", what, ms(50), ms(99), ms(100))
}

func (b *bench) isthmus(ctx context.Context, c *kubelab.Cluster, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "isthmus"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "ISTHMUS_CONTEXT="+c.Name(), "HOME="+b.dir)
	var out, complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("isthmus %s in %s: %w: %s", args[0], c.Name(), err, complaint.String())
	}
	return strings.TrimSpace(out.String()), nil
}

func (b *bench) apply(ctx context.Context, c *kubelab.Cluster, text string) error {
	file := filepath.Join(b.dir, "apply.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "apply", "-f", file)
	return err
}

// until tries until it works.
func until(ctx context.Context, limit time.Duration, what string, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s within %s: %w", what, limit, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// setUp installs the mesh in both clusters, joins them and starts the applications.
func (b *bench) setUp(ctx context.Context) error {
	for _, c := range b.lab.Clusters() {
		if _, err := b.isthmus(ctx, c, "install", "--yes", "--context", c.Name(), "--set", "cluster.name="+c.Name()+",isthmusd.replicas=1"); err != nil {
			return err
		}
	}
	var token string
	err := until(ctx, 30*time.Second, "a token", func() (err error) {
		token, err = b.isthmus(ctx, b.from, "token", "create", "--for", b.to.Name(), "--auto-approve")
		return err
	})
	if err != nil {
		return err
	}
	join := func() error { _, err := b.isthmus(ctx, b.to, "join", token); return err }
	if err := until(ctx, 30*time.Second, "join", join); err != nil {
		return err
	}
	if err := b.apply(ctx, b.from, objects+fmt.Sprintf(deployment, "sleep", "curlimages/curl", 1)); err != nil {
		return err
	}
	if err := b.apply(ctx, b.to, objects+fmt.Sprintf(deployment, "hello", "isthmus/hello", 1)); err != nil {
		return err
	}
	for _, c := range b.lab.Clusters() {
		if err := until(ctx, time.Minute, "pods", func() error { return c.PodsReady(ctx, "bench", "") }); err != nil {
			return err
		}
	}
	return until(ctx, 30*time.Second, "a first call", func() error {
		_, complaint, code, err := b.from.Exec(ctx, "bench/sleep", "sleep", "caller", "--strict", "--url", "http://hello.bench.global:5000/")
		if err == nil && code != 0 {
			err = errors.New(complaint)
		}
		return err
	})
}

// watch notes when pods are ready.
func (b *bench) watch(ctx context.Context) error {
	client, err := b.to.Client()
	if err != nil {
		return err
	}
	w, err := client.CoreV1().Pods("bench").Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	go func() {
		for e := range w.ResultChan() {
			p, ok := e.Object.(*corev1.Pod)
			if ok && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			}) {
				b.ready.LoadOrStore(p.Name, time.Now())
			}
		}
	}()
	return nil
}

// scale makes the changes while a client calls, and returns how long each took from the command, and from readiness.
func (b *bench) scale(ctx context.Context) (total, ready []time.Duration, err error) {
	if err := b.memory(ctx); err != nil {
		return nil, nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if err := b.watch(ctx); err != nil {
		return nil, nil, err
	}
	if err := until(ctx, time.Minute, "the first pod", func() error { return b.count(1) }); err != nil {
		return nil, nil, err
	}
	calls := b.call(ctx)
	defer func() { stop(); err = errors.Join(err, calls.wait()) }()
	for n := 0; n < changes; n += batch {
		known := map[string]bool{}
		b.ready.Range(func(name, _ any) bool { known[name.(string)] = true; return true })
		var starts []time.Time
		for i := 1; i <= batch; i++ {
			starts = append(starts, time.Now())
			if err := b.apply(ctx, b.to, fmt.Sprintf(deployment, "hello", "isthmus/hello", i+1)); err != nil {
				return nil, nil, err
			}
			if err := until(ctx, time.Minute, "a new pod", func() error { return b.count(len(known) + i) }); err != nil {
				return nil, nil, err
			}
			time.Sleep(time.Second) // it is to be served, and things to come to rest
		}
		for i, pod := range b.news(known) {
			var served time.Time
			if err := until(ctx, 20*time.Second, "a request served by "+pod.name, func() error {
				var ok bool
				if served, ok = calls.first(pod.name); !ok {
					return errors.New("none yet")
				}
				return nil
			}); err != nil {
				return nil, nil, err
			}
			total, ready = append(total, served.Sub(starts[i])), append(ready, served.Sub(pod.ready))
		}
		if err := b.one(ctx); err != nil {
			return nil, nil, err
		}
	}
	return total, ready, nil
}

// one takes all pods but one away.
func (b *bench) one(ctx context.Context) error {
	if err := b.apply(ctx, b.to, fmt.Sprintf(deployment, "hello", "isthmus/hello", 1)); err != nil {
		return err
	}
	return until(ctx, time.Minute, "one pod left", func() error {
		out, err := b.to.Kubectl(ctx, "get", "pods", "-n", "bench", "-o", "name")
		if n := len(strings.Fields(out)); err == nil && n != 1 {
			err = fmt.Errorf("%d pods", n)
		}
		return err
	})
}

func (b *bench) count(want int) error {
	n := 0
	b.ready.Range(func(any, any) bool { n++; return true })
	if n < want {
		return fmt.Errorf("%d pods were ready so far, want %d", n, want)
	}
	return nil
}

type came struct {
	name  string
	ready time.Time
}

// news lists the pods that are not known, as they became ready.
func (b *bench) news(known map[string]bool) (out []came) {
	b.ready.Range(func(name, at any) bool {
		if !known[name.(string)] {
			out = append(out, came{name.(string), at.(time.Time)})
		}
		return true
	})
	slices.SortFunc(out, func(x, y came) int { return x.ready.Compare(y.ready) })
	return out
}

// callers are clients in the client's cluster that note when each pod answered first.
type callers struct {
	mu   sync.Mutex
	seen map[string]time.Time
	err  error
	all  sync.WaitGroup
}

func (c *callers) first(pod string) (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, ok := c.seen[pod]
	return at, ok
}

func (c *callers) wait() error {
	c.all.Wait()
	return c.err
}

// call starts two clients, so that one sends while the other is started again. They end with ctx.
func (b *bench) call(ctx context.Context) *callers {
	c := &callers{seen: map[string]time.Time{}}
	for i := range 2 {
		c.all.Add(1)
		go func() {
			defer c.all.Done()
			time.Sleep(time.Duration(i) * 2 * time.Second)
			for ctx.Err() == nil {
				out, complaint, code, err := b.from.Exec(ctx, "bench/sleep", "sleep", "caller", "--each", "--json",
					"--url", "http://hello.bench.global:5000/", "--rate", strconv.Itoa(rate/2), "--duration", "4s")
				if ctx.Err() != nil {
					return
				}
				if err == nil && code != 0 {
					err = fmt.Errorf("caller: exit code %d: %s", code, complaint)
				}
				c.note(out, err)
			}
		}()
	}
	return c
}

func (c *callers) note(out string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = errors.Join(c.err, err)
	for line := range strings.Lines(out) {
		var r struct {
			End    time.Time
			Status int
			Pod    string
		}
		if json.Unmarshal([]byte(line), &r) != nil || r.Status != 200 || r.Pod == "" {
			continue
		}
		if at, ok := c.seen[r.Pod]; !ok || r.End.Before(at) {
			c.seen[r.Pod] = r.End
		}
	}
}

// memory prints what the programs of some pods weigh after a while without requests.
func (b *bench) memory(ctx context.Context) error {
	time.Sleep(15 * time.Second)
	fmt.Printf("resident memory at rest, 1 exported service (of that, not backed by files)\n")
	for _, p := range []struct{ pod, container string }{
		{"istio-system/isthmusd", ""}, {"istio-system/istio-eastwestgateway", ""}, {"istio-system/isthmus-dns", ""}, {"bench/sleep", "istio-proxy"},
	} {
		ns, _, _, err := b.from.Exec(ctx, p.pod, p.container, "readlink", "/proc/self/ns/net")
		if err != nil {
			return err
		}
		if err := weigh(p.pod, strings.TrimSpace(ns)); err != nil {
			return err
		}
	}
	fmt.Println()
	return nil
}

// weigh prints a line for each program in a network namespace.
func weigh(pod, ns string) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if at, err := os.Readlink(dir + "/ns/net"); err != nil || at != ns {
			continue
		}
		text, err := os.ReadFile(dir + "/status")
		if err != nil {
			continue // it has ended
		}
		field := map[string]string{}
		for line := range strings.Lines(string(text)) {
			k, v, _ := strings.Cut(line, ":")
			field[k] = strings.TrimSpace(v)
		}
		if field["VmRSS"] == "" || field["Name"] == "samples" {
			continue
		}
		mib := func(k string) int {
			kb, _ := strconv.Atoi(strings.TrimSuffix(field[k], " kB"))
			return (kb + 512) / 1024
		}
		fmt.Printf("%-14s in %-36s %4d MiB (%d)\n", field["Name"], pod, mib("VmRSS"), mib("RssAnon"))
	}
	return nil
}
