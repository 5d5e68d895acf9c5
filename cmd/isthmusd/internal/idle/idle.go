// Package idle gives memory back to the system while a process has little to do. A garbage collector that waits for the
// heap to double is right under load, where its work counts; at rest it only holds memory.
package idle

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// Config says what little is. The zero Config is good.
type Config struct {
	// Every is the time between two looks. 0: 10 s.
	Every time.Duration
	// Rate is how much is allocated at most in a second at rest, in bytes. Raising it saves memory in processes that do
	// a little all the time, and costs them more collections. 0: 1 MiB.
	Rate uint64
	// Percent is the heap's growth until a collection at rest. Lowering it saves memory, and costs collections. 0: 30.
	Percent int
}

// Run follows how much is allocated until ctx ends; then all is as it was. It does nothing where the environment sets
// GOGC or GOMEMLIMIT: the operator has chosen.
func Run(ctx context.Context, cfg Config) error {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		<-ctx.Done()
		return nil
	}
	if cfg.Every <= 0 {
		cfg.Every = 10 * time.Second
	}
	if cfg.Rate == 0 {
		cfg.Rate = 1 << 20
	}
	if cfg.Percent <= 0 {
		cfg.Percent = 30
	}
	tick := time.NewTicker(cfg.Every)
	defer tick.Stop()
	before, busy := allocated(), 0
	resting := false
	for {
		select {
		case <-ctx.Done():
			if resting {
				debug.SetGCPercent(busy)
			}
			return nil
		case <-tick.C:
		}
		now := allocated()
		rests := now-before <= cfg.Rate*uint64(cfg.Every)/uint64(time.Second)
		before = now
		if rests == resting {
			continue
		}
		if resting = rests; rests {
			busy = debug.SetGCPercent(cfg.Percent)
			debug.FreeOSMemory()
		} else {
			debug.SetGCPercent(busy)
		}
	}
}

// allocated returns the bytes allocated since the process began.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}
