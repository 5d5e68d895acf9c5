// Package scripts runs stories on clusters of the lab: txtar files of commands, whose verbs are in README.md.
package scripts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// Config says which stories run, and with what.
type Config struct {
	// Dir is the folder of the stories.
	Dir string
	// Bin is the folder of programs. Default $LAB_BIN, else build/bin.
	Bin string
	// Scheduler runs the real scheduler in the clusters.
	Scheduler bool
	// Parallel is how many stories run at a time. Default $LAB_PARALLEL, else two, or one where memory is short. It is
	// never more than go test's -parallel.
	Parallel int
}

// Run runs the stories of a folder, each as a subtest with clusters of its own. Where labs cannot be made, or programs
// were not built, they are skipped; with REQUIRE_TOOLS set that is a failure. TestMain must call lab.Main.
func Run(t *testing.T, cfg Config) {
	t.Helper()
	if cfg.Bin == "" {
		cfg.Bin = os.Getenv("LAB_BIN")
	}
	if cfg.Bin == "" {
		cfg.Bin = filepath.Join(repository(), "build", "bin")
	}
	cfg.Bin, _ = filepath.Abs(cfg.Bin) // fails only without a working directory
	if err := kubelab.Allowed(); err != nil {
		t.Skip(err) // no tool that is missing: another user
	}
	if reason := missing(cfg.Bin); reason != "" {
		if os.Getenv("REQUIRE_TOOLS") != "" {
			t.Fatal(reason)
		}
		t.Skip(reason)
	}
	turns := make(chan struct{}, parallel(cfg.Parallel))
	p := testscript.Params{
		Files: stories(t, cfg.Dir), Cmds: map[string]func(*testscript.TestScript, bool, []string){},
		RequireUniqueNames: true,
		ContinueOnError:    os.Getenv("LAB_CONTINUE") != "",
		Setup: func(env *testscript.Env) error {
			s := &story{cfg: cfg, t: env.T().(subtest).T, started: map[string]*lab.Proc{}, loads: map[string]*load{}}
			s.ctx, s.cancel = context.WithCancel(context.Background())
			if deadline, ok := s.t.Deadline(); ok { // leave time to clean up
				s.ctx, s.cancel = context.WithDeadline(context.Background(), deadline.Add(-30*time.Second))
			}
			env.Values[key{}] = s
			env.Vars = append(env.Vars, "bin="+cfg.Bin, "examples="+filepath.Join(repository(), "topologies", "examples"), "PATH="+cfg.Bin+":"+os.Getenv("PATH"))
			env.Defer(s.end)
			return nil
		},
	}
	for name := range verbs {
		p.Cmds[name] = func(ts *testscript.TestScript, neg bool, args []string) {
			s := ts.Value(key{}).(*story)
			s.ts = ts
			words := append([]string{name}, args...)
			if neg {
				words = append([]string{"!"}, words...)
			}
			out, err := s.do(s.ctx, words)
			fmt.Fprint(ts.Stdout(), out)
			if err != nil {
				ts.Fatalf("%v", err)
			}
		}
	}
	if deadline, ok := t.Deadline(); ok {
		p.Deadline = deadline
	}
	testscript.RunT(subtest{t, turns}, p)
}

// missing says what stories lack here; "" when nothing.
func missing(bin string) string {
	if testing.Short() {
		return "clusters take a while: -short leaves them out"
	}
	for _, program := range []string{"kube", "labcni", "coredns", "samples", "caller"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			return fmt.Sprintf("%s is not in %s: make kube build makes it", program, bin)
		}
	}
	return ""
}

// repository is the root of this repository.
func repository() string {
	_, here, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(here), "..", "..")
}

// stories lists the stories of a folder, the longest text first: most often it takes the longest, and what is started
// last should not.
func stories(t *testing.T, dir string) []string {
	files, err := filepath.Glob(filepath.Join(dir, "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories in %s: %v", dir, err)
	}
	size := func(name string) int64 {
		st, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	slices.SortStableFunc(files, func(a, b string) int { return cmp.Compare(size(b), size(a)) })
	return files
}

// needs is the memory of a story: three clusters with everything in them take less.
const needs = 6 << 30

// parallel says how many stories run at a time when want is asked for; 0 leaves it to the machine.
func parallel(want int) int {
	if want <= 0 {
		want, _ = strconv.Atoi(os.Getenv("LAB_PARALLEL")) // what is no number says nothing
	}
	if want > 0 {
		return want
	}
	return min(2, max(1, int(available()/needs)))
}

// available is the memory that programs may still take, in bytes; a lot where the system does not say.
func available() uint64 {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 1 << 62
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kib, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 54)
			if err == nil {
				return kib << 10
			}
		}
	}
	return 1 << 62
}

// subtest lets as many stories run at a time as there are turns.
type subtest struct {
	*testing.T
	turns chan struct{}
}

func (s subtest) Parallel() {
	s.T.Parallel()
	s.turns <- struct{}{}
	s.T.Cleanup(func() { <-s.turns })
}
func (s subtest) Verbose() bool { return testing.Verbose() }
func (s subtest) Run(name string, f func(testscript.T)) {
	s.T.Run(name, func(t *testing.T) { f(subtest{t, s.turns}) })
}

type key struct{}

// story is one script that runs.
type story struct {
	cfg    Config
	t      *testing.T
	ts     *testscript.TestScript
	ctx    context.Context
	cancel context.CancelFunc
	lab    *kubelab.Lab

	started map[string]*lab.Proc
	loads   map[string]*load
}

// end takes the story's clusters down, and says what was wrong with them when it failed.
func (s *story) end() {
	defer s.cancel()
	for _, l := range s.loads {
		l.kill()
	}
	if s.lab == nil {
		return
	}
	if s.t.Failed() {
		s.diagnose()
		if os.Getenv("LAB_KEEP") != "" {
			s.t.Logf("the clusters stay until Ctrl-C: run %s in %s", s.lab.Net().Run, s.lab.Net().Dir())
			wait, stop := signal.NotifyContext(context.Background(), os.Interrupt)
			<-wait.Done()
			stop()
		}
	}
	if err := s.lab.Down(); err != nil {
		s.t.Errorf("take the clusters down: %v", err)
	}
}

// diagnose logs what is not ready, and the last events.
func (s *story) diagnose() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, c := range s.lab.Clusters() {
		for _, args := range [][]string{
			{"get", "pods", "-A", "-o", "wide", "--request-timeout=5s"},
			{"get", "events", "-A", "--field-selector=type=Warning", "--sort-by=.lastTimestamp", "--request-timeout=5s"},
		} {
			out, err := c.Kubectl(ctx, args...)
			if err != nil {
				out = err.Error()
			}
			lines := strings.Split(strings.TrimSpace(out), "\n")
			s.t.Logf("%s: kubectl %s\n%s", c.Name(), strings.Join(args, " "), strings.Join(lines[max(0, len(lines)-25):], "\n"))
		}
	}
}

// do runs a verb with its arguments, or wants it to fail after "!".
func (s *story) do(ctx context.Context, words []string) (stdout string, err error) {
	if len(words) > 0 && words[0] == "!" {
		out, err := s.do(ctx, words[1:])
		if err == nil {
			return out, fmt.Errorf("it succeeded, which it should not:\n%.3000s", out)
		}
		var bad usageError
		if errors.As(err, &bad) {
			return out, err
		}
		return out, nil
	}
	if len(words) == 0 {
		return "", usageError("name a verb")
	}
	v, ok := verbs[words[0]]
	if !ok {
		return "", usageError(fmt.Sprintf("unknown verb %q: see e2e/scripts/README.md", words[0]))
	}
	if len(words)-1 < v.least || v.most >= 0 && len(words)-1 > v.most {
		return "", usageError("usage: " + words[0] + " " + v.usage)
	}
	if words[0] != "topology" && s.lab == nil {
		return "", usageError("a story begins with topology")
	}
	return v.run(s, ctx, words[1:])
}

// usageError is a story that is written wrongly: no "!" or "within" makes it right.
type usageError string

func (e usageError) Error() string { return string(e) }

func (s *story) cluster(name string) (*kubelab.Cluster, error) {
	if c := s.lab.Cluster(name); c != nil {
		return c, nil
	}
	var names []string
	for _, c := range s.lab.Clusters() {
		names = append(names, c.Name())
	}
	return nil, usageError(fmt.Sprintf("no cluster %q; there are %s", name, strings.Join(names, ", ")))
}

// up is the verb topology.
func (s *story) up(ctx context.Context, args []string) (string, error) {
	if s.lab != nil {
		return "", usageError("the topology is up already")
	}
	name := args[0]
	if _, err := os.Stat(s.ts.MkAbs(name)); err == nil {
		name = s.ts.MkAbs(name)
	}
	topology, err := kubelab.FindTopology(name)
	if err != nil {
		return "", err
	}
	start := time.Now()
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelInfo
	}
	var logs string
	if base := os.Getenv("LAB_LOGS"); base != "" {
		logs = filepath.Join(base, s.ts.Name())
	}
	l, err := kubelab.Up(ctx, kubelab.Config{Topology: topology, Bin: s.cfg.Bin, Logs: logs, Scheduler: s.cfg.Scheduler,
		Log: slog.New(slog.NewTextHandler(writer{s.t}, &slog.HandlerOptions{Level: level}))})
	if err != nil {
		return "", err
	}
	s.lab = l
	for _, c := range l.Clusters() {
		id := strings.ReplaceAll(c.Name(), "-", "_")
		for k, v := range c.Facts() {
			s.ts.Setenv(id+"_"+k, v)
		}
	}
	return fmt.Sprintf("up after %.1f s\n", time.Since(start).Seconds()), nil
}

// writer hands log lines to a test.
type writer struct{ t *testing.T }

// Write logs one line.
func (w writer) Write(b []byte) (int, error) {
	defer func() { _ = recover() }() // a line after the end of the test
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}
