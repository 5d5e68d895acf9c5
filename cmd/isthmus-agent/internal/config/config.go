// Package config is the file that isthmus-agent reads: its fields, their defaults and what is refused. It opens
// nothing but that file.
package config

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
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// MaxSize is the largest configuration file that is read.
const MaxSize = 1 << 20

// Role says what the agent runs beside.
type Role string

// The roles. A relay runs no Envoy.
const (
	Sidecar Role = "sidecar"
	Gateway Role = "gateway"
	Relay   Role = "relay"
	Machine Role = "machine"
)

// Duration is a time.Duration written as "90s" or "24h".
type Duration time.Duration

// UnmarshalYAML reads the text form.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil {
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: %q is not a duration such as 90s or 24h", n.Line, n.Value)}}
	}
	*d = Duration(v)
	return nil
}

// MarshalYAML writes the text form.
func (d Duration) MarshalYAML() (any, error) { return time.Duration(d).String(), nil }

// Config is the whole file.
type Config struct {
	Role           Role              `yaml:"role"`
	Name           string            `yaml:"name"`
	Namespace      string            `yaml:"namespace"`
	ServiceAccount string            `yaml:"serviceAccount"`
	Cluster        string            `yaml:"cluster"`
	TrustDomain    string            `yaml:"trustDomain"`
	Network        string            `yaml:"network,omitempty"`
	Locality       string            `yaml:"locality,omitempty"` // region/zone/subzone
	Addresses      []string          `yaml:"addresses,omitempty"`
	Labels         map[string]string `yaml:"labels,omitempty"`
	ControlPlane   ControlPlane      `yaml:"controlPlane"`
	RootCert       string            `yaml:"rootCert"`
	TokenFile      string            `yaml:"tokenFile,omitempty"`
	DataDir        string            `yaml:"dataDir"`
	CertTTL        Duration          `yaml:"certTTL,omitempty"`
	ListenHealth   int               `yaml:"listenHealth,omitempty"`
	Envoy          Envoy             `yaml:"envoy,omitempty"`
	Capture        Capture           `yaml:"capture,omitempty"`
	DNS            DNS               `yaml:"dns,omitempty"`
	Relay          RelayConfig       `yaml:"relay,omitempty"`

	Pod *Pod `yaml:"-"` // set for an agent in a Pod, which has no file
}

// ControlPlane is where isthmusd is.
type ControlPlane struct {
	Addresses  []string `yaml:"addresses"` // host:port, tried in turn
	CA         []string `yaml:"-"`         // the same for certificates; default: Addresses
	CAName     string   `yaml:"-"`         // ServerName of CA
	ServerName string   `yaml:"serverName,omitempty"`
}

// Envoy is how Envoy is run.
type Envoy struct {
	Path            string   `yaml:"path,omitempty"`
	Concurrency     int      `yaml:"concurrency,omitempty"` // workers; more cost memory, fewer cost throughput
	LogLevel        string   `yaml:"logLevel,omitempty"`
	ComponentLog    string   `yaml:"-"`                 // COMPONENT:LEVEL,...
	LogFile         string   `yaml:"logFile,omitempty"` // empty: the agent's own standard error
	AdminPort       int      `yaml:"adminPort,omitempty"`
	StatsPort       int      `yaml:"statsPort,omitempty"`
	MaxConnections  int      `yaml:"maxConnections,omitempty"` // downstream, all listeners together
	DrainTime       Duration `yaml:"drainTime,omitempty"`      // longest wait for open connections at a clean stop
	MinDrain        Duration `yaml:"-"`                        // shortest wait at a clean stop, even without connections
	CustomBootstrap string   `yaml:"customBootstrap,omitempty"`
}

// Capture is which traffic is led through Envoy without the application knowing.
type Capture struct {
	Enabled              bool     `yaml:"enabled,omitempty"`
	Mode                 string   `yaml:"mode,omitempty"`
	ExcludeInboundPorts  []uint16 `yaml:"excludeInboundPorts,omitempty"`
	ExcludeOutboundPorts []uint16 `yaml:"excludeOutboundPorts,omitempty"`
	ExcludeOutboundCIDRs []string `yaml:"excludeOutboundCIDRs,omitempty"`
	DNS                  bool     `yaml:"dns,omitempty"`
}

// DNS is how names are answered on a machine.
type DNS struct {
	Port       int      `yaml:"port,omitempty"`       // loopback, UDP and TCP
	Upstream   []string `yaml:"upstream,omitempty"`   // host:port; default: those of resolvConf
	ResolvConf string   `yaml:"resolvConf,omitempty"` // default /etc/resolv.conf
}

// RelayConfig is how the built-in relay listens.
type RelayConfig struct {
	Listen    string   `yaml:"listen,omitempty"`
	DrainTime Duration `yaml:"drainTime,omitempty"` // longest wait for open connections at a clean stop
}

// Example is a documented file with every field; `isthmus-agent run --help` prints it.
const Example = `role: sidecar                     # sidecar, gateway, relay (no Envoy) or machine
name: productpage-1               # workload (pod or machine) name
namespace: default
serviceAccount: productpage
cluster: amber                    # as isthmusd's
trustDomain: amber.mesh
network: amber-net                # default: the cluster's
locality: north/a/rack1           # region/zone/subzone, optional
addresses: [10.1.0.5]             # default: those of the interfaces
labels: {app: productpage}        # role gateway: istio: eastwestgateway unless "istio" or a Gateway is named
controlPlane:
  addresses: ["10.1.0.2:15012"]   # tried in turn
  serverName: xds.amber.mesh      # default xds.TRUSTDOMAIN
rootCert: /etc/isthmus/root-cert.pem
tokenFile: /var/run/secrets/tokens/istio-token   # JWT; a machine uses its certificate instead
dataDir: /var/lib/isthmus-agent   # sockets, Envoy's pid and bootstrap; made with mode 0700
certTTL: 24h                      # asked for; renewed at half of its life
listenHealth: 15021               # /healthz/ready, and the agent's own /metrics
envoy:
  path: envoy
  concurrency: 2
  logLevel: warning
  logFile: ""                     # default: standard error
  adminPort: 15000                # loopback only
  statsPort: 15090                # /stats/prometheus
  maxConnections: 50000
  drainTime: 5s
  customBootstrap: ""             # JSON or YAML merged over the generated bootstrap
capture:
  enabled: true                   # needs CAP_NET_ADMIN
  mode: nftables
  excludeInboundPorts: [22]
  excludeOutboundPorts: []
  excludeOutboundCIDRs: []
  dns: false                      # answer port 53; always on a machine
dns:
  port: 15053
  upstream: []                    # default: the name servers of resolvConf
  resolvConf: /etc/resolv.conf
relay:
  listen: ":15443"
  drainTime: 5s
`

// Load reads and checks the file.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("read configuration: %w", err), "give the file's path with --config")
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", path, err)
	}
	return Parse(path, data)
}

var unknownField = regexp.MustCompile(`^line (\d+): field (\S+) not found in type`)
var lineError = regexp.MustCompile(`^(?:yaml: )?line (\d+): (.*)`)

// Parse decodes data, fills in defaults and checks it. Errors begin with SOURCE:LINE.
func Parse(source string, data []byte) (*Config, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%s: over %d bytes", source, MaxSize)
	}
	var c Config
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil {
		return nil, decodeError(source, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: more than one YAML document", source)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return nil, decodeError(source, err)
	}
	c.setDefaults()
	if path, err := c.check(); err != nil {
		return nil, diag.Hint(fmt.Errorf("%s:%d: %s: %w", source, lineOf(&doc, path), path, err),
			"correct the field; isthmus-agent run --help shows a whole file")
	}
	return &c, nil
}

func decodeError(source string, err error) error {
	text := err.Error()
	var te *yaml.TypeError
	if errors.As(err, &te) && len(te.Errors) > 0 {
		text = te.Errors[0]
	}
	if errors.Is(err, io.EOF) {
		return diag.Hint(fmt.Errorf("%s:1: the file is empty", source), "isthmus-agent run --help shows a whole file")
	}
	if m := unknownField.FindStringSubmatch(text); m != nil {
		return diag.Hint(fmt.Errorf("%s:%s: unknown field %q", source, m[1], m[2]),
			"remove or correct it; isthmus-agent run --help lists the fields")
	}
	if m := lineError.FindStringSubmatch(text); m != nil {
		return diag.Hint(fmt.Errorf("%s:%s: %s", source, m[1], m[2]), "isthmus-agent run --help shows a whole file")
	}
	return fmt.Errorf("%s: %s", source, text)
}

// lineOf finds the line of a dotted path, or of the nearest parent that is in the file.
func lineOf(doc *yaml.Node, path string) int {
	if len(doc.Content) == 0 {
		return 1
	}
	at, line := doc.Content[0], 1
	for key := range strings.SplitSeq(path, ".") {
		var next *yaml.Node
		if at.Kind == yaml.MappingNode {
			for i := 0; i+1 < len(at.Content); i += 2 {
				if at.Content[i].Value == key {
					line, next = at.Content[i].Line, at.Content[i+1]
				}
			}
		}
		if next == nil {
			return line
		}
		at = next
	}
	return line
}

func orDefault[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

func (c *Config) setDefaults() {
	orDefault(&c.ControlPlane.ServerName, "xds."+c.TrustDomain)
	orDefault(&c.CertTTL, Duration(24*time.Hour))
	orDefault(&c.ListenHealth, 15021)
	orDefault(&c.Envoy.Path, "envoy")
	orDefault(&c.Envoy.Concurrency, 2)
	orDefault(&c.Envoy.LogLevel, "warning")
	orDefault(&c.Envoy.AdminPort, 15000)
	orDefault(&c.Envoy.StatsPort, 15090)
	orDefault(&c.Envoy.MaxConnections, 50000)
	orDefault(&c.Envoy.DrainTime, Duration(5*time.Second))
	orDefault(&c.Capture.Mode, "nftables")
	orDefault(&c.DNS.Port, 15053)
	orDefault(&c.DNS.ResolvConf, "/etc/resolv.conf")
	orDefault(&c.Relay.Listen, ":15443")
	orDefault(&c.Relay.DrainTime, Duration(5*time.Second))
	orDefault(&c.Namespace, "default")
	orDefault(&c.ServiceAccount, "default")
	if c.Role == Machine {
		c.Capture.DNS = true
	}
	if c.Role == Gateway || c.Role == Relay {
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		if c.Labels["istio"] == "" && c.Labels["gateway.networking.k8s.io/gateway-name"] == "" {
			c.Labels["istio"] = "eastwestgateway"
		}
	}
}

// istioCluster is the name of a cluster that an installation of Istio did not name.
const istioCluster = "Kubernetes"

var label = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func isSubdomain(s string) bool {
	if len(s) > 253 {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if !label.MatchString(part) {
			return false
		}
	}
	return true
}

// check returns the dotted path of the first wrong field.
func (c *Config) check() (string, error) {
	switch c.Role {
	case Sidecar, Gateway, Relay, Machine:
	default:
		return "role", fmt.Errorf("%q is not sidecar, gateway, relay or machine", c.Role)
	}
	for _, f := range []struct{ path, value string }{
		{"name", c.Name}, {"namespace", c.Namespace}, {"serviceAccount", c.ServiceAccount},
		{"cluster", c.Cluster}, {"trustDomain", c.TrustDomain},
	} {
		if f.value == "" {
			return f.path, errors.New("must be set")
		}
		if !isSubdomain(f.value) && !(f.path == "cluster" && f.value == istioCluster) {
			return f.path, fmt.Errorf("%q is not a DNS name in lower case", f.value)
		}
	}
	for _, a := range c.Addresses {
		if _, err := netip.ParseAddr(a); err != nil {
			return "addresses", fmt.Errorf("%q is not an IP address", a)
		}
	}
	if len(c.ControlPlane.Addresses) == 0 {
		return "controlPlane.addresses", errors.New("must name at least one host:port")
	}
	for _, a := range c.ControlPlane.Addresses {
		if !isHostPort(a) {
			return "controlPlane.addresses", fmt.Errorf("%q is not host:port", a)
		}
	}
	if c.RootCert == "" {
		return "rootCert", errors.New("must name the PEM file of the control plane's root certificate")
	}
	if c.TokenFile == "" && c.Role != Machine {
		return "tokenFile", errors.New("must name the file of the workload's token")
	}
	if !filepath.IsAbs(c.DataDir) {
		return "dataDir", fmt.Errorf("%q is not an absolute path", c.DataDir)
	}
	if n := len(filepath.Join(c.DataDir, "xds.sock")); n > 107 {
		return "dataDir", fmt.Errorf("too long: the sockets in it would have paths of %d bytes, 107 are allowed", n)
	}
	if ttl := time.Duration(c.CertTTL); ttl < 10*time.Second || ttl > 90*24*time.Hour {
		return "certTTL", fmt.Errorf("%s is not between 10s and 2160h", ttl)
	}
	if d := time.Duration(c.Envoy.DrainTime); d < 0 || d > 10*time.Minute {
		return "envoy.drainTime", fmt.Errorf("%s is not between 0s and 10m", d)
	}
	if d := time.Duration(c.Relay.DrainTime); d < 0 || d > 10*time.Minute {
		return "relay.drainTime", fmt.Errorf("%s is not between 0s and 10m", d)
	}
	for _, p := range []struct {
		path string
		port int
	}{{"listenHealth", c.ListenHealth}, {"envoy.adminPort", c.Envoy.AdminPort}, {"envoy.statsPort", c.Envoy.StatsPort}, {"dns.port", c.DNS.Port}} {
		if p.port < 1 || p.port > 65535 {
			return p.path, fmt.Errorf("%d is not a port", p.port)
		}
	}
	if c.Envoy.Concurrency < 1 || c.Envoy.Concurrency > 1024 {
		return "envoy.concurrency", fmt.Errorf("%d is not between 1 and 1024", c.Envoy.Concurrency)
	}
	switch c.Envoy.LogLevel {
	case "trace", "debug", "info", "warning", "error", "critical", "off":
	default:
		return "envoy.logLevel", fmt.Errorf("%q is not trace, debug, info, warning, error, critical or off", c.Envoy.LogLevel)
	}
	if c.Capture.Mode != "nftables" {
		return "capture.mode", fmt.Errorf("%q is not nftables", c.Capture.Mode)
	}
	const limit = 256
	if len(c.Capture.ExcludeInboundPorts) > limit || len(c.Capture.ExcludeOutboundPorts) > limit || len(c.Capture.ExcludeOutboundCIDRs) > limit {
		return "capture", fmt.Errorf("a list has over %d entries", limit)
	}
	for _, s := range c.Capture.ExcludeOutboundCIDRs {
		if _, err := netip.ParsePrefix(s); err != nil {
			return "capture.excludeOutboundCIDRs", fmt.Errorf("%q is not a CIDR such as 10.0.0.0/8", s)
		}
	}
	for _, s := range c.DNS.Upstream {
		if !isHostPort(s) {
			return "dns.upstream", fmt.Errorf("%q is not host:port", s)
		}
	}
	if strings.Count(c.Locality, "/") > 2 {
		return "locality", fmt.Errorf("%q is not region/zone/subzone", c.Locality)
	}
	return "", nil
}

func isHostPort(s string) bool {
	host, port, err := net.SplitHostPort(s)
	n, perr := strconv.ParseUint(port, 10, 16)
	return err == nil && perr == nil && n > 0 && host != ""
}

// SPIFFE returns the identity of the workload.
func (c *Config) SPIFFE() string {
	return "spiffe://" + c.TrustDomain + "/ns/" + c.Namespace + "/sa/" + c.ServiceAccount
}

// EastWest reports whether the agent runs a gateway between clusters, which ends no TLS and so holds no key in Envoy.
func (c *Config) EastWest() bool {
	return (c.Role == Gateway || c.Role == Relay) && c.Labels["istio"] == "eastwestgateway"
}

// Prefixes returns capture's excluded networks; they were checked by Parse.
func (c *Capture) Prefixes() []netip.Prefix {
	var out []netip.Prefix
	for _, s := range c.ExcludeOutboundCIDRs {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// InterfaceAddresses returns the addresses of the machine's interfaces that others can reach, IPv4 first.
func InterfaceAddresses() ([]string, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the addresses of the interfaces: %w", err)
	}
	var v4, v6 []string
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !p.Addr().IsGlobalUnicast() {
			continue
		}
		if p.Addr().Is4() {
			v4 = append(v4, p.Addr().String())
		} else {
			v6 = append(v6, p.Addr().String())
		}
	}
	if len(v4)+len(v6) == 0 {
		return nil, diag.Hint(errors.New("no interface has an address that others can reach"), "set addresses in the configuration")
	}
	return append(v4, v6...), nil
}
