package story

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

func gatewayKilled(ctx context.Context, w *World) (string, error) {
	if err := w.Cluster("amber").Delete(rulesFile); err != nil {
		return "", err
	}
	err := lab.Eventually(ctx, 5*time.Second, func(ctx context.Context) error {
		rs, err := w.call(ctx, client, reviewsURL, "--n", "20")
		if err == nil && rs.versions()["v2"] != 12 {
			err = fmt.Errorf("without the rules 20 requests reach %v", rs.versions())
		}
		return err
	})
	if err != nil {
		return "", err
	}
	var killed time.Time
	rs, err := w.under(ctx, client, reviewsURL, 60, 7*time.Second, func(ctx context.Context) error {
		if err := pass(ctx, 2*time.Second); err != nil {
			return err
		}
		killed = time.Now()
		return w.Cluster("birch").KillGateway("eastwest-1")
	})
	if err != nil {
		return "", err
	}
	open := rs.between(killed.Add(-time.Second), killed.Add(time.Second)).failures()
	later := rs.between(killed.Add(time.Second), time.Now())
	if n := len(rs.failures()) - len(open); n > 0 {
		err = fmt.Errorf("%d requests failed that were not open then", n)
	}
	if later.versions()["v2"] < len(later)/2 {
		err = errors.Join(err, fmt.Errorf("after it, v2 got %d of %d requests", later.versions()["v2"], len(later)))
	}
	return fmt.Sprintf("%d of %d requests failed, all of them open at the kill; %d later ones reached v2 by the other gateway", len(open), len(rs), later.versions()["v2"]),
		errors.Join(err, later.none(), w.Cluster("birch").StartGateway(ctx, "eastwest-1"))
}

// metric adds up the samples of one metric that isthmusd of a cluster shows, but for those of digests: they beat.
func (w *World) metric(ctx context.Context, cluster, name string) (float64, error) {
	lines, err := w.metricLines(ctx, cluster, name)
	sum := 0.0
	for _, line := range lines {
		v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
		if err != nil {
			return 0, err
		}
		sum += v
	}
	return sum, err
}

// metricText is what the sum of metric is made of.
func (w *World) metricText(ctx context.Context, cluster, name string) string {
	lines, err := w.metricLines(ctx, cluster, name)
	if err != nil {
		return err.Error()
	}
	return strings.Join(lines, ", ")
}

// metricLines returns the lines of the metric with their values, without those about digests.
func (w *World) metricLines(ctx context.Context, cluster, name string) (out []string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:15014/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := w.Node(cluster + "/isthmusd").HTTP().Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return nil, err
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		head, _, ok := strings.Cut(line, " ")
		if base, _, _ := strings.Cut(head, "{"); ok && base == name && !strings.Contains(head, `type="Digest"`) {
			out = append(out, line)
		}
	}
	return out, nil
}

func controlPlaneKilled(ctx context.Context, w *World) (string, error) {
	clients, err := w.metric(ctx, "amber", "isthmus_xds_clients")
	if err != nil {
		return "", err
	}
	before, err := w.status(ctx, "amber")
	if err != nil {
		return "", err
	}
	rs, err := w.under(ctx, client, reviewsURL, 60, 8*time.Second, func(ctx context.Context) error {
		if err := pass(ctx, time.Second); err != nil {
			return err
		}
		if err := w.Cluster("amber").KillControlPlane(syscall.SIGKILL); err != nil {
			return err
		}
		if err := pass(ctx, 2*time.Second); err != nil {
			return err
		}
		return w.Cluster("amber").StartControlPlane(ctx)
	})
	if err != nil {
		return "", err
	}
	err = lab.Eventually(ctx, 10*time.Second, func(ctx context.Context) error {
		n, err := w.metric(ctx, "amber", "isthmus_xds_clients")
		if err == nil && n < clients {
			err = fmt.Errorf("%v of %v clients are back", n, clients)
		}
		return errors.Join(err, w.seesAll(ctx, "amber"))
	})
	if err != nil {
		return "", errors.Join(rs.none(), err)
	}
	sent, err := w.metric(ctx, "amber", "isthmus_xds_resources_sent_total")
	if err != nil {
		return "", err
	}
	if sent > 0 {
		err = fmt.Errorf("isthmusd sent %v resources after its return (%s), nothing had changed", sent, w.metricText(ctx, "amber", "isthmus_xds_resources_sent_total"))
	}
	after, serr := w.status(ctx, "amber")
	if len(after.Imports) != len(before.Imports) {
		err = errors.Join(err, fmt.Errorf("%d imports before, %d after", len(before.Imports), len(after.Imports)))
	}
	return fmt.Sprintf("0 of %d requests failed; %v clients resumed, %v resources resent", len(rs), clients, sent), errors.Join(rs.none(), err, serr)
}

func clusterCut(ctx context.Context, w *World) (string, error) {
	var cut, restored time.Time
	var stale string
	rs, err := w.under(ctx, client, reviewsURL, 50, 20*time.Second, func(ctx context.Context) error {
		if err := pass(ctx, 2*time.Second); err != nil {
			return err
		}
		cut = time.Now()
		if err := w.CutLink("cedar"); err != nil {
			return err
		}
		err := lab.Eventually(ctx, 8*time.Second, func(ctx context.Context) error {
			peers, err := w.peers(ctx, "amber")
			if err == nil && (peers["cedar"].StaleSince.IsZero() || peers["cedar"].Freshness == "fresh") {
				err = fmt.Errorf("amber still sees cedar as %s", peers["cedar"].Freshness)
			}
			if since := peers["cedar"].StaleSince; err == nil && (since.Before(cut.Add(-2*time.Second)) || since.After(cut.Add(2*time.Second))) {
				err = fmt.Errorf("amber says stale since %s, the cut was at %s", since, cut)
			}
			if err == nil {
				stale = fmt.Sprintf("%s since %s", peers["cedar"].Freshness, peers["cedar"].StaleSince.Format("15:04:05"))
			}
			return err
		})
		if err != nil {
			return err
		}
		if err := pass(ctx, time.Until(cut.Add(8*time.Second))); err != nil {
			return err
		}
		restored = time.Now()
		return w.RestoreLink("cedar")
	})
	if err != nil {
		return "", errors.Join(err, w.RestoreLink("cedar"))
	}
	avoided := rs.between(cut.Add(3*time.Second), restored)
	back := rs.between(restored.Add(5*time.Second), time.Now())
	err = errors.Join(avoided.none(), back.none())
	for _, r := range avoided {
		if r.End.Sub(r.Start) > time.Second {
			err = errors.Join(err, fmt.Errorf("a request %.1f s after the cut took %s", r.Start.Sub(cut).Seconds(), r.End.Sub(r.Start)))
			break
		}
	}
	if n := avoided.versions()["v3"]; n > 0 {
		err = errors.Join(err, fmt.Errorf("v3 answered %d requests while it was cut off", n))
	}
	if share := 100 * back.versions()["v3"] / max(len(back), 1); share < 17 || share > 23 {
		err = errors.Join(err, fmt.Errorf("5 s after the link is back v3 gets %d %% of %d requests, want 20 %%", share, len(back)))
	}
	return fmt.Sprintf("cedar was %s; 0 of %d requests failed from 3 s on, %d failed before; back: v3 %d of %d", stale, len(avoided),
		len(rs.between(cut.Add(-5*time.Second), cut.Add(3*time.Second)).failures()), back.versions()["v3"], len(back)), errors.Join(err, w.seesAll(ctx, "amber"))
}
