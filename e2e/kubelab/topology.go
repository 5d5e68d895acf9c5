package kubelab

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Topology is a topology file: clusters, how they reach each other, and machines. Everything but the names has a
// default, made from a cluster's place in the list (I below, from 1), so that a file says only what matters to it.
type Topology struct {
	// WAN is the wire between clusters, default 172.30.0.0/16, and WAN6 its IPv6 prefix, default fd30::/64. The
	// addresses of the I-th cluster are in 172.30.I.0/24.
	WAN  netip.Prefix `yaml:"wan"`
	WAN6 netip.Prefix `yaml:"wan6"`
	// Emulate passes the packets of the WAN through an emulator, so that links can be made slow, lossy and small (Lab.Link).
	Emulate bool `yaml:"emulate"`
	// Images maps container images, without tag, to programs; they are laid over the built-in ones.
	Images   map[string]string `yaml:"images"`
	Clusters []ClusterSpec     `yaml:"clusters"`
	Machines []MachineSpec     `yaml:"machines"`
}

// ClusterSpec is one cluster of a Topology.
type ClusterSpec struct {
	Name string `yaml:"name"`
	// Network is the name of the network for the mesh, default the cluster's, or that of the flat network. It becomes
	// the label topology.istio.io/network of the namespace istio-system, which is all that the lab does with it.
	Network string `yaml:"network"`
	// Flat joins the cluster to a routed network by this name: clusters of one flat network reach each other's Pods and
	// API servers directly. Empty: nobody outside reaches its Pods.
	Flat string `yaml:"flat"`
	// PodCIDR holds the Pods, default 10.(10 I).0.0/16; the K-th Node has the K-th /24 of it. Clusters that are not on
	// one flat network may overlap.
	PodCIDR  netip.Prefix `yaml:"podCIDR"`
	PodCIDR6 netip.Prefix `yaml:"podCIDR6"` // default fd00:(10 I)::/48; a /64 a Node
	// ServiceCIDR holds cluster addresses of Services, default 10.(100+I).0.0/16.
	ServiceCIDR  netip.Prefix `yaml:"serviceCIDR"`
	ServiceCIDR6 netip.Prefix `yaml:"serviceCIDR6"` // default fd00:(100+I)::/112
	// IPv6 turns dual stack off, when false.
	IPv6 *bool `yaml:"ipv6"`
	// Nodes are the cluster's, default one named NAME-1.
	Nodes []NodeSpec `yaml:"nodes"`
	// LoadBalancer is the part of the WAN from which Services of type LoadBalancer get addresses, default 172.30.I.128/25.
	LoadBalancer netip.Prefix `yaml:"loadBalancer"`
	// Control is the network of the control plane beside the router, default 192.168.(100+I).0/29.
	Control netip.Prefix `yaml:"control"`
	// APIServer is the WAN address of the API server, default 172.30.I.100.
	APIServer netip.Addr `yaml:"apiServer"`
	// HideAPIServer lets nobody outside reach the API server on the WAN.
	HideAPIServer bool `yaml:"hideAPIServer"`
	// DNS says who answers at the tenth address of ServiceCIDR: "coredns", the stock one as a Deployment in kube-system
	// (the default), or "none".
	DNS string `yaml:"dns"`
}

// NodeSpec is a Node object of a cluster.
type NodeSpec struct {
	Name string `yaml:"name"`
	// Address is the Node's on the WAN, where its NodePorts answer. Default 172.30.I.K for the K-th.
	Address netip.Addr `yaml:"address"`
	// Region and Zone are its well-known labels; Labels are further ones.
	Region string            `yaml:"region"`
	Zone   string            `yaml:"zone"`
	Labels map[string]string `yaml:"labels"`

	pods, pods6 netip.Prefix
	address6    netip.Addr
}

// MachineSpec is a machine without a cluster. It has a leg to the WAN, or stands beside a cluster's router.
type MachineSpec struct {
	Name string `yaml:"name"`
	// Cluster is the one whose router it is attached to, which then routes between it and the Pods.
	Cluster string `yaml:"cluster"`
	// Subnet is the network between router and machine, its first address the router's; needed with Cluster.
	Subnet netip.Prefix `yaml:"subnet"`
	// Address is the machine's: in Subnet, or on the WAN.
	Address netip.Addr `yaml:"address"`
	// DNS is the nameserver in its resolv.conf; none by default.
	DNS netip.Addr `yaml:"dns"`
}

var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$`)

// LoadTopology reads, completes and checks a topology file.
func LoadTopology(path string) (*Topology, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read topology: %w", err)
	}
	t, err := ParseTopology(data)
	if err != nil {
		return nil, fmt.Errorf("topology %s: %w", path, err)
	}
	return t, nil
}

// ParseTopology decodes, completes and checks the text of a topology file. Unknown fields are refused.
func ParseTopology(data []byte) (*Topology, error) {
	t := &Topology{}
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(t); err != nil {
		return nil, err
	}
	return t, t.Complete()
}

// Complete fills in what is not said and checks the whole. A topology that is written in Go needs it, too.
func (t *Topology) Complete() error {
	set(&t.WAN, netip.MustParsePrefix("172.30.0.0/16"))
	set(&t.WAN6, netip.MustParsePrefix("fd30::/64"))
	if !t.WAN.Addr().Is4() || t.WAN.Bits() > 20 {
		return fmt.Errorf("wan %v: give an IPv4 prefix of at most 20 bits", t.WAN)
	}
	for i := range t.Clusters {
		t.Clusters[i].complete(t, i+1)
	}
	return t.check()
}

func set[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func prefix(format string, a ...any) netip.Prefix {
	p, _ := netip.ParsePrefix(fmt.Sprintf(format, a...)) // the zero Prefix is reported by check
	return p
}

func (c *ClusterSpec) complete(t *Topology, i int) {
	wan := t.WAN.Masked().Addr().As4()
	at := func(host byte) netip.Addr { return netip.AddrFrom4([4]byte{wan[0], wan[1], wan[2] + byte(i), host}) }
	set(&c.Network, c.Flat)
	set(&c.Network, c.Name)
	set(&c.PodCIDR, prefix("10.%d.0.0/16", 10*i))
	set(&c.ServiceCIDR, prefix("10.%d.0.0/16", 100+i))
	if c.IPv6 == nil || *c.IPv6 {
		set(&c.PodCIDR6, prefix("fd00:%d::/48", 10*i))
		set(&c.ServiceCIDR6, prefix("fd00:%d::/112", 100+i))
	}
	set(&c.Control, prefix("192.168.%d.0/29", 100+i))
	set(&c.LoadBalancer, netip.PrefixFrom(at(128), 25))
	set(&c.APIServer, at(100))
	set(&c.DNS, "coredns")
	if len(c.Nodes) == 0 {
		c.Nodes = []NodeSpec{{Name: c.Name + "-1"}}
	}
	for k := range c.Nodes {
		n := &c.Nodes[k]
		set(&n.Address, at(byte(k+1)))
		if n.Address.Is4() {
			n.address6 = t.wan6(n.Address)
		}
		n.pods, n.pods6 = part(c.PodCIDR, 24, k), part(c.PodCIDR6, 64, k)
	}
}

// wan6 is the IPv6 address beside an IPv4 one on the WAN: the last two octets in the prefix.
func (t *Topology) wan6(a netip.Addr) netip.Addr {
	b, v4 := t.WAN6.Masked().Addr().As16(), a.As4()
	b[14], b[15] = v4[2], v4[3]
	return netip.AddrFrom16(b)
}

// part returns the k-th prefix of the given length in p; the zero Prefix when there is none.
func part(p netip.Prefix, bits, k int) netip.Prefix {
	if !p.IsValid() || p.Bits() > bits || k >= 1<<min(8, bits-p.Bits()) {
		return netip.Prefix{}
	}
	b := p.Masked().Addr().AsSlice()
	b[bits/8-1] += byte(k)
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, bits)
}

// nth returns the n-th address of a prefix.
func nth(p netip.Prefix, n int) netip.Addr {
	a := p.Masked().Addr()
	for range n {
		a = a.Next()
	}
	return a
}

// router and control are the two ends of the network of the control plane.
func (c *ClusterSpec) router() netip.Addr  { return nth(c.Control, 1) }
func (c *ClusterSpec) control() netip.Addr { return nth(c.Control, 2) }

// ClusterDNS is the address of the Service kube-dns.
func (c *ClusterSpec) ClusterDNS() netip.Addr { return nth(c.ServiceCIDR, 10) }

// check finds what cannot be built.
func (t *Topology) check() error {
	k := &checker{names: map[string]string{"wan": "the wire"}, wan: map[netip.Addr]string{}}
	if len(t.Clusters) == 0 {
		k.bad("no clusters given")
	}
	for i := range t.Clusters {
		k.cluster(t, &t.Clusters[i])
	}
	for i := range t.Clusters {
		for j := range i {
			k.pair(&t.Clusters[j], &t.Clusters[i])
		}
	}
	for i := range t.Machines {
		k.machine(t, &t.Machines[i])
	}
	for image, program := range t.Images {
		if program == "" {
			k.bad("image %s: name a program", image)
		}
	}
	return errors.Join(k.errs...)
}

type checker struct {
	errs  []error
	names map[string]string
	wan   map[netip.Addr]string
}

func (k *checker) bad(format string, a ...any) { k.errs = append(k.errs, fmt.Errorf(format, a...)) }

func (k *checker) name(what, n string) {
	if !label.MatchString(n) {
		k.bad("%s %q: the name must be a DNS label of at most 32 characters", what, n)
	} else if k.names[n] != "" {
		k.bad("%s %s: the name is that of %s", what, n, k.names[n])
	}
	k.names[n] = what + " " + n
}

func (k *checker) onWAN(t *Topology, who string, a netip.Addr) {
	if !a.Is4() || !t.WAN.Contains(a) {
		k.bad("%s: %v is not an address of wan %v", who, a, t.WAN)
	} else if k.wan[a] != "" {
		k.bad("%s: address %v is already that of %s", who, a, k.wan[a])
	}
	k.wan[a] = who
}

func (k *checker) cluster(t *Topology, c *ClusterSpec) {
	who := "cluster " + c.Name
	k.name("cluster", c.Name)
	if c.Flat != "" && !label.MatchString(c.Flat) {
		k.bad("%s: flat %q: the name must be a DNS label of at most 32 characters", who, c.Flat)
	}
	for what, p := range map[string]netip.Prefix{"podCIDR": c.PodCIDR, "serviceCIDR": c.ServiceCIDR, "control": c.Control, "loadBalancer": c.LoadBalancer} {
		if !p.IsValid() || !p.Addr().Is4() {
			k.bad("%s: %s %v: give an IPv4 prefix", who, what, p)
			return
		}
	}
	for what, p := range map[string]netip.Prefix{"podCIDR6": c.PodCIDR6, "serviceCIDR6": c.ServiceCIDR6} {
		if p.IsValid() && !p.Addr().Is6() {
			k.bad("%s: %s %v: give an IPv6 prefix", who, what, p)
		}
	}
	if c.PodCIDR.Bits() > 24 || c.ServiceCIDR.Bits() > 24 || c.ServiceCIDR.Bits() < 12 || c.Control.Bits() > 29 {
		k.bad("%s: podCIDR may have at most 24 bits, serviceCIDR 12 to 24, control 29", who)
	}
	own := []struct {
		what string
		p    netip.Prefix
	}{{"podCIDR", c.PodCIDR}, {"serviceCIDR", c.ServiceCIDR}, {"control", c.Control}, {"wan", t.WAN}}
	for i, a := range own {
		for _, b := range own[:i] {
			if a.p.Overlaps(b.p) {
				k.bad("%s: %s %v overlaps %s %v", who, a.what, a.p, b.what, b.p)
			}
		}
	}
	if !t.WAN.Overlaps(c.LoadBalancer) || c.LoadBalancer.Bits() < t.WAN.Bits() {
		k.bad("%s: loadBalancer %v is not within wan %v", who, c.LoadBalancer, t.WAN)
	}
	k.onWAN(t, who+": apiServer", c.APIServer)
	nodes := map[string]bool{}
	for _, n := range c.Nodes {
		if !label.MatchString(n.Name) || nodes[n.Name] {
			k.bad("%s: node %q: the name must be a DNS label of at most 32 characters, given once", who, n.Name)
		}
		nodes[n.Name] = true
		k.onWAN(t, who+": node "+n.Name, n.Address)
		if c.LoadBalancer.Contains(n.Address) {
			k.bad("%s: node %s: address %v is in loadBalancer %v", who, n.Name, n.Address, c.LoadBalancer)
		}
		if !n.pods.IsValid() {
			k.bad("%s: node %s: podCIDR %v has no /24 left for it", who, n.Name, c.PodCIDR)
		}
	}
	if c.DNS != "coredns" && c.DNS != "none" {
		k.bad("%s: dns %q: choose coredns or none", who, c.DNS)
	}
}

// pair checks two clusters against each other.
func (k *checker) pair(a, b *ClusterSpec) {
	who := "clusters " + a.Name + " and " + b.Name
	if a.LoadBalancer.Overlaps(b.LoadBalancer) {
		k.bad("%s: loadBalancer %v overlaps %v", who, a.LoadBalancer, b.LoadBalancer)
	}
	if a.Flat == "" || a.Flat != b.Flat {
		return
	}
	for what, p := range map[string][2]netip.Prefix{"podCIDR": {a.PodCIDR, b.PodCIDR}, "podCIDR6": {a.PodCIDR6, b.PodCIDR6}, "control": {a.Control, b.Control}} {
		if p[0].IsValid() && p[1].IsValid() && p[0].Overlaps(p[1]) {
			k.bad("%s are on one flat network: %s %v overlaps %v", who, what, p[0], p[1])
		}
	}
}

func (k *checker) machine(t *Topology, m *MachineSpec) {
	who := "machine " + m.Name
	k.name("machine", m.Name)
	if m.Cluster == "" {
		k.onWAN(t, who, m.Address)
		return
	}
	if t.Cluster(m.Cluster) == nil {
		k.bad("%s: cluster %q is not in this topology; it has %s", who, m.Cluster, strings.Join(t.names(), ", "))
	}
	if !m.Subnet.IsValid() || !m.Subnet.Contains(m.Address) || m.Address == nth(m.Subnet, 1) {
		k.bad("%s: address %v must be in subnet %v and not its first", who, m.Address, m.Subnet)
	}
}

// Cluster returns a cluster by its name, nil when there is none.
func (t *Topology) Cluster(name string) *ClusterSpec {
	for i := range t.Clusters {
		if t.Clusters[i].Name == name {
			return &t.Clusters[i]
		}
	}
	return nil
}

func (t *Topology) names() []string {
	var out []string
	for _, c := range t.Clusters {
		out = append(out, c.Name)
	}
	return out
}
