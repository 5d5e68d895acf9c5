package translate_test

import (
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// backend answers with its name and counts what it is asked, by Host and path.
type backend struct {
	name   string
	port   string
	status atomic.Int32  // of its answers; 0: 200
	gate   chan struct{} // requests wait until it is closed; nil: they do not

	mu    sync.Mutex
	calls map[string]int
}

func startBackend(t *testing.T, name string, gate chan struct{}) *backend {
	t.Helper()
	b := &backend{name: name, gate: gate, calls: map[string]int{}}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.mu.Lock()
		b.calls[r.Host+r.URL.Path]++
		b.mu.Unlock()
		if gate != nil {
			<-gate
		}
		if code := b.status.Load(); code != 0 {
			w.WriteHeader(int(code))
		}
		io.WriteString(w, name)
	}))
	t.Cleanup(s.Close)
	b.port = s.URL[strings.LastIndex(s.URL, ":")+1:]
	return b
}

func (b *backend) asked(key string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.calls[key]
}

// entry is a ServiceEntry for NAME.example.com with the backends as versions.
func entry(name string, backends ...*backend) string {
	var y strings.Builder
	fmt.Fprintf(&y, "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: %s, namespace: a}\nspec:\n  hosts: [%s.example.com]\n  location: MESH_EXTERNAL\n  resolution: STATIC\n"+
		"  ports: [{name: http, number: 80, protocol: HTTP}]\n  endpoints:\n", name, name)
	for _, b := range backends {
		fmt.Fprintf(&y, "  - {address: 127.0.0.1, ports: {http: %s}, labels: {version: %s}}\n", b.port, b.name)
	}
	return y.String() + "---\n"
}

const trafficRules = `apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: app, namespace: a}
spec:
  hosts: [app.example.com]
  http:
  - {match: [{uri: {prefix: /abort}}], fault: {abort: {httpStatus: 555, percentage: {value: 50}}}, route: [{destination: {host: app.example.com, subset: v1}}]}
  - {match: [{headers: {end-user: {exact: jason}}}], fault: {delay: {fixedDelay: 700ms, percentage: {value: 100}}}, route: [{destination: {host: app.example.com, subset: v1}}]}
  - route: [{destination: {host: app.example.com, subset: v1}, weight: 80}, {destination: {host: app.example.com, subset: v2}, weight: 20}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: app, namespace: a}
spec: {host: app.example.com, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: fail, namespace: a}
spec:
  hosts: [fail.example.com]
  http:
  - {match: [{uri: {exact: /three}}], retries: {attempts: 3, retryOn: 5xx, backoff: 1ms}, route: [{destination: {host: fail.example.com}}]}
  - {match: [{uri: {exact: /zero}}], retries: {attempts: 0}, route: [{destination: {host: fail.example.com}}]}
  - route: [{destination: {host: fail.example.com}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: hash, namespace: a}
spec: {host: hash.example.com, trafficPolicy: {loadBalancer: {consistentHash: {httpHeaderName: x-user}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: cookie, namespace: a}
spec: {host: cookie.example.com, trafficPolicy: {loadBalancer: {consistentHash: {httpCookie: {name: user, path: /, ttl: 60s}, maglev: {}}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: full, namespace: a}
spec: {host: full.example.com, trafficPolicy: {connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: full, namespace: a}
spec: {hosts: [full.example.com], http: [{retries: {attempts: 0}, headers: {response: {set: {x-flags: "%RESPONSE_FLAGS%"}}}, route: [{destination: {host: full.example.com}}]}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: eject, namespace: a}
spec: {host: eject.example.com, trafficPolicy: {outlierDetection: {consecutive5xxErrors: 1, interval: 200ms, baseEjectionTime: 2s, maxEjectionPercent: 100}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: eject, namespace: a}
spec: {hosts: [eject.example.com], http: [{retries: {attempts: 0}, route: [{destination: {host: eject.example.com}}]}]}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: mirror, namespace: a}
spec:
  hosts: [mirror.example.com]
  http:
  - {match: [{uri: {exact: /dead}}], mirror: {host: dead.example.com}, route: [{destination: {host: mirror.example.com}}]}
  - {mirror: {host: copy.example.com}, mirrorPercentage: {value: 25}, match: [{uri: {exact: /some}}], route: [{destination: {host: mirror.example.com}}]}
  - {mirror: {host: copy.example.com}, route: [{destination: {host: mirror.example.com}}]}
`

// near reports whether got is within the points of want percent of n.
func near(got, n int, want, points float64) bool {
	return math.Abs(100*float64(got)/float64(n)-want) <= points
}

// TestEnvoyTraffic runs real Envoy against real servers under the rules above: weights, retries as the server counts
// them, faults, hashes, overflow, ejection and return, mirrors.
func TestEnvoyTraffic(t *testing.T) {
	envoytest.Path(t)
	v1, v2, v3 := startBackend(t, "v1", nil), startBackend(t, "v2", nil), startBackend(t, "v3", nil)
	fail, copied, dead := startBackend(t, "fail", nil), startBackend(t, "copy", nil), &backend{name: "dead", port: fmt.Sprint(freePort(t))}
	fail.status.Store(503)
	gate := make(chan struct{})
	full := startBackend(t, "full", gate)
	bad, good := startBackend(t, "bad", nil), startBackend(t, "good", nil)

	yaml := entry("app", v1, v2) + entry("fail", fail) + entry("hash", v1, v2, v3) + entry("cookie", v1, v2, v3) + entry("full", full) +
		entry("eject", bad, good) + entry("mirror", v1) + entry("copy", copied) + entry("dead", dead) + trafficRules
	snap, problems := fromYAML(t, yaml, nil)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	r, problems := translate.Translate(snap, proxyNamed(t, "sidecar-a-client", ""))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	port := freePort(t)
	cp, addr := serve(t, bindAt(r, map[string]uint32{"0.0.0.0_80": port}))
	startEnvoy(t, addr)
	eventually(t, "first answer", func() error {
		status, body, err := get(port, "/", "app.example.com", "")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d: %s", status, body)
		}
		return err
	})
	if n := cp.refused(); n != "" {
		t.Fatalf("envoy refused: %s", n)
	}
	tally := func(n int, path, host, header string) map[string]int {
		out := map[string]int{}
		for range n {
			status, body, err := get(port, path, host, header)
			if err != nil {
				t.Fatal(err)
			}
			if status != http.StatusOK {
				body = fmt.Sprint(status)
			}
			out[body]++
		}
		return out
	}

	t.Run("weights", func(t *testing.T) {
		if n := tally(2000, "/", "app.example.com", ""); !near(n["v1"], 2000, 80, 3) || n["v1"]+n["v2"] != 2000 {
			t.Errorf("80 and 20 became %v of 2000", n)
		}
	})
	t.Run("faults", func(t *testing.T) {
		if n := tally(1000, "/abort", "app.example.com", ""); !near(n["555"], 1000, 50, 5) || n["555"]+n["v1"] != 1000 {
			t.Errorf("an abort of 50 %% became %v of 1000", n)
		}
		start := time.Now()
		tally(1, "/", "app.example.com", "end-user: jason")
		if d := time.Since(start); d < 650*time.Millisecond { // Envoy counts in coarse steps
			t.Errorf("a delay of 700 ms took %s", d)
		}
	})
	t.Run("retries", func(t *testing.T) {
		for path, calls := range map[string]int{"/three": 4, "/zero": 1, "/default": 3} {
			if n := tally(1, path, "fail.example.com", ""); n["503"] != 1 {
				t.Errorf("%s: %v", path, n)
			}
			if got := fail.asked("fail.example.com" + path); got != calls {
				t.Errorf("%s: the server was called %d times, want %d", path, got, calls)
			}
		}
	})
	t.Run("hash", func(t *testing.T) {
		reached := map[string]bool{}
		for i := range 60 {
			n := tally(3, "/", "hash.example.com", fmt.Sprintf("x-user: u%d", i))
			if len(n) != 1 {
				t.Errorf("user %d went to %v", i, n)
			}
			for name := range n {
				reached[name] = true
			}
		}
		if len(reached) != 3 {
			t.Errorf("60 users reached %v", reached)
		}
		testCookie(t, port)
	})
	t.Run("overflow", func(t *testing.T) { testOverflow(t, port, full, gate) })
	t.Run("ejection", func(t *testing.T) {
		bad.status.Store(503)
		eventually(t, "the bad server is met", func() error {
			if n := tally(1, "/", "eject.example.com", ""); n["503"] == 0 {
				return fmt.Errorf("%v", n)
			}
			return nil
		})
		// A worker hears of it a moment after the failure, and after two seconds the server is tried again.
		eventually(t, "the bad server is set aside", func() error {
			if n := tally(20, "/", "eject.example.com", ""); n["good"] != 20 {
				return fmt.Errorf("%v of 20", n)
			}
			return nil
		})
		bad.status.Store(0)
		eventually(t, "the server is back", func() error {
			if n := tally(4, "/", "eject.example.com", ""); n["bad"] == 0 {
				return fmt.Errorf("%v", n)
			}
			return nil
		})
	})
	t.Run("mirror", func(t *testing.T) {
		const shadow = "mirror.example.com-shadow"
		if n := tally(100, "/all", "mirror.example.com", ""); n["v1"] != 100 {
			t.Errorf("mirrored requests: %v", n)
		}
		tally(1000, "/some", "mirror.example.com", "")
		eventually(t, "copies", func() error {
			if all, some := copied.asked(shadow+"/all"), copied.asked(shadow+"/some"); all != 100 || !near(some, 1000, 25, 5) {
				return fmt.Errorf("%d of 100 and %d of 1000 were copied, want all and 25 %%", all, some)
			}
			return nil
		})
		if n := tally(100, "/dead", "mirror.example.com", ""); n["v1"] != 100 {
			t.Errorf("with a mirror that is dead: %v", n)
		}
	})
}

// testCookie: the cookie is set once, and leads back to the same server.
func testCookie(t *testing.T, port uint32) {
	ask := func(cookie string) (body, set string) {
		req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/", port), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "cookie.example.com"
		if cookie != "" {
			req.Header.Set("Cookie", cookie)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b), resp.Header.Get("Set-Cookie")
	}
	first, set := ask("")
	if !strings.HasPrefix(set, "user=") || !strings.Contains(set, "Path=/") || !strings.Contains(set, "Max-Age=60") || !strings.Contains(set, "HttpOnly") {
		t.Errorf("the first answer sets %q", set)
	}
	pair, _, _ := strings.Cut(set, ";")
	for range 20 {
		if body, again := ask(pair); body != first || again != "" {
			t.Errorf("with the cookie: %s, sets %q; without it was %s", body, again, first)
		}
	}
}

// testOverflow fills one connection and one place in the queue; all others are refused at once.
func testOverflow(t *testing.T, port uint32, full *backend, gate chan struct{}) {
	var done sync.WaitGroup
	var ok, overflow atomic.Int32
	other := make(chan string, 10)
	for range 10 {
		done.Go(func() {
			req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/", port), nil)
			if err != nil {
				other <- err.Error()
				return
			}
			req.Host = "full.example.com"
			resp, err := (&http.Client{Timeout: 30 * time.Second}).Do(req)
			if err != nil {
				other <- err.Error()
				return
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			switch flags := resp.Header.Get("x-flags"); {
			case err == nil && resp.StatusCode == http.StatusOK:
				ok.Add(1)
			case err == nil && resp.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(body), "overflow") && flags == "UO":
				overflow.Add(1)
			default:
				other <- fmt.Sprintf("%d %q %q %v", resp.StatusCode, flags, body, err)
			}
		})
	}
	eventually(t, "the others are refused", func() error {
		if n := overflow.Load(); n < 8 {
			return fmt.Errorf("%d of 10 overflowed", n)
		}
		return nil
	})
	close(gate)
	done.Wait()
	// One request has the connection and one waits. Where all come before the connection is there, the first is the one
	// that waits, and all others are too many.
	if n := ok.Load(); n < 1 || n > 2 || overflow.Load() != 10-n || len(other) > 0 {
		t.Errorf("%d served, %d refused as overflow, %d otherwise", ok.Load(), overflow.Load(), len(other))
	}
}

// TestEnvoySniffs: at a port of which nobody said what it speaks, requests are routed by rules, and other bytes pass as
// they are, also when the server speaks first.
func TestEnvoySniffs(t *testing.T) {
	for _, inspected := range []int{80, 90, 9999} { // with TLS looked into, and without
		t.Run(fmt.Sprint(inspected), func(t *testing.T) { testSniffs(t, inspected) })
	}
}

func testSniffs(t *testing.T, inspected int) {
	envoytest.Path(t)
	web, first := startBackend(t, "web", nil), listen(t)
	go func() {
		for {
			c, err := first.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "hello from the server\n")
			c.Close()
		}
	}()
	_, firstPort, _ := strings.Cut(first.Addr().String(), ":")
	yaml := fmt.Sprintf(`apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: web, namespace: a}
spec:
  hosts: [web.example.com]
  addresses: [192.0.2.1]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{name: web, number: 80}, {name: first, number: 90}]
  endpoints: [{address: 127.0.0.1, ports: {web: %s, first: %s}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: a}
spec:
  hosts: [web.example.com]
  http:
  - {match: [{uri: {exact: /rule}}], directResponse: {status: 418}}
  - {route: [{destination: {host: web.example.com, port: {number: 80}}}]}
  tls: [{match: [{port: %d, sniHosts: [web.example.com]}], route: [{destination: {host: web.example.com, port: {number: 80}}}]}]
`, web.port, firstPort, inspected)
	snap, problems := fromYAML(t, yaml, nil)
	r, more := translate.Translate(snap, proxyNamed(t, "sidecar-a-client", ""))
	if problems = append(problems, more...); len(problems) > 0 {
		t.Fatal(problems)
	}
	http, raw := freePort(t), freePort(t)
	_, addr := serve(t, bindAt(r, map[string]uint32{"192.0.2.1_80": http, "192.0.2.1_90": raw}))
	startEnvoy(t, addr)
	eventually(t, "requests are routed", func() error {
		rule, _, err := get(http, "/rule", "any", "")
		if err != nil {
			return err
		}
		if status, body, err := get(http, "/", "any", ""); err != nil || rule != 418 || status != 200 || body != "web" {
			return fmt.Errorf("/rule %d; / %d %q %v", rule, status, body, err)
		}
		return nil
	})
	eventually(t, "the server's first words", func() error {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", raw), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if text, err := io.ReadAll(c); string(text) != "hello from the server\n" {
			return fmt.Errorf("%q %v", text, err)
		}
		return nil
	})
}
