package kubelab

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/internal/kubeplane"
)

const (
	apiPort  = 6443
	etcdPort = 2379
)

// Cluster is one cluster of a lab.
type Cluster struct {
	Spec    *ClusterSpec
	Dir     string    // its part of the run's folder
	Router  *lab.Node // where its Pods are attached
	Control *lab.Node // where its control plane runs

	lab        *Lab
	plane      *kubeplane.Plane
	api        *APIServer
	nodes      *node.Node
	kubeconfig string // through the forwarder on loopback
	rest       *rest.Config
}

// inside are the addresses that a flat network routes.
func (s *ClusterSpec) inside() []netip.Prefix {
	out := []netip.Prefix{s.PodCIDR, s.Control}
	if s.PodCIDR6.IsValid() {
		out = append(out, s.PodCIDR6)
	}
	return out
}

// nodeAddresses are those of its Nodes on the WAN.
func (s *ClusterSpec) nodeAddresses() []netip.Prefix {
	var out []netip.Prefix
	for _, n := range s.Nodes {
		out = append(out, single(n.Address), single(n.address6))
	}
	return out
}

// network makes the cluster's router and control plane with their legs.
func (c *Cluster) network() error {
	s, net, t := c.Spec, c.lab.net, c.lab.topology
	var err error
	if c.Router, err = net.AddNode(s.Name+"/router", lab.NodeOptions{Forward: true}); err != nil {
		return err
	}
	var addresses []netip.Prefix
	for _, n := range s.Nodes {
		addresses = append(addresses, netip.PrefixFrom(n.Address, t.WAN.Bits()), netip.PrefixFrom(n.address6, t.WAN6.Bits()))
	}
	if err := c.lab.onWAN(s.Name, c.Router, addresses, c.behind()); err != nil {
		return err
	}
	if err := c.Router.Bridge("control", netip.PrefixFrom(s.router(), s.Control.Bits())); err != nil {
		return err
	}
	if c.Control, err = net.AddNode(s.Name+"/control", lab.NodeOptions{}); err != nil {
		return err
	}
	if err := net.Attach(lab.Leg{Node: c.Control, Link: "eth0", Parent: c.Router, Bridge: "control",
		Addresses: []netip.Prefix{netip.PrefixFrom(s.control(), s.Control.Bits())}, Gateways: []netip.Addr{s.router()}}); err != nil {
		return err
	}
	return c.lab.onWAN(s.Name+"/apiserver", c.Control, []netip.Prefix{netip.PrefixFrom(s.APIServer, t.WAN.Bits())}, nil)
}

// routes leads packets for the insides of the other clusters on the flat network to their routers.
func (c *Cluster) routes(peers []*Cluster) error {
	return c.Router.Do(func() error {
		link, err := netlink.LinkByName(lab.LinkWAN)
		if err != nil {
			return err
		}
		for _, p := range peers {
			for _, inside := range p.Spec.inside() {
				via := p.Spec.Nodes[0].Address
				if inside.Addr().Is6() {
					via = p.Spec.Nodes[0].address6
				}
				dst := &net.IPNet{IP: inside.Masked().Addr().AsSlice(), Mask: net.CIDRMask(inside.Bits(), inside.Addr().BitLen())}
				if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: via.AsSlice()}); err != nil {
					return fmt.Errorf("route to %v of %s: %w", inside, p.Spec.Name, err)
				}
			}
		}
		return nil
	})
}

// up starts the control plane, then the Nodes. What runs inside this process ends with life.
func (c *Cluster) up(ctx, life context.Context) error {
	s := c.Spec
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ranges := []netip.Prefix{s.ServiceCIDR}
	if s.ServiceCIDR6.IsValid() {
		ranges = append(ranges, s.ServiceCIDR6)
	}
	if c.plane, err = kubeplane.New(kubeplane.Config{
		Name: s.Name, Dir: filepath.Join(c.Dir, "control"), Address: s.control(), Port: apiPort, Listen: netip.IPv4Unspecified(),
		EtcdURL: fmt.Sprintf("http://127.0.0.1:%d", etcdPort), ServiceCIDRs: ranges, Controllers: true,
		Addresses: []netip.Addr{s.APIServer},
	}); err != nil {
		return err
	}
	outside, err := c.plane.Kubeconfig("https://"+listener.Addr().String(), "admin", "system:masters")
	if err != nil {
		return err
	}
	c.kubeconfig = filepath.Join(c.Dir, "kubeconfig")
	if err := write(c.kubeconfig, outside); err != nil {
		return err
	}
	if c.rest, err = clientcmd.BuildConfigFromFlags("", c.plane.Admin()); err != nil {
		return err
	}
	c.rest.Dial, c.rest.QPS, c.rest.Burst = c.Control.Dial, 200, 400
	c.lab.parts.Go(func() error { return forward(life, listener, c.dialAPI) })
	if c.api, err = c.startPlane(ctx); err != nil || c.lab.cfg.ControlOnly {
		return err
	}
	images, err := c.lab.programs()
	if err != nil {
		return err
	}
	if err := c.startNodes(ctx, life, images); err != nil {
		return fmt.Errorf("nodes: %w", err)
	}
	if s.DNS == "none" {
		return nil
	}
	if err := c.dns(ctx); err != nil {
		return fmt.Errorf("DNS: %w", err)
	}
	return nil
}

func (c *Cluster) dialAPI(ctx context.Context) (net.Conn, error) {
	return c.Control.Dial(ctx, "tcp", netip.AddrPortFrom(c.Spec.control(), apiPort).String())
}

// Name is the cluster's.
func (c *Cluster) Name() string { return c.Spec.Name }

// Kubeconfig is the file of the administrator's kubeconfig. It works where the lab was started, for as long as the
// lab's process lives: its server is a port of loopback that leads to the API server.
func (c *Cluster) Kubeconfig() string { return c.kubeconfig }

// KubeconfigInside is the file of a kubeconfig that works inside the namespaces of the cluster.
func (c *Cluster) KubeconfigInside() string { return c.plane.Admin() }

// REST returns the administrator's client configuration. Its connections start beside the API server.
func (c *Cluster) REST() *rest.Config { return rest.CopyConfig(c.rest) }

// Client returns the administrator's client.
func (c *Cluster) Client() (kubernetes.Interface, error) { return kubernetes.NewForConfig(c.REST()) }

// APIServerURL is where clients on the WAN, and on the cluster's flat network, reach the API server.
func (c *Cluster) APIServerURL() string {
	return "https://" + netip.AddrPortFrom(c.Spec.APIServer, apiPort).String()
}

// CA is the certificate of the cluster's API server's authority, in PEM.
func (c *Cluster) CA() []byte { return c.plane.CA() }

// APIServer is the cluster's.
func (c *Cluster) APIServer() *APIServer { return c.api }

// Facts is what stories know of the cluster, by short names.
func (c *Cluster) Facts() map[string]string {
	s := c.Spec
	return map[string]string{
		"kubeconfig": c.kubeconfig, "apiserver": c.APIServerURL(), "dns": s.ClusterDNS().String(), "node": s.Nodes[0].Address.String(),
		"control": s.control().String(), "network": s.Network, "ca": base64.StdEncoding.EncodeToString(c.CA()),
	}
}
