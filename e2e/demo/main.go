// Command demo runs the main job on the lab and prints each step as it passes, with what was seen.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/e2e/story"
)

func main() { os.Exit(lab.Main(run)) }

func run(ctx context.Context) int {
	keep := flag.Bool("keep", false, "leave the world running and print how to look around")
	world := flag.String("world", "e2e/worlds/bookstore", "folder of the world")
	bin := flag.String("bin", "build/bin", "folder of the programs")
	logs := flag.String("logs", "build/demo-logs", "folder in which each run makes one for the logs of all programs")
	check := flag.Bool("check", false, "say whether this machine allows what the demo needs, and do no more")
	flag.Parse()
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "demo: %s: no arguments are taken\n", flag.Arg(0))
		return 1
	}
	if err := lab.Allowed(); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	if *check {
		return 0
	}
	passed, failed, err := demo(ctx, *world, *bin, *logs, *keep) // Ctrl-C ends ctx
	if ctx.Err() != nil {
		if err != nil && !errors.Is(err, context.Canceled) {
			fmt.Fprintln(os.Stderr, "demo:", err)
		}
		fmt.Println("demo: interrupted")
		return 1
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		failed++
	}
	fmt.Printf("demo: %d passed, %d failed\n", passed, failed)
	if failed > 0 {
		return 1
	}
	return 0
}

func demo(ctx context.Context, path, bin, logBase string, keep bool) (passed, failed int, err error) {
	started := time.Now()
	world, err := lab.LoadWorld(path)
	if err != nil {
		return 0, 0, err
	}
	logs, err := newLogs(logBase, started)
	if err != nil {
		return 0, 0, err
	}
	l, err := lab.New(lab.Config{World: world, BinDir: bin, LogDir: logs, RunDir: os.Getenv("ISTHMUS_LAB_DIR")})
	if err != nil {
		return 0, 0, err
	}
	unlock, err := alone(filepath.Dir(l.Dir()))
	if err != nil {
		return 0, 0, errors.Join(err, os.Remove(logs))
	}
	defer unlock()
	kept := false
	defer func() {
		if kept {
			return
		}
		if ctx.Err() != nil {
			fmt.Println("demo: interrupted, cleaning up ...")
		}
		if down := l.Down(); down != nil {
			err = errors.Join(err, fmt.Errorf("clean up: %w", down))
		}
	}()
	tellOthers(filepath.Dir(l.Dir()), bin)
	fmt.Println("demo: bringing up clusters amber, birch and cedar and the machine dune ...")
	if err := l.Up(ctx); err != nil {
		return 0, 0, fmt.Errorf("%w\n  logs of all programs are in %s", err, logs)
	}
	fmt.Printf("demo: %d hosts are up after %.1f s\n", len(l.Nodes()), time.Since(started).Seconds())
	w := &story.World{Lab: l}
	for _, s := range story.Steps() {
		begun, logged := time.Now(), sizes(logs)
		seen, err := s.Run(ctx, w)
		if ctx.Err() != nil {
			return passed, failed, ctx.Err()
		}
		if err != nil {
			failed++
			fmt.Printf("FAIL  %s (%.1f s)\n      %s\n", s.Title, time.Since(begun).Seconds(), strings.ReplaceAll(err.Error(), "\n", "\n      "))
			fmt.Printf("      logs of all programs: %s\n", logs)
			for _, t := range tails(logs, logged) {
				fmt.Printf("        %s\n", t)
			}
			continue
		}
		passed++
		fmt.Printf("pass  %s (%.1f s)\n      %s\n", s.Title, time.Since(begun).Seconds(), seen)
	}
	fmt.Printf("demo: took %.1f s, logs of all programs are in %s\n", time.Since(started).Seconds(), logs)
	if keep {
		rules, err := w.LeaveRules()
		if err != nil {
			return passed, failed, err
		}
		if err := l.Keep(); err != nil {
			return passed, failed, err
		}
		kept = true
		lookAround(l, bin, rules)
	}
	return passed, failed, nil
}

// alone makes sure that no other demo has its world in the same folder: the story measures times and shares, and two at
// once spoil both. The lock is on the folder itself, and gone with the process.
func alone(base string) (unlock func(), err error) {
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, err
	}
	f, err := os.Open(base)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = errors.New("another demo is running on this machine, and two at once spoil each other's times: wait until it ends, or end it")
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// tellOthers mentions other worlds: they take processor time, which the story measures.
func tellOthers(base, bin string) {
	runs, err := lab.Runs(base)
	if err != nil {
		return // Up says so if it matters
	}
	for _, r := range runs {
		switch {
		case r.Kept:
			fmt.Printf("demo: the world of an earlier run is still up; %s/lab down %s ends it\n", bin, r.Name)
		case r.Live:
			fmt.Printf("demo: another run (%s) is going on; both may be slow\n", r.Name)
		default:
			fmt.Printf("demo: run %s ended without cleaning up: removing what it left\n", r.Name)
		}
	}
}

func lookAround(l *lab.Lab, bin, rules string) {
	fmt.Printf(`
The world is still up. Look around:
  %[1]s/isthmus --socket %[2]s/amber/isthmusd.sock status
  %[1]s/isthmus --socket %[2]s/birch/isthmusd.sock peers
  %[1]s/isthmus --socket %[2]s/amber/isthmusd.sock explain --from productpage.default http://reviews.default.global:9080/
  %[1]s/lab exec --run %[4]s amber/productpage-v1 -- %[3]s/caller --url http://reviews.default.global:9080/ --n 100
Change a weight, and call again: the rules of amber are in
  %[5]s
Each cluster reads a folder of YAML such as %[2]s/amber/config; new files count, too.
  %[1]s/lab nodes %[4]s         lists every host; lab exec --run %[4]s HOST -- COMMAND runs something there
  %[1]s/lab down %[4]s          ends it

`, bin, l.Dir(), abs(bin), l.Run, rules)
}

func abs(path string) string {
	if a, err := filepath.Abs(path); err == nil {
		return a
	}
	return path
}
