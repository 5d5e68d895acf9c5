package inject

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/template"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// Policies of a Config.
const (
	PolicyEnabled  = "enabled"
	PolicyDisabled = "disabled"
)

// MaxConfig is the most bytes that a document of the configuration may have; a ConfigMap holds 1 MiB.
const MaxConfig = 1 << 20

// Config is what the injector was told. It is not changed after it was made and is safe for concurrent use.
type Config struct {
	// Policy says what happens where the webhook's selectors chose a Pod and nothing else decides: enabled (the
	// default) or disabled.
	Policy string
	Values Values
	// Mesh gives trustDomain, defaultConfig and enablePrometheusMerge.
	Mesh *meshconfig.MeshConfig

	custom map[string]*template.Template
	raw    map[string]any // the values as they came, for custom templates
}

// Values are the values of the installation that injection reads, in the layout of Istio's charts. Others are let pass.
type Values struct {
	Revision string        `json:"revision,omitempty"`
	Global   GlobalValues  `json:"global,omitempty"`
	Webhook  WebhookValues `json:"sidecarInjectorWebhook,omitempty"`
	Pilot    PilotValues   `json:"pilot,omitempty"`
	CNI      CNIValues     `json:"istio_cni,omitempty"`
	Chart    ChartValues   `json:"-"`
}

// ChartValues are what the chart of Isthmus writes into the ConfigMap; they win over the keys of Istio's charts.
type ChartValues struct {
	Global struct {
		ClusterName string `json:"clusterName,omitempty"`
		Network     string `json:"network,omitempty"`
		TrustDomain string `json:"trustDomain,omitempty"`
		Namespace   string `json:"namespace,omitempty"`
	} `json:"global,omitempty"`
	Image struct {
		Image       string   `json:"image,omitempty"` // a whole reference
		PullPolicy  string   `json:"pullPolicy,omitempty"`
		PullSecrets []string `json:"pullSecrets,omitempty"`
	} `json:"image,omitempty"`
	Proxy struct {
		ProxyValues
		NativeSidecar    *bool  `json:"nativeSidecar,omitempty"`
		InterceptionMode string `json:"interceptionMode,omitempty"`
		DNSCapture       bool   `json:"dnsCapture,omitempty"`
	} `json:"proxy,omitempty"`
	CNI       CNIValues `json:"cni,omitempty"`
	Injection struct {
		Revision                  string `json:"revision,omitempty"`
		EnableNamespacesByDefault bool   `json:"enableNamespacesByDefault,omitempty"`
	} `json:"injection,omitempty"`
	DiscoveryAddress string `json:"discoveryAddress,omitempty"`
}

// GlobalValues are those of the key global.
type GlobalValues struct {
	IstioNamespace   string   `json:"istioNamespace,omitempty"` // istio-system
	Hub              string   `json:"hub,omitempty"`            // images are HUB/NAME:TAG
	Tag              string   `json:"tag,omitempty"`
	ImagePullPolicy  string   `json:"imagePullPolicy,omitempty"`
	ImagePullSecrets []string `json:"imagePullSecrets,omitempty"`
	Network          string   `json:"network,omitempty"`
	MeshID           string   `json:"meshID,omitempty"`
	CAAddress        string   `json:"caAddress,omitempty"` // host:port; default: the discovery address
	MultiCluster     struct {
		ClusterName string `json:"clusterName,omitempty"`
	} `json:"multiCluster,omitempty"`
	Logging struct {
		Level string `json:"level,omitempty"`
	} `json:"logging,omitempty"`
	Proxy     ProxyValues `json:"proxy,omitempty"`
	ProxyInit struct {
		Image     string                      `json:"image,omitempty"`
		Resources corev1.ResourceRequirements `json:"resources,omitempty"`
	} `json:"proxy_init,omitempty"`
	// PodDNSSearchNamespaces are search domains for every injected Pod; {{...}} in one is the Pod's namespace.
	PodDNSSearchNamespaces []string `json:"podDNSSearchNamespaces,omitempty"`
	LegacyFSGroup          bool     `json:"legacyFSGroup,omitempty"` // fsGroup 1337 on every Pod, for Kubernetes before 1.19
}

// ProxyValues are those of the key global.proxy.
type ProxyValues struct {
	Image                        string                      `json:"image,omitempty"` // a name, or a whole reference when it has a slash
	ClusterDomain                string                      `json:"clusterDomain,omitempty"`
	LogLevel                     string                      `json:"logLevel,omitempty"`
	ComponentLogLevel            string                      `json:"componentLogLevel,omitempty"`
	Privileged                   bool                        `json:"privileged,omitempty"`
	Resources                    corev1.ResourceRequirements `json:"resources,omitempty"`
	IncludeIPRanges              *string                     `json:"includeIPRanges,omitempty"`
	ExcludeIPRanges              string                      `json:"excludeIPRanges,omitempty"`
	IncludeInboundPorts          *string                     `json:"includeInboundPorts,omitempty"`
	ExcludeInboundPorts          string                      `json:"excludeInboundPorts,omitempty"`
	IncludeOutboundPorts         string                      `json:"includeOutboundPorts,omitempty"`
	ExcludeOutboundPorts         string                      `json:"excludeOutboundPorts,omitempty"`
	StatusPort                   *int                        `json:"statusPort,omitempty"`
	ReadinessInitialDelaySeconds int32                       `json:"readinessInitialDelaySeconds,omitempty"`
	ReadinessPeriodSeconds       int32                       `json:"readinessPeriodSeconds,omitempty"`
	ReadinessFailureThreshold    int32                       `json:"readinessFailureThreshold,omitempty"`
	StartupProbe                 struct {
		Enabled          *bool `json:"enabled,omitempty"`
		FailureThreshold int32 `json:"failureThreshold,omitempty"`
	} `json:"startupProbe,omitempty"`
	HoldApplicationUntilProxyStarts bool              `json:"holdApplicationUntilProxyStarts,omitempty"`
	Lifecycle                       *corev1.Lifecycle `json:"lifecycle,omitempty"`
}

// WebhookValues are those of the key sidecarInjectorWebhook.
type WebhookValues struct {
	EnableNamespacesByDefault bool                   `json:"enableNamespacesByDefault,omitempty"`
	RewriteAppHTTPProbe       *bool                  `json:"rewriteAppHTTPProbe,omitempty"`
	NeverInjectSelector       []metav1.LabelSelector `json:"neverInjectSelector,omitempty"`
	AlwaysInjectSelector      []metav1.LabelSelector `json:"alwaysInjectSelector,omitempty"`
	InjectedAnnotations       map[string]string      `json:"injectedAnnotations,omitempty"`
	Templates                 map[string]string      `json:"templates,omitempty"`
	DefaultTemplates          []string               `json:"defaultTemplates,omitempty"`
}

// PilotValues are those of the key pilot.
type PilotValues struct {
	CNI            CNIValues         `json:"cni,omitempty"`
	NativeSidecars *bool             `json:"nativeSidecars,omitempty"` // default true
	Env            map[string]string `json:"env,omitempty"`            // ENABLE_NATIVE_SIDECARS, as Istio's
}

func (p PilotValues) nativeSidecars() bool {
	if p.NativeSidecars != nil {
		return *p.NativeSidecars
	}
	return p.Env["ENABLE_NATIVE_SIDECARS"] != "false"
}

// CNIValues say whether the CNI plugin captures traffic in place of an init container.
type CNIValues struct {
	Enabled bool `json:"enabled,omitempty"`
}

// file is the document under the key config of the injector's ConfigMap.
type file struct {
	Policy               string                 `json:"policy,omitempty"`
	DefaultTemplates     []string               `json:"defaultTemplates,omitempty"`
	AlwaysInjectSelector []metav1.LabelSelector `json:"alwaysInjectSelector,omitempty"`
	NeverInjectSelector  []metav1.LabelSelector `json:"neverInjectSelector,omitempty"`
	InjectedAnnotations  map[string]string      `json:"injectedAnnotations,omitempty"`
	Templates            map[string]string      `json:"templates,omitempty"`
}

// Documents are the YAML or JSON texts that a Config is made of; each may be empty.
type Documents struct {
	Config string // key config of ConfigMap istio-sidecar-injector
	Values string // key values of the same
	Mesh   string // key mesh of ConfigMap istio

	Defaults Identity
}

// Identity is what the documents may leave open.
type Identity struct {
	Cluster, Network, TrustDomain string
	Namespace                     string // of the control plane
	Revision                      string
}

// Parse makes a Config. An error names the document and, where it is known, the field.
func Parse(d Documents) (*Config, error) {
	c := &Config{Mesh: &meshconfig.MeshConfig{}, custom: map[string]*template.Template{}}
	var f file
	for _, x := range []struct {
		name, text string
		into       any
	}{{"config", d.Config, &f}, {"values", d.Values, &c.Values}, {"values", d.Values, &c.Values.Chart}, {"values", d.Values, &c.raw}} {
		if len(x.text) > MaxConfig {
			return nil, fmt.Errorf("%s of the injector: over %d bytes", x.name, MaxConfig)
		}
		if err := yaml.Unmarshal([]byte(x.text), x.into); err != nil {
			return nil, fmt.Errorf("%s of the injector: %w", x.name, err)
		}
	}
	if err := unmarshalProto(d.Mesh, c.Mesh, lenient); err != nil {
		return nil, fmt.Errorf("mesh configuration: %w", err)
	}
	if err := c.takeChart(); err != nil {
		return nil, err
	}
	c.Policy = first(f.Policy, PolicyEnabled)
	if c.Policy != PolicyEnabled && c.Policy != PolicyDisabled {
		return nil, fmt.Errorf("config of the injector: policy: %q is neither %s nor %s", c.Policy, PolicyEnabled, PolicyDisabled)
	}
	w := &c.Values.Webhook
	w.AlwaysInjectSelector = append(w.AlwaysInjectSelector, f.AlwaysInjectSelector...)
	w.NeverInjectSelector = append(w.NeverInjectSelector, f.NeverInjectSelector...)
	for _, s := range append(append([]metav1.LabelSelector{}, w.AlwaysInjectSelector...), w.NeverInjectSelector...) {
		if _, err := metav1.LabelSelectorAsSelector(&s); err != nil {
			return nil, fmt.Errorf("selectors of the injector: %w", err)
		}
	}
	if len(f.DefaultTemplates) > 0 {
		w.DefaultTemplates = f.DefaultTemplates
	}
	w.InjectedAnnotations = mergeMaps(w.InjectedAnnotations, f.InjectedAnnotations)
	for name, text := range mergeMaps(f.Templates, w.Templates) {
		if name == templateSidecar || name == templateGateway {
			continue // built in: Istio's own text under these names would start Istio's agent
		}
		t, err := template.New(name).Option("missingkey=zero").Funcs(templateFuncs).Parse(text)
		if err != nil {
			return nil, fmt.Errorf("template %s of the injector: %w", name, err)
		}
		c.custom[name] = t
	}
	c.setDefaults(d.Defaults)
	if _, _, err := c.templates(""); err != nil {
		return nil, err
	}
	return c, nil
}

// Default returns the Config of an installation that said nothing.
func Default() *Config {
	c, err := Parse(Documents{})
	if err != nil { // a test parses it
		return &Config{Mesh: &meshconfig.MeshConfig{}}
	}
	return c
}

// takeChart copies the values of our own chart to where those of Istio's are.
func (c *Config) takeChart() error {
	v, g := &c.Values.Chart, &c.Values.Global
	set := func(p *string, value string) { *p = first(value, *p) }
	set(&g.MultiCluster.ClusterName, v.Global.ClusterName)
	set(&g.IstioNamespace, v.Global.Namespace)
	set(&g.Network, v.Global.Network)
	set(&g.ImagePullPolicy, v.Image.PullPolicy)
	g.ImagePullSecrets = append(g.ImagePullSecrets, v.Image.PullSecrets...)
	if c.raw["proxy"] != nil {
		g.Proxy = v.Proxy.ProxyValues
	}
	set(&g.Proxy.Image, v.Image.Image)
	if v.Proxy.NativeSidecar != nil {
		c.Values.Pilot.NativeSidecars = v.Proxy.NativeSidecar
	}
	c.Values.CNI.Enabled = c.Values.CNI.Enabled || v.CNI.Enabled
	set(&c.Values.Revision, v.Injection.Revision)
	c.Values.Webhook.EnableNamespacesByDefault = c.Values.Webhook.EnableNamespacesByDefault || v.Injection.EnableNamespacesByDefault
	m := c.Mesh
	set(&m.TrustDomain, v.Global.TrustDomain)
	if m.DefaultConfig == nil {
		m.DefaultConfig = &meshconfig.ProxyConfig{}
	}
	set(&m.DefaultConfig.DiscoveryAddress, v.DiscoveryAddress)
	if mode := v.Proxy.InterceptionMode; mode != "" {
		n, ok := meshconfig.ProxyConfig_InboundInterceptionMode_value[mode]
		if !ok {
			return fmt.Errorf("values of the injector: proxy.interceptionMode: %q is none of REDIRECT, TPROXY, NONE", mode)
		}
		m.DefaultConfig.InterceptionMode = meshconfig.ProxyConfig_InboundInterceptionMode(n)
	}
	if v.Proxy.DNSCapture {
		m.DefaultConfig.ProxyMetadata = mergeMaps(map[string]string{"ISTIO_META_DNS_CAPTURE": "true"}, m.DefaultConfig.ProxyMetadata)
	}
	return nil
}

func (c *Config) setDefaults(id Identity) {
	g := &c.Values.Global
	def := func(p *string, v string) { *p = first(*p, v) }
	def(&c.Values.Revision, id.Revision)
	def(&g.MultiCluster.ClusterName, id.Cluster)
	def(&g.Network, id.Network)
	def(&g.IstioNamespace, id.Namespace)
	def(&c.Mesh.TrustDomain, id.TrustDomain)
	def(&g.IstioNamespace, "istio-system")
	def(&g.Tag, "latest")
	def(&g.Proxy.Image, "isthmus-agent")
	def(&g.ProxyInit.Image, g.Proxy.Image)
	def(&g.Proxy.ClusterDomain, "cluster.local")
	def(&g.Proxy.LogLevel, "warning")
	def(&g.Logging.Level, "default:info")
	star, port := "*", 15020
	if g.Proxy.IncludeIPRanges == nil {
		g.Proxy.IncludeIPRanges = &star
	}
	if g.Proxy.IncludeInboundPorts == nil {
		g.Proxy.IncludeInboundPorts = &star
	}
	if g.Proxy.StatusPort == nil {
		g.Proxy.StatusPort = &port
	}
	num := func(p *int32, v int32) {
		if *p == 0 {
			*p = v
		}
	}
	num(&g.Proxy.ReadinessPeriodSeconds, 15)
	num(&g.Proxy.ReadinessFailureThreshold, 4)
	num(&g.Proxy.StartupProbe.FailureThreshold, 600)
	if c.Mesh.DefaultConfig == nil {
		c.Mesh.DefaultConfig = &meshconfig.ProxyConfig{}
	}
	def(&c.Mesh.DefaultConfig.DiscoveryAddress, "istiod."+g.IstioNamespace+".svc:15012")
	def(&g.CAAddress, c.Mesh.DefaultConfig.DiscoveryAddress)
}

func (c *Config) revision() string { return first(c.Values.Revision, defaultRevision) }

// Revision is the revision that the injector serves: "default" unless the values name one.
func (c *Config) Revision() string { return c.revision() }

func (c *Config) cni() bool { return c.Values.Pilot.CNI.Enabled || c.Values.CNI.Enabled }

// How unmarshalProto takes fields that this version does not know.
const (
	lenient = true
	strict  = false
)

// unmarshalProto reads YAML into a message of Istio's API.
func unmarshalProto(text string, m proto.Message, unknown bool) error {
	if len(bytes.TrimSpace([]byte(text))) == 0 {
		return nil
	}
	if len(text) > MaxConfig {
		return fmt.Errorf("over %d bytes", MaxConfig)
	}
	data, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		return err
	}
	if !json.Valid(data) || data[0] != '{' {
		return fmt.Errorf("it is not a mapping of fields")
	}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: unknown}).Unmarshal(data, m); err != nil {
		return errors.New(strings.ReplaceAll(err.Error(), "\u00a0", " ")) // protobuf varies its spaces on purpose
	}
	return nil
}

// marshalProto writes a message as JSON without the white space that protojson varies.
func marshalProto(m proto.Message) (string, error) {
	data, err := protojson.Marshal(m)
	if err != nil {
		return "", err
	}
	var out bytes.Buffer
	if err := json.Compact(&out, data); err != nil {
		return "", err
	}
	return out.String(), nil
}

func mergeMaps(a, b map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range []map[string]string{a, b} {
		for k, v := range m {
			out[k] = v
		}
	}
	return out
}
