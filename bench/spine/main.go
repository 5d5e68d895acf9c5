// Command spine measures, on the demo's world, how long changes take and what the programs weigh:
// a changed rule until the first request that follows it, a pod that comes or goes in one cluster until another cluster's
// Envoy has it, and the memory of each program at rest.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/e2e/story"
)

const (
	changes = 50
	client  = "amber/productpage-v1"
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

func run(ctx context.Context) (err error) {
	world, err := lab.LoadWorld("e2e/worlds/bookstore")
	if err != nil {
		return err
	}
	l, err := lab.New(lab.Config{World: world, BinDir: "build/bin", RunDir: os.Getenv("ISTHMUS_LAB_DIR"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Down()) }()
	if err := l.Up(ctx); err != nil {
		return err
	}
	w := &story.World{Lab: l}
	for _, s := range story.Steps()[1:3] { // the joins, and everyone knows everyone
		if _, err := s.Run(ctx, w); err != nil {
			return fmt.Errorf("%s: %w", s.Title, err)
		}
	}
	fmt.Printf("%d processors, %s; %d changes each; whole path from the write of a YAML file\n\n", runtime.NumCPU(), runtime.Version(), changes)
	fmt.Println("what                                                          p50      p99      max   target")
	rule, err := measure(ctx, func(i int) (func(context.Context) (bool, error), error) { return changeRule(l, i) })
	if err != nil {
		return err
	}
	row("rule changed: first request that follows it, same cluster", rule, "p50 25 ms, p99 100 ms")
	pod, err := measure(ctx, func(i int) (func(context.Context) (bool, error), error) { return changePod(l, i) })
	if err != nil {
		return err
	}
	row("pod of birch comes or goes: amber's Envoy has it", pod, "p50 30 ms, p99 1 s (no delay on the link)")
	return memory(l)
}

// measure makes the changes one after another and times each until it is seen.
func measure(ctx context.Context, change func(i int) (seen func(context.Context) (bool, error), err error)) ([]time.Duration, error) {
	var out []time.Duration
	for i := range changes {
		started := time.Now()
		seen, err := change(i)
		if err != nil {
			return nil, err
		}
		for {
			ok, err := seen(ctx)
			if ok {
				break
			}
			if ctx.Err() != nil || time.Since(started) > 10*time.Second {
				return nil, fmt.Errorf("change %d was not seen within 10 s: %w", i, errors.Join(err, ctx.Err()))
			}
		}
		out = append(out, time.Since(started))
		select { // let things come to rest: the figure is that of an idle mesh
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	slices.Sort(out)
	return out, nil
}

func row(what string, d []time.Duration, target string) {
	ms := func(q float64) string {
		return fmt.Sprintf("%.1f ms", d[min(len(d)-1, int(q*float64(len(d))))].Seconds()*1000)
	}
	fmt.Printf("%-58s %7s %8s %8s   %s\n", what, ms(.5), ms(.99), ms(1), target)
}

const rule = `apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: bench, namespace: default}
spec:
  hosts: [reviews.default.global]
  http:
  - match: [{uri: {exact: /bench}}]
    directResponse: {status: 200, body: {string: "change %d"}}
  - route: [{destination: {host: reviews.default.global}}]
`

func changeRule(l *lab.Lab, i int) (func(context.Context) (bool, error), error) {
	if err := l.Cluster("amber").Apply("bench.yaml", fmt.Appendf(nil, rule, i)); err != nil {
		return nil, err
	}
	return func(ctx context.Context) (bool, error) {
		body, err := get(ctx, l.Node(client), "http://reviews.default.global:9080/bench")
		return body == fmt.Sprintf("change %d", i), err
	}, nil
}

func get(ctx context.Context, n *lab.Node, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := n.HTTP().Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	return string(body), err
}

func changePod(l *lab.Lab, i int) (func(context.Context) (bool, error), error) {
	birch := l.Cluster("birch")
	data, err := os.ReadFile(filepath.Join(birch.ConfigDir, "reviews.yaml"))
	if err != nil {
		return nil, err
	}
	from, to := "True", "False"
	if i%2 == 1 {
		from, to = to, from
	}
	head, tail, ok := cutLast(string(data), `status: "`+from+`"`)
	if !ok {
		return nil, errors.New("the last pod of birch's reviews.yaml has no Ready condition")
	}
	if err := birch.Apply("reviews.yaml", []byte(head+`status: "`+to+`"`+tail)); err != nil {
		return nil, err
	}
	return func(ctx context.Context) (bool, error) {
		body, err := get(ctx, l.Node(client), "http://127.0.0.1:15000/clusters?filter=reviews.default.global")
		return err == nil && strings.Contains(body, "reviews-v2-c.p9080.birch") == (to == "True"), err
	}, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// memory prints the resident memory of one process of each kind.
func memory(l *lab.Lab) error {
	fmt.Println("\nresident memory at rest (of that, not backed by files)")
	for _, x := range []struct{ node, program, target string }{
		{"amber/isthmusd", "isthmusd", "80 MiB"}, {client, "isthmus-agent", "30 MiB"}, {"cedar/eastwest-1", "isthmus-agent", "15 MiB (relay)"}, {client, "envoy", ""},
	} {
		for _, pid := range l.Processes(x.node) {
			exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
			if err != nil || filepath.Base(exe) != x.program {
				continue
			}
			rss, anon, err := resident(pid)
			if err != nil {
				return err
			}
			fmt.Printf("%-14s in %-22s %4d MiB (%d)   %s\n", x.program, x.node, rss>>10, anon>>10, x.target)
		}
	}
	return nil
}

// resident reads VmRSS and RssAnon of a process in KiB.
func resident(pid int) (rss, anon int, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch n, _ := strconv.Atoi(fields[1]); fields[0] {
		case "VmRSS:":
			rss = n
		case "RssAnon:":
			anon = n
		}
	}
	return rss, anon, nil
}
