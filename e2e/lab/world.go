package lab

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// World is a world.yaml: the clusters, machines and programs of one scenario.
type World struct {
	// Dir is the folder of the file; other paths in it are relative to this one.
	Dir string `yaml:"-"`
	// WAN is the network between clusters.
	WAN netip.Prefix `yaml:"wan"`
	// Images maps container images to programs in the folder of binaries.
	Images map[string]string `yaml:"images"`
	// Corefile replaces the built-in CoreDNS configuration (a text/template over CorefileData).
	Corefile string        `yaml:"corefile"`
	Clusters []ClusterSpec `yaml:"clusters"`
	Machines []MachineSpec `yaml:"machines"`
}

// ClusterSpec is one cluster of a World.
type ClusterSpec struct {
	Name         string        `yaml:"name"`
	TrustDomain  string        `yaml:"trustDomain"`  // default NAME.mesh
	Network      string        `yaml:"network"`      // default NAME
	PodCIDR      netip.Prefix  `yaml:"podCIDR"`      // IPv4; its first address is the router's
	PodCIDR6     netip.Prefix  `yaml:"podCIDR6"`     // default fd00:A:B::/64 for 10.A.B.0/24 or its like
	WANAddress   netip.Addr    `yaml:"wanAddress"`   // the router's, the source of all that leaves the pods
	ControlPlane netip.Addr    `yaml:"controlPlane"` // isthmusd's pod address; default the second address of PodCIDR
	DNS          netip.Addr    `yaml:"dns"`          // CoreDNS's pod address; default the third address of PodCIDR
	Config       string        `yaml:"config"`       // folder of YAML, default NAME
	Gateways     []GatewaySpec `yaml:"gateways"`
	// Isthmusd and Agent are laid over the generated configuration files, key by key.
	Isthmusd map[string]any `yaml:"isthmusd"`
	Agent    map[string]any `yaml:"agent"`
}

// Kinds of east-west gateways.
const (
	KindEnvoy = "envoy"
	KindRelay = "relay"
)

// GatewaySpec is one east-west gateway of a cluster.
type GatewaySpec struct {
	Name       string     `yaml:"name"`
	Kind       string     `yaml:"kind"` // envoy or relay
	Address    netip.Addr `yaml:"address"`
	WANAddress netip.Addr `yaml:"wanAddress"`
}

// MachineSpec is a machine without a cluster, routed to one cluster's pods.
type MachineSpec struct {
	Name    string       `yaml:"name"`
	Cluster string       `yaml:"cluster"` // whose router it is attached to
	Subnet  netip.Prefix `yaml:"subnet"`  // its first address is the router's
	Address netip.Addr   `yaml:"address"`
	DNS     netip.Addr   `yaml:"dns"` // nameserver in its resolv.conf; default the router, where nobody answers
	// WAN says what it may dial outside: "gateways" (TCP 15443, as pods do; the default) or "none".
	WAN       string        `yaml:"wan"`
	Processes []ProcessSpec `yaml:"processes"`
}

// ProcessSpec is a program on a machine, started when the world comes up.
type ProcessSpec struct {
	Name    string            `yaml:"name"`
	Image   string            `yaml:"image"`
	Command []string          `yaml:"command"`
	Args    []string          `yaml:"args"`
	Env     map[string]string `yaml:"env"`
}

var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$`)

// LoadWorld reads a world.yaml, or the world.yaml in a folder, and completes and checks it.
func LoadWorld(path string) (*World, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, "world.yaml")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read world: %w", err)
	}
	w, err := ParseWorld(data)
	if err != nil {
		return nil, fmt.Errorf("world %s: %w", path, err)
	}
	if w.Dir, err = filepath.Abs(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("world %s: %w", path, err)
	}
	return w, nil
}

// ParseWorld decodes, completes and checks the text of a world.yaml. Unknown fields are refused.
func ParseWorld(data []byte) (*World, error) {
	w := &World{}
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(w); err != nil {
		return nil, err
	}
	for i := range w.Clusters {
		w.Clusters[i].complete()
	}
	for i := range w.Machines {
		if w.Machines[i].WAN == "" {
			w.Machines[i].WAN = "gateways"
		}
		if m := &w.Machines[i]; !m.DNS.IsValid() && m.Subnet.IsValid() {
			m.DNS = nth(m.Subnet, 1)
		}
	}
	return w, w.check()
}

func (c *ClusterSpec) complete() {
	set := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	set(&c.TrustDomain, c.Name+".mesh")
	set(&c.Network, c.Name)
	set(&c.Config, c.Name)
	if !c.PodCIDR.IsValid() || !c.PodCIDR.Addr().Is4() {
		return
	}
	if !c.ControlPlane.IsValid() {
		c.ControlPlane = nth(c.PodCIDR, 2)
	}
	if !c.DNS.IsValid() {
		c.DNS = nth(c.PodCIDR, 3)
	}
	if !c.PodCIDR6.IsValid() {
		b := c.PodCIDR.Addr().As4()
		if p, err := netip.ParsePrefix(fmt.Sprintf("fd00:%d:%d::/64", b[0], b[1])); err == nil {
			c.PodCIDR6 = p
		}
	}
}

func (w *World) check() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	names, wan := map[string]bool{"wan": true, "ns": true, "etc": true, "logs": true}, map[netip.Addr]string{}
	name := func(what, n string) {
		if !label.MatchString(n) {
			bad("%s %q: the name must be a DNS label of at most 32 characters", what, n)
		}
		if names[n] {
			bad("%s %s: the name is taken", what, n)
		}
		names[n] = true
	}
	takes := func(who string, a netip.Addr) {
		if !a.Is4() || !w.WAN.Contains(a) {
			bad("%s: wanAddress %v is not an address of wan %v", who, a, w.WAN)
		} else if wan[a] != "" {
			bad("%s: wanAddress %v is already that of %s", who, a, wan[a])
		}
		wan[a] = who
	}
	if !w.WAN.IsValid() || !w.WAN.Addr().Is4() {
		bad("wan %v: give an IPv4 prefix, for example 172.31.0.0/24", w.WAN)
	}
	for _, c := range w.Clusters {
		who := "cluster " + c.Name
		name("cluster", c.Name)
		if !c.PodCIDR.IsValid() || !c.PodCIDR.Addr().Is4() || c.PodCIDR.Bits() > 28 {
			bad("%s: podCIDR %v: give an IPv4 prefix of at most 28 bits", who, c.PodCIDR)
			continue
		}
		takes(who, c.WANAddress)
		pods := map[netip.Addr]string{nth(c.PodCIDR, 1): "the router"}
		pod := func(what string, a netip.Addr) {
			if !c.PodCIDR.Contains(a) {
				bad("%s: %s %v is not in podCIDR %v", who, what, a, c.PodCIDR)
			} else if pods[a] != "" {
				bad("%s: %s %v is the address of %s", who, what, a, pods[a])
			}
			pods[a] = what
		}
		pod("controlPlane", c.ControlPlane)
		pod("dns", c.DNS)
		gateways := map[string]bool{}
		for _, g := range c.Gateways {
			what := "gateway " + g.Name
			if !label.MatchString(g.Name) || gateways[g.Name] {
				bad("%s: %q: the name must be a DNS label, given once", who, what)
			}
			gateways[g.Name] = true
			pod(what, g.Address)
			takes(who+": "+what, g.WANAddress)
			if g.Kind != KindEnvoy && g.Kind != KindRelay {
				bad("%s: %s: kind %q: choose envoy or relay", who, what, g.Kind)
			}
		}
	}
	for _, m := range w.Machines {
		who := "machine " + m.Name
		name("machine", m.Name)
		if _, ok := w.cluster(m.Cluster); !ok {
			bad("%s: cluster %q is not in this world", who, m.Cluster)
		}
		if !m.Subnet.IsValid() || !m.Subnet.Contains(m.Address) || m.Address == nth(m.Subnet, 1) {
			bad("%s: address %v must be in subnet %v and not its first", who, m.Address, m.Subnet)
		}
		if m.WAN != "gateways" && m.WAN != "none" {
			bad("%s: wan %q: choose gateways or none", who, m.WAN)
		}
		for _, p := range m.Processes {
			if !label.MatchString(p.Name) {
				bad("%s: process %q: the name must be a DNS label", who, p.Name)
			}
		}
	}
	for image, program := range w.Images {
		if program == "" || strings.ContainsRune(program, '/') {
			bad("image %s: program %q must be a file name in the folder of binaries", image, program)
		}
	}
	return errors.Join(errs...)
}

func (w *World) cluster(name string) (ClusterSpec, bool) {
	for _, c := range w.Clusters {
		if c.Name == name {
			return c, true
		}
	}
	return ClusterSpec{}, false
}

// nth returns the n-th address of an IPv4 prefix.
func nth(p netip.Prefix, n int) netip.Addr {
	a := p.Masked().Addr()
	for range n {
		a = a.Next()
	}
	return a
}

// v6 returns the IPv6 address of the pod with an IPv4 address: the last octet's digits in the cluster's prefix, so
// that 10.10.0.11 is fd00:10:10::11.
func (c *ClusterSpec) v6(a netip.Addr) netip.Addr {
	if !c.PodCIDR6.IsValid() || !a.Is4() {
		return netip.Addr{}
	}
	o := a.As4()
	b := c.PodCIDR6.Masked().Addr().As16()
	digits := func(i int, v byte) { b[i], b[i+1] = v/100, (v/10%10)<<4|v%10 }
	digits(14, o[3])
	if c.PodCIDR.Bits() < 24 {
		digits(12, o[2])
	}
	return netip.AddrFrom16(b)
}
