// Package features proves features of the product one by one, each on a small world of the lab.
package features

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(func(context.Context) int { return m.Run() })) }

// world is a running lab.
type world struct {
	*lab.Lab
	t *testing.T
}

// up starts a world of e2e/worlds; change may edit it before. The test is skipped where a tool is missing, unless
// REQUIRE_TOOLS is set.
func up(t *testing.T, name string, change func(*lab.World)) *world {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	bin := os.Getenv("ISTHMUS_BIN") // default: what make build made
	if bin == "" {
		bin = filepath.Join(root, "build", "bin")
	}
	missing := lab.Allowed()
	if _, err := os.Stat(filepath.Join(bin, "isthmusd")); missing == nil && err != nil {
		missing = fmt.Errorf("the programs are not built: run make build (%w)", err)
	}
	if os.Getenv("REQUIRE_TOOLS") == "" || testing.Short() {
		t.Skip("takes a world and both processors: make e2e runs it, or REQUIRE_TOOLS=1 after make build")
	}
	if missing != nil {
		t.Fatal(missing)
	}
	w, err := lab.LoadWorld(filepath.Join(root, "e2e", "worlds", name))
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(w)
	}
	logs := filepath.Join(root, "build", "feature-logs", t.Name())
	if err := os.RemoveAll(logs); err != nil {
		t.Fatal(err)
	}
	l, err := lab.New(lab.Config{World: w, BinDir: bin, LogDir: logs, RunDir: os.Getenv("ISTHMUS_LAB_DIR"), Envoy: envoytest.Path(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	})
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	return &world{l, t}
}

// answer is what a request got: the status, the body, and what the bookstore's services say of themselves and of the
// caller they saw.
type answer struct {
	status               int
	body                 string
	App, Version, Pod    string
	Caller, XFCC, server string
}

// get asks for a page from inside a node, as an application there would.
func (w *world) get(ctx context.Context, node, url string, headers ...string) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return answer{}, err
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, "=")
		if name == "Host" {
			req.Host = value
		}
		req.Header.Set(name, value)
	}
	resp, err := w.Node(node).HTTP().Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	a := answer{status: resp.StatusCode, body: string(body), server: resp.Header.Get("Server")}
	_ = json.Unmarshal(body, &a) // a page of another kind says nothing of itself
	return a, err
}

// patience is how long a condition may take to come true.
const patience = 30 * time.Second

// eventually polls until check returns nil.
func (w *world) eventually(check func(ctx context.Context) error) {
	w.t.Helper()
	if err := lab.Eventually(w.t.Context(), patience, check); err != nil {
		w.t.Fatal(err)
	}
}

// want polls until a page has the status.
func (w *world) want(node, url string, status int, headers ...string) answer {
	w.t.Helper()
	var a answer
	w.eventually(func(ctx context.Context) (err error) {
		if a, err = w.get(ctx, node, url, headers...); err == nil && a.status != status {
			err = fmt.Errorf("%s from %s: status %d, want %d: %.200s", url, node, a.status, status, a.body)
		}
		return err
	})
	return a
}

func (w *world) apply(cluster, file, yaml string) {
	w.t.Helper()
	if err := w.Cluster(cluster).Apply(file, []byte(yaml)); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) remove(cluster, file string) {
	w.t.Helper()
	if err := w.Cluster(cluster).Delete(file); err != nil {
		w.t.Fatal(err)
	}
}

// admin asks the Envoy of a node.
func (w *world) admin(ctx context.Context, node, path string) (string, error) {
	a, err := w.get(ctx, node, "http://127.0.0.1:15000"+path)
	if err == nil && a.status != http.StatusOK {
		err = fmt.Errorf("envoy of %s: %s: status %d", node, path, a.status)
	}
	return a.body, err
}

// counter adds up the counters of a node's Envoy whose names contain part.
func (w *world) counter(node, part string) int {
	w.t.Helper()
	text, err := w.admin(w.t.Context(), node, "/stats")
	if err != nil {
		w.t.Fatal(err)
	}
	sum := 0
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if n, err := strconv.Atoi(value); err == nil && strings.Contains(name, part) {
			sum += n
		}
	}
	return sum
}

// isthmus runs the operator's tool in a cluster.
func (w *world) isthmus(cluster string, args ...string) string {
	w.t.Helper()
	out, errOut, code, err := w.Cluster(cluster).Isthmus(w.t.Context(), args...)
	if err != nil || code != 0 {
		w.t.Fatalf("isthmus %v in %s: code %d, %v: %s", args, cluster, code, err, errOut)
	}
	return strings.TrimSpace(out)
}

// summary is what the load client prints at its end.
type summary struct {
	Requests, Failed, Skipped int
	Status, Version, Pod      map[string]int
	Caller, Error             map[string]int
}

// load runs the load client in a node to its end.
func (w *world) load(ctx context.Context, node, url string, args ...string) (s summary, err error) {
	out, errOut, code, err := w.Exec(ctx, node, append([]string{"caller", "--url", url, "--json"}, args...))
	if err == nil && code != 0 {
		err = fmt.Errorf("caller in %s: exit code %d: %s", node, code, errOut)
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &s)
	}
	return s, err
}

// underLoad sends rate requests a second for the duration while do runs, and wants none to fail.
func (w *world) underLoad(node, url string, rate int, duration time.Duration, do func()) summary {
	w.t.Helper()
	type outcome struct {
		s   summary
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		s, err := w.load(w.t.Context(), node, url, "--rate", strconv.Itoa(rate), "--duration", duration.String(), "--timeout", "5s")
		done <- outcome{s, err}
	}()
	do()
	o := <-done
	if o.err != nil {
		w.t.Fatal(o.err)
	}
	if o.s.Failed > 0 || o.s.Requests == 0 {
		w.t.Errorf("%d of %d requests failed: %v, %v", o.s.Failed, o.s.Requests, o.s.Status, o.s.Error)
	}
	return o.s
}
