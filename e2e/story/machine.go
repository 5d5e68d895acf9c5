package story

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

const ratingsURL = "http://ratings.default.global:9080/"

func machineJoins(ctx context.Context, w *World) (string, error) {
	token, err := w.isthmus(ctx, "birch", "token", "create", "--vm", "ratings", "--namespace", "default", "--service-account", "ratings")
	if err != nil {
		return "", err
	}
	started := time.Now()
	if w.machine, err = w.Start("dune", "agent", []string{"isthmus-agent", "join", token}, nil); err != nil {
		return "", err
	}
	err = lab.Eventually(ctx, 20*time.Second, func(ctx context.Context) error {
		if !w.machine.Alive() {
			return fmt.Errorf("the agent ended: %s", w.machine.Tail(5))
		}
		for _, c := range clusters {
			if n, err := w.endpoints(ctx, c, "ratings.default.global"); err != nil || n != 1 {
				return errors.Join(err, fmt.Errorf("%s sees %d endpoints of ratings", c, n))
			}
		}
		return nil
	})
	return fmt.Sprintf("registered and known in all three clusters after %.1f s", time.Since(started).Seconds()), err
}

// endpoints counts the ready endpoints of an imported or exported host in a cluster's status.
func (w *World) endpoints(ctx context.Context, cluster, host string) (int, error) {
	s, err := w.status(ctx, cluster)
	if err != nil {
		return 0, err
	}
	local := strings.TrimSuffix(host, ".global") + ".svc.cluster.local"
	n := 0
	for _, x := range s.Imports {
		if x.Host == host {
			for _, k := range x.Endpoints {
				n += k
			}
			return n, nil
		}
	}
	for _, x := range s.Exports {
		if x.Host == local {
			for _, k := range x.Endpoints {
				n += k
			}
		}
	}
	return n, nil
}

func machineReaches(ctx context.Context, w *World) (string, error) {
	for _, x := range []struct{ node, url, caller string }{
		{"birch/reviews-v2-a", ratingsURL, identity("birch", "bookstore-reviews")},
		{"cedar/reviews-v3", ratingsURL, identity("cedar", "bookstore-reviews")},
		{"dune", "http://productpage.default.global:9080/", identity("birch", "ratings")},
	} {
		err := lab.Eventually(ctx, 15*time.Second, func(ctx context.Context) error {
			rs, err := w.call(ctx, x.node, x.url, "--n", "20", "--timeout", "2s")
			if err != nil {
				return err
			}
			callers := rs.by(func(r result) string { return r.Caller })
			if err := rs.none(); err != nil || callers[x.caller] != 20 {
				return errors.Join(err, fmt.Errorf("%s calls %s: seen as %v, want %s", x.node, x.url, callers, x.caller))
			}
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	hosts, err := w.hosts(ctx, "cedar/reviews-v3", "outbound|9080||ratings.default.global")
	if err != nil {
		return "", err
	}
	for h := range hosts {
		if h != "eastwest|birch ratings.p9080.birch.ratings.default.global" {
			return "", fmt.Errorf("cedar reaches ratings as %s, want through birch's gateway", h)
		}
	}
	return "20 of 20 each with mutual TLS: birch directly, cedar through birch's gateway, dune to amber by name", nil
}

func machineLeaves(ctx context.Context, w *World) (string, error) {
	if err := w.machine.Kill(syscall.SIGTERM); err != nil {
		return "", err
	}
	started := time.Now()
	err := lab.Eventually(ctx, 10*time.Second, func(ctx context.Context) error {
		for _, c := range clusters {
			if n, err := w.endpoints(ctx, c, "ratings.default.global"); err != nil || n != 0 {
				return errors.Join(err, fmt.Errorf("%s still sees %d endpoints of ratings", c, n))
			}
		}
		hosts, err := w.hosts(ctx, "cedar/reviews-v3", "outbound|9080||ratings.default.global")
		if err == nil && len(hosts) != 0 {
			err = fmt.Errorf("the Envoy of cedar's reviews still has %d hosts of ratings", len(hosts))
		}
		return err
	})
	return fmt.Sprintf("gone everywhere after %.1f s", time.Since(started).Seconds()), err
}

func machineReturns(ctx context.Context, w *World) (string, error) {
	if _, err := w.machine.Wait(ctx); err != nil {
		return "", err
	}
	var err error
	if w.machine, err = w.Start("dune", "agent", []string{"isthmus-agent", "run"}, nil); err != nil {
		return "", err
	}
	started := time.Now()
	err = lab.Eventually(ctx, 20*time.Second, func(ctx context.Context) error {
		rs, err := w.call(ctx, "cedar/reviews-v3", ratingsURL, "--n", "10", "--timeout", "2s")
		return errors.Join(err, rs.none())
	})
	return fmt.Sprintf("cedar is answered again after %.1f s", time.Since(started).Seconds()), err
}
