package kubeproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"reflect"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// Node is what the proxy knows of a node.
type Node struct {
	Name      string
	Addresses []netip.Addr
	PodCIDRs  []netip.Prefix
}

// Config is what a Proxy is made from.
type Config struct {
	Client       kubernetes.Interface
	Factory      informers.SharedInformerFactory // started by Run too
	Router       *box.NetNS
	Namespaces   []string // files of further network namespaces
	Nodes        []Node
	ServiceCIDRs []netip.Prefix
	LoadBalancer netip.Prefix // the zero Prefix: Services of that type stay pending
	WANLink      string       // the router's interface for addresses of LoadBalancer
	Log          *slog.Logger
}

// Proxy keeps the rules equal to the Services.
type Proxy struct {
	cfg      Config
	services cache.SharedIndexInformer
	slices   cache.SharedIndexInformer
	dirty    chan struct{}
	balance  chan struct{}

	mu       sync.Mutex
	balancer map[string]netip.Addr
}

// New registers what the proxy watches. It starts nothing.
func New(cfg Config) (*Proxy, error) {
	p := &Proxy{
		cfg: cfg, services: cfg.Factory.Core().V1().Services().Informer(), slices: cfg.Factory.Discovery().V1().EndpointSlices().Informer(),
		dirty: make(chan struct{}, 1), balance: make(chan struct{}, 1), balancer: map[string]netip.Addr{},
	}
	on := func(chans ...chan struct{}) cache.ResourceEventHandler {
		f := func() {
			for _, c := range chans {
				poke(c)
			}
		}
		return cache.ResourceEventHandlerFuncs{AddFunc: func(any) { f() }, UpdateFunc: func(any, any) { f() }, DeleteFunc: func(any) { f() }}
	}
	if _, err := p.services.AddEventHandler(on(p.dirty, p.balance)); err != nil {
		return nil, fmt.Errorf("watch services: %w", err)
	}
	if _, err := p.slices.AddEventHandler(on(p.dirty)); err != nil {
		return nil, fmt.Errorf("watch endpoint slices: %w", err)
	}
	return p, nil
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Addresses returns the addresses of the Services of type LoadBalancer, by NAMESPACE/NAME.
func (p *Proxy) Addresses() map[string]netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make(map[string]netip.Addr, len(p.balancer))
	for k, v := range p.balancer {
		out[k] = v
	}
	return out
}

// Run serves until ctx ends. It returns an error when the namespaces cannot be had.
func (p *Proxy) Run(ctx context.Context) error {
	spaces := []*box.NetNS{p.cfg.Router}
	for _, path := range p.cfg.Namespaces {
		n, err := box.OpenNetNS(path)
		if err != nil {
			return err
		}
		defer n.Close()
		spaces = append(spaces, n)
	}
	if err := p.prepareRouter(); err != nil {
		return err
	}
	p.cfg.Factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), p.services.HasSynced, p.slices.HasSynced) {
		return nil
	}
	var wait sync.WaitGroup
	defer wait.Wait()
	wait.Go(func() { p.balanceLoads(ctx) })
	var last []frontend
	first := true
	for {
		now := table(p.input())
		if first || !reflect.DeepEqual(now, last) {
			if err := p.apply(spaces, last, now); err != nil {
				p.cfg.Log.Warn("rules of services not replaced", "err", err)
				if !pause(ctx, 500*time.Millisecond) {
					return nil
				}
				continue
			}
			last, first = now, false
		}
		select {
		case <-ctx.Done():
			return nil
		case <-p.dirty:
			if !pause(ctx, 5*time.Millisecond) { // what comes together
				return nil
			}
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (p *Proxy) input() input {
	in := input{nodes: p.cfg.Nodes, balancer: p.Addresses()}
	for _, o := range p.services.GetStore().List() {
		in.services = append(in.services, o.(*corev1.Service))
	}
	for _, o := range p.slices.GetStore().List() {
		in.slices = append(in.slices, o.(*discoveryv1.EndpointSlice))
	}
	return in
}

func (p *Proxy) apply(spaces []*box.NetNS, last, now []frontend) error {
	var errs []error
	for _, s := range spaces {
		if err := apply(s.Fd(), now, p.cfg.Nodes, p.cfg.ServiceCIDRs); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.Path, err))
			continue
		}
		if err := forget(s, last, now); err != nil {
			p.cfg.Log.Debug("flows of udp endpoints not forgotten", "err", err)
		}
	}
	return errors.Join(errs...)
}

// forget drops the kernel's memory of UDP flows to endpoints that are gone: nothing else would end them.
func forget(s *box.NetNS, last, now []frontend) error {
	gone := map[netip.AddrPort]bool{}
	udp := func(list []frontend, set func(netip.AddrPort)) {
		for _, f := range list {
			for _, e := range f.backends {
				if f.proto == unix.IPPROTO_UDP {
					set(e)
				}
			}
		}
	}
	udp(last, func(e netip.AddrPort) { gone[e] = true })
	udp(now, func(e netip.AddrPort) { delete(gone, e) })
	var errs []error
	for e := range gone {
		fam := netlink.InetFamily(unix.AF_INET)
		if e.Addr().Is6() {
			fam = unix.AF_INET6
		}
		filter := &netlink.ConntrackFilter{}
		errs = append(errs, filter.AddProtocol(unix.IPPROTO_UDP), filter.AddIP(netlink.ConntrackReplySrcIP, e.Addr().AsSlice()))
		errs = append(errs, s.Do(func() error {
			_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, fam, filter)
			return err
		}))
	}
	return errors.Join(errs...)
}

// prepareRouter makes the router forward, and gives it a way to cluster addresses, so that its own connections to them
// get as far as the rules.
func (p *Proxy) prepareRouter() error {
	return p.cfg.Router.Do(func() error {
		for _, path := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+path, []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("make the router forward: %w", err)
			}
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, r := range p.cfg.ServiceCIDRs {
			route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: r.Masked().Addr().AsSlice(), Mask: net.CIDRMask(r.Bits(), r.Addr().BitLen())}}
			for _, a := range p.cfg.Nodes[0].Addresses {
				if a.Is6() == r.Addr().Is6() {
					route.Src = a.AsSlice()
				}
			}
			if err := netlink.RouteReplace(route); err != nil {
				return fmt.Errorf("route of the router to services %v: %w", r, err)
			}
		}
		return nil
	})
}
