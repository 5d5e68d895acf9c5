package inject

import (
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// AppProbe is one probe of an application as the agent runs it; ISTIO_KUBE_APP_PROBERS is a JSON object of them by the
// path under which the kubelet asks for it.
type AppProbe struct {
	HTTPGet        *corev1.HTTPGetAction   `json:"httpGet,omitempty"`
	TCPSocket      *corev1.TCPSocketAction `json:"tcpSocket,omitempty"`
	GRPC           *corev1.GRPCAction      `json:"grpc,omitempty"`
	TimeoutSeconds int32                   `json:"timeoutSeconds,omitempty"`
}

// rewriteProbes leads the kubelet's probes to the agent: under mutual TLS, and behind capture, the kubelet cannot speak
// to the application itself. Lists of commands are not touched.
func (b *build) rewriteProbes() error {
	if !b.set.rewriteProbes || b.set.statusPort == 0 || b.template != templateSidecar {
		return nil
	}
	probes := map[string]AppProbe{}
	for i := range b.pod.Spec.Containers {
		b.rewriteContainer(&b.pod.Spec.Containers[i], probes)
	}
	for i := range b.pod.Spec.InitContainers {
		if c := &b.pod.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			b.rewriteContainer(c, probes)
		}
	}
	if len(probes) == 0 {
		return nil
	}
	text, err := json.Marshal(probes) // in the order of their keys
	if err != nil {
		return fmt.Errorf("write ISTIO_KUBE_APP_PROBERS: %w", err)
	}
	b.addEnv("ISTIO_KUBE_APP_PROBERS", string(text))
	return nil
}

func (b *build) addEnv(name, value string) {
	for _, cs := range [][]corev1.Container{b.pod.Spec.Containers, b.pod.Spec.InitContainers} {
		for i := range cs {
			if cs[i].Name == ProxyContainer {
				cs[i].Env = append(cs[i].Env, corev1.EnvVar{Name: name, Value: value})
			}
		}
	}
}

func (b *build) rewriteContainer(c *corev1.Container, probes map[string]AppProbe) {
	if c.Name == ProxyContainer {
		return
	}
	for _, x := range []struct {
		kind  string
		probe *corev1.Probe
	}{{"readyz", c.ReadinessProbe}, {"livez", c.LivenessProbe}, {"startupz", c.StartupProbe}} {
		if x.probe != nil {
			b.rewrite("/app-health/"+c.Name+"/"+x.kind, c, &x.probe.ProbeHandler, max(1, x.probe.TimeoutSeconds), probes)
		}
	}
	if c.Lifecycle == nil {
		return
	}
	for _, x := range []struct {
		kind string
		hook *corev1.LifecycleHandler
	}{{"prestopz", c.Lifecycle.PreStop}, {"poststartz", c.Lifecycle.PostStart}} {
		if x.hook == nil || x.hook.HTTPGet == nil {
			continue
		}
		h := corev1.ProbeHandler{HTTPGet: x.hook.HTTPGet}
		b.rewrite("/app-lifecycle/"+c.Name+"/"+x.kind, c, &h, 30, probes)
		x.hook.HTTPGet = h.HTTPGet
	}
}

// rewrite replaces the handler by one that asks the agent at path, and remembers what it was.
func (b *build) rewrite(path string, c *corev1.Container, h *corev1.ProbeHandler, timeout int32, probes map[string]AppProbe) {
	was := AppProbe{TimeoutSeconds: timeout}
	ask := &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt(b.set.statusPort)}
	switch {
	case h.HTTPGet != nil:
		port, ok := number(c, h.HTTPGet.Port)
		if !ok || h.HTTPGet.Host != "" { // another host is not behind our proxy
			return
		}
		was.HTTPGet = h.HTTPGet.DeepCopy()
		was.HTTPGet.Port = port
		ask.HTTPHeaders = h.HTTPGet.HTTPHeaders
	case h.TCPSocket != nil:
		port, ok := number(c, h.TCPSocket.Port)
		if !ok || h.TCPSocket.Host != "" {
			return
		}
		was.TCPSocket = &corev1.TCPSocketAction{Port: port}
	case h.GRPC != nil:
		was.GRPC = h.GRPC.DeepCopy()
	default:
		return
	}
	probes[path] = was
	*h = corev1.ProbeHandler{HTTPGet: ask}
}

// number resolves the name of a port, which is that of the same container; an unknown one is left for the kubelet to
// complain about.
func number(c *corev1.Container, p intstr.IntOrString) (intstr.IntOrString, bool) {
	if p.Type == intstr.Int {
		return p, true
	}
	for _, x := range c.Ports {
		if x.Name == p.StrVal {
			return intstr.FromInt32(x.ContainerPort), true
		}
	}
	return p, false
}

// Annotations by which Prometheus finds what to scrape.
const (
	scrapeAnnotation     = "prometheus.io/scrape"
	scrapePortAnnotation = "prometheus.io/port"
	scrapePathAnnotation = "prometheus.io/path"
)

// Scrape says where an application's metrics are; ISTIO_PROMETHEUS_ANNOTATIONS is its JSON.
type Scrape struct {
	Scrape string `json:"scrape"`
	Path   string `json:"path"`
	Port   string `json:"port"`
}

// mergeMetrics leads Prometheus to the agent, which asks the application and Envoy.
func (b *build) mergeMetrics() {
	a := b.pod.Annotations
	if !b.set.mergeMetrics || b.set.statusPort == 0 || b.template != templateSidecar || a[scrapeAnnotation] == "false" {
		return
	}
	if a[scrapeAnnotation] == "true" {
		text, err := json.Marshal(Scrape{"true", first(a[scrapePathAnnotation], "/metrics"), a[scrapePortAnnotation]})
		if err == nil {
			b.addEnv("ISTIO_PROMETHEUS_ANNOTATIONS", string(text))
		}
	}
	a[scrapeAnnotation], a[scrapePathAnnotation], a[scrapePortAnnotation] = "true", "/stats/prometheus", fmt.Sprint(b.set.statusPort)
}
