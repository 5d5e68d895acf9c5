package protocol

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// simulate runs one seed and returns what broke, and the story.
func simulate(seed uint64, f faults, tell bool) (string, error) {
	s := newSim(seed, f, tell)
	s.run(2 * time.Second)
	for range 15 + s.rng.IntN(25) {
		s.disturb()
		if s.rng.IntN(2) == 0 {
			s.run(time.Duration(1+s.rng.IntN(4)) * 500 * time.Millisecond)
		}
		if s.broken != nil {
			break
		}
	}
	if s.broken == nil {
		s.settle()
	}
	return strings.Join(s.story, "\n"), s.broken
}

// number reads an environment variable.
func number(t *testing.T, name string, n uint64) uint64 {
	v := os.Getenv(name)
	if v == "" {
		return n
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		t.Fatalf("%s=%q: %v", name, v, err)
	}
	return n
}

// search runs n seeds from first on until one breaks, and returns the lowest that did.
func search(first, n uint64, f faults, progress func(done uint64)) (uint64, error) {
	var (
		mu    sync.Mutex
		next  = first
		done  uint64
		found = first + n
		why   error
		wg    sync.WaitGroup
	)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				seed := next
				next++
				stop := seed >= first+n || why != nil
				mu.Unlock()
				if stop {
					return
				}
				_, err := simulate(seed, f, false)
				mu.Lock()
				if done++; progress != nil {
					progress(done)
				}
				if err != nil && cmp.Compare(seed, found) < 0 {
					found, why = seed, err
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return found, why
}

// TestSimulation runs SIM_SEEDS seeds from SIM_FIRST on (make simulate; a few by default), or tells the story of SIM_SEED.
func TestSimulation(t *testing.T) {
	if os.Getenv("SIM_SEED") != "" {
		seed := number(t, "SIM_SEED", 0)
		story, err := simulate(seed, faults{}, true)
		fmt.Printf("seed %d:\n%s\n", seed, story)
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	first, n, begin := number(t, "SIM_FIRST", 0), number(t, "SIM_SEEDS", 500), time.Now()
	defer debug.SetGCPercent(debug.SetGCPercent(800)) // the worlds are small and short-lived
	step := max(n/20, 5000)
	seed, err := search(first, n, faults{}, func(done uint64) {
		if done%step == 0 {
			fmt.Printf("simulation: %d of %d seeds in %s, none broke\n", done, n, time.Since(begin).Round(time.Second))
		}
	})
	if err != nil {
		t.Fatalf("seed %d: %v\nits story: make simulate SEED=%d", seed, err, seed)
	}
}

// TestSimulationFinds breaks, one at a time, what the core rests on and wants the simulation to notice.
func TestSimulationFinds(t *testing.T) {
	for name, c := range map[string]struct {
		faults faults
		want   []string // one of them
	}{
		"signatures not checked":                  {faults{believeAnything: true}, []string{"did not sign"}},
		"tombstones lost by the disk":             {faults{forgetTombs: true}, []string{"after version", "healed and quiet", "still holds", "evicted"}},
		"what is not for us is taken":             {faults{mutant: everyAudience}, []string{"not exported to it"}},
		"an older version wins":                   {faults{mutant: oldWins}, []string{"after version"}},
		"a tombstone is not final":                {faults{mutant: tombsPass}, []string{"after version"}},
		"others bring an evicted key back":        {faults{mutant: banForgotten}, []string{"evicted"}},
		"what a silent peer said is dropped":      {faults{mutant: silenceDeletes}, []string{"with no deletion by its origin"}},
		"nobody asks for what differs":            {faults{mutant: neverAsks}, []string{"healed and quiet"}},
		"a loss of state begins no epoch":         {faults{mutant: epochStays}, []string{"healed and quiet", "and \""}},
		"own numbers begin at one at every start": {faults{mutant: marksLost}, []string{"fell from"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seed, err := search(0, 2000, c.faults, nil)
			if err == nil {
				t.Fatal("not found in 2000 seeds")
			}
			found := false
			for _, want := range c.want {
				found = found || strings.Contains(err.Error(), want)
			}
			if !found {
				t.Fatalf("found %v, want one of %q", err, c.want)
			}
			t.Logf("seed %d: %v", seed, err)
			// The same seed tells the same story.
			one, err1 := simulate(seed, c.faults, true)
			two, err2 := simulate(seed, c.faults, true)
			if one != two || err1 == nil || err1.Error() != err2.Error() {
				t.Fatalf("seed %d does not replay: %v", seed, errors.Join(err1, err2))
			}
		})
	}
}
