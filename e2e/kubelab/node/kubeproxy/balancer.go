package kubeproxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sort"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// HostnameAnnotation on a Service of type LoadBalancer makes its status give this host name in the place of an address,
// as some clouds do.
const HostnameAnnotation = "lab.isthmus.io/hostname"

// balanceLoads gives addresses to Services and takes them back.
func (p *Proxy) balanceLoads(ctx context.Context) {
	for {
		if p.cfg.LoadBalancer.IsValid() {
			if err := p.balanceOnce(ctx); err != nil && ctx.Err() == nil {
				p.cfg.Log.Warn("load balancer", "err", err)
				if !pause(ctx, 500*time.Millisecond) {
					return
				}
				continue
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-p.balance:
		}
	}
}

func (p *Proxy) balanceOnce(ctx context.Context) error {
	var want []*corev1.Service
	for _, o := range p.services.GetStore().List() {
		if s := o.(*corev1.Service); s.Spec.Type == corev1.ServiceTypeLoadBalancer && s.DeletionTimestamp == nil {
			want = append(want, s)
		}
	}
	before := p.Addresses()
	after, errs := allocate(want, before, p.cfg.LoadBalancer)
	for key, a := range after {
		if before[key] != a {
			errs = append(errs, p.wan(a, netlink.AddrReplace))
		}
	}
	p.mu.Lock()
	p.balancer = after
	p.mu.Unlock()
	if !maps.Equal(before, after) {
		poke(p.dirty)
	}
	for key, a := range before {
		if after[key] != a && !slices.Contains(slices.Collect(maps.Values(after)), a) {
			errs = append(errs, p.wan(a, netlink.AddrDel))
		}
	}
	for _, s := range want {
		if a, ok := after[s.Namespace+"/"+s.Name]; ok {
			errs = append(errs, p.publish(ctx, s, a))
		}
	}
	return errors.Join(errs...)
}

// allocate returns who gets which address: who has one keeps it, one that was asked for or is in the status already is
// given, others get the first that is free, the oldest Service first. It is pure.
func allocate(services []*corev1.Service, before map[string]netip.Addr, from netip.Prefix) (map[string]netip.Addr, []error) {
	sort.Slice(services, func(i, j int) bool {
		a, b := services[i], services[j]
		if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
			return a.CreationTimestamp.Before(&b.CreationTimestamp)
		}
		return a.Namespace+"/"+a.Name < b.Namespace+"/"+b.Name
	})
	out, taken := map[string]netip.Addr{}, map[netip.Addr]bool{}
	give := func(key string, a netip.Addr) bool {
		if !from.Contains(a) || taken[a] {
			return false
		}
		out[key], taken[a] = a, true
		return true
	}
	var rest []string
	for _, s := range services {
		key := s.Namespace + "/" + s.Name
		asked, _ := netip.ParseAddr(s.Spec.LoadBalancerIP)
		published := netip.Addr{}
		if in := s.Status.LoadBalancer.Ingress; len(in) > 0 {
			published, _ = netip.ParseAddr(in[0].IP)
		}
		had, ok := before[key]
		if asked.IsValid() && asked != had {
			ok = false
		}
		if !(ok && give(key, had)) && !give(key, asked) && !(!asked.IsValid() && give(key, published)) {
			rest = append(rest, key)
		}
	}
	var errs []error
	next := from.Masked().Addr()
	for _, key := range rest {
		for from.Contains(next) && taken[next] {
			next = next.Next()
		}
		if !give(key, next) {
			errs = append(errs, fmt.Errorf("service %s: no address is left in %v", key, from))
		}
	}
	return out, errs
}

// wan adds an address to the router's outer interface or removes it.
func (p *Proxy) wan(a netip.Addr, do func(netlink.Link, *netlink.Addr) error) error {
	return p.cfg.Router.Do(func() error {
		link, err := netlink.LinkByName(p.cfg.WANLink)
		if err != nil {
			return fmt.Errorf("link %s of the router: %w", p.cfg.WANLink, err)
		}
		err = do(link, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}})
		if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("address %v on link %s of the router: %w", a, p.cfg.WANLink, err)
		}
		return nil
	})
}

// publish writes the status of a Service.
func (p *Proxy) publish(ctx context.Context, s *corev1.Service, a netip.Addr) error {
	ingress := corev1.LoadBalancerIngress{IP: a.String()}
	if name := s.Annotations[HostnameAnnotation]; name != "" {
		ingress = corev1.LoadBalancerIngress{Hostname: name}
	} else {
		vip := corev1.LoadBalancerIPModeVIP
		ingress.IPMode = &vip
	}
	if have := s.Status.LoadBalancer.Ingress; len(have) == 1 && have[0].IP == ingress.IP && have[0].Hostname == ingress.Hostname {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"loadBalancer": map[string]any{"ingress": []any{ingress}}}})
	if err != nil {
		return err
	}
	_, err = p.cfg.Client.CoreV1().Services(s.Namespace).Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("status of service %s/%s: %w", s.Namespace, s.Name, err)
	}
	return nil
}
