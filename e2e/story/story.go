// Package story is the main job as a story on the lab: clusters joined by one token, requests routed by version across
// them, a machine in the mesh, and what happens when parts are lost. The demo prints it, the end-to-end test asserts it.
package story

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// Step is one chapter. Run returns what was seen.
type Step struct {
	Title string
	Run   func(ctx context.Context, w *World) (seen string, err error)
}

// World is the lab and what earlier steps left for later ones.
type World struct {
	*lab.Lab
	token   string // the one birch has spent
	machine *lab.Proc
}

// Steps are in order; each builds on those before it.
func Steps() []Step {
	return []Step{
		{"0 pods of different clusters cannot reach each other, only gateways on 15443 can be reached", isolated},
		{"1 join by token: birch and cedar join amber", joinByToken},
		{"1 every cluster lists the two others", everyoneKnowsEveryone},
		{"1 a spent token is refused with the reason", spentToken},
		{"2 reviews.default.global is one name with one address everywhere", names},
		{"2 PTR and SRV answer, an unknown name does not exist", reverseNames},
		{"3 productpage's Envoy has five endpoints, three of them distinct pods in birch", fiveEndpoints},
		{"3 500 requests reach v1:v2:v3 as 1:3:1, with mutual TLS", exactShares},
		{"3 the gateways hold no workload key", noKeys},
		{"4 version routing across clusters by a rule in amber only", versionRouting},
		{"4 changed weights take effect within a second, no request fails", changedWeights},
		{"5 the machine dune joins birch with one command", machineJoins},
		{"5 reviews in birch and in cedar reach ratings on dune, dune reaches productpage", machineReaches},
		{"5 the agent stops: the endpoint is gone from every cluster", machineLeaves},
		{"5 the agent starts again: the endpoint is back without a new token", machineReturns},
		{"6 a gateway of birch is killed: nothing fails after one second", gatewayKilled},
		{"6 amber's isthmusd is killed: traffic goes on, its return resends nothing", controlPlaneKilled},
		{"6 cedar is cut off: v3 is avoided within 3 s, and back 5 s after the link", clusterCut},
		{"7 isthmus status shows it on one screen", status},
		{"7 isthmus explain shows the way of a request", explained},
		{"8 bad input gives one clear line and changes nothing", badInput},
	}
}

// isthmus runs the operator's tool in a cluster and wants it to succeed.
func (w *World) isthmus(ctx context.Context, cluster string, args ...string) (string, error) {
	out, errOut, code, err := w.Cluster(cluster).Isthmus(ctx, args...)
	if err != nil {
		return "", err
	}
	if code != 0 {
		return "", fmt.Errorf("isthmus %s in %s: exit code %d: %s", args[0], cluster, code, strings.TrimSpace(errOut))
	}
	return strings.TrimSpace(out), nil
}

// refused runs the tool and wants one line of refusal that contains the words.
func (w *World) refused(ctx context.Context, cluster, words string, args ...string) (string, error) {
	_, errOut, code, err := w.Cluster(cluster).Isthmus(ctx, args...)
	if err != nil {
		return "", err
	}
	var said string
	for _, l := range strings.Split(strings.TrimSpace(errOut), "\n") {
		if strings.HasPrefix(l, "isthmus: ") {
			said = l
		}
	}
	if code != 1 || !strings.Contains(said, words) {
		return "", fmt.Errorf("isthmus %s in %s: exit code %d, %q; want 1 and %q", args[0], cluster, code, said, words)
	}
	return said, nil
}

// ask runs the tool with -o json and decodes its answer.
func (w *World) ask(ctx context.Context, cluster string, out any, args ...string) error {
	text, err := w.isthmus(ctx, cluster, append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(text), out)
}

func (w *World) peers(ctx context.Context, cluster string) (map[string]admin.Peer, error) {
	var list []admin.Peer
	err := w.ask(ctx, cluster, &list, "peers")
	out := map[string]admin.Peer{}
	for _, p := range list {
		out[p.Name] = p
	}
	return out, err
}

func (w *World) status(ctx context.Context, cluster string) (admin.Status, error) {
	var s admin.Status
	err := w.ask(ctx, cluster, &s, "status")
	return s, err
}

// result is one request of the load client.
type result struct {
	Start   time.Time `json:"start"`
	End     time.Time `json:"end"`
	Status  int       `json:"status"`
	Version string    `json:"version"`
	Pod     string    `json:"pod"`
	Caller  string    `json:"caller"`
	Error   string    `json:"error"`
}

func (r result) failed() bool { return r.Status != 200 || r.Error != "" }

// results are the requests of one run of the load client.
type results []result

func (rs results) by(key func(result) string) map[string]int {
	out := map[string]int{}
	for _, r := range rs {
		out[key(r)]++
	}
	return out
}

func (rs results) versions() map[string]int { return rs.by(func(r result) string { return r.Version }) }

func (rs results) pods() map[string]int { return rs.by(func(r result) string { return r.Pod }) }

// between are the requests that began in [from, to).
func (rs results) between(from, to time.Time) results {
	var out results
	for _, r := range rs {
		if !r.Start.Before(from) && r.Start.Before(to) {
			out = append(out, r)
		}
	}
	return out
}

// failures lists the failed ones.
func (rs results) failures() results {
	var out results
	for _, r := range rs {
		if r.failed() {
			out = append(out, r)
		}
	}
	return out
}

// none wants no failure.
func (rs results) none() error {
	f := rs.failures()
	if len(f) == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d requests failed, the first with status %d %s", len(f), len(rs), f[0].Status, f[0].Error)
}

// call runs the load client in a node and returns every request.
func (w *World) call(ctx context.Context, node, url string, args ...string) (results, error) {
	argv := append([]string{"caller", "--url", url, "--each", "--json"}, args...)
	out, errOut, code, err := w.Exec(ctx, node, argv)
	if err != nil {
		return nil, err
	}
	if code != 0 {
		return nil, fmt.Errorf("caller in %s: exit code %d: %s", node, code, errOut)
	}
	var rs results
	for line := range strings.SplitSeq(out, "\n") {
		var r result
		if json.Unmarshal([]byte(line), &r) == nil && !r.Start.IsZero() {
			rs = append(rs, r)
		}
	}
	if len(rs) == 0 {
		return nil, fmt.Errorf("caller in %s printed no request", node)
	}
	return rs, nil
}

// under runs do while the load client sends rate requests a second for the duration, and returns the requests.
func (w *World) under(ctx context.Context, node, url string, rate int, duration time.Duration, do func(ctx context.Context) error) (results, error) {
	type outcome struct {
		rs  results
		err error
	}
	ctx, cancel := context.WithTimeout(ctx, duration+30*time.Second)
	defer cancel()
	done := make(chan outcome, 1)
	go func() {
		rs, err := w.call(ctx, node, url, "--rate", fmt.Sprint(rate), "--duration", duration.String(), "--timeout", "5s")
		done <- outcome{rs, err}
	}()
	err := do(ctx)
	o := <-done
	return o.rs, errors.Join(err, o.err)
}

// pass waits so that load runs undisturbed for a while; it is time that the story tells of, not a wait for something.
func pass(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// identity is the SPIFFE id of a service account in namespace default.
func identity(cluster, account string) string {
	return "spiffe://" + cluster + ".mesh/ns/default/sa/" + account
}

// clusters of the story.
var clusters = []string{"amber", "birch", "cedar"}

func others(of string) []string {
	var out []string
	for _, c := range clusters {
		if c != of {
			out = append(out, c)
		}
	}
	return out
}

const (
	client     = "amber/productpage-v1"
	reviewsURL = "http://reviews.default.global:9080/"
)

// dataDir is where a run keeps a machine's files.
func (w *World) dataDir(name string) string { return filepath.Join(w.Dir(), name) }
