// Command demo runs the main job on the lab and prints each step as it passes, with what was seen.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/e2e/story"
)

func main() { os.Exit(lab.Main(run)) }

func run(ctx context.Context) int {
	keep := flag.Bool("keep", false, "leave the world running and print how to look around")
	world := flag.String("world", "e2e/worlds/bookstore", "folder of the world")
	bin := flag.String("bin", "build/bin", "folder of the programs")
	logs := flag.String("logs", "build/demo-logs", "folder for the logs of all programs")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "demo: %s: no arguments are taken\n", flag.Arg(0))
		return 1
	}
	// Ctrl-C ends the story at its next wait; a second one is the shell's business.
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	passed, failed, err := demo(ctx, *world, *bin, *logs, *keep)
	switch {
	case errors.Is(err, context.Canceled):
		fmt.Println("demo: interrupted, cleaned up")
		return 1
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		failed++
	}
	fmt.Printf("demo: %d passed, %d failed\n", passed, failed)
	if failed > 0 {
		return 1
	}
	return 0
}

func demo(ctx context.Context, path, bin, logs string, keep bool) (passed, failed int, err error) {
	started := time.Now()
	world, err := lab.LoadWorld(path)
	if err != nil {
		return 0, 0, err
	}
	if err := os.RemoveAll(logs); err != nil {
		return 0, 0, err
	}
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return 0, 0, err
	}
	l, err := lab.New(lab.Config{World: world, BinDir: bin, LogDir: logs, Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		return 0, 0, err
	}
	kept := false
	defer func() {
		if !kept {
			err = errors.Join(err, l.Down())
		}
	}()
	fmt.Println("demo: bringing up clusters amber, birch and cedar and the machine dune ...")
	if err := l.Up(ctx); err != nil {
		return 0, 0, fmt.Errorf("%w\n  logs of all programs are in %s", err, logs)
	}
	fmt.Printf("demo: %d hosts are up after %.1f s\n", len(l.Nodes()), time.Since(started).Seconds())
	w := &story.World{Lab: l}
	for _, s := range story.Steps() {
		begun := time.Now()
		seen, err := s.Run(ctx, w)
		if ctx.Err() != nil {
			return passed, failed, ctx.Err()
		}
		if err != nil {
			failed++
			fmt.Printf("FAIL  %s (%.1f s)\n      %s\n", s.Title, time.Since(begun).Seconds(), strings.ReplaceAll(err.Error(), "\n", "\n      "))
			continue
		}
		passed++
		fmt.Printf("pass  %s (%.1f s)\n      %s\n", s.Title, time.Since(begun).Seconds(), seen)
	}
	fmt.Printf("demo: took %.1f s, logs of all programs are in %s\n", time.Since(started).Seconds(), logs)
	if keep && failed == 0 {
		if err := l.Keep(); err != nil {
			return passed, failed, err
		}
		kept = true
		lookAround(l, bin)
	}
	return passed, failed, nil
}

func lookAround(l *lab.Lab, bin string) {
	fmt.Printf(`
The world is still up. Look around:
  %[1]s/isthmus --socket %[2]s/amber/isthmusd.sock status
  %[1]s/isthmus --socket %[2]s/birch/isthmusd.sock peers
  %[1]s/isthmus --socket %[2]s/amber/isthmusd.sock explain --from productpage.default http://reviews.default.global:9080/
  %[1]s/lab exec amber/productpage-v1 -- %[3]s/caller --url http://reviews.default.global:9080/ --n 100
  %[1]s/lab exec amber/productpage-v1 -- curl -s localhost:15000/clusters
Change something: each cluster reads a folder of YAML, for example %[2]s/amber/config
  %[1]s/lab nodes                 lists every host
  %[1]s/lab down                  ends it

`, bin, l.Dir(), abs(bin))
}

func abs(path string) string {
	if a, err := filepath.Abs(path); err == nil {
		return a
	}
	return path
}
