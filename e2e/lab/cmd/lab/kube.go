package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// upMark ends what a kept lab prints when it is up.
const upMark = "The lab stays until: "

// kube brings a topology of Kubernetes clusters up and serves it until ctx ends.
func kube(ctx context.Context, args []string) (int, error) {
	f := flag.NewFlagSet("lab kube", flag.ContinueOnError)
	bin := f.String("bin", besideMe(), "folder of the programs")
	logs := f.String("logs", "", "folder for log files that stay")
	keep := f.Bool("keep", false, "leave it running in the background")
	served := f.Bool("served", false, "this is the background")
	scheduler := f.Bool("scheduler", false, "run the real scheduler")
	if err := f.Parse(args); err != nil || f.NArg() != 1 {
		fmt.Fprint(os.Stderr, usage, "\nTopologies: ", strings.Join(kubelab.Topologies(), ", "), "\n")
		return 1, nil
	}
	topology, err := kubelab.FindTopology(f.Arg(0))
	if err != nil {
		return 1, err
	}
	if *keep && !*served {
		return background(ctx, args)
	}
	start := time.Now()
	l, err := kubelab.Up(ctx, kubelab.Config{Topology: topology, Bin: *bin, Logs: *logs, Run: os.Getenv("ISTHMUS_LAB_DIR"),
		Scheduler: *scheduler, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))})
	if err != nil {
		return 1, err
	}
	describe(os.Stdout, l, time.Since(start))
	if *keep {
		if err := l.Net().Stay(); err != nil {
			return 1, errors.Join(err, l.Down())
		}
		fmt.Printf("%s%s down %s\n", upMark, os.Args[0], l.Net().Run)
	} else {
		fmt.Println("Ctrl-C ends the lab.")
	}
	<-ctx.Done()
	return 0, l.Down()
}

func besideMe() string {
	if self, err := os.Executable(); err == nil {
		return filepath.Dir(self)
	}
	return "build/bin"
}

// describe says what is up and how to look at it.
func describe(w io.Writer, l *kubelab.Lab, took time.Duration) {
	net := l.Net()
	fmt.Fprintf(w, "run %s is up after %.1f s: %s, logs in %s\n\n", net.Run, took.Seconds(), net.Dir(), net.LogDir())
	for _, c := range l.Clusters() {
		s := c.Spec
		fmt.Fprintf(w, "cluster %s  pods %v, services %v, load balancers %v, API server for other clusters %s\n", s.Name, s.PodCIDR, s.ServiceCIDR, s.LoadBalancer, c.APIServerURL())
		fmt.Fprintf(w, "  export KUBECONFIG=%s\n", c.Kubeconfig())
		if lab.Rootless() { // the port is in the user namespace
			fmt.Fprintf(w, "  from inside: %s exec --run %s %s/control -- kubectl --kubeconfig %s get pods -A\n", os.Args[0], net.Run, s.Name, c.KubeconfigInside())
		}
	}
	kubectl, err := net.Program("kubectl")
	if err != nil {
		kubectl = "kubectl"
	}
	fmt.Fprintf(w, "\nlook around: %s get pods -A; %s nodes %s; %s exec --run %s %s/router -- ip address\n", kubectl, os.Args[0], net.Run, os.Args[0], net.Run, l.Clusters()[0].Name())
}

// background runs this command again on its own and shows what it says until it is up.
func background(ctx context.Context, args []string) (int, error) {
	log, err := os.CreateTemp("", "isthmus-lab-*.log")
	if err != nil {
		return 1, err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe", append([]string{"kube", "--served"}, args...)...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var shown int
	show := func() (up bool) {
		text, err := os.ReadFile(log.Name())
		if err != nil {
			return false
		}
		text = text[:bytes.LastIndexByte(text, '\n')+1]
		_, _ = os.Stdout.Write(text[shown:])
		shown = len(text)
		return bytes.Contains(text, []byte(upMark))
	}
	for {
		select {
		case err := <-ended:
			show()
			_ = os.Remove(log.Name())
			return 1, errors.Join(errors.New("the lab did not come up"), err)
		case <-ctx.Done():
			_ = cmd.Process.Signal(syscall.SIGTERM)
			<-ended
			return 1, ctx.Err()
		case <-time.After(50 * time.Millisecond):
			if show() {
				return 0, nil
			}
		}
	}
}
