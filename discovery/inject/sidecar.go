package inject

import (
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Ports that the proxy's containers have for themselves.
const (
	healthPort  = 15021
	metricsPort = 15090
)

// proxyUser is whom the proxy runs as: capture lets through what this user sends.
const proxyUser = 1337

// validationUser runs istio-validation: not the proxy's user, so that its own connections are captured.
const validationUser = 65534

// TokenAudience is whom the projected service-account token is for.
const TokenAudience = "istio-ca"

func ptr[T any](v T) *T { return &v }

func (b *build) image(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	g := &b.c.Values.Global
	if !strings.Contains(name, ":") {
		name += ":" + g.Tag
	}
	if g.Hub == "" {
		return name
	}
	return strings.TrimSuffix(g.Hub, "/") + "/" + name
}

// sidecar returns what is laid over a workload's Pod.
func (b *build) sidecar() *corev1.Pod {
	out := &corev1.Pod{}
	proxy := b.proxy("sidecar")
	if b.native {
		proxy.RestartPolicy = ptr(corev1.ContainerRestartPolicyAlways)
	}
	if init := b.capture(); init != nil {
		out.Spec.InitContainers = append(out.Spec.InitContainers, *init)
	}
	if b.native {
		out.Spec.InitContainers = append(out.Spec.InitContainers, proxy)
	} else {
		out.Spec.Containers = append(out.Spec.Containers, proxy)
	}
	b.podSpec(out)
	return out
}

// gateway returns what is laid over the Pod of a gateway, whose image is "auto": the proxy as the Pod's application.
func (b *build) gateway() *corev1.Pod {
	out := &corev1.Pod{}
	proxy := b.proxy("router")
	out.Spec.Containers = []corev1.Container{proxy}
	b.podSpec(out)
	return out
}

func (b *build) podSpec(out *corev1.Pod) {
	out.Spec.Volumes = b.volumes()
	for _, s := range b.c.Values.Global.ImagePullSecrets {
		out.Spec.ImagePullSecrets = append(out.Spec.ImagePullSecrets, corev1.LocalObjectReference{Name: s})
	}
	if searches := b.c.Values.Global.PodDNSSearchNamespaces; len(searches) > 0 && b.template == templateSidecar {
		out.Spec.DNSConfig = &corev1.PodDNSConfig{}
		if own := b.in.Spec.DNSConfig; own != nil {
			out.Spec.DNSConfig.Searches = slices.Clone(own.Searches)
		}
		for _, s := range searches {
			out.Spec.DNSConfig.Searches = append(out.Spec.DNSConfig.Searches, placeholder.ReplaceAllString(s, b.namespace()))
		}
	}
	sc := b.in.Spec.SecurityContext
	if b.c.Values.Global.LegacyFSGroup && (sc == nil || sc.FSGroup == nil) {
		out.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: ptr[int64](proxyUser)}
	}
}

// placeholder is how Istio's charts write the namespace of the Pod in a search domain.
var placeholder = regexp.MustCompile(`\{\{[^{}]*\}\}`)

func (b *build) namespace() string { return first(b.r.Namespace.Name, b.in.Namespace, "default") }

func (b *build) proxy(role string) corev1.Container {
	g, s := &b.c.Values.Global, &b.set
	c := corev1.Container{
		Name: ProxyContainer, Image: b.image(s.image), ImagePullPolicy: corev1.PullPolicy(g.ImagePullPolicy),
		Args: []string{"proxy", role, "--domain", "$(POD_NAMESPACE).svc." + g.Proxy.ClusterDomain,
			"--proxyLogLevel=" + s.logLevel},
		Ports:           []corev1.ContainerPort{{Name: "http-envoy-prom", ContainerPort: metricsPort, Protocol: corev1.ProtocolTCP}},
		Resources:       s.resources,
		Env:             b.env(),
		SecurityContext: b.security(),
		VolumeMounts:    b.mounts(),
		Lifecycle:       g.Proxy.Lifecycle,
	}
	if s.componentLevel != "" {
		c.Args = append(c.Args, "--proxyComponentLogLevel="+s.componentLevel)
	}
	c.Args = append(c.Args, "--log_output_level="+s.agentLog)
	if s.statusPort != 0 || b.template == templateGateway {
		b.probes(&c)
	}
	if s.hold && !b.native && b.template == templateSidecar && c.Lifecycle == nil {
		c.Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"isthmus-agent", "wait"}}}}
	}
	return c
}

func (b *build) probes(c *corev1.Container) {
	s := &b.set
	ready := func() corev1.ProbeHandler {
		return corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz/ready", Port: intstr.FromInt32(healthPort)}}
	}
	c.ReadinessProbe = &corev1.Probe{
		ProbeHandler: ready(), InitialDelaySeconds: s.initialDelay, PeriodSeconds: s.period, TimeoutSeconds: 3, FailureThreshold: s.failures,
	}
	startup := &b.c.Values.Global.Proxy.StartupProbe
	if b.native || startup.Enabled == nil || *startup.Enabled { // a native sidecar without one is "started" before it is ready
		c.StartupProbe = &corev1.Probe{ProbeHandler: ready(), PeriodSeconds: 1, TimeoutSeconds: 3, FailureThreshold: startup.FailureThreshold}
	}
}

func (b *build) security() *corev1.SecurityContext {
	privileged := b.c.Values.Global.Proxy.Privileged
	sc := &corev1.SecurityContext{
		AllowPrivilegeEscalation: ptr(privileged), Privileged: ptr(privileged), ReadOnlyRootFilesystem: ptr(true),
		RunAsNonRoot: ptr(true), RunAsUser: ptr[int64](proxyUser), RunAsGroup: ptr[int64](proxyUser),
		Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}
	if b.set.mode == "TPROXY" && b.template == templateSidecar { // transparent sockets need it; capture goes by the group then
		sc.Capabilities.Add = []corev1.Capability{"NET_ADMIN"}
		sc.RunAsNonRoot, sc.RunAsUser = ptr(false), ptr[int64](0)
	}
	return sc
}

// env is the contract with the agent: docs/guide/injection.md lists it.
func (b *build) env() []corev1.EnvVar {
	g, s := &b.c.Values.Global, &b.set
	var out []corev1.EnvVar
	set := func(name, value string) { out = append(out, corev1.EnvVar{Name: name, Value: value}) }
	field := func(name, path string) {
		out = append(out, corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}})
	}
	set("CA_ADDR", g.CAAddress)
	field("POD_NAME", "metadata.name")
	field("POD_NAMESPACE", "metadata.namespace")
	field("INSTANCE_IP", "status.podIP")
	field("SERVICE_ACCOUNT", "spec.serviceAccountName")
	field("HOST_IP", "status.hostIP")
	for _, l := range []struct {
		name string
		key  corev1.ResourceName
	}{{"ISTIO_CPU_LIMIT", corev1.ResourceCPU}, {"GOMAXPROCS", corev1.ResourceCPU}, {"GOMEMLIMIT", corev1.ResourceMemory}} {
		if _, ok := s.resources.Limits[l.key]; ok {
			out = append(out, corev1.EnvVar{Name: l.name, ValueFrom: &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{
				ContainerName: ProxyContainer, Resource: "limits." + string(l.key), Divisor: resource.Quantity{}}}})
		}
	}
	set("PROXY_CONFIG", s.proxyText)
	if b.template == templateSidecar {
		set("ISTIO_META_POD_PORTS", b.podPorts())
		set("ISTIO_META_APP_CONTAINERS", strings.Join(b.appContainers(), ","))
		set("ISTIO_META_INTERCEPTION_MODE", s.mode)
	}
	set("ISTIO_META_CLUSTER_ID", b.cluster())
	field("ISTIO_META_NODE_NAME", "spec.nodeName")
	if n := b.network(); n != "" {
		set("ISTIO_META_NETWORK", n)
	}
	if b.owner.Name != "" {
		set("ISTIO_META_WORKLOAD_NAME", b.owner.Name)
		set("ISTIO_META_OWNER", b.owner.meta(b.namespace()))
	}
	set("ISTIO_META_MESH_ID", first(g.MeshID, b.c.Mesh.GetTrustDomain(), "cluster.local"))
	set("TRUST_DOMAIN", first(b.c.Mesh.GetTrustDomain(), "cluster.local"))
	if s.bootstrapOverride != "" {
		set("ISTIO_BOOTSTRAP_OVERRIDE", "/etc/istio/custom-bootstrap/custom_bootstrap.json")
	}
	if s.applicationPorts != "" {
		set("ISTHMUS_READINESS_APPLICATION_PORTS", s.applicationPorts)
	}
	if s.statusPort != 15020 {
		set("ISTIO_STATUS_PORT", strconv.Itoa(s.statusPort))
	}
	out = append(out, s.env...)
	for _, k := range slices.Sorted(maps.Keys(s.proxy.GetProxyMetadata())) {
		set(k, s.proxy.GetProxyMetadata()[k])
	}
	return out
}

// podPorts is the JSON of the application's container ports.
func (b *build) podPorts() string {
	ports := []corev1.ContainerPort{}
	for _, c := range b.in.Spec.Containers {
		if c.Name != ProxyContainer {
			for _, p := range c.Ports {
				p.Protocol = corev1.Protocol(first(string(p.Protocol), "TCP"))
				ports = append(ports, p)
			}
		}
	}
	text, err := json.Marshal(ports)
	if err != nil {
		return "[]" // strings and numbers alone: it cannot fail
	}
	return string(text)
}

func (b *build) mounts() []corev1.VolumeMount {
	out := []corev1.VolumeMount{
		{Name: "istiod-ca-cert", MountPath: "/var/run/secrets/istio"},
		{Name: "istio-data", MountPath: "/var/lib/istio/data"},
		{Name: "istio-envoy", MountPath: "/etc/istio/proxy"},
		{Name: "istio-token", MountPath: "/var/run/secrets/tokens"},
		{Name: "istio-podinfo", MountPath: "/etc/istio/pod"},
	}
	if b.set.bootstrapOverride != "" {
		out = append(out, corev1.VolumeMount{Name: "custom-bootstrap-volume", MountPath: "/etc/istio/custom-bootstrap"})
	}
	return append(out, b.set.mounts...)
}

func (b *build) volumes() []corev1.Volume {
	item := func(name string) corev1.DownwardAPIVolumeFile {
		return corev1.DownwardAPIVolumeFile{Path: name, FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata." + name}}
	}
	out := []corev1.Volume{
		{Name: "istio-envoy", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}},
		{Name: "istio-data", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
		{Name: "istio-podinfo", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{
			Items: []corev1.DownwardAPIVolumeFile{item("labels"), item("annotations")},
		}}},
		{Name: "istio-token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: TokenAudience, ExpirationSeconds: ptr[int64](43200), Path: "istio-token"}},
		}}}},
		{Name: "istiod-ca-cert", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: "istio-ca-root-cert"},
		}}},
	}
	if name := b.set.bootstrapOverride; name != "" {
		out = append(out, corev1.Volume{Name: "custom-bootstrap-volume", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: name},
		}}})
	}
	return append(out, b.set.volumes...)
}

// capture is the container that sets up, or under CNI checks, the redirection of traffic; nil when there is none.
func (b *build) capture() *corev1.Container {
	g, s := &b.c.Values.Global, &b.set
	if s.mode == "NONE" {
		return nil
	}
	excluded := []string{strconv.Itoa(metricsPort), strconv.Itoa(healthPort)}
	if s.statusPort != 0 {
		excluded = append(excluded, strconv.Itoa(s.statusPort))
	}
	if s.excludeIn != "" {
		excluded = append(excluded, s.excludeIn)
	}
	args := []string{"init", "-p", "15001", "-z", "15006", "-u", strconv.Itoa(proxyUser), "-m", s.mode,
		"-i", s.includeIPs, "-x", s.excludeIPs, "-b", s.includeIn, "-d", strings.Join(excluded, ",")}
	for _, o := range []struct{ flag, value string }{{"-q", s.includeOut}, {"-o", s.excludeOut}, {"-k", s.kubevirt}, {"-c", s.excludeInterfaces}} {
		if o.value != "" {
			args = append(args, o.flag, o.value)
		}
	}
	args = append(args, "--log_output_level="+s.agentLog)
	c := &corev1.Container{
		Name: InitContainer, Image: b.image(g.ProxyInit.Image), ImagePullPolicy: corev1.PullPolicy(g.ImagePullPolicy), Args: args, Resources: g.ProxyInit.Resources,
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: ptr(g.Proxy.Privileged), Privileged: ptr(g.Proxy.Privileged), ReadOnlyRootFilesystem: ptr(false),
			RunAsNonRoot: ptr(false), RunAsUser: ptr[int64](0), RunAsGroup: ptr[int64](0),
			Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_ADMIN", "NET_RAW"}, Drop: []corev1.Capability{"ALL"}},
		},
	}
	if b.c.cni() {
		c.Name = ValidationContainer
		c.Args = append(c.Args, "--run-validation", "--skip-rule-apply")
		c.SecurityContext = &corev1.SecurityContext{
			AllowPrivilegeEscalation: ptr(false), Privileged: ptr(false), ReadOnlyRootFilesystem: ptr(true),
			RunAsNonRoot: ptr(true), RunAsUser: ptr[int64](validationUser), RunAsGroup: ptr[int64](validationUser),
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		}
	}
	for _, k := range slices.Sorted(maps.Keys(s.proxy.GetProxyMetadata())) {
		c.Env = append(c.Env, corev1.EnvVar{Name: k, Value: s.proxy.GetProxyMetadata()[k]})
	}
	return c
}
