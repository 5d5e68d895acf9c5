package story

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// envoy asks the admin interface of the Envoy in a node, which answers on the node's loopback only.
func (w *World) envoy(ctx context.Context, node, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:15000"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := w.Node(node).HTTP().Do(req)
	if err != nil {
		return nil, fmt.Errorf("envoy of %s: %w", node, err)
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, 64<<20))
}

// hosts lists the hosts of a cluster in the Envoy of a node, and whether each is healthy.
func (w *World) hosts(ctx context.Context, node, cluster string) (map[string]bool, error) {
	data, err := w.envoy(ctx, node, "/clusters?format=json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Statuses []struct {
			Name  string `json:"name"`
			Hosts []struct {
				Address struct {
					Socket struct {
						Address string `json:"address"`
					} `json:"socket_address"`
					Internal struct {
						Listener string `json:"server_listener_name"`
						Endpoint string `json:"endpoint_id"`
					} `json:"envoy_internal_address"`
				} `json:"address"`
				Health map[string]any `json:"health_status"`
			} `json:"host_statuses"`
		} `json:"cluster_statuses"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, fmt.Errorf("clusters of %s: %w", node, err)
	}
	out := map[string]bool{}
	for _, c := range list.Statuses {
		if c.Name != cluster {
			continue
		}
		for _, h := range c.Hosts {
			name := h.Address.Socket.Address
			if h.Address.Internal.Endpoint != "" {
				name = h.Address.Internal.Listener + " " + h.Address.Internal.Endpoint
			}
			out[name] = h.Health["eds_health_status"] == "HEALTHY" && len(h.Health) == 1
		}
	}
	return out, nil
}

func fiveEndpoints(ctx context.Context, w *World) (string, error) {
	var hosts map[string]bool
	err := lab.Eventually(ctx, 10*time.Second, func(ctx context.Context) (err error) {
		hosts, err = w.hosts(ctx, client, "outbound|9080||reviews.default.global")
		if err != nil {
			return err
		}
		birch := 0
		for name := range hosts {
			if strings.HasPrefix(name, "eastwest|birch ") {
				birch++
			}
		}
		if len(hosts) != 5 || birch != 3 {
			return fmt.Errorf("%d hosts, %d of birch: %v", len(hosts), birch, slices.Sorted(maps.Keys(hosts)))
		}
		return nil
	})
	return strings.Join(slices.Sorted(maps.Keys(hosts)), ", "), err
}

// within wants a count to be n, give or take.
func within(what string, got, want, tolerance int) error {
	if got < want-tolerance || got > want+tolerance {
		return fmt.Errorf("%s got %d requests, want %d +- %d", what, got, want, tolerance)
	}
	return nil
}

func exactShares(ctx context.Context, w *World) (string, error) {
	rs, err := w.call(ctx, client, reviewsURL, "--n", "500", "--concurrency", "4")
	if err != nil {
		return "", err
	}
	v, callers := rs.versions(), rs.by(func(r result) string { return r.Caller })
	err = errors.Join(rs.none(), within("v1", v["v1"], 100, 5), within("v2", v["v2"], 300, 5), within("v3", v["v3"], 100, 5))
	for pod, n := range rs.pods() {
		err = errors.Join(err, within(pod, n, 100, 5))
	}
	if callers[identity("amber", "bookstore-productpage")] != 500 {
		err = errors.Join(err, fmt.Errorf("the pods saw the callers %v", callers))
	}
	return fmt.Sprintf("v1 %d, v2 %d over %d pods, v3 %d; every pod saw %s", v["v1"], v["v2"], len(rs.pods())-2, v["v3"], identity("amber", "bookstore-productpage")), err
}

func noKeys(ctx context.Context, w *World) (string, error) {
	for _, node := range []string{"amber/eastwest-1", "birch/eastwest-1", "birch/eastwest-2"} {
		data, err := w.envoy(ctx, node, "/certs")
		if err != nil {
			return "", err
		}
		var certs struct {
			Certificates []any `json:"certificates"`
		}
		if err := json.Unmarshal(data, &certs); err != nil {
			return "", err
		}
		if len(certs.Certificates) != 0 {
			return "", fmt.Errorf("%s holds %d certificates", node, len(certs.Certificates))
		}
	}
	return "no certificate in the Envoys of amber's and birch's gateways; cedar's relay has no TLS at all", nil
}

const rules = `apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: reviews-global, namespace: default}
spec:
  host: reviews.default.global
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
  - {name: v3, labels: {version: v3}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews-global, namespace: default}
spec:
  hosts: [reviews.default.global]
  http:
  - match:
    - headers: {end-user: {exact: jason}}
    route:
    - destination: {host: reviews.default.global, subset: v2}
  - route:
    - {weight: %d, destination: {host: reviews.default.global, subset: v1}}
    - {weight: %d, destination: {host: reviews.default.global, subset: v3}}
`

const rulesFile = "version-routing.yaml"

func (w *World) route(v1, v3 int) error {
	return w.Cluster("amber").Apply(rulesFile, fmt.Appendf(nil, rules, v1, v3))
}

// LeaveRules puts the rules of version routing back for whoever looks around, and returns their file.
func (w *World) LeaveRules() (string, error) {
	return filepath.Join(w.Cluster("amber").ConfigDir, rulesFile), w.route(90, 10)
}

func versionRouting(ctx context.Context, w *World) (string, error) {
	if err := w.route(90, 10); err != nil {
		return "", err
	}
	err := lab.Eventually(ctx, 5*time.Second, func(ctx context.Context) error {
		rs, err := w.call(ctx, client, reviewsURL, "--n", "10", "--header", "end-user=jason")
		if err == nil && rs.versions()["v2"] != 10 {
			err = fmt.Errorf("jason gets %v", rs.versions())
		}
		return err
	})
	if err != nil {
		return "", err
	}
	jason, err := w.call(ctx, client, reviewsURL, "--n", "200", "--concurrency", "4", "--header", "end-user=jason")
	if err != nil {
		return "", err
	}
	rest, err := w.call(ctx, client, reviewsURL, "--n", "2000", "--concurrency", "8")
	if err != nil {
		return "", err
	}
	v := rest.versions()
	err = errors.Join(jason.none(), rest.none(), within("jason's v2", jason.versions()["v2"], 200, 0), within("v1", v["v1"], 1800, 60), within("v3", v["v3"], 200, 60))
	return fmt.Sprintf("jason: 200 of 200 to v2; the rest: v1 %d, v3 %d of 2000", v["v1"], v["v3"]), err
}

func changedWeights(ctx context.Context, w *World) (string, error) {
	var changed time.Time
	rs, err := w.under(ctx, client, reviewsURL, 100, 5*time.Second, func(ctx context.Context) error {
		if err := pass(ctx, 2*time.Second); err != nil {
			return err
		}
		changed = time.Now()
		return w.route(20, 80)
	})
	if err != nil {
		return "", err
	}
	before, after := rs.between(time.Time{}, changed), rs.between(changed.Add(time.Second), time.Now())
	if len(before) < 100 || len(after) < 100 {
		return "", fmt.Errorf("%d requests before the change and %d after it are too few", len(before), len(after))
	}
	share := func(rs results) int { return 100 * rs.versions()["v3"] / len(rs) }
	err = rs.none()
	if b, a := share(before), share(after); b > 20 || a < 70 || a > 90 {
		err = errors.Join(err, fmt.Errorf("v3 got %d %% before and %d %% after, want 10 %% and 80 %%", b, a))
	}
	first := "no request"
	for _, r := range rs.between(changed, time.Now()) {
		if r.Version == "v3" {
			first = r.Start.Sub(changed).Round(time.Millisecond).String()
			break
		}
	}
	return fmt.Sprintf("v3 from %d %% to %d %%, first of the new share after %s, 0 of %d failed", share(before), share(after), first, len(rs)), err
}
