package scripts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"sort"
	"strconv"
	"strings"
	"unicode"
)

// counts is what the program caller says came back.
type counts struct {
	Requests, Failed                                 int
	Status, Version, Pod, Caller, Certificate, Error map[string]int
	Latency                                          map[string]float64 `json:"latencyMs"`
}

// of returns how often something came back.
func (c *counts) of(what string) (int, error) {
	kind, key, _ := strings.Cut(what, ":")
	switch kind {
	case "ok":
		return c.Requests - c.Failed, nil
	case "failed":
		return c.Failed, nil
	case "status":
		return c.Status[key], nil
	case "version":
		return c.Version[key], nil
	case "caller":
		return c.Caller[key], nil
	case "certificate":
		return c.Certificate[key], nil
	case "pod":
		var n int
		for pod, k := range c.Pod {
			if strings.HasPrefix(pod, key) {
				n += k
			}
		}
		return n, nil
	}
	return 0, usageError(fmt.Sprintf("%q: choose ok, failed, status:, version:, pod:, caller: or certificate:", what))
}

// String says it all in a line.
func (c *counts) String() string {
	var parts []string
	for _, k := range []struct {
		name string
		m    map[string]int
	}{{"status", c.Status}, {"version", c.Version}, {"pod", c.Pod}, {"caller", c.Caller}, {"certificate", c.Certificate}, {"error", c.Error}} {
		keys := make([]string, 0, len(k.m))
		for key := range k.m {
			keys = append(keys, key)
		}
		sort.Strings(keys)
		for _, key := range keys {
			parts = append(parts, fmt.Sprintf("%s:%s=%d", k.name, key, k.m[key]))
		}
	}
	return fmt.Sprintf("%d requests, %d failed, p50 %.1f ms, p99 %.1f ms: %s", c.Requests, c.Failed, c.Latency["p50"], c.Latency["p99"], strings.Join(parts, " "))
}

// bounds parses a count, as README.md describes it, of n requests.
func bounds(text string, n int) (low, high int, err error) {
	bad := func() (int, int, error) {
		return 0, 0, usageError(fmt.Sprintf("count %q: see e2e/scripts/README.md", text))
	}
	number := func(s string) (float64, bool, bool) { // value, in percent, valid
		s, percent := strings.CutSuffix(s, "%")
		if s == "" || !unicode.IsDigit(rune(s[0])) {
			return 0, false, false
		}
		f, err := strconv.ParseFloat(s, 64)
		return f, percent, err == nil
	}
	floor, ceil := func(f float64) int { return int(math.Ceil(f - 1e-9)) }, func(f float64) int { return int(math.Floor(f + 1e-9)) }
	if s, ok := strings.CutPrefix(text, ">="); ok {
		f, percent, ok := number(s)
		if percent {
			f *= float64(n) / 100
		}
		if !ok {
			return bad()
		}
		return floor(f), math.MaxInt, nil
	}
	if s, ok := strings.CutPrefix(text, "<="); ok {
		f, percent, ok := number(s)
		if percent {
			f *= float64(n) / 100
		}
		if !ok {
			return bad()
		}
		return 0, ceil(f), nil
	}
	if a, b, ok := strings.Cut(text, ".."); ok {
		lo, p1, ok1 := number(a)
		hi, p2, ok2 := number(b)
		if !ok1 || !ok2 || p1 || p2 || lo > hi {
			return bad()
		}
		return floor(lo), ceil(hi), nil
	}
	base, give, ranged := strings.Cut(text, "±")
	f, percent, ok := number(base)
	if !ok {
		return bad()
	}
	if percent {
		f *= float64(n) / 100
	}
	var g float64
	if ranged {
		part, gPercent, ok := number(give)
		if !ok {
			return bad()
		}
		if g = part; gPercent {
			g = f * part / 100
		}
	}
	low, high = floor(f-g), ceil(f+g)
	if low > high { // 50% of an odd number is no whole one
		return bad()
	}
	return max(0, low), high, nil
}

// check compares what came back with what was wanted: WHAT=COUNT.
func (c *counts) check(wants []string) error {
	if len(wants) == 0 {
		wants = []string{"failed=0"}
	}
	var errs []error
	for _, w := range wants {
		i := strings.LastIndexByte(w, '=') // a caller's id may have one
		if j := strings.Index(w, "=>="); j > 0 {
			i = j
		} else if j := strings.Index(w, "=<="); j > 0 {
			i = j
		}
		if i <= 0 {
			return usageError(fmt.Sprintf("%q: write WHAT=COUNT", w))
		}
		got, err := c.of(w[:i])
		if err != nil {
			return err
		}
		low, high, err := bounds(w[i+1:], c.Requests)
		if err != nil {
			return err
		}
		if got < low || got > high {
			errs = append(errs, fmt.Errorf("%s: %d, want %s", w[:i], got, w[i+1:]))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w\n%s", errors.Join(errs...), c)
	}
	return nil
}

// call sends requests from a Pod and checks what came back. Options of the program caller may stand among the wants.
func (s *story) call(ctx context.Context, args []string) (string, error) {
	c, err := s.cluster(args[0])
	if err != nil {
		return "", err
	}
	argv, wants, n := []string{"caller", "--json", "--url", args[2]}, []string(nil), "1"
	for _, a := range args[3:] {
		switch {
		case strings.HasPrefix(a, "n="):
			n = a[2:]
		case strings.HasPrefix(a, "--"):
			argv = append(argv, a)
		default:
			wants = append(wants, a)
		}
	}
	argv = append(argv, "--n", n)
	pod, container := split(args[1])
	stdout, stderr, code, err := c.Exec(ctx, pod, container, argv...)
	if err := failed(argv, stderr, code, err); err != nil {
		return stdout, err
	}
	got := &counts{}
	if err := json.Unmarshal([]byte(stdout), got); err != nil {
		return stdout, fmt.Errorf("what caller says: %w", err)
	}
	return got.String() + "\n", got.check(wants)
}
