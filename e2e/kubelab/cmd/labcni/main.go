// Command labcni is the main network plugin of the lab's nodes: it joins a pod's network namespace to the namespace
// in which it runs (the node's) by a pair of virtual interfaces and routes addresses over it, with no bridge between.
//
// It speaks the Container Network Interface, versions 0.3.1 to 1.1.0. Addresses come from the ranges that the runtime
// hands over (capability ipRanges) or those of its configuration, one of each, the first address being the gateway's:
//
//	{"type": "labcni", "capabilities": {"ipRanges": true}, "ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00:1::/64"}]]}
//
// What is taken is kept in files named after the addresses in dataDir (default /var/lib/cni/networks) below the name
// of the network.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

type ipRange struct {
	Subnet netip.Prefix `json:"subnet"`
}

type config struct {
	types.NetConf
	Ranges        [][]ipRange `json:"ranges"`
	DataDir       string      `json:"dataDir"`
	MTU           int         `json:"mtu"`
	RuntimeConfig struct {
		IPRanges [][]ipRange `json:"ipRanges"`
	} `json:"runtimeConfig"`
}

func main() {
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: del, Check: check, Status: func(*skel.CmdArgs) error { return nil }},
		version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0"), "labcni")
}

func load(args *skel.CmdArgs) (*config, error) {
	c := &config{}
	if err := json.Unmarshal(args.StdinData, c); err != nil {
		return nil, fmt.Errorf("network configuration: %w", err)
	}
	if len(c.RuntimeConfig.IPRanges) > 0 {
		c.Ranges = c.RuntimeConfig.IPRanges
	}
	if c.DataDir == "" {
		c.DataDir = "/var/lib/cni/networks"
	}
	if c.MTU == 0 {
		c.MTU = 1500
	}
	return c, nil
}

// subnets are the ranges to take one address of each from.
func (c *config) subnets() ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, set := range c.Ranges {
		for _, r := range set {
			if !r.Subnet.IsValid() {
				return nil, errors.New("ranges: an entry without a subnet")
			}
			out = append(out, r.Subnet.Masked())
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no ranges: give the node a pod CIDR, or the network a list of ranges")
	}
	return out, nil
}

// hostLink is the name of the node's end: the same for the same pod, so that DEL finds it.
func hostLink(containerID string) string { return "lab" + fmt.Sprintf("%011x", hash(containerID)) }

func hash(s string) uint64 { // FNV-1a, 44 bits
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h >> 20
}

func add(args *skel.CmdArgs) (err error) {
	c, err := load(args)
	if err != nil {
		return err
	}
	subnets, err := c.subnets()
	if err != nil {
		return err
	}
	store := &ledger{dir: c.DataDir + "/" + c.Name}
	addrs, err := store.take(args.ContainerID, subnets)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, store.release(args.ContainerID))
		}
	}()
	pod, err := os.Open(args.Netns)
	if err != nil {
		return fmt.Errorf("open the pod's namespace: %w", err)
	}
	defer pod.Close()
	result := &current.Result{CNIVersion: current.ImplementedSpecVersion}
	if err := connect(c, args, pod, addrs, subnets, result); err != nil {
		return err
	}
	return types.PrintResult(result, c.CNIVersion)
}

// connect makes the pair of interfaces and both ends' addresses and routes.
func connect(c *config, args *skel.CmdArgs, pod *os.File, addrs []netip.Addr, subnets []netip.Prefix, result *current.Result) error {
	forwarding()
	if err := inNamespace(pod, quiet); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = hostLink(args.ContainerID), c.MTU
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: args.IfName, PeerNamespace: netlink.NsFd(pod.Fd())}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make interfaces %s and %s: %w", attrs.Name, args.IfName, err)
	}
	err := hostEnd(attrs.Name, addrs, subnets)
	if err == nil {
		err = inNamespace(pod, func() error { return podEnd(args.IfName, addrs, subnets) })
	}
	if err != nil {
		return errors.Join(err, netlink.LinkDel(veth))
	}
	result.Interfaces = []*current.Interface{{Name: attrs.Name}, {Name: args.IfName, Sandbox: args.Netns}}
	for i, a := range addrs {
		result.IPs = append(result.IPs, &current.IPConfig{Interface: current.Int(1), Address: *single(a), Gateway: gateway(subnets[i]).AsSlice()})
		zero := netip.IPv4Unspecified()
		if a.Is6() {
			zero = netip.IPv6Unspecified()
		}
		result.Routes = append(result.Routes, &types.Route{Dst: net.IPNet{IP: zero.AsSlice(), Mask: net.CIDRMask(0, zero.BitLen())}, GW: gateway(subnets[i]).AsSlice()})
	}
	return nil
}

// hostEnd gives the node's end the gateways' addresses and the routes to the pod.
func hostEnd(name string, addrs []netip.Addr, subnets []netip.Prefix) error {
	for _, family := range []string{"ipv4", "ipv6"} {
		_ = os.WriteFile("/proc/sys/net/"+family+"/conf/"+name+"/forwarding", []byte("1"), 0)
	}
	_ = os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/send_redirects", []byte("0"), 0) // a pod's own service returns by the way it came
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0)
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	for i, a := range addrs {
		if err := address(link, gateway(subnets[i])); err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: single(a), Scope: unix.RT_SCOPE_LINK, Src: gateway(subnets[i]).AsSlice()}); err != nil {
			return fmt.Errorf("route to %v: %w", a, err)
		}
	}
	return nil
}

// podEnd gives the pod its addresses and default routes.
func podEnd(name string, addrs []netip.Addr, subnets []netip.Prefix) error {
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0)
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	for i, a := range addrs {
		if err := address(link, a); err != nil {
			return err
		}
		gw := gateway(subnets[i])
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: single(gw), Scope: unix.RT_SCOPE_LINK}); err != nil {
			return fmt.Errorf("route to gateway %v: %w", gw, err)
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gw.AsSlice()}); err != nil {
			return fmt.Errorf("default route by %v: %w", gw, err)
		}
	}
	return nil
}

func address(link netlink.Link, a netip.Addr) error {
	addr := &netlink.Addr{IPNet: single(a)}
	if a.Is6() {
		addr.Flags = unix.IFA_F_NODAD // usable at once
	}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("give %s the address %v: %w", link.Attrs().Name, a, err)
	}
	return nil
}

func del(args *skel.CmdArgs) error {
	c, err := load(args)
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(hostLink(args.ContainerID))
	if err == nil {
		err = netlink.LinkDel(link)
	}
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) || errors.Is(err, unix.ENODEV) {
		err = nil // deleting twice is deleting once
	}
	return errors.Join(err, (&ledger{dir: c.DataDir + "/" + c.Name}).release(args.ContainerID))
}

func check(args *skel.CmdArgs) error {
	c, err := load(args)
	if err != nil {
		return err
	}
	if err := version.ParsePrevResult(&c.NetConf); err != nil {
		return err
	}
	prev, err := current.GetResult(c.PrevResult)
	if err != nil {
		return fmt.Errorf("previous result: %w", err)
	}
	if _, err := netlink.LinkByName(hostLink(args.ContainerID)); err != nil {
		return fmt.Errorf("the node's end %s: %w", hostLink(args.ContainerID), err)
	}
	pod, err := os.Open(args.Netns)
	if err != nil {
		return fmt.Errorf("open the pod's namespace: %w", err)
	}
	defer pod.Close()
	return inNamespace(pod, func() error {
		link, err := netlink.LinkByName(args.IfName)
		if err != nil {
			return fmt.Errorf("the pod's %s: %w", args.IfName, err)
		}
		have, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, ip := range prev.IPs {
			found := false
			for _, h := range have {
				found = found || h.IP.Equal(ip.Address.IP)
			}
			if !found {
				return fmt.Errorf("the pod's %s has lost its address %v", args.IfName, ip.Address.IP)
			}
		}
		return nil
	})
}
