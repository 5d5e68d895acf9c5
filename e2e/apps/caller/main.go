// Command caller sends HTTP requests and counts what came back: a load client that says who answered.
//
// Closed loop: --n requests by --concurrency workers. Open loop: --rate a second for --duration, started on time
// whether or not earlier ones have ended, so that a stall shows as late answers and not as fewer requests. With
// --until-eof it starts none after standard input has ended, and waits for those that are under way.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sort"
	"strings"
	"sync"
	"syscall"
	"time"
)

type headers http.Header

func (h headers) String() string { return "" }

// Set adds one "name=value".
func (h headers) Set(s string) error {
	k, v, ok := strings.Cut(s, "=")
	if !ok || k == "" {
		return errors.New("want NAME=VALUE")
	}
	http.Header(h).Add(k, v)
	return nil
}

type options struct {
	url         string
	n           int
	concurrency int
	rate        float64
	duration    time.Duration
	timeout     time.Duration
	keepAlive   bool
	header      http.Header
	connect     string          // HOST:PORT that is dialled, whatever the URL says; "" follows the URL
	tls         *tls.Config     // nil: the roots of the system, and no certificate
	each        io.Writer       // nil: no line per request
	enough      <-chan struct{} // closed: the open loop starts no more; nil: never
}

func main() {
	o, files := options{header: http.Header{}}, secure{}
	flag.StringVar(&o.url, "url", "", "URL to call")
	flag.IntVar(&o.n, "n", 1, "closed loop: how many requests")
	flag.IntVar(&o.concurrency, "concurrency", 1, "closed loop: how many at a time; open loop: how many at most (0: 4096)")
	flag.Float64Var(&o.rate, "rate", 0, "open loop: requests a second")
	flag.DurationVar(&o.duration, "duration", 10*time.Second, "open loop: for how long")
	flag.DurationVar(&o.timeout, "timeout", 2*time.Second, "of one request")
	flag.BoolVar(&o.keepAlive, "keep-alive", true, "reuse connections")
	flag.Var(headers(o.header), "header", "NAME=VALUE, repeatable")
	flag.StringVar(&o.connect, "connect", "", "HOST:PORT to connect to in place of the URL's, whose host is asked for all the same")
	flag.StringVar(&files.authority, "cacert", "", "PEM file of the authorities that the server's certificate must be of")
	flag.StringVar(&files.cert, "cert", "", "PEM file of the certificate to show")
	flag.StringVar(&files.key, "key", "", "PEM file of its key")
	untilEOF := flag.Bool("until-eof", false, "open loop: start no more requests when standard input has ended")
	asJSON := flag.Bool("json", false, "print the summary as JSON")
	each := flag.Bool("each", false, "print a JSON line per request as it ends; the summary comes last")
	strict := flag.Bool("strict", false, "exit 1 when a request failed or its status was not 200")
	flag.Parse()
	if o.url == "" {
		fmt.Fprintln(os.Stderr, "caller: --url is missing")
		os.Exit(2)
	}
	var err error
	if o.tls, err = files.config(); err != nil {
		fmt.Fprintln(os.Stderr, "caller:", err)
		os.Exit(2)
	}
	if *each {
		o.each = os.Stdout
	}
	if *untilEOF {
		o.enough = ended(os.Stdin)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	s := run(ctx, o)
	if *asJSON {
		_ = json.NewEncoder(os.Stdout).Encode(s)
	} else {
		fmt.Print(s)
	}
	if *strict && s.Failed > 0 {
		os.Exit(1)
	}
}

// ended returns a channel that is closed at the end of r.
func ended(r io.Reader) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, r)
	}()
	return done
}

// result is one request, as --each prints it.
type result struct {
	Start   time.Time `json:"start"`
	End     time.Time `json:"end"`
	Status  int       `json:"status,omitempty"`
	Version string    `json:"version,omitempty"`
	Pod     string    `json:"pod,omitempty"`
	Caller  string    `json:"caller,omitempty"`
	// Certificate names the server's, see shown.
	Certificate string `json:"certificate,omitempty"`
	Error       string `json:"error,omitempty"`
}

// summary counts the results.
type summary struct {
	Requests int            `json:"requests"`
	Failed   int            `json:"failed"` // no answer, or a status other than 200
	Skipped  int            `json:"skipped,omitempty"`
	Seconds  float64        `json:"seconds"`
	Status   map[string]int `json:"status"`
	Version  map[string]int `json:"version"`
	Pod      map[string]int `json:"pod"`
	Caller   map[string]int `json:"caller"`
	// Certificate counts by what names the server's certificate.
	Certificate map[string]int `json:"certificate"`
	Error       map[string]int `json:"error"`
	// Latency has p50, p90, p99, p999 and max in milliseconds.
	Latency map[string]float64 `json:"latencyMs"`

	took []float64
}

func newSummary() *summary {
	return &summary{Status: map[string]int{}, Version: map[string]int{}, Pod: map[string]int{}, Caller: map[string]int{},
		Certificate: map[string]int{}, Error: map[string]int{}, Latency: map[string]float64{}}
}

func (s *summary) add(r result) {
	s.Requests++
	if r.Status != http.StatusOK || r.Error != "" {
		s.Failed++
	}
	count := func(m map[string]int, key string) {
		if key != "" {
			m[key]++
		}
	}
	if r.Status != 0 {
		s.Status[fmt.Sprint(r.Status)]++
	}
	count(s.Version, r.Version)
	count(s.Pod, r.Pod)
	count(s.Caller, r.Caller)
	count(s.Certificate, r.Certificate)
	count(s.Error, r.Error)
	s.took = append(s.took, float64(r.End.Sub(r.Start).Microseconds())/1000)
}

func (s *summary) finish(took time.Duration) {
	s.Seconds = took.Seconds()
	sort.Float64s(s.took)
	for name, q := range map[string]float64{"p50": .5, "p90": .9, "p99": .99, "p999": .999, "max": 1} {
		if n := len(s.took); n > 0 {
			s.Latency[name] = s.took[min(n-1, int(q*float64(n)))]
		}
	}
}

// String is the summary for people.
func (s *summary) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests in %.2f s, %d failed, %d skipped\n", s.Requests, s.Seconds, s.Failed, s.Skipped)
	for _, t := range []struct {
		name string
		m    map[string]int
	}{{"status", s.Status}, {"version", s.Version}, {"pod", s.Pod}, {"caller", s.Caller}, {"certificate", s.Certificate}, {"error", s.Error}} {
		keys := make([]string, 0, len(t.m))
		for k := range t.m {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			fmt.Fprintf(&b, "%-11s %6d  %s\n", t.name, t.m[k], k)
		}
	}
	fmt.Fprintf(&b, "latency  p50 %.1f ms, p90 %.1f ms, p99 %.1f ms, max %.1f ms\n", s.Latency["p50"], s.Latency["p90"], s.Latency["p99"], s.Latency["max"])
	return b.String()
}

func run(ctx context.Context, o options) *summary {
	limit := o.concurrency
	if o.rate > 0 && limit <= 1 {
		limit = 4096
	}
	limit = max(limit, 1)
	client := &http.Client{
		Timeout:       o.timeout,
		Transport:     o.transport(limit),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	defer client.CloseIdleConnections()
	s, start := newSummary(), time.Now()
	var mu sync.Mutex
	var wait sync.WaitGroup
	one := func(due time.Time) {
		r := call(ctx, client, o, due)
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() != nil && r.Error != "" {
			return // ended by us
		}
		s.add(r)
		if o.each != nil {
			_ = json.NewEncoder(o.each).Encode(r)
		}
	}
	if o.rate > 0 {
		s.Skipped = openLoop(ctx, o, limit, &wait, one)
	} else {
		closedLoop(ctx, o.n, limit, &wait, one)
	}
	wait.Wait()
	s.finish(time.Since(start))
	return s
}

func closedLoop(ctx context.Context, n, limit int, wait *sync.WaitGroup, one func(time.Time)) {
	work := make(chan struct{})
	for range limit {
		wait.Go(func() {
			for range work {
				one(time.Now())
			}
		})
	}
	defer close(work)
	for range n {
		select {
		case work <- struct{}{}:
		case <-ctx.Done():
			return
		}
	}
}

// openLoop starts requests when they are due; those for which there is no room are counted and skipped.
func openLoop(ctx context.Context, o options, limit int, wait *sync.WaitGroup, one func(time.Time)) (skipped int) {
	room := make(chan struct{}, limit)
	start, total := time.Now(), int(o.rate*o.duration.Seconds())
	timer := time.NewTimer(0)
	defer timer.Stop()
	for i := range total {
		due := start.Add(time.Duration(float64(i) / o.rate * float64(time.Second)))
		timer.Reset(time.Until(due))
		select {
		case <-timer.C:
		case <-o.enough:
			return skipped
		case <-ctx.Done():
			return skipped
		}
		select {
		case room <- struct{}{}:
			wait.Go(func() {
				defer func() { <-room }()
				one(due)
			})
		default:
			skipped++
		}
	}
	return skipped
}

// call sends one request; its time counts from when it was due.
func call(ctx context.Context, client *http.Client, o options, due time.Time) result {
	r := result{Start: due}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, o.url, nil)
	if err != nil {
		r.End, r.Error = time.Now(), err.Error()
		return r
	}
	req.Header = o.header.Clone()
	if host := req.Header.Get("Host"); host != "" {
		req.Host = host
	}
	resp, err := client.Do(req)
	if err == nil {
		r.Status, r.Certificate = resp.StatusCode, shown(resp.TLS)
		var body []byte
		body, err = io.ReadAll(io.LimitReader(resp.Body, 1<<20))
		_ = resp.Body.Close()
		var a struct{ Version, Pod, Caller string }
		if json.Unmarshal(body, &a) == nil {
			r.Version, r.Pod, r.Caller = a.Version, a.Pod, a.Caller
		} else if n, _ := fmt.Sscanf(string(body), "Hello version: %s instance: %s", &r.Version, &r.Pod); n == 2 { // helloworld
			r.Version = strings.TrimSuffix(r.Version, ",")
		}
	}
	r.End = time.Now()
	if err != nil {
		r.Error = reason(err)
	}
	return r
}

// reason is the error without addresses and ports, so that equal ones are counted together.
func reason(err error) string {
	var dns *net.DNSError
	var op *net.OpError
	var timeout interface{ Timeout() bool }
	switch {
	case errors.As(err, &dns):
		return "dns: " + dns.Err + ": " + dns.Name
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	case errors.As(err, &op):
		return op.Op + ": " + op.Err.Error()
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "connection closed"
	}
	return err.Error()
}
