// Package inject puts the proxy's containers into a Pod. It is pure: a Pod, the labels of its namespace and the values of
// the installation in, a Pod or a refusal out. It knows no cluster and opens no socket; its sub-package webhook does.
package inject

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Names of what is put into a Pod, those of Istio.
const (
	ProxyContainer      = "istio-proxy"
	InitContainer       = "istio-init"
	ValidationContainer = "istio-validation"
)

// Annotations and labels that are written.
const (
	StatusAnnotation    = "sidecar.istio.io/status"
	OverridesAnnotation = "proxy.istio.io/overrides"
	tlsModeLabel        = "security.istio.io/tlsMode"
	canonicalName       = "service.istio.io/canonical-name"
	canonicalRevision   = "service.istio.io/canonical-revision"
	networkLabel        = "topology.istio.io/network"
	revisionLabel       = "istio.io/rev"
)

// Namespace is the namespace of a Pod.
type Namespace struct {
	Name   string
	Labels map[string]string
	// Known says that Labels are the namespace's. Without it the Pod was chosen by the selectors of a webhook, which have
	// looked at them.
	Known bool
}

// Owner is the object that a Pod belongs to, as ISTIO_META_OWNER and ISTIO_META_WORKLOAD_NAME say it.
type Owner struct{ APIVersion, Kind, Name string }

// Request says where a Pod is to run.
type Request struct {
	Namespace Namespace
	// Owner is set when the Pod comes out of a workload's template; otherwise the Pod's owner references are read.
	Owner Owner
	// Cluster and Network take the place of those in the values: a webhook may serve other clusters.
	Cluster, Network string
	// Proxies are the objects of kind ProxyConfig of the mesh.
	Proxies []*mesh.ProxyConfig
}

// Result is what became of a Pod.
type Result struct {
	Decision Decision
	Pod      *corev1.Pod // nil unless Decision.Inject
}

// Inject returns the Pod with the proxy, or why it gets none. The error names the annotation and the value that it
// cannot be done with. pod is not changed.
func (c *Config) Inject(pod *corev1.Pod, r Request) (Result, error) {
	d, err := c.Decide(pod, r.Namespace)
	if err != nil || !d.Inject {
		return Result{Decision: d}, err
	}
	b, err := c.newBuild(pod, r)
	if err != nil {
		return Result{Decision: d}, err
	}
	out, err := b.run()
	if err != nil {
		return Result{Decision: d}, err
	}
	return Result{Decision: d, Pod: out}, nil
}

// build is one injection under way.
type build struct {
	c     *Config
	r     Request
	in    *corev1.Pod // as it came
	pod   *corev1.Pod // what it becomes
	set   settings
	owner Owner
	// own are the containers that the user declared under our names, to be laid over ours.
	own overrides
	// native: the proxy is an init container that keeps running.
	native bool
	// template is sidecar or gateway.
	template string
	custom   []string
}

// overrides is the content of OverridesAnnotation.
type overrides struct {
	Containers     []corev1.Container `json:"containers,omitempty"`
	InitContainers []corev1.Container `json:"initContainers,omitempty"`
}

func (c *Config) newBuild(pod *corev1.Pod, r Request) (*build, error) {
	b := &build{c: c, r: r, in: pod, pod: pod.DeepCopy(), owner: r.Owner}
	if b.owner.Name == "" {
		b.owner = ownerOf(pod)
	}
	var err error
	if b.set, err = c.settings(pod, r); err != nil {
		return nil, err
	}
	if b.template, b.custom, err = c.templates(pod.Annotations[templatesAnnotation]); err != nil {
		return nil, err
	}
	b.native = b.template == templateSidecar && (b.set.native == nil && c.Values.Pilot.nativeSidecars() || b.set.native != nil && *b.set.native)
	b.takeOwn()
	return b, nil
}

// takeOwn removes the user's containers of our names from the Pod, to lay them over ours.
func (b *build) takeOwn() {
	ours := func(c corev1.Container) bool {
		return c.Name == ProxyContainer || c.Name == InitContainer || c.Name == ValidationContainer
	}
	if b.set.overrides != nil {
		b.own = *b.set.overrides
	}
	spec := &b.pod.Spec
	for _, c := range spec.Containers {
		if ours(c) {
			b.own.Containers = append(b.own.Containers, c)
		}
	}
	for _, c := range spec.InitContainers {
		if ours(c) {
			b.own.InitContainers = append(b.own.InitContainers, c)
		}
	}
	spec.Containers = slices.DeleteFunc(spec.Containers, ours)
	spec.InitContainers = slices.DeleteFunc(spec.InitContainers, ours)
}

func (b *build) run() (*corev1.Pod, error) {
	template := b.sidecar()
	if b.template == templateGateway {
		template = b.gateway()
	}
	if err := b.overlay(template); err != nil {
		return nil, err
	}
	for _, name := range b.custom {
		if err := b.overlayCustom(name); err != nil {
			return nil, err
		}
	}
	if err := b.overlayOwn(); err != nil {
		return nil, err
	}
	b.metadata()
	if err := b.rewriteProbes(); err != nil {
		return nil, err
	}
	b.mergeMetrics()
	b.order()
	return b.pod, b.status()
}

// metadata sets labels and annotations; those that are there stay.
func (b *build) metadata() {
	m := &b.pod.ObjectMeta
	labels := maps.Clone(m.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	def := func(key, value string) {
		if _, ok := labels[key]; !ok && value != "" {
			labels[key] = value
		}
	}
	def(tlsModeLabel, "istio")
	def(canonicalName, first(labels["app.kubernetes.io/name"], labels["app"], cutName(b.owner.Name)))
	def(canonicalRevision, first(labels["app.kubernetes.io/version"], labels["version"], "latest"))
	def(networkLabel, b.network())
	if rev := b.c.revision(); rev != defaultRevision {
		def(revisionLabel, rev)
	}
	m.Labels = labels
	if m.Annotations == nil {
		m.Annotations = map[string]string{}
	}
	for k, v := range b.c.Values.Webhook.InjectedAnnotations {
		if _, ok := m.Annotations[k]; !ok {
			m.Annotations[k] = v
		}
	}
	if b.c.cni() {
		b.tellPlugin()
	}
	app := b.appContainers()
	if len(app) > 0 && m.Annotations["kubectl.kubernetes.io/default-container"] == "" {
		m.Annotations["kubectl.kubernetes.io/default-container"] = app[0]
	}
	if len(app) > 0 && m.Annotations["kubectl.kubernetes.io/default-logs-container"] == "" {
		m.Annotations["kubectl.kubernetes.io/default-logs-container"] = app[0]
	}
}

// tellPlugin writes what the installation's values say of capture into annotations, which the CNI plugin reads.
func (b *build) tellPlugin() {
	for _, x := range []struct{ key, value, usual string }{
		{"includeOutboundIPRanges", b.set.includeIPs, "*"}, {"excludeOutboundIPRanges", b.set.excludeIPs, ""},
		{"includeInboundPorts", b.set.includeIn, "*"}, {"excludeInboundPorts", b.set.excludeIn, ""},
		{"includeOutboundPorts", b.set.includeOut, ""}, {"excludeOutboundPorts", b.set.excludeOut, ""},
	} {
		if _, ok := b.pod.Annotations[traffic+x.key]; !ok && x.value != x.usual {
			b.pod.Annotations[traffic+x.key] = x.value
		}
	}
}

// cutName keeps a name within what a label value may be.
func cutName(name string) string { return strings.TrimRight(name[:min(len(name), 63)], "-.") }

// order puts istio-init or istio-validation first, then the proxy where it must run first.
func (b *build) order() {
	rank := func(c corev1.Container) int {
		switch c.Name {
		case ValidationContainer, InitContainer:
			return 0
		case ProxyContainer:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(b.pod.Spec.InitContainers, func(x, y corev1.Container) int { return rank(x) - rank(y) })
	if b.native || !b.set.hold {
		// After the application's containers, so that "the first container" stays the application.
		slices.SortStableFunc(b.pod.Spec.Containers, func(x, y corev1.Container) int { return rank(y)/2 - rank(x)/2 })
		return
	}
	// The kubelet starts containers in order and waits for the postStart hook of each.
	slices.SortStableFunc(b.pod.Spec.Containers, func(x, y corev1.Container) int { return rank(x) - rank(y) })
}

// injected is the content of StatusAnnotation.
type injected struct {
	InitContainers   []string `json:"initContainers"`
	Containers       []string `json:"containers"`
	Volumes          []string `json:"volumes"`
	ImagePullSecrets []string `json:"imagePullSecrets"`
	Revision         string   `json:"revision"`
}

func (b *build) status() error {
	s := injected{Revision: b.c.revision()}
	before := map[string]bool{}
	for _, c := range append(slices.Clone(b.in.Spec.Containers), b.in.Spec.InitContainers...) {
		before["c/"+c.Name] = c.Name != ProxyContainer && c.Name != InitContainer && c.Name != ValidationContainer
	}
	for _, v := range b.in.Spec.Volumes {
		before["v/"+v.Name] = true
	}
	for _, p := range b.in.Spec.ImagePullSecrets {
		before["p/"+p.Name] = true
	}
	add := func(to *[]string, prefix, name string) {
		if !before[prefix+name] {
			*to = append(*to, name)
		}
	}
	for _, c := range b.pod.Spec.InitContainers {
		add(&s.InitContainers, "c/", c.Name)
	}
	for _, c := range b.pod.Spec.Containers {
		add(&s.Containers, "c/", c.Name)
	}
	for _, v := range b.pod.Spec.Volumes {
		add(&s.Volumes, "v/", v.Name)
	}
	for _, p := range b.pod.Spec.ImagePullSecrets {
		add(&s.ImagePullSecrets, "p/", p.Name)
	}
	text, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("write %s: %w", StatusAnnotation, err)
	}
	b.pod.Annotations[StatusAnnotation] = string(text)
	return nil
}

func (b *build) appContainers() []string {
	var out []string
	for _, c := range b.in.Spec.Containers {
		if c.Name != ProxyContainer {
			out = append(out, c.Name)
		}
	}
	return out
}

func (b *build) network() string { return first(b.r.Network, b.c.Values.Global.Network) }

func (b *build) cluster() string {
	return first(b.r.Cluster, b.c.Values.Global.MultiCluster.ClusterName, "Kubernetes")
}

func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
