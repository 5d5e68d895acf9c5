package store

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// The first change after a quiet time is built at once, those that follow are gathered, and none is lost.
func TestFirstChangeAtOnceOthersGathered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := DefaultConfig(local())
		s := New(cfg, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		sink := s.Sink("kube")
		sink.Report("service", mesh.Input{Services: []*mesh.ServiceDecl{service("a")}})
		time.Sleep(time.Second)
		before, changed := s.Latest()
		started := time.Now()
		sink.Report("pod-0", mesh.Input{Workloads: []*mesh.Workload{pod("pod-0", "a", "10.0.0.1")}})
		<-changed
		if took := time.Since(started); took != 0 {
			t.Errorf("the first change waited %v", took)
		}
		for i := range 100 {
			time.Sleep(time.Millisecond)
			sink.Report(fmt.Sprint("pod-", i+1), mesh.Input{Workloads: []*mesh.Workload{pod(fmt.Sprint("pod-", i+1), "a", fmt.Sprint("10.0.1.", i))}})
		}
		time.Sleep(cfg.Quiet)
		synctest.Wait()
		snap, _ := s.Latest()
		if n := len(snap.Services[0].Endpoints); n != 101 {
			t.Errorf("%d of 101 changes are in the newest snapshot", n)
		}
		if builds := snap.Revision - before.Revision; builds > uint64(100*time.Millisecond/cfg.Quiet)+2 {
			t.Errorf("101 changes in 100 ms were built in %d snapshots", builds)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
