package story

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// isolated dials from isthmusd's host, which has no proxy that would accept in another's place.
func isolated(ctx context.Context, w *World) (string, error) {
	dial := func(addr string) error {
		ctx, cancel := context.WithTimeout(ctx, 700*time.Millisecond)
		defer cancel()
		conn, err := w.Node("amber/isthmusd").Dial(ctx, "tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err
	}
	for _, closed := range []string{"10.20.0.11:9080", "10.30.0.11:9080", "10.20.0.2:15012", "172.31.0.21:15000", "172.31.0.21:15021"} {
		if dial(closed) == nil {
			return "", fmt.Errorf("amber reaches %s", closed)
		}
	}
	for _, open := range []string{"172.31.0.21:15443", "172.31.0.22:15443", "172.31.0.31:15443"} {
		if err := dial(open); err != nil {
			return "", fmt.Errorf("amber does not reach the gateway %s: %w", open, err)
		}
	}
	return "from amber: pods and control planes of birch and cedar closed, their gateways' 15443 open", nil
}

func joinByToken(ctx context.Context, w *World) (string, error) {
	var said []string
	for _, name := range []string{"birch", "cedar"} {
		token, err := w.isthmus(ctx, "amber", "token", "create", "--for", name)
		if err != nil {
			return "", err
		}
		if w.token == "" {
			w.token = token
		}
		out, err := w.isthmus(ctx, name, "join", token)
		if err != nil {
			return "", err
		}
		said = append(said, name+": "+out)
	}
	return strings.Join(said, "; "), nil
}

func everyoneKnowsEveryone(ctx context.Context, w *World) (string, error) {
	err := lab.Eventually(ctx, 15*time.Second, func(ctx context.Context) error {
		for _, c := range clusters {
			if err := w.seesAll(ctx, c); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	peers, err := w.peers(ctx, "cedar")
	b := peers["birch"]
	return fmt.Sprintf("cedar knows birch (%s, %s, %s, path %s) without a token between them", b.TrustDomain, b.Topology, b.Freshness, b.Path), err
}

// seesAll wants both other clusters fresh, by a direct path, in one cluster's list.
func (w *World) seesAll(ctx context.Context, cluster string) error {
	peers, err := w.peers(ctx, cluster)
	if err != nil {
		return err
	}
	for _, o := range others(cluster) {
		p, ok := peers[o]
		switch {
		case !ok:
			return fmt.Errorf("%s does not list %s", cluster, o)
		case p.State != "approved" || p.Freshness != "fresh" || !strings.HasPrefix(p.Path, "direct ") || !p.StaleSince.IsZero():
			return fmt.Errorf("%s sees %s as %s, %s, path %s", cluster, o, p.State, p.Freshness, p.Path)
		case p.TrustDomain != o+".mesh" || p.Topology != "multi-control-plane":
			return fmt.Errorf("%s sees %s in trust domain %s, topology %s", cluster, o, p.TrustDomain, p.Topology)
		}
	}
	if len(peers) != 2 {
		return fmt.Errorf("%s lists %d clusters", cluster, len(peers))
	}
	return nil
}

func spentToken(ctx context.Context, w *World) (string, error) {
	// Only birch may show it; a birch with another key is what a thief of the token would be, and is told the same.
	said, err := w.refused(ctx, "cedar", "is for cluster birch", "join", w.token)
	if err != nil {
		return "", err
	}
	thief, err := w.thief(ctx, w.token)
	if err != nil {
		return "", err
	}
	return said + " | another birch: " + thief, nil
}

// lookup asks a cluster's CoreDNS from one of its pods.
func (w *World) lookup(ctx context.Context, node, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	addrs, err := w.Node(node).Resolver().LookupNetIP(ctx, "ip", name)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, err
}

var pods = map[string]string{"amber": "amber/productpage-v1", "birch": "birch/reviews-v2-a", "cedar": "cedar/reviews-v3"}

func names(ctx context.Context, w *World) (string, error) {
	var first []netip.Addr
	for _, c := range clusters {
		err := lab.Eventually(ctx, 5*time.Second, func(ctx context.Context) error {
			addrs, err := w.lookup(ctx, pods[c], "reviews.default.global.")
			if err != nil {
				return err
			}
			if len(addrs) != 2 || !addrs[0].Is4() || !addrs[1].Is6() {
				return fmt.Errorf("%s answers %v, want one A and one AAAA", c, addrs)
			}
			if first != nil && !slices.Equal(first, addrs) {
				return fmt.Errorf("%s answers %v, amber %v", c, addrs, first)
			}
			first = addrs
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("A %s and AAAA %s from amber, birch and cedar", first[0], first[1]), nil
}

func reverseNames(ctx context.Context, w *World) (string, error) {
	addrs, err := w.lookup(ctx, pods["cedar"], "reviews.default.global.")
	if err != nil {
		return "", err
	}
	resolver := w.Node(pods["cedar"]).Resolver()
	ptr, err := resolver.LookupAddr(ctx, addrs[0].String())
	if err != nil || !slices.Contains(ptr, "reviews.default.global.") {
		return "", fmt.Errorf("PTR of %s is %v: %w", addrs[0], ptr, err)
	}
	_, srv, err := resolver.LookupSRV(ctx, "http", "tcp", "reviews.default.global.")
	if err != nil || len(srv) != 1 || srv[0].Port != 9080 {
		return "", fmt.Errorf("SRV is %v: %w", srv, err)
	}
	if got, err := w.lookup(ctx, pods["cedar"], "nothing.default.global."); err == nil {
		return "", fmt.Errorf("nothing.default.global. has an address: %v", got)
	} else if !strings.Contains(err.Error(), "no such host") {
		return "", fmt.Errorf("nothing.default.global.: %w", err)
	}
	return fmt.Sprintf("%s is %s, SRV %s:%d", addrs[0], ptr[0], srv[0].Target, srv[0].Port), nil
}
