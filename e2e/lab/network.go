package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Interface names inside nodes.
const (
	linkPods     = "pods"     // a router's bridge of the pod network
	linkMachines = "machines" // a router's bridge of its machines
	linkWAN      = "wan"      // the leg to the network between clusters; in node wan, its bridge
	linkEth      = "eth0"     // a pod's, a machine's or a gateway's leg to its own network
)

// GatewayPort is the one port that is open between clusters.
const GatewayPort = 15443

// leg is how a node is attached to a bridge.
type leg struct {
	node    *Node
	link    string
	parent  *Node
	bridge  string
	addrs   []netip.Prefix
	gateway []netip.Addr // default routes
}

// attach joins a node to a bridge of another by a pair of virtual interfaces.
func (l *Lab) attach(g leg) error {
	parent, err := g.parent.handle()
	if err != nil {
		return err
	}
	defer parent.Close()
	bridge, err := parent.LinkByName(g.bridge)
	if err != nil {
		return fmt.Errorf("bridge %s of %s: %w", g.bridge, g.parent.Name, err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = fmt.Sprintf("port%d", l.ports.Add(1))
	attrs.MasterIndex = bridge.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: g.link, PeerNamespace: netlink.NsFd(g.node.fd)}
	if err := parent.LinkAdd(veth); err != nil {
		return fmt.Errorf("attach %s to %s: %w", g.node.Name, g.parent.Name, err)
	}
	if err := parent.LinkSetUp(veth); err != nil {
		return fmt.Errorf("set port of %s up: %w", g.node.Name, err)
	}
	child, err := g.node.handle()
	if err != nil {
		return err
	}
	defer child.Close()
	link, err := child.LinkByName(g.link)
	if err != nil {
		return fmt.Errorf("link %s of %s: %w", g.link, g.node.Name, err)
	}
	return setUp(g.node, child, link, g.addrs, g.gateway)
}

func setUp(n *Node, h *netlink.Handle, link netlink.Link, addrs []netip.Prefix, gateways []netip.Addr) error {
	name := link.Attrs().Name
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s of %s up: %w", name, n.Name, err)
	}
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // usable at once
		}
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("give %s of %s the address %v: %w", name, n.Name, a, err)
		}
	}
	for _, g := range gateways {
		if err := h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: g.AsSlice()}); err != nil {
			return fmt.Errorf("default route of %s by %v: %w", n.Name, g, err)
		}
	}
	return nil
}

// bridge makes a bridge with addresses in a node.
func (n *Node) bridge(name string, addrs ...netip.Prefix) error {
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("make bridge %s in %s: %w", name, n.Name, err)
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	return setUp(n, h, link, addrs, nil)
}

func (n *Node) loopback() error {
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	return h.LinkSetUp(lo)
}

// network makes all that does not depend on pods: the WAN, routers, control planes, DNS servers, gateways, machines.
func (l *Lab) network() error {
	wan, err := l.addNode("wan", netip.Addr{}, "")
	if err != nil {
		return err
	}
	if err := wan.bridge(linkWAN); err != nil {
		return err
	}
	for _, c := range l.clusters {
		if err := c.network(wan); err != nil {
			return fmt.Errorf("cluster %s: %w", c.Spec.Name, err)
		}
	}
	for _, m := range l.world.Machines {
		if err := l.machine(m); err != nil {
			return fmt.Errorf("machine %s: %w", m.Name, err)
		}
	}
	for _, c := range l.clusters {
		if err := c.firewall(); err != nil {
			return fmt.Errorf("cluster %s: %w", c.Spec.Name, err)
		}
	}
	return nil
}

func (c *Cluster) network(wan *Node) error {
	s := c.Spec
	var err error
	if c.Router, err = c.lab.addNode(s.Name+"/router", netip.Addr{}, ""); err != nil {
		return err
	}
	if err := c.Router.sysctl("net.ipv4.ip_forward", "1"); err != nil {
		return err
	}
	addrs := []netip.Prefix{netip.PrefixFrom(nth(s.PodCIDR, 1), s.PodCIDR.Bits())}
	if s.PodCIDR6.IsValid() {
		addrs = append(addrs, netip.PrefixFrom(s.v6(nth(s.PodCIDR, 1)), s.PodCIDR6.Bits()))
	}
	if err := c.Router.bridge(linkPods, addrs...); err != nil {
		return err
	}
	bits := c.lab.world.WAN.Bits()
	if err := c.lab.attach(leg{node: c.Router, link: linkWAN, parent: wan, bridge: linkWAN,
		addrs: []netip.Prefix{netip.PrefixFrom(s.WANAddress, bits)}}); err != nil {
		return err
	}
	if c.controlPlane.node, err = c.podNode("isthmusd", "kube-system", s.ControlPlane); err != nil {
		return err
	}
	if c.dns.node, err = c.podNode("coredns", "kube-system", s.DNS); err != nil {
		return err
	}
	for i := range c.gateways {
		g := c.gateways[i]
		if g.node, err = c.podNode(g.spec.Name, "istio-system", g.spec.Address); err != nil {
			return err
		}
		if err := c.lab.attach(leg{node: g.node, link: linkWAN, parent: wan, bridge: linkWAN,
			addrs: []netip.Prefix{netip.PrefixFrom(g.spec.WANAddress, bits)}}); err != nil {
			return err
		}
		if err := g.node.gatewayFirewall(); err != nil {
			return err
		}
	}
	return nil
}

// podNode makes a namespace on the pod network.
func (c *Cluster) podNode(name, namespace string, ip netip.Addr, more ...netip.Addr) (*Node, error) {
	s := c.Spec
	if !s.PodCIDR.Contains(ip) {
		return nil, fmt.Errorf("address %v of %s is not in podCIDR %v", ip, name, s.PodCIDR)
	}
	n, err := c.lab.addNode(s.Name+"/"+name, s.DNS, namespace+".svc.cluster.local svc.cluster.local cluster.local")
	if err != nil {
		return nil, err
	}
	n.Addresses = []netip.Addr{ip}
	l := leg{node: n, link: linkEth, parent: c.Router, bridge: linkPods,
		addrs: []netip.Prefix{netip.PrefixFrom(ip, s.PodCIDR.Bits())}, gateway: []netip.Addr{nth(s.PodCIDR, 1)}}
	if s.PodCIDR6.IsValid() {
		v6 := s.v6(ip)
		for _, a := range more {
			if a.Is6() {
				v6 = a
			}
		}
		n.Addresses = append(n.Addresses, v6)
		l.addrs = append(l.addrs, netip.PrefixFrom(v6, s.PodCIDR6.Bits()))
		l.gateway = append(l.gateway, s.v6(nth(s.PodCIDR, 1)))
	}
	return n, c.lab.attach(l)
}

// machine makes a machine's namespace on a bridge of its own at the router of its cluster.
func (l *Lab) machine(m MachineSpec) error {
	c := l.Cluster(m.Cluster)
	if c == nil {
		return fmt.Errorf("cluster %s is not in this world", m.Cluster)
	}
	bridge := linkMachines
	if k := len(c.machines); k > 0 {
		bridge = fmt.Sprintf("%s%d", linkMachines, k)
	}
	router := nth(m.Subnet, 1)
	if err := c.Router.bridge(bridge, netip.PrefixFrom(router, m.Subnet.Bits())); err != nil {
		return err
	}
	n, err := l.addNode(m.Name, m.DNS, "")
	if err != nil {
		return err
	}
	n.Addresses = []netip.Addr{m.Address}
	if err := l.ownFiles(n); err != nil {
		return err
	}
	c.machines = append(c.machines, machineLink{spec: m, bridge: bridge})
	return l.attach(leg{node: n, link: linkEth, parent: c.Router, bridge: bridge,
		addrs: []netip.Prefix{netip.PrefixFrom(m.Address, m.Subnet.Bits())}, gateway: []netip.Addr{router}})
}

// ownFiles gives a machine an /etc and a /var/lib of its own, so that a program installs itself there as it would on a
// real one. They are in the run's folder, under the machine's name.
func (l *Lab) ownFiles(n *Node) error {
	etc, state := filepath.Join(l.dir, n.Name, "etc"), filepath.Join(l.dir, n.Name, "var-lib")
	if err := os.MkdirAll(state, 0o755); err != nil {
		return err
	}
	if err := copyTree("/etc", etc); err != nil {
		return fmt.Errorf("copy /etc: %w", err)
	}
	for _, m := range n.mounts { // resolv.conf and hosts
		name := filepath.Join(etc, "resolv.conf")
		if strings.HasSuffix(m[0], "-hosts") {
			name = filepath.Join(etc, "hosts")
		}
		data, err := os.ReadFile(m[0])
		if err != nil {
			return err
		}
		_ = os.Remove(name) // it may be a link
		if err := os.WriteFile(name, data, 0o644); err != nil {
			return err
		}
	}
	n.mounts = [][2]string{{etc, "/etc"}, {state, "/var/lib"}}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.writeNodes()
}

// copyTree copies folders, links and the regular files that may be read.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(from, path)
		target := filepath.Join(to, rel)
		switch {
		case err != nil && d != nil && d.IsDir(): // may not be read
			return fs.SkipDir
		case err != nil || relErr != nil:
			return errors.Join(err, relErr)
		case d.IsDir():
			return os.MkdirAll(target, 0o755)
		case d.Type() == fs.ModeSymlink:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(link, target)
		case !d.Type().IsRegular():
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil // of another user
		}
		return os.WriteFile(target, data, 0o644)
	})
}
