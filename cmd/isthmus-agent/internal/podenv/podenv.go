// Package podenv makes the agent's configuration out of what a Pod has: environment variables with Istio's names, files
// of the downward API, and the arguments of the container. There is no file to write.
package podenv

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Where injection mounts things.
const (
	TokenFile       = "/var/run/secrets/tokens/istio-token"
	RootFile        = "/var/run/secrets/istio/root-cert.pem"
	LabelsFile      = "/etc/istio/pod/labels"
	AnnotationsFile = "/etc/istio/pod/annotations"
	DataDir         = "/etc/istio/proxy/agent"
)

// maxFile bounds a file of the downward API and a variable with JSON.
const maxFile = 1 << 20

// Source is where the configuration comes from.
type Source struct {
	Kind    string              // sidecar or router, the first argument
	Getenv  func(string) string // as os.Getenv
	Environ []string            // as os.Environ
	Root    string              // put before absolute paths; "" but in tests
	Flags   Flags
}

// Flags are the arguments after the kind, as Istio's agent takes them.
type Flags struct {
	Domain         string // --domain, the suffix of the node id
	ProxyLogLevel  string
	ComponentLevel string
	Concurrency    int    // 0: not given
	Envoy          string // program
	ServiceCluster string // taken and not used: node.cluster says it
}

// proxyConfig is what is used of Istio's ProxyConfig.
type proxyConfig struct {
	DiscoveryAddress         string            `json:"discoveryAddress"`
	BinaryPath               string            `json:"binaryPath"`
	CustomConfigFile         string            `json:"customConfigFile"`
	Concurrency              *int              `json:"concurrency"`
	ProxyAdminPort           int               `json:"proxyAdminPort"`
	StatusPort               int               `json:"statusPort"`
	TerminationDrainDuration string            `json:"terminationDrainDuration"`
	ProxyMetadata            map[string]string `json:"proxyMetadata"`
}

// reader reads the environment; proxyMetadata stands in for variables that are not set, as in Istio.
type reader struct {
	src   Source
	proxy proxyConfig
	errs  []error
}

func (r *reader) get(name string) string {
	if v := r.src.Getenv(name); v != "" {
		return v
	}
	return r.proxy.ProxyMetadata[name]
}

func (r *reader) or(name, otherwise string) string {
	if v := r.get(name); v != "" {
		return v
	}
	return otherwise
}

func (r *reader) wrong(name, format string, args ...any) {
	r.errs = append(r.errs, diag.Hint(fmt.Errorf("environment variable %s: %w", name, fmt.Errorf(format, args...)), "injection sets it; docs/guide/injection.md lists the variables"))
}

func (r *reader) path(p string) string {
	if r.src.Root == "" {
		return p
	}
	return filepath.Join(r.src.Root, p)
}

func (r *reader) bool(name string) bool {
	v := r.get(name)
	if v == "" {
		return false
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		r.wrong(name, "%.64q is neither true nor false", v)
	}
	return b
}

func (r *reader) duration(name, text string, otherwise time.Duration) config.Duration {
	if text == "" {
		return config.Duration(otherwise)
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 {
		r.wrong(name, "%.64q is not a time such as 5s", text)
		return config.Duration(otherwise)
	}
	return config.Duration(min(d, 10*time.Minute))
}

func (r *reader) json(name string, into any) {
	v := r.src.Getenv(name)
	if v == "" {
		return
	}
	if len(v) > maxFile {
		r.wrong(name, "over %d bytes", maxFile)
		return
	}
	if err := json.Unmarshal([]byte(v), into); err != nil {
		r.wrong(name, "not the JSON that is wanted: %w", err)
	}
}

// Load makes the configuration. Its error names each variable that is wrong.
func Load(src Source) (*config.Config, error) {
	r := &reader{src: src}
	r.json("PROXY_CONFIG", &r.proxy)
	c := &config.Config{
		Name: r.get("POD_NAME"), Namespace: r.get("POD_NAMESPACE"), ServiceAccount: r.or("SERVICE_ACCOUNT", "default"),
		Cluster: r.or("ISTIO_META_CLUSTER_ID", "Kubernetes"), TrustDomain: r.or("TRUST_DOMAIN", "cluster.local"), Network: r.get("ISTIO_META_NETWORK"),
		RootCert: r.or("ISTHMUS_ROOT_CERT", r.path(RootFile)), TokenFile: r.or("ISTHMUS_TOKEN_FILE", r.path(TokenFile)), DataDir: r.or("ISTHMUS_DATA_DIR", r.path(DataDir)),
	}
	switch src.Kind {
	case "sidecar":
		c.Role = config.Sidecar
	case "router":
		c.Role = config.Gateway
		if r.get("ISTHMUS_GATEWAY_KIND") == "relay" {
			c.Role = config.Relay
		}
	default:
		return nil, diag.Hint(fmt.Errorf("%q is no kind of proxy", src.Kind), "isthmus-agent proxy sidecar, or isthmus-agent proxy router")
	}
	for _, name := range []string{"POD_NAME", "POD_NAMESPACE"} {
		if r.get(name) == "" {
			r.wrong(name, "not set")
		}
	}
	pod := &config.Pod{TokenAlways: true}
	c.Pod = pod
	c.Labels = r.downward(r.or("ISTHMUS_POD_LABELS", r.path(LabelsFile)))
	if l := c.Labels["istio-locality"]; l != "" {
		c.Locality = strings.ReplaceAll(l, ".", "/")
	}
	pod.Metadata = r.metadata(r.downward(r.or("ISTHMUS_POD_ANNOTATIONS", r.path(AnnotationsFile))))
	r.domain(c)
	r.addresses(c)
	r.controlPlane(c)
	r.envoy(c)
	r.application(c)
	c.Capture.DNS = c.Role == config.Sidecar && r.bool("ISTIO_META_DNS_CAPTURE")
	if len(r.errs) > 0 {
		return nil, errors.Join(r.errs...)
	}
	if err := c.Complete(); err != nil {
		return nil, diag.Hint(fmt.Errorf("configuration from the environment: %w", err), "docs/guide/injection.md lists the variables")
	}
	return c, nil
}

// downward reads a file of the downward API: KEY="VALUE" on each line, the value quoted. One that is not there is empty.
func (r *reader) downward(path string) map[string]string {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		defer f.Close()
	}
	var data []byte
	if err == nil {
		data, err = io.ReadAll(io.LimitReader(f, maxFile))
	}
	if err != nil {
		r.errs = append(r.errs, fmt.Errorf("read %s: %w", path, err))
		return nil
	}
	return ParseDownward(string(data))
}

// ParseDownward reads the content of a downward API file. Lines that are none are left out.
func ParseDownward(text string) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(text) {
		k, v, ok := strings.Cut(strings.TrimRight(line, "\n"), "=")
		if !ok {
			continue
		}
		if s, err := strconv.Unquote(v); err == nil {
			v = s
		}
		out[k] = v
	}
	return out
}

// hidden are annotations that would only make the node's metadata large.
var hidden = []string{"kubectl.kubernetes.io/last-applied-configuration", "sidecar.istio.io/status", "proxy.istio.io/overrides"}

// metadata takes each ISTIO_META_NAME as NAME, each ISTIO_METAJSON_NAME as the object it is, and the annotations.
func (r *reader) metadata(annotations map[string]string) map[string]any {
	m := map[string]any{}
	take := func(name, value string) {
		if strings.HasPrefix(name, "ISTIO_METAJSON_") {
			var v map[string]any
			if err := json.Unmarshal([]byte(value), &v); err != nil {
				r.wrong(name, "not a JSON object: %w", err)
				return
			}
			for k, x := range v {
				m[k] = x
			}
		} else if key, ok := strings.CutPrefix(name, "ISTIO_META_"); ok {
			m[key] = value
		}
	}
	for name, value := range r.proxy.ProxyMetadata {
		take(name, value)
	}
	env := slices.Clone(r.src.Environ)
	slices.Sort(env)
	for _, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		take(name, value)
	}
	kept := map[string]any{}
	for k, v := range annotations {
		if !slices.Contains(hidden, k) {
			kept[k] = v
		}
	}
	if len(kept) > 0 {
		m["ANNOTATIONS"] = kept
	}
	var proxy map[string]any
	r.json("PROXY_CONFIG", &proxy)
	if len(proxy) > 0 {
		m["PROXY_CONFIG"] = proxy
	}
	return m
}

func (r *reader) domain(c *config.Config) {
	d := r.src.Flags.Domain
	if d == "" {
		d = c.Namespace + ".svc.cluster.local"
	}
	c.Pod.Domain = strings.NewReplacer("$(POD_NAMESPACE)", c.Namespace, "${POD_NAMESPACE}", c.Namespace).Replace(d)
}

// addresses takes the Pod's address first, then what the interfaces have beside it.
func (r *reader) addresses(c *config.Config) {
	var first string
	if ip := r.get("INSTANCE_IP"); ip != "" {
		if _, err := netip.ParseAddr(ip); err != nil {
			r.wrong("INSTANCE_IP", "%.64q is not an IP address", ip)
			return
		}
		first = ip
		c.Addresses = []string{ip}
	}
	others, err := config.InterfaceAddresses()
	if err != nil && first == "" {
		r.errs = append(r.errs, err)
		return
	}
	if first != "" && !slices.Contains(others, first) {
		return // the address is not ours: that of a test, or of a NAT
	}
	for _, a := range others {
		if a != first {
			c.Addresses = append(c.Addresses, a)
		}
	}
}

// controlPlane finds xDS and CA; the host is the name that the certificate must carry, and is resolved at each dial.
func (r *reader) controlPlane(c *config.Config) {
	xds := r.proxy.DiscoveryAddress
	if xds == "" {
		r.wrong("PROXY_CONFIG", "discoveryAddress is not set")
		return
	}
	c.ControlPlane.Addresses, c.ControlPlane.ServerName = []string{xds}, r.or("ISTHMUS_CONTROL_PLANE_NAME", hostOf(xds))
	if ca := r.get("CA_ADDR"); ca != "" && ca != xds {
		c.ControlPlane.CA, c.ControlPlane.CAName = []string{ca}, r.or("ISTHMUS_CONTROL_PLANE_NAME", hostOf(ca))
	}
	if c.ControlPlane.CAName == "" && len(c.ControlPlane.CA) > 0 {
		c.ControlPlane.CAName = "xds." + c.TrustDomain
	}
}

// hostOf returns the host of host:port; "" for an IP address, which names nobody.
func hostOf(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return ""
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return ""
	}
	return host
}

func (r *reader) envoy(c *config.Config) {
	f, e := r.src.Flags, &c.Envoy
	e.Path = f.Envoy
	if e.Path == "" {
		e.Path = r.get("ENVOY")
	}
	for _, p := range []string{r.proxy.BinaryPath, "/usr/local/bin/envoy"} {
		if e.Path == "" && p != "" {
			if _, err := os.Stat(p); err == nil {
				e.Path = p
			}
		}
	}
	e.LogLevel, e.ComponentLog = f.ProxyLogLevel, f.ComponentLevel
	e.AdminPort = r.proxy.ProxyAdminPort
	e.Concurrency = r.concurrency()
	e.DrainTime = r.duration("PROXY_CONFIG", r.proxy.TerminationDrainDuration, 5*time.Second)
	if v := r.get("TERMINATION_DRAIN_DURATION_SECONDS"); v != "" {
		e.DrainTime = r.duration("TERMINATION_DRAIN_DURATION_SECONDS", v+"s", 5*time.Second)
	}
	if r.bool("EXIT_ON_ZERO_ACTIVE_CONNECTIONS") { // the kubelet's grace period is the limit then
		e.MinDrain = r.duration("MINIMUM_DRAIN_DURATION", r.get("MINIMUM_DRAIN_DURATION"), 5*time.Second)
		e.DrainTime = config.Duration(10 * time.Minute)
	}
	c.Relay.DrainTime = e.DrainTime
	e.CustomBootstrap = r.proxy.CustomConfigFile
	if v := r.get("ISTIO_BOOTSTRAP_OVERRIDE"); v != "" {
		e.CustomBootstrap = r.path(v)
	}
}

// concurrency is what was asked for, else the CPU limit, else two.
func (r *reader) concurrency() int {
	if r.src.Flags.Concurrency > 0 {
		return r.src.Flags.Concurrency
	}
	if n := r.proxy.Concurrency; n != nil && *n > 0 {
		return *n
	}
	if v := r.get("ISTIO_CPU_LIMIT"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			r.wrong("ISTIO_CPU_LIMIT", "%.64q is not a number", v)
		}
		return max(1, min(n, 1024))
	}
	return 2
}

func (r *reader) application(c *config.Config) {
	p := c.Pod
	p.StatusPort = 15020
	if r.proxy.StatusPort != 0 {
		p.StatusPort = r.proxy.StatusPort
	}
	if v := r.get("ISTIO_STATUS_PORT"); v != "" {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil {
			r.wrong("ISTIO_STATUS_PORT", "%.64q is not a port", v)
		}
		p.StatusPort = int(n)
	}
	r.json("ISTIO_KUBE_APP_PROBERS", &p.AppProbes)
	for path, probe := range p.AppProbes {
		kinds := 0
		for _, set := range []bool{probe.HTTPGet != nil, probe.TCPSocket != nil, probe.GRPC != nil} {
			if set {
				kinds++
			}
		}
		if kinds != 1 || !strings.HasPrefix(path, "/app-") {
			r.wrong("ISTIO_KUBE_APP_PROBERS", "%.128q is not one of httpGet, tcpSocket, grpc under /app-health/", path)
		}
	}
	if r.src.Getenv("ISTIO_PROMETHEUS_ANNOTATIONS") != "" {
		p.AppScrape = &config.Scrape{}
		r.json("ISTIO_PROMETHEUS_ANNOTATIONS", p.AppScrape)
	}
	if v := r.get("ISTHMUS_READINESS_APPLICATION_PORTS"); v != "" {
		for s := range strings.SplitSeq(v, ",") {
			n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 16)
			if err != nil || n == 0 || len(p.ApplicationPorts) >= 256 {
				r.wrong("ISTHMUS_READINESS_APPLICATION_PORTS", "%.64q is not a port", s)
				break
			}
			p.ApplicationPorts = append(p.ApplicationPorts, uint16(n))
		}
	}
}
