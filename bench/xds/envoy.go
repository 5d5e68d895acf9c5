package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

const (
	answerHost = "answer.example.com"
	idle       = 40 // changes, one after another
	stormTime  = 60 * time.Second
	stormEvery = 10 * time.Millisecond
)

// reach is how long changes took from the file to the first request that was answered by them.
type reach struct {
	changes  int
	p50, p99 time.Duration
	lost     int
}

func (r reach) String() string {
	return fmt.Sprintf("%6d changes, %d lost: p50 %6.1f ms, p99 %6.1f ms", r.changes, r.lost, ms(r.p50), ms(r.p99))
}

func reached(times []time.Duration, lost int) reach {
	slices.Sort(times)
	if len(times) == 0 {
		return reach{lost: lost}
	}
	return reach{len(times), times[len(times)/2], times[len(times)*99/100], lost}
}

// measureEnvoy changes a VirtualService under a real Envoy of isthmusd: at rest, and a hundred times a second.
func measureEnvoy(ctx context.Context) (atRest, stormy reach, err error) {
	dir, err := os.MkdirTemp("", "isthmus-bench")
	if err != nil {
		return atRest, stormy, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := write(dir, load{services: 100, pods: 2}); err != nil {
		return atRest, stormy, err
	}
	listen, err := freeAddr()
	if err != nil {
		return atRest, stormy, err
	}
	_, port, _ := net.SplitHostPort(listen)
	if err := os.WriteFile(filepath.Join(dir, "objects", "answer.yaml"), fmt.Appendf(nil, `apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: answer, namespace: bench}
spec: {hosts: [%[1]s], resolution: STATIC, ports: [{number: %[2]s, name: http, protocol: HTTP}], endpoints: [{address: 127.0.0.1}]}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: own, namespace: bench}
spec: {egress: [{port: {number: %[2]s, protocol: HTTP, name: http}, bind: 127.0.0.1, captureMode: NONE, hosts: ["*/*"]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: off, namespace: bench}
spec: {mtls: {mode: DISABLE}}
`, answerHost, port), 0o600); err != nil {
		return atRest, stormy, err
	}
	if err := answer(dir, 0); err != nil {
		return atRest, stormy, err
	}
	addr, err := freeAddr()
	if err != nil {
		return atRest, stormy, err
	}
	p, err := startDaemon(ctx, dir, addr)
	if err != nil {
		return atRest, stormy, err
	}
	defer p.stop()
	e, err := startEnvoy(ctx, dir, addr)
	if err != nil {
		return atRest, stormy, err
	}
	defer e.stop()
	if _, err := await(ctx, listen, 0); err != nil {
		return atRest, stormy, err
	}
	var times []time.Duration
	for i := 1; i <= idle; i++ {
		time.Sleep(100 * time.Millisecond) // at rest
		began := time.Now()
		if err := answer(dir, i); err != nil {
			return atRest, stormy, err
		}
		at, err := await(ctx, listen, i)
		if err != nil {
			return atRest, stormy, err
		}
		times = append(times, at.Sub(began))
	}
	stormy, err = inStorm(ctx, dir, listen)
	return reached(times, 0), stormy, err
}

// inStorm makes changes at a fixed rate. One is there when it, or a later one, answers; it is lost when none ever does.
func inStorm(ctx context.Context, dir, listen string) (reach, error) {
	first, n := idle+1, int(stormTime/stormEvery)
	began := make([]time.Time, n)
	failed := make(chan error, 1)
	go func() {
		tick := time.NewTicker(stormEvery)
		defer tick.Stop()
		for i := range n {
			<-tick.C
			began[i] = time.Now()
			if err := answer(dir, first+i); err != nil {
				failed <- err
				return
			}
		}
		failed <- nil
	}()
	var seen []time.Time // of changes in order
	for len(seen) < n {
		now, at, err := ask(ctx, listen)
		if err != nil {
			return reach{}, err
		}
		for len(seen) <= now-first {
			seen = append(seen, at)
		}
		if now < first+len(seen)-1 && len(seen) > 0 {
			return reach{}, fmt.Errorf("answered by change %d after change %d", now-first, len(seen)-1)
		}
		select {
		case err := <-failed:
			if err != nil {
				return reach{}, err
			}
			if _, err := await(ctx, listen, first+n-1); err != nil {
				return reached(nil, n-len(seen)), nil
			}
		case <-time.After(time.Millisecond):
		}
	}
	times := make([]time.Duration, n)
	for i := range times {
		times[i] = seen[i].Sub(began[i])
	}
	return reached(times, 0), nil
}

// answer has requests answered by the number.
func answer(dir string, n int) error {
	path := filepath.Join(dir, "objects", "route.yaml")
	text := fmt.Sprintf("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: answer, namespace: bench}\nspec: {hosts: [%s], http: [{directResponse: {status: 200, body: {string: \"%d\"}}}]}\n", answerHost, n)
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

var asking = &http.Client{Timeout: 5 * time.Second}

// ask returns the number that answers now, -1 for none.
func ask(ctx context.Context, addr string) (int, time.Time, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/", nil)
	if err != nil {
		return -1, time.Time{}, err
	}
	req.Host = answerHost
	resp, err := asking.Do(req)
	if err != nil {
		return -1, time.Now(), ctx.Err() // not up yet
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	at := time.Now()
	if err != nil || resp.StatusCode != http.StatusOK {
		return -1, at, nil
	}
	n, err := strconv.Atoi(string(body))
	return n, at, err
}

// await asks until the number answers, and says when.
func await(ctx context.Context, addr string, want int) (time.Time, error) {
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(time.Millisecond) {
		got, at, err := ask(ctx, addr)
		if err != nil || got >= want {
			return at, err
		}
	}
	return time.Time{}, fmt.Errorf("requests are not answered by change %d", want)
}

// startEnvoy runs Envoy as a sidecar.
func startEnvoy(ctx context.Context, dir, addr string) (*process, error) {
	_, port, _ := net.SplitHostPort(addr)
	path := filepath.Join(dir, "envoy.yaml")
	ads := "{ads: {}, resource_api_version: V3}"
	if err := os.WriteFile(path, fmt.Appendf(nil, `node: {id: sidecar~10.250.0.1~client.bench~bench.svc.cluster.local, cluster: client.bench, metadata: {NAMESPACE: bench, CLUSTER_ID: bench}}
dynamic_resources:
  ads_config: {api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}
  cds_config: %[1]s
  lds_config: %[1]s
static_resources:
  clusters:
  - name: xds
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: xds, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %[2]s}}}}]}]}
  - {name: sds-grpc, type: STATIC, load_assignment: {cluster_name: sds-grpc}}
`, ads, port), 0o600); err != nil {
		return nil, err
	}
	log, err := os.Create(path + ".log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, cmp.Or(os.Getenv("ENVOY"), "build/envoy/envoy"), "-c", path, "--concurrency", "1", "--use-dynamic-base-id", "--disable-hot-restart", "-l", "warning")
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &process{cmd}, nil
}
