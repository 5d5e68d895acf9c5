// Command lab looks into the namespaces of running labs, and runs a world by itself.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

const usage = `lab runs clusters in network namespaces.

  lab runs                          list runs
  lab nodes [RUN]                   list the nodes of a run
  lab exec [--run RUN] NODE -- CMD  run a command in a node, for example: lab exec amber/productpage-v1 -- ss -ntp
  lab up [--bin DIR] [--logs DIR] [--network-only] [--tolerant] [--keep] WORLD
                                    run a world until Ctrl-C, or leave it running with --keep
  lab kube [--bin DIR] [--logs DIR] [--scheduler] [--keep] TOPOLOGY
                                    run Kubernetes clusters, a built-in topology or a file, until Ctrl-C
  lab down [RUN]                    end a run that was left running
  lab clean                         remove what crashed runs left

RUN may be left out when there is only one. Runs live in ` + "$ISTHMUS_LAB_DIR" + ` (default /run/isthmus-lab for root).
`

func main() {
	if len(os.Args) > 1 && (os.Args[1] == "up" || os.Args[1] == "kube") || os.Getenv("ISTHMUS_LAB_HELPER") != "" {
		os.Exit(lab.Main(func(ctx context.Context) int {
			if os.Args[1] == "kube" {
				return report(kube(ctx, os.Args[2:]))
			}
			return report(up(ctx, os.Args[2:]))
		}))
	}
	if self, err := os.Executable(); err == nil { // the product's programs are beside this one
		_ = os.Setenv("PATH", filepath.Dir(self)+":"+os.Getenv("PATH"))
	}
	os.Exit(report(look(os.Args[1:])))
}

func report(code int, err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	return code
}

// look serves the commands that need no namespaces of their own.
func look(args []string) (int, error) {
	base := os.Getenv("ISTHMUS_LAB_DIR")
	if len(args) == 0 {
		fmt.Print(usage)
		return 1, nil
	}
	cmd, args := args[0], args[1:]
	switch cmd {
	case "runs":
		runs, err := lab.Runs(base)
		for _, r := range runs {
			state := "crashed"
			if r.Kept {
				state = "kept"
			} else if r.Live {
				state = "live"
			}
			fmt.Println(r.Name, state, r.Dir)
		}
		return 0, err
	case "nodes":
		run, err := choose(base, args)
		if err != nil {
			return 1, err
		}
		names, err := lab.NodesOf(run)
		for _, n := range names {
			fmt.Println(n)
		}
		return 0, err
	case "exec":
		return execCmd(base, args)
	case "down":
		run, err := choose(base, args)
		if err != nil {
			return 1, err
		}
		if run.Live && !run.Kept {
			return 1, fmt.Errorf("run %s belongs to a process that still runs; end that with Ctrl-C", run.Name)
		}
		return 0, lab.Remove(run)
	case "clean":
		removed, err := lab.RemoveLeftovers(base)
		for _, r := range removed {
			fmt.Println("removed", r)
		}
		return 0, err
	case "help", "-h", "--help":
		fmt.Print(usage)
		return 0, nil
	}
	return 1, fmt.Errorf("unknown command %q; see lab help", cmd)
}

func choose(base string, args []string) (lab.RunInfo, error) {
	runs, err := lab.Runs(base)
	if err != nil {
		return lab.RunInfo{}, err
	}
	var names []string
	for _, r := range runs {
		if len(args) > 0 && args[0] == r.Name || len(args) == 0 && len(runs) == 1 {
			return r, nil
		}
		names = append(names, r.Name)
	}
	if len(runs) == 0 {
		return lab.RunInfo{}, fmt.Errorf("no run found; start one with KEEP=1 or lab up")
	}
	return lab.RunInfo{}, fmt.Errorf("choose one of the runs %v", names)
}

func execCmd(base string, args []string) (int, error) {
	f := flag.NewFlagSet("lab exec", flag.ContinueOnError)
	name := f.String("run", "", "name of the run")
	if err := f.Parse(args); err != nil {
		return 1, nil
	}
	args = f.Args()
	if len(args) > 1 && args[1] == "--" {
		args = append(args[:1:1], args[2:]...)
	}
	if len(args) < 2 {
		return 1, fmt.Errorf("give a node and a command: lab exec NODE -- CMD")
	}
	var pick []string
	if *name != "" {
		pick = []string{*name}
	}
	run, err := choose(base, pick)
	if err != nil {
		return 1, err
	}
	return lab.ExecIn(run, args[0], args[1:])
}

func up(ctx context.Context, args []string) (int, error) {
	f := flag.NewFlagSet("lab up", flag.ContinueOnError)
	bin := f.String("bin", "build/bin", "folder of the programs")
	logs := f.String("logs", "", "folder for log files that stay")
	network := f.Bool("network-only", false, "make namespaces and links, start nothing")
	tolerant := f.Bool("tolerant", false, "warn about missing programs instead of failing")
	keep := f.Bool("keep", false, "leave it running")
	if err := f.Parse(args); err != nil || f.NArg() != 1 {
		fmt.Fprint(os.Stderr, usage)
		return 1, nil
	}
	world, err := lab.LoadWorld(f.Arg(0))
	if err != nil {
		return 1, err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	l, err := lab.New(lab.Config{World: world, BinDir: *bin, LogDir: *logs, RunDir: os.Getenv("ISTHMUS_LAB_DIR"),
		NetworkOnly: *network, Tolerant: *tolerant, Log: log})
	if err != nil {
		return 1, err
	}
	start := time.Now()
	if err := l.Up(ctx); err != nil {
		if down := l.Down(); down != nil {
			log.Error("run not removed", "err", down)
		}
		return 1, err
	}
	fmt.Printf("run %s is up after %.1f s with %d nodes in %s, logs in %s\nlook around: %s exec --run %s NODE -- CMD\n", l.Run,
		time.Since(start).Seconds(), len(l.Nodes()), l.Dir(), l.LogDir(), filepath.Base(os.Args[0]), l.Run)
	if *keep {
		return 0, l.Keep()
	}
	<-ctx.Done()
	return 0, l.Down()
}
