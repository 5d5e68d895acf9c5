package inject

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"
)

const (
	traffic             = "traffic.sidecar.istio.io/"
	sidecar             = "sidecar.istio.io/"
	readiness           = "readiness.status.sidecar.istio.io/"
	templatesAnnotation = "inject.istio.io/templates"
	templateSidecar     = "sidecar"
	templateGateway     = "gateway"
	maxAnnotationList   = 256
)

// settings are the annotations of one Pod over the values of the installation.
type settings struct {
	proxy     *meshconfig.ProxyConfig
	proxyText string // the JSON of proxy

	includeIPs, excludeIPs                    string
	includeIn, excludeIn                      string
	includeOut, excludeOut                    string
	excludeInterfaces, kubevirt               string
	mode                                      string // REDIRECT, TPROXY or NONE
	statusPort                                int    // 0: none
	image, logLevel, componentLevel, agentLog string
	bootstrapOverride                         string
	resources                                 corev1.ResourceRequirements
	volumes                                   []corev1.Volume
	mounts                                    []corev1.VolumeMount
	rewriteProbes, mergeMetrics, hold         bool
	native                                    *bool
	initialDelay, period, failures            int32
	applicationPorts                          string
	overrides                                 *overrides
	env                                       []corev1.EnvVar
}

// reader takes annotations one by one and remembers the first that is wrong.
type reader struct {
	pod *corev1.Pod
	err error
}

// get returns the annotation, or otherwise when it is absent or wrong.
func (r *reader) get(key, otherwise string, check func(string) error) string {
	v, ok := r.pod.Annotations[key]
	if !ok || r.err != nil {
		return otherwise
	}
	if err := check(v); err != nil {
		r.err = fmt.Errorf("annotation %s: %.256q: %w", key, v, err)
		return otherwise
	}
	return v
}

func (r *reader) bool(key string, otherwise bool) bool {
	return r.get(key, strconv.FormatBool(otherwise), isBool) == "true"
}

func (r *reader) number(key string, otherwise int32) int32 {
	n, _ := strconv.ParseInt(r.get(key, strconv.Itoa(int(otherwise)), isNumber(0, 1<<20)), 10, 32)
	return int32(n)
}

func (r *reader) json(key string, into any) {
	r.get(key, "", func(v string) error {
		if err := json.Unmarshal([]byte(v), into); err != nil {
			return fmt.Errorf("not the JSON that is wanted: %w", err)
		}
		return nil
	})
}

// settings reads all annotations, so that each wrong one is refused whether or not it would be used.
func (c *Config) settings(pod *corev1.Pod, to Request) (settings, error) {
	r, v := &reader{pod: pod}, &c.Values.Global.Proxy
	var s settings
	c.proxyConfig(r, &s, to)
	s.includeIPs = r.get(traffic+"includeOutboundIPRanges", *v.IncludeIPRanges, isCIDRs)
	s.excludeIPs = r.get(traffic+"excludeOutboundIPRanges", v.ExcludeIPRanges, isCIDRs)
	s.includeIn = r.get(traffic+"includeInboundPorts", *v.IncludeInboundPorts, orStar(isPorts))
	s.excludeIn = r.get(traffic+"excludeInboundPorts", v.ExcludeInboundPorts, isPorts)
	s.includeOut = r.get(traffic+"includeOutboundPorts", v.IncludeOutboundPorts, isPorts)
	s.excludeOut = r.get(traffic+"excludeOutboundPorts", v.ExcludeOutboundPorts, isPorts)
	s.excludeInterfaces = r.get(traffic+"excludeInterfaces", "", isInterfaces)
	s.kubevirt = r.get(traffic+"kubevirtInterfaces", "", isInterfaces)
	s.mode = r.get(sidecar+"interceptionMode", s.proxy.GetInterceptionMode().String(), oneOf("REDIRECT", "TPROXY", "NONE"))
	s.statusPort, _ = strconv.Atoi(r.get("status.sidecar.istio.io/port", strconv.Itoa(*v.StatusPort), isNumber(0, 65535)))
	s.image = r.get(sidecar+"proxyImage", v.Image, isImage)
	s.logLevel = r.get(sidecar+"logLevel", v.LogLevel, isEnvoyLevel)
	s.componentLevel = r.get(sidecar+"componentLogLevel", v.ComponentLogLevel, each(isComponentLevel))
	s.agentLog = r.get(sidecar+"agentLogLevel", c.Values.Global.Logging.Level, each(isAgentLevel))
	s.bootstrapOverride = r.get(sidecar+"bootstrapOverride", "", isName)
	s.rewriteProbes = r.bool(sidecar+"rewriteAppHTTPProbers", c.Values.Webhook.RewriteAppHTTPProbe == nil || *c.Values.Webhook.RewriteAppHTTPProbe)
	s.mergeMetrics = r.bool("prometheus.istio.io/merge-metrics", c.Mesh.GetEnablePrometheusMerge() == nil || c.Mesh.GetEnablePrometheusMerge().GetValue())
	s.hold = v.HoldApplicationUntilProxyStarts || s.proxy.GetHoldApplicationUntilProxyStarts().GetValue()
	if _, ok := pod.Annotations[sidecar+"nativeSidecar"]; ok {
		native := r.bool(sidecar+"nativeSidecar", true)
		s.native = &native
	}
	s.initialDelay = r.number(readiness+"initialDelaySeconds", v.ReadinessInitialDelaySeconds)
	s.period = r.number(readiness+"periodSeconds", v.ReadinessPeriodSeconds)
	s.failures = r.number(readiness+"failureThreshold", v.ReadinessFailureThreshold)
	s.applicationPorts = r.get(readiness+"applicationPorts", "", isPorts)
	r.json(sidecar+"userVolume", &s.volumes)
	r.json(sidecar+"userVolumeMount", &s.mounts)
	if pod.Annotations[OverridesAnnotation] != "" {
		s.overrides = &overrides{}
		r.json(OverridesAnnotation, s.overrides)
	}
	s.stats(r)
	s.resources = proxyResources(r, v.Resources)
	return s, r.err
}

// proxyConfig lays over the mesh's defaultConfig the ProxyConfigs of the root namespace and of the Pod's own, then the
// annotation proxy.istio.io/config, then the ProxyConfig that selects the Pod.
func (c *Config) proxyConfig(r *reader, s *settings, to Request) {
	s.proxy = proto.Clone(c.Mesh.GetDefaultConfig()).(*meshconfig.ProxyConfig)
	objects := proxyConfigsFor(to.Proxies, first(c.Mesh.GetRootNamespace(), c.Values.Global.IstioNamespace), to.Namespace.Name, r.pod.Labels)
	lay(s.proxy, said(objects.root))
	lay(s.proxy, said(objects.namespace))
	r.get("proxy.istio.io/config", "", func(v string) error {
		over := &meshconfig.ProxyConfig{}
		if err := unmarshalProto(v, over, strict); err != nil {
			return fmt.Errorf("not a ProxyConfig: %w", err)
		}
		lay(s.proxy, over)
		return nil
	})
	lay(s.proxy, said(objects.workload))
	text, err := marshalProto(s.proxy)
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("write PROXY_CONFIG: %w", err)
	}
	s.proxyText = text
}

// stats carries the choice of statistics to the agent.
func (s *settings) stats(r *reader) {
	for _, x := range []struct{ key, env string }{
		{"statsInclusionPrefixes", "ISTIO_META_STATS_INCLUSION_PREFIXES"},
		{"statsInclusionSuffixes", "ISTIO_META_STATS_INCLUSION_SUFFIXES"},
		{"statsInclusionRegexps", "ISTIO_META_STATS_INCLUSION_REGEXPS"},
		{"extraStatTags", "ISTIO_META_EXTRA_STAT_TAGS"},
	} {
		if v := r.get(sidecar+x.key, "", notEmpty); v != "" {
			s.env = append(s.env, corev1.EnvVar{Name: x.env, Value: v})
		}
	}
}

// proxyResources returns those of the annotations, if there is one, else those of the installation.
func proxyResources(r *reader, values corev1.ResourceRequirements) corev1.ResourceRequirements {
	var out corev1.ResourceRequirements
	for _, x := range []struct {
		key  string
		list *corev1.ResourceList
		name corev1.ResourceName
	}{
		{"proxyCPU", &out.Requests, corev1.ResourceCPU}, {"proxyMemory", &out.Requests, corev1.ResourceMemory},
		{"proxyCPULimit", &out.Limits, corev1.ResourceCPU}, {"proxyMemoryLimit", &out.Limits, corev1.ResourceMemory},
	} {
		text := r.get(sidecar+x.key, "", isQuantity)
		if text == "" {
			continue
		}
		if *x.list == nil {
			*x.list = corev1.ResourceList{}
		}
		(*x.list)[x.name] = resource.MustParse(text)
	}
	if out.Limits == nil && out.Requests == nil {
		return values
	}
	for name, limit := range out.Limits {
		if request, ok := out.Requests[name]; ok && request.Cmp(limit) > 0 && r.err == nil {
			r.err = fmt.Errorf("annotations of the proxy's %s: the request %s is above the limit %s", name, request.String(), limit.String())
		}
	}
	return out
}

// templates reads the annotation inject.istio.io/templates: what is put in, and which custom templates are laid over it.
func (c *Config) templates(annotation string) (base string, custom []string, err error) {
	names, where := c.Values.Webhook.DefaultTemplates, "defaultTemplates of the injector"
	if annotation != "" {
		names, where = strings.Split(annotation, ","), "annotation "+templatesAnnotation
	}
	base = templateSidecar
	for _, n := range names {
		n = strings.TrimSpace(n)
		switch {
		case n == templateSidecar || n == templateGateway:
			base = n
		case c.custom[n] != nil:
			custom = append(custom, n)
		default:
			return "", nil, fmt.Errorf("%s: %.64q: no such template; there are sidecar, gateway and those of the ConfigMap istio-sidecar-injector", where, n)
		}
	}
	return base, custom, nil
}

// The checks: each returns what is wanted instead.

func isBool(v string) error { return oneOf("true", "false")(v) }

func oneOf(values ...string) func(string) error {
	return func(v string) error {
		if !slices.Contains(values, v) {
			return fmt.Errorf("it is none of %s", strings.Join(values, ", "))
		}
		return nil
	}
}

func isNumber(low, high int64) func(string) error {
	return func(v string) error {
		if n, err := strconv.ParseInt(v, 10, 64); err != nil || n < low || n > high {
			return fmt.Errorf("not a number from %d to %d", low, high)
		}
		return nil
	}
}

// each applies check to the parts of a list with commas; an empty list is good.
func each(check func(string) error) func(string) error {
	return func(v string) error {
		if v == "" {
			return nil
		}
		parts := strings.Split(v, ",")
		if len(parts) > maxAnnotationList {
			return fmt.Errorf("over %d entries", maxAnnotationList)
		}
		for _, p := range parts {
			if err := check(strings.TrimSpace(p)); err != nil {
				return err
			}
		}
		return nil
	}
}

func orStar(check func(string) error) func(string) error {
	return func(v string) error {
		if v == "*" {
			return nil
		}
		return check(v)
	}
}

var isPorts = each(func(p string) error {
	if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%q is not a port from 1 to 65535", p)
	}
	return nil
})

var isCIDRs = orStar(each(func(p string) error {
	if _, err := netip.ParsePrefix(p); err != nil {
		return fmt.Errorf("%q is not a range such as 10.0.0.0/8 or fd00::/8", p)
	}
	return nil
}))

var interfaceName = regexp.MustCompile(`^[A-Za-z0-9_.@-]{1,15}$`)

var isInterfaces = each(func(p string) error {
	if !interfaceName.MatchString(p) {
		return fmt.Errorf("%q is not the name of a network interface", p)
	}
	return nil
})

// Envoy's levels.
var envoyLevels = []string{"trace", "debug", "info", "warning", "error", "critical", "off"}

func isEnvoyLevel(v string) error { return oneOf(envoyLevels...)(v) }

func isComponentLevel(p string) error {
	name, level, ok := strings.Cut(p, ":")
	if !ok || name == "" || !slices.Contains(envoyLevels, level) {
		return fmt.Errorf("%q is not COMPONENT:LEVEL with a level of Envoy", p)
	}
	return nil
}

func isAgentLevel(p string) error {
	_, level, ok := strings.Cut(p, ":")
	if !ok {
		level = p
	}
	if !slices.Contains([]string{"none", "fatal", "error", "warn", "info", "debug"}, level) {
		return fmt.Errorf("%q is not SCOPE:LEVEL with one of none, fatal, error, warn, info, debug", p)
	}
	return nil
}

func isName(v string) error {
	if problems := validation.IsDNS1123Subdomain(v); len(problems) > 0 {
		return fmt.Errorf("not the name of a ConfigMap")
	}
	return nil
}

func isImage(v string) error {
	if v == "" || strings.ContainsAny(v, " \t\n") {
		return fmt.Errorf("not the name of an image")
	}
	return nil
}

func notEmpty(v string) error {
	if strings.TrimSpace(v) == "" {
		return fmt.Errorf("nothing is listed")
	}
	return nil
}

func isQuantity(v string) error {
	q, err := resource.ParseQuantity(v)
	if err != nil || q.Sign() < 0 {
		return fmt.Errorf("not a quantity such as 100m or 128Mi")
	}
	return nil
}
