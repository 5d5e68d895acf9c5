// Command dns measures the CoreDNS plugin isthmus against CoreDNS's own plugins hosts and file, on the same names in the
// same program, with dnsperf over loopback: answers in a second as dnsperf sees them, and the server's CPU time for each.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"time"
)

const (
	few, many = 1_000, 100_000
	rounds    = 5
	seconds   = 3 // of one measurement
	perSecond = 100
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// candidate is one line of the table.
type candidate struct {
	name    string
	server  *server
	queries string // dnsperf's input
	changes bool   // while measuring, the control plane changes names
	results []result
}

type result struct {
	rate     float64       // answers in a second
	cpu      time.Duration // of the server for one answer
	servfail int
	lost     int
}

func run(ctx context.Context) (err error) {
	if _, err := exec.LookPath("dnsperf"); err != nil {
		return errors.New("dnsperf is not here: install it (Debian: apt-get install dnsperf)")
	}
	dir, err := os.MkdirTemp("", "isthmus-bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var all []*candidate
	defer func() {
		for _, c := range all {
			c.server.stop()
		}
	}()
	fewQueries, manyQueries := filepath.Join(dir, "few.queries"), filepath.Join(dir, "many.queries")
	if err := errors.Join(writeQueries(fewQueries, few), writeQueries(manyQueries, many)); err != nil {
		return err
	}
	for _, x := range []struct {
		name  string
		start func(context.Context, string) (*server, error)
	}{{"hosts", startHosts}, {"file", startFile}} {
		s, err := x.start(ctx, dir)
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
		all = append(all, &candidate{name: fmt.Sprintf("%s, %d names", x.name, few), server: s, queries: fewQueries})
	}
	small, err := startIsthmus(ctx, dir, few)
	if err != nil {
		return err
	}
	all = append(all, &candidate{name: fmt.Sprintf("isthmus, %d names", few), server: small, queries: fewQueries})
	large, err := startIsthmus(ctx, dir, many)
	if err != nil {
		return err
	}
	all = append(all, &candidate{name: fmt.Sprintf("isthmus, %d names", many), server: large, queries: manyQueries},
		&candidate{name: fmt.Sprintf("isthmus, %d names, %d changes/s", many, perSecond), server: large, queries: manyQueries, changes: true})
	if err := measure(ctx, all); err != nil {
		return err
	}
	report(all, small, large)
	return nil
}

// measure takes turns, so that what else the machine does falls on all alike.
func measure(ctx context.Context, all []*candidate) error {
	for round := range rounds + 1 {
		for _, c := range all {
			r, err := c.once(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", c.name, err)
			}
			if round > 0 { // the first warms up
				c.results = append(c.results, r)
			}
		}
	}
	return nil
}

func (c *candidate) once(ctx context.Context) (result, error) {
	if c.changes {
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() { defer close(done); c.server.change(ctx, perSecond) }()
		defer func() { cancel(); <-done }()
	}
	before := c.server.cpu()
	answers, r, err := dnsperf(ctx, c.server.port, c.queries)
	if err != nil {
		return r, err
	}
	r.cpu = (c.server.cpu() - before) / time.Duration(max(answers, 1))
	return r, nil
}

func report(all []*candidate, small, large *server) {
	fmt.Printf("%d processors, %s; dnsperf and server on one machine, over loopback, UDP; half A, half AAAA, names at random\n", runtime.NumCPU(), runtime.Version())
	fmt.Printf("%d rounds of %d s, taking turns; medians, of ratios those of the rounds\n\n", rounds, seconds)
	fmt.Printf("%-42s %12s %14s %10s %8s\n", "", "answers/s", "CPU an answer", "SERVFAIL", "lost")
	by := map[*candidate]result{}
	for _, c := range all {
		r := median(c.results)
		by[c] = r
		fmt.Printf("%-42s %12.0f %11.2f us %10d %8d\n", c.name, r.rate, float64(r.cpu.Nanoseconds())/1000, r.servfail, r.lost)
	}
	line := func(text string, a, b *candidate, target string) {
		ratios := make([]float64, rounds)
		for i := range ratios { // of one round each: what else the machine did was the same for both, nearly
			ratios[i] = a.results[i].rate / b.results[i].rate
		}
		fmt.Printf("%-52s %5.2fx (target %s); CPU an answer %.2fx\n", text, middle(ratios), target, float64(by[a].cpu)/float64(by[b].cpu))
	}
	hosts, file, isthmus, big, changing := all[0], all[1], all[2], all[3], all[4]
	fmt.Println()
	line("isthmus to hosts", isthmus, hosts, ">= 0.95x")
	line("isthmus to file", isthmus, file, ">= 1.50x")
	line(fmt.Sprintf("%d names to %d", many, few), big, isthmus, ">= 0.95x")
	line(fmt.Sprintf("%d changes a second to none", perSecond), changing, big, ">= 0.95x")
	fmt.Printf("memory: %d MiB with %d names, %d MiB with %d\n", small.anon()>>20, few, large.anon()>>20, many)
}

// median of each figure; failures add up.
func median(list []result) (m result) {
	rates, cpus := make([]float64, len(list)), make([]time.Duration, len(list))
	for i, r := range list {
		rates[i], cpus[i] = r.rate, r.cpu
		m.servfail += r.servfail
		m.lost += r.lost
	}
	m.rate, m.cpu = middle(rates), middle(cpus)
	return m
}

func middle[T cmp.Ordered](list []T) T {
	slices.Sort(list)
	return list[len(list)/2]
}
