package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/audit"
	"github.com/isthmus-mesh/isthmus/dns/vip"
	"github.com/isthmus-mesh/isthmus/internal/cidr"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Config is isthmusd's configuration file. Fields that are not listed here are refused.
type Config struct {
	// Cluster is this cluster's name in the mesh, a DNS label.
	Cluster string `yaml:"cluster"`
	// TrustDomain of the cluster's certificates; CLUSTER.mesh unless given.
	TrustDomain string `yaml:"trustDomain"`
	// Network the cluster's pods are on; the cluster's name unless given. Clusters on one network reach each other's pods directly.
	Network string `yaml:"network"`
	// PodRanges are the addresses of the cluster's pods, ADDRESS/BITS; unless given, those of its nodes that pods use.
	PodRanges []string `yaml:"podRanges"`
	// ServiceRanges are the addresses of the cluster's Services, ADDRESS/BITS; not known unless given.
	ServiceRanges []string `yaml:"serviceRanges"`
	// VirtualRanges are what virtual addresses are from, an IPv4 and an IPv6 prefix; 240.0.0.0/4 and fd69:7374:686d::/48
	// unless given. All clusters of a mesh have the same.
	VirtualRanges []string `yaml:"virtualRanges"`
	// DataDir keeps keys, records and addresses over restarts.
	DataDir string `yaml:"dataDir"`
	// Listen is the one TLS port: xDS, certificates, joins, peers.
	Listen string `yaml:"listen"`
	// Advertise are the addresses under which this cluster's gateways and workloads reach Listen.
	Advertise []string `yaml:"advertise"`
	// Gateways are the east-west gateways of this cluster as other networks dial them, IP:PORT.
	Gateways []string `yaml:"gateways"`
	// Source is where the cluster's objects come from.
	Source sources `yaml:"source"`
	// CA is the workload certificate authority.
	CA struct {
		// Dir holds ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem; without it a root is made in DataDir.
		Dir string `yaml:"dir"`
		// MaxTTL bounds the life of workload certificates.
		MaxTTL time.Duration `yaml:"maxTTL"`
		// Settle is how long a new root is told to everybody before certificates are signed under it. Shorter: a stolen
		// key is out of use sooner; longer: who hears late is not cut off. Used with state.in: kubernetes.
		Settle time.Duration `yaml:"settle"`
		// Overlap is how long the roots before are trusted still; not shorter than certificates live. 0: twice MaxTTL.
		Overlap time.Duration `yaml:"overlap"`
	} `yaml:"ca"`
	// State is where keys, the standing of peers and grants of tokens are kept.
	State StateConfig `yaml:"state"`
	// Admin is the operator's way in.
	Admin struct {
		Socket string `yaml:"socket"`
		// Listen is the address of the same over TLS, for the tool's --context; needs state.in: kubernetes. Empty: off.
		Listen string `yaml:"listen"`
	} `yaml:"admin"`
	// Audit is where changes of tokens, peers and roots are written down.
	Audit audit.Config `yaml:"audit"`
	// Metrics is the address of /metrics and /ready over plain HTTP; empty: off.
	Metrics string `yaml:"metrics"`
	// XDSPlaintext is a loopback address that serves xDS without authentication; empty: off.
	XDSPlaintext string `yaml:"xdsPlaintext"`
	// Webhook is about injection into pods and the check of objects as they are written.
	Webhook webhookConfig `yaml:"webhook"`
	// Federation is about other clusters.
	Federation struct {
		// AutoApprove makes every cluster that redeems a token a member without a second word.
		AutoApprove bool `yaml:"autoApprove"`
		// LateAfter is the silence after which a peer's endpoints are used only when fresh ones do not suffice. Lowering it reacts sooner and to shorter pauses.
		LateAfter time.Duration `yaml:"lateAfter"`
		// Lease is the silence after which a peer's endpoints are dropped where another cluster serves the same host.
		Lease time.Duration `yaml:"lease"`
	} `yaml:"federation"`
	// Names are those that every exported service has besides SERVICE.NAMESPACE.global: "cluster" for CLUSTER.SERVICE.NAMESPACE.global, "pod" for
	// POD.CLUSTER.SERVICE.NAMESPACE.global and both. Headless services, and those whose exports ask, have them anyway.
	Names []string `yaml:"names"`
	// MachineGrace is how long a machine whose agent was lost without a word stays registered.
	MachineGrace time.Duration `yaml:"machineGrace"`

	allowLoopback bool // peers' gateways and endpoints may be loopback addresses; only tests set it
}

// defaultConfig returns what holds where the file is silent.
func defaultConfig() Config {
	var c Config
	c.DataDir = "/var/lib/isthmus"
	c.Listen = "0.0.0.0:15012"
	c.Admin.Socket = admin.DefaultSocket
	c.Metrics = "0.0.0.0:15014"
	c.Source.Kube.Namespace = "istio-system"
	c.CA.MaxTTL = 24 * time.Hour
	c.CA.Settle = time.Minute
	c.State = defaultState()
	c.Federation.LateAfter = 3 * time.Second
	c.Federation.Lease = 10 * time.Minute
	c.MachineGrace = 10 * time.Second
	return c
}

// loadConfig reads and checks the file.
func loadConfig(path string) (Config, error) {
	c := defaultConfig()
	data, err := os.ReadFile(path)
	if err != nil {
		return c, diag.Hint(fmt.Errorf("read the configuration: %w", err), "name the file with --config; docs/guide/isthmusd.md shows one")
	}
	if err := decode(data, &c); err != nil {
		return c, diag.Hint(fmt.Errorf("configuration %s: %w", path, err), "docs/guide/isthmusd.md lists every field")
	}
	if c.TrustDomain == "" {
		c.TrustDomain = c.Cluster + ".mesh"
	}
	if c.Network == "" {
		c.Network = c.Cluster
	}
	if err := c.validate(); err != nil {
		return c, diag.Hint(fmt.Errorf("configuration %s: %w", path, err), "docs/guide/isthmusd.md lists every field")
	}
	return c, nil
}

// decode reads the one document of the file.
func decode(data []byte, c *Config) error {
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	err := d.Decode(c)
	var wrong *yaml.TypeError
	switch {
	case errors.Is(err, io.EOF):
		return nil // all is default
	case errors.As(err, &wrong):
		return errors.New(notFound.ReplaceAllString(strings.Join(wrong.Errors, "; "), "unknown field $1"))
	case err != nil:
		return err
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return errors.New("it has a second document; one is read")
	}
	return nil
}

// notFound is how the decoder says that a field is unknown.
var notFound = regexp.MustCompile(`field (\S+) not found in type (?:main\.\w+|struct \{[^}]*\})`)

var (
	label  = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	domain = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,200}[a-z0-9])?$`)
)

func (c Config) validate() error {
	switch {
	case !label.MatchString(c.Cluster):
		return fmt.Errorf("cluster: %q is not a DNS label (a-z, 0-9, -)", c.Cluster)
	case !domain.MatchString(c.TrustDomain):
		return fmt.Errorf("trustDomain: %q is not a SPIFFE trust domain", c.TrustDomain)
	case c.CA.MaxTTL <= 0:
		return fmt.Errorf("ca.maxTTL: %s is not a time that a certificate can live", c.CA.MaxTTL)
	case c.CA.Settle < 0:
		return fmt.Errorf("ca.settle: %s is negative", c.CA.Settle)
	case c.CA.Overlap != 0 && c.CA.Overlap < c.CA.MaxTTL:
		return fmt.Errorf("ca.overlap: %s is shorter than certificates may live, ca.maxTTL %s", c.CA.Overlap, c.CA.MaxTTL)
	case c.MachineGrace < 0:
		return fmt.Errorf("machineGrace: %s is negative", c.MachineGrace)
	case c.Federation.LateAfter <= 0:
		return fmt.Errorf("federation.lateAfter: %s is not longer than nothing", c.Federation.LateAfter)
	case c.Federation.Lease <= c.Federation.LateAfter:
		return fmt.Errorf("federation.lease: %s is not longer than federation.lateAfter, %s", c.Federation.Lease, c.Federation.LateAfter)
	}
	if err := errors.Join(c.Source.validate(), c.Webhook.validate()); err != nil {
		return err
	}
	for _, x := range []struct{ field, addr string }{{"listen", c.Listen}, {"metrics", c.Metrics}, {"admin.listen", c.Admin.Listen}} {
		if x.field != "listen" && x.addr == "" {
			continue
		}
		if _, port, err := net.SplitHostPort(x.addr); err != nil || port == "" {
			return fmt.Errorf("%s: %q is not ADDRESS:PORT", x.field, x.addr)
		}
	}
	if _, wrong := cidr.Parse(c.PodRanges); wrong != "" {
		return fmt.Errorf("podRanges: %q is not ADDRESS/BITS", wrong)
	}
	if _, wrong := cidr.Parse(c.ServiceRanges); wrong != "" {
		return fmt.Errorf("serviceRanges: %q is not ADDRESS/BITS", wrong)
	}
	if _, err := vip.ParseRanges(c.VirtualRanges); err != nil {
		return fmt.Errorf("virtualRanges: %w", err)
	}
	for i, n := range c.Names {
		if n != "cluster" && n != "pod" {
			return fmt.Errorf("names[%d]: %q is neither cluster nor pod", i, n)
		}
	}
	for i, g := range c.Gateways {
		if _, err := netip.ParseAddrPort(g); err != nil {
			return fmt.Errorf("gateways[%d]: %q is not IP:PORT", i, g)
		}
	}
	for i, a := range c.Advertise {
		if _, err := netip.ParseAddrPort(a); err != nil {
			return fmt.Errorf("advertise[%d]: %q is not IP:PORT", i, a)
		}
	}
	if err := c.State.validate(); err != nil {
		return err
	}
	if c.Admin.Listen != "" && c.State.In != inKubernetes {
		return errors.New("admin.listen: tokens of callers are reviewed by an API server; set state.in: kubernetes, or use the socket")
	}
	if c.XDSPlaintext != "" {
		host, _, err := net.SplitHostPort(c.XDSPlaintext)
		if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
			return fmt.Errorf("xdsPlaintext: %q is not a loopback address; without authentication no other is allowed", c.XDSPlaintext)
		}
	}
	return nil
}

// addrs reads addresses that validate has checked.
func addrs(in []string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range in {
		if a, err := netip.ParseAddrPort(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}

// data returns the path of a file in the data directory.
func (c Config) data(name string) string { return filepath.Join(c.DataDir, name) }
