package scripts

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestBounds(t *testing.T) {
	for _, c := range []struct {
		text         string
		n, low, high int
	}{
		{"100", 300, 100, 100},
		{">=90", 300, 90, math.MaxInt},
		{"<=10", 300, 0, 10},
		{"<=10%", 300, 0, 30},
		{"90..110", 300, 90, 110},
		{"100±1%", 300, 99, 101},
		{"100±0.5%", 300, 100, 100},
		{"25%±5", 200, 45, 55},
		{"50%", 200, 100, 100},
		{"50%±10%", 200, 90, 110},
		{"3±5", 200, 0, 8},
	} {
		low, high, err := bounds(c.text, c.n)
		if err != nil || low != c.low || high != c.high {
			t.Errorf("%s of %d: %d to %d (%v), want %d to %d", c.text, c.n, low, high, err, c.low, c.high)
		}
	}
	for _, text := range []string{"", "x", "±5", "10±", "20..10", ">=", "50%%", "-1", "1..2%"} {
		if low, high, err := bounds(text, 100); err == nil {
			t.Errorf("%q is %d to %d, want an error", text, low, high)
		}
	}
	if _, _, err := bounds("50%", 5); err == nil {
		t.Error("half of five is no number of requests")
	}
}

func TestCheck(t *testing.T) {
	c := &counts{Requests: 10, Failed: 1, Version: map[string]int{"v1": 6, "v2": 3}, Pod: map[string]int{"a-1": 4, "a-2": 2, "b-1": 3},
		Status: map[string]int{"200": 9, "503": 1}, Caller: map[string]int{"spiffe://x/ns/a/sa/b": 9}, Certificate: map[string]int{"a-1": 9}}
	for _, ok := range []string{"ok=9", "failed=1", "version:v1=60%", "version:v3=0", "pod:a-=6", "status:503=>=1", "status:200=<=9", "caller:spiffe://x/ns/a/sa/b=9", "certificate:a-1=>=9", "certificate:a-2=0"} {
		if err := c.check([]string{ok}); err != nil {
			t.Errorf("%s: %v", ok, err)
		}
	}
	for _, wrong := range []string{"ok=10", "version:v2=4", "pod:a-=5", "status:503=>=2", "certificate:a-1=10"} {
		if err := c.check([]string{"failed=1", wrong}); err == nil || !strings.Contains(err.Error(), "version:v1=6") {
			t.Errorf("%s: error %v, want one that shows the counts", wrong, err)
		}
	}
	if err := c.check(nil); err == nil {
		t.Error("a failed request passes")
	}
	var bad usageError
	for _, w := range []string{"colour:red=1", "ok", "ok=many"} {
		if err := c.check([]string{w}); !errors.As(err, &bad) {
			t.Errorf("%s: %v, want a mistake of the story", w, err)
		}
	}
}
