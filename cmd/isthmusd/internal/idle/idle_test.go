package idle

import (
	"context"
	"runtime/debug"
	"testing"
	"time"
)

// percent returns the setting without changing it.
func percent() int {
	p := debug.SetGCPercent(100)
	debug.SetGCPercent(p)
	return p
}

var sink []byte

// TestRun: the collector is eager at rest, as it was under load, and as it was at the end.
func TestRun(t *testing.T) {
	t.Setenv("GOGC", "")
	t.Setenv("GOMEMLIMIT", "")
	was := percent()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, Config{Every: 5 * time.Millisecond, Rate: 256 << 20, Percent: 31}) }()
	until := func(want int, work func()) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); percent() != want; {
			if time.Now().After(end) {
				t.Fatalf("the setting is %d, want %d", percent(), want)
			}
			work()
		}
	}
	until(31, func() { time.Sleep(time.Millisecond) })
	until(was, func() { sink = make([]byte, 8<<20) })
	until(31, func() { time.Sleep(time.Millisecond) })
	cancel()
	if err := <-done; err != nil || percent() != was {
		t.Errorf("%v, and the setting is %d", err, percent())
	}
}

// TestChosen: what the environment says stays.
func TestChosen(t *testing.T) {
	t.Setenv("GOGC", "77")
	was := percent()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := Run(ctx, Config{Every: time.Millisecond}); err != nil || percent() != was {
		t.Errorf("%v, and the setting is %d", err, percent())
	}
}
