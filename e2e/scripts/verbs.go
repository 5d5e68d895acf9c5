package scripts

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// verb is a command of stories.
type verb struct {
	usage       string
	least, most int // numbers of arguments; most -1 is any
	run         func(s *story, ctx context.Context, args []string) (stdout string, err error)
}

var verbs map[string]verb

func init() { // verbs name verbs
	verbs = map[string]verb{
		"topology":  {"NAME|FILE", 1, 1, (*story).up},
		"kubectl":   {"CLUSTER ARGS...", 2, -1, (*story).kubectl},
		"apply":     {"CLUSTER FILE...", 2, -1, (*story).apply},
		"isthmus":   {"CLUSTER ARGS...", 2, -1, (*story).isthmus},
		"pod":       {"CLUSTER NAMESPACE/POD[:CONTAINER] CMD...", 3, -1, (*story).pod},
		"node":      {"PLACE CMD...", 2, -1, (*story).node},
		"call":      {"CLUSTER NAMESPACE/POD[:CONTAINER] URL [n=N] [WHAT=COUNT...]", 3, -1, (*story).call},
		"load":      {"NAME CLUSTER NAMESPACE/POD[:CONTAINER] URL [--rate=N]", 4, -1, (*story).load},
		"unload":    {"NAME [WHAT=COUNT...]", 1, -1, (*story).unload},
		"ready":     {"CLUSTER NAMESPACE [SELECTOR]", 2, 3, (*story).ready},
		"expect":    {"REGEXP VERB ARGS...", 2, -1, (*story).expect},
		"within":    {"DURATION VERB ARGS...", 2, -1, (*story).within},
		"always":    {"DURATION VERB ARGS...", 2, -1, (*story).always},
		"cut":       {"FROM TO", 2, 2, func(s *story, _ context.Context, a []string) (string, error) { return "", s.lab.Cut(a[0], a[1]) }},
		"heal":      {"FROM TO", 2, 2, func(s *story, _ context.Context, a []string) (string, error) { return "", s.lab.Heal(a[0], a[1]) }},
		"link":      {"FROM TO [delay=D] [jitter=D] [loss=N%] [reorder=N%] [mtu=N] [down]", 2, -1, (*story).link},
		"apiserver": {"CLUSTER stop|start|freeze|thaw|cut|heal", 2, 2, (*story).apiserver},
		"signal":    {"CLUSTER NAMESPACE/POD[:CONTAINER] KILL|TERM|STOP|CONT|HUP", 3, 3, (*story).signal},
		"start":     {"PLACE NAME CMD...", 3, -1, (*story).start},
		"halt":      {"NAME", 1, 1, (*story).halt},
		"setenv":    {"NAME VERB ARGS...", 2, -1, (*story).setenv},
	}
}

// program runs a program of this machine in the story's folder with a cluster's kubeconfig.
func (s *story) program(ctx context.Context, cluster, name string, args ...string) (string, error) {
	c, err := s.cluster(cluster)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(s.cfg.Bin, name), args...)
	if name == "kubectl" {
		cmd.Path = filepath.Join(s.cfg.Bin, "kube")
		cmd.Args = append([]string{"kube", "kubectl"}, args...)
	}
	cmd.Dir = s.ts.MkAbs(".")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "ISTHMUS_CONTEXT="+cluster, "HOME="+s.ts.MkAbs("."))
	cmd.WaitDelay = 2 * time.Second
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

func (s *story) kubectl(ctx context.Context, args []string) (string, error) {
	return s.program(ctx, args[0], "kubectl", args[1:]...)
}

func (s *story) isthmus(ctx context.Context, args []string) (string, error) {
	return s.program(ctx, args[0], "isthmus", args[1:]...)
}

// apply replaces the variables in files, which are the story's or those of e2e/samples.
func (s *story) apply(ctx context.Context, args []string) (string, error) {
	words := []string{"apply"}
	for i, name := range args[1:] {
		if strings.HasPrefix(name, "-") { // an option of kubectl and its value
			words = append(words, name)
			continue
		}
		if i > 0 && args[i] == "-n" {
			words = append(words, name)
			continue
		}
		path := s.ts.MkAbs(name)
		if sample, ok := strings.CutPrefix(name, "samples/"); ok {
			path = filepath.Join(repository(), "e2e", "samples", sample)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return "", usageError(err.Error())
		}
		done := s.ts.MkAbs(".applied-" + strings.ReplaceAll(name, "/", "-"))
		if err := os.WriteFile(done, []byte(s.expand(string(text))), 0o600); err != nil {
			return "", err
		}
		words = append(words, "-f", done)
	}
	return s.program(ctx, args[0], "kubectl", words...)
}

var variable = regexp.MustCompile(`\$[A-Za-z_][A-Za-z0-9_]*|\$\{[A-Za-z_][A-Za-z0-9_]*\}`)

// expand replaces variables that are set, and leaves all other dollars alone.
func (s *story) expand(text string) string {
	return variable.ReplaceAllStringFunc(text, func(v string) string {
		if value := s.ts.Getenv(strings.Trim(v, "${}")); value != "" {
			return value
		}
		return v
	})
}

func (s *story) pod(ctx context.Context, args []string) (string, error) {
	c, err := s.cluster(args[0])
	if err != nil {
		return "", err
	}
	pod, container := split(args[1])
	stdout, stderr, code, err := c.Exec(ctx, pod, container, args[2:]...)
	return stdout, failed(args[2:], stderr, code, err)
}

// split takes NAMESPACE/POD:CONTAINER apart.
func split(which string) (pod, container string) {
	pod, container, _ = strings.Cut(which, ":")
	return pod, container
}

func failed(argv []string, stderr string, code int, err error) error {
	if err == nil && code != 0 {
		err = fmt.Errorf("%s: exit code %d: %s", strings.Join(argv, " "), code, strings.TrimSpace(stderr))
	}
	return err
}

func (s *story) node(ctx context.Context, args []string) (string, error) {
	stdout, stderr, code, err := s.lab.Net().Exec(ctx, args[0], args[1:])
	return stdout, failed(args[1:], stderr, code, err)
}

func (s *story) ready(ctx context.Context, args []string) (string, error) {
	c, err := s.cluster(args[0])
	if err != nil {
		return "", err
	}
	var selector string
	if len(args) > 2 {
		selector = args[2]
	}
	return "", c.PodsReady(ctx, args[1], selector)
}

func (s *story) expect(ctx context.Context, args []string) (string, error) {
	re, err := regexp.Compile("(?m)" + args[0])
	if err != nil {
		return "", usageError(err.Error())
	}
	out, err := s.do(ctx, args[1:])
	if err == nil && !re.MatchString(out) {
		err = fmt.Errorf("no match for %q in: %s", args[0], strings.TrimSpace(out))
	}
	return out, err
}

// limits parses the duration that within and always begin with.
func limits(args []string) (time.Duration, error) {
	d, err := time.ParseDuration(args[0])
	if err != nil || d <= 0 {
		return 0, usageError(fmt.Sprintf("duration %q: write 500ms, 5s or 2m", args[0]))
	}
	return d, nil
}

// pause sleeps between tries, shorter at first.
func pause(ctx context.Context, try int) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(min(time.Duration(20*(try+1))*time.Millisecond, 300*time.Millisecond)):
		return true
	}
}

func (s *story) within(ctx context.Context, args []string) (string, error) {
	d, err := limits(args)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	start := time.Now()
	var last error
	for try := 0; ; try++ {
		out, err := s.do(ctx, args[1:])
		var bad usageError
		if errors.As(err, &bad) {
			return out, err
		}
		if err == nil && (ctx.Err() == nil || try == 0) {
			s.ts.Logf("after %.2f s, %d tries", time.Since(start).Seconds(), try+1)
			return out, nil
		}
		if last == nil || ctx.Err() == nil { // the last one may only say that time is up
			last = err
		}
		if !pause(ctx, try) {
			return out, fmt.Errorf("not within %s, %d tries: %w", args[0], try+1, last)
		}
	}
}

func (s *story) always(ctx context.Context, args []string) (string, error) {
	d, err := limits(args)
	if err != nil {
		return "", err
	}
	end := time.Now().Add(d)
	for try := 0; ; try++ {
		out, err := s.do(ctx, args[1:])
		if err != nil {
			return out, fmt.Errorf("try %d, %v before the end: %w", try+1, time.Until(end).Round(time.Millisecond), err)
		}
		if time.Now().After(end) || !pause(ctx, try) {
			return out, ctx.Err()
		}
	}
}

func (s *story) apiserver(ctx context.Context, args []string) (string, error) {
	c, err := s.cluster(args[0])
	if err != nil {
		return "", err
	}
	api := c.APIServer()
	switch args[1] {
	case "stop":
		return "", api.Stop(ctx)
	case "start":
		return "", api.Start(ctx)
	case "freeze":
		return "", api.Freeze()
	case "thaw":
		return "", api.Thaw()
	case "cut":
		return "", api.Cut()
	case "heal":
		return "", api.Heal()
	}
	return "", usageError("usage: apiserver " + verbs["apiserver"].usage)
}

var signals = map[string]syscall.Signal{
	"KILL": syscall.SIGKILL, "TERM": syscall.SIGTERM, "STOP": syscall.SIGSTOP, "CONT": syscall.SIGCONT, "HUP": syscall.SIGHUP,
}

func (s *story) signal(ctx context.Context, args []string) (string, error) {
	c, err := s.cluster(args[0])
	if err != nil {
		return "", err
	}
	sig, ok := signals[strings.TrimPrefix(args[2], "SIG")]
	if !ok {
		return "", usageError("usage: signal " + verbs["signal"].usage)
	}
	pod, container := split(args[1])
	return "", c.Signal(ctx, pod, container, sig)
}

func (s *story) setenv(ctx context.Context, args []string) (string, error) {
	out, err := s.do(ctx, args[1:])
	value := strings.TrimSpace(out)
	if err == nil && value == "" {
		err = fmt.Errorf("nothing was printed for %s", args[0])
	}
	if err == nil {
		s.ts.Setenv(args[0], value)
	}
	return out, err
}

// start runs a program in a namespace of the lab until it is halted, or the story ends.
func (s *story) start(_ context.Context, args []string) (string, error) {
	if p := s.started[args[1]]; p != nil && p.Alive() {
		return "", usageError(fmt.Sprintf("%s runs already", args[1]))
	}
	p, err := s.lab.Net().Start(args[0], args[1], args[2:], nil)
	if err != nil {
		return "", err
	}
	s.started[args[1]] = p
	return p.Log + "\n", nil
}

// halt ends what start started, its children too, and waits for its end.
func (s *story) halt(ctx context.Context, args []string) (string, error) {
	p := s.started[args[0]]
	if p == nil {
		return "", usageError(fmt.Sprintf("nothing was started as %s", args[0]))
	}
	if err := p.KillGroup(syscall.SIGTERM); err != nil {
		return "", err
	}
	_, err := p.Wait(ctx)
	return p.Tail(20) + "\n", err
}
