// Command xds measures what isthmusd costs under xDS clients with the node ids of Istio's sidecars: their connection, one
// endpoint that changes, and their return after a restart. The same change by a bare go-control-plane LinearCache, which
// reads, translates and compares nothing, is the floor.
package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	changes  = 20
	deadline = 60 * time.Second
)

// load is one line of the table.
type load struct {
	services, pods, clients int
	sotw                    bool
}

func (l load) String() string {
	kind := "delta"
	if l.sotw {
		kind = "sotw"
	}
	return fmt.Sprintf("%5d services x %2d, %4d clients, %s", l.services, l.pods, l.clients, kind)
}

func main() {
	if n, err := strconv.Atoi(os.Getenv("BENCH_LINEAR")); err == nil {
		if err := linear(n); err != nil {
			fmt.Fprintln(os.Stderr, "linear cache:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	fmt.Printf("%d processors, %s; clients and servers on one machine, over loopback; %d changes each, one after another\n\n", runtime.NumCPU(), runtime.Version(), changes)
	fmt.Printf("%-46s %10s %9s %9s | %s\n", "isthmusd", "connect", "", "", "one endpoint changes")
	fmt.Printf("%-46s %10s %9s %9s | %9s %9s %9s %9s\n", "", "CPU", "MiB more", "MB sent", "CPU", "p50", "p99", "bytes")
	only := strings.Join(os.Args[1:], " ") // words of the rows to measure, or "envoy"
	var base time.Duration
	for _, l := range []load{{1000, 10, 1, false}, {1000, 10, 100, false}, {1000, 10, 100, true}, {1000, 10, 1000, false}, {1000, 10, 1000, true}, {10000, 2, 100, false}, {10000, 2, 100, true}} {
		if !strings.Contains(l.String(), only) {
			continue
		}
		r, err := measure(ctx, l)
		if err != nil {
			return fmt.Errorf("%s: %w", l, err)
		}
		fmt.Printf("%-46s %8.2f s %9d %9.1f | %6.1f ms %6.1f ms %6.1f ms %9d\n", l, r.connect.Seconds(), r.memory>>10, float64(r.bytes)/1e6, ms(r.change), ms(r.p50), ms(r.p99), r.changed)
		if l.clients == 100 && !l.sotw && l.services == 1000 {
			base = r.change
			fmt.Printf("%-46s %.2f %% of the bytes of a first connection\n", "  after a restart clients resume with", 100*float64(r.resumed)/float64(r.bytes))
		}
	}
	if only == "" || only == "envoy" {
		rest, storm, err := measureEnvoy(ctx)
		if err != nil {
			return fmt.Errorf("envoy: %w", err)
		}
		fmt.Printf("\nEnvoy, from a changed VirtualService to the first request that it answers\n%-46s %s\n%-46s %s\n", "at rest, one after another", rest, fmt.Sprintf("%.0f a second for %s", 1/stormEvery.Seconds(), stormTime), storm)
	}
	if only != "" {
		return nil
	}
	floor, err := measureLinear(ctx, load{1000, 10, 100, false})
	if err != nil {
		return fmt.Errorf("linear cache: %w", err)
	}
	fmt.Printf("\n%-46s %41s %6.1f ms %6.1f ms %6.1f ms\n", "LinearCache, 1000 services x 10, 100 clients", "|", ms(floor.change), ms(floor.p50), ms(floor.p99))
	fmt.Printf("isthmusd, with reading and translating, to LinearCache, CPU of one change: %.2fx\n", float64(base)/float64(floor.change))
	return nil
}

func ms(d time.Duration) float64 { return d.Seconds() * 1000 }

type result struct {
	connect, change, p50, p99 time.Duration
	memory                    int // KiB
	bytes, changed, resumed   int64
}

// measure runs one isthmusd and its clients.
func measure(ctx context.Context, l load) (r result, err error) {
	dir, err := os.MkdirTemp("", "isthmus-bench")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := write(dir, l); err != nil {
		return r, err
	}
	addr, err := freeAddr()
	if err != nil {
		return r, err
	}
	p, err := startDaemon(ctx, dir, addr)
	if err != nil {
		return r, err
	}
	defer func() { p.stop() }()
	before := p.cpu()
	_, anon := p.memory()
	c, err := connect(ctx, addr, l, l.services)
	if err != nil {
		return r, err
	}
	r.connect, r.bytes = p.cpu()-before, c.bytes.Load()
	_, now := p.memory()
	r.memory = now - anon
	if err := changeMany(ctx, c, p, &r, func(i int) error { return writeService(dir, i*7%l.services, l.pods, i+1) }); err != nil {
		c.close()
		return r, err
	}
	versions := c.close()
	if l.sotw || l.clients != 100 || l.services != 1000 {
		return r, nil
	}
	p.stop()
	if p, err = startDaemon(ctx, dir, addr); err != nil {
		return r, err
	}
	again, err := resume(ctx, addr, l, versions)
	if err != nil {
		return r, err
	}
	r.resumed = again.bytes.Load()
	again.close()
	return r, nil
}

// changeMany makes the changes and takes the time until every client has each.
func changeMany(ctx context.Context, c *crowd, p *process, r *result, change func(i int) error) error {
	var times []time.Duration
	before, sent := p.cpu(), c.bytes.Load()
	for i := range changes {
		seen := c.expect()
		started := time.Now()
		if err := change(i); err != nil {
			return err
		}
		for range c.clients {
			select {
			case at := <-seen:
				times = append(times, at.Sub(started))
			case <-time.After(deadline):
				return fmt.Errorf("change %d did not reach every client", i)
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		time.Sleep(50 * time.Millisecond) // at rest again: the figure is that of an idle mesh
	}
	slices.Sort(times)
	r.change, r.changed = (p.cpu()-before)/changes, (c.bytes.Load()-sent)/changes
	r.p50, r.p99 = times[len(times)/2], times[len(times)*99/100]
	return nil
}

func measureLinear(ctx context.Context, l load) (r result, err error) {
	exe, err := os.Executable()
	if err != nil {
		return r, err
	}
	cmd := exec.CommandContext(ctx, exe)
	cmd.Env = append(os.Environ(), "BENCH_LINEAR="+strconv.Itoa(l.services))
	in, err := cmd.StdinPipe()
	if err != nil {
		return r, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := cmd.Start(); err != nil {
		return r, err
	}
	p := &process{cmd}
	defer p.stop()
	addr, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return r, err
	}
	c, err := connect(ctx, strings.TrimSpace(addr), l, 0)
	if err != nil {
		return r, err
	}
	defer c.close()
	err = changeMany(ctx, c, p, &r, func(i int) error { _, err := fmt.Fprintln(in, i); return err })
	return r, err
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func serviceName(i int) string { return fmt.Sprintf("svc-%05d", i) }

// clusterName is the name under which clients get the endpoints of a service.
func clusterName(i int) string {
	return "outbound|80||" + serviceName(i) + ".bench.svc.cluster.local"
}

func write(dir string, l load) error {
	if err := os.MkdirAll(filepath.Join(dir, "objects"), 0o755); err != nil {
		return err
	}
	for i := range l.services {
		if err := writeService(dir, i, l.pods, 0); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "isthmusd.yaml"), fmt.Appendf(nil, "cluster: bench\ndataDir: %s/data\nlisten: 127.0.0.1:0\nmetrics: \"\"\nadmin: {socket: %s/admin.sock}\nsource: {dir: %s/objects}\n", dir, dir, dir), 0o600)
}

// writeService writes one service with its pods, in one file that appears at once. The first pod is ready in even changes.
func writeService(dir string, i, pods, change int) error {
	name := serviceName(i)
	text := fmt.Appendf(nil, "apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: bench}\nspec: {clusterIP: 10.200.%d.%d, selector: {app: %s}, ports: [{name: http, port: 80, targetPort: 8080}]}\n", name, i/250, i%250+1, name)
	for j := range pods {
		ready := "True"
		if j == 0 && change > 0 {
			ready = "False"
		}
		text = fmt.Appendf(text, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s-%d, namespace: bench, labels: {app: %s}}\nspec: {serviceAccountName: %s, containers: [{name: app, ports: [{containerPort: 8080}]}]}\nstatus: {phase: Running, podIP: 10.%d.%d.%d, podIPs: [{ip: 10.%d.%d.%d}], conditions: [{type: Ready, status: \"%s\"}]}\n",
			name, j, name, name, 16+j, i/250, i%250+1, 16+j, i/250, i%250+1, ready)
	}
	path := filepath.Join(dir, "objects", name+".yaml")
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// process is a server that is measured.
type process struct{ cmd *exec.Cmd }

func startDaemon(ctx context.Context, dir, addr string) (*process, error) {
	log, err := os.Create(filepath.Join(dir, "isthmusd.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, "build/bin/isthmusd", "--config", filepath.Join(dir, "isthmusd.yaml"), "--xds-plaintext", addr)
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd}
	// Ready is when it is idle again: all files are read.
	for last, calm, began := time.Duration(-1), 0, time.Now(); calm < 4; {
		if time.Since(began) > deadline {
			text, _ := os.ReadFile(log.Name())
			p.stop()
			return nil, fmt.Errorf("isthmusd is not at rest; its log:\n%s", text[:min(len(text), 2000)])
		}
		time.Sleep(250 * time.Millisecond)
		now := p.cpu()
		if calm++; now-last > 20*time.Millisecond {
			calm = 0
		}
		last = now
	}
	return p, nil
}

func (p *process) stop() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// cpu is the processor time used so far, in steps of 10 ms.
func (p *process) cpu() time.Duration {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// memory reads VmRSS and RssAnon in KiB.
func (p *process) memory() (rss, anon int) {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		n, _ := strconv.Atoi(cmp.Or(strings.Join(fields[min(1, len(fields)):min(2, len(fields))], ""), "0"))
		switch {
		case len(fields) > 0 && fields[0] == "VmRSS:":
			rss = n
		case len(fields) > 0 && fields[0] == "RssAnon:":
			anon = n
		}
	}
	return rss, anon
}
