package plugin

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/internal/capture"
)

// Names that injection gives.
const (
	proxyContainer   = "istio-proxy"
	initContainer    = "istio-init"
	annotationStatus = "sidecar.istio.io/status"
	inject           = "sidecar.istio.io/inject"
)

// Decide says what is captured in a Pod, or why nothing is: then skip is not empty. It is pure. An error is for a Pod
// that must not start: what it asks for cannot be done.
func Decide(pod *corev1.Pod, excluded []string) (c capture.Config, skip string, err error) {
	switch {
	case slices.Contains(excluded, pod.Namespace):
		return c, "its namespace is excluded", nil
	case pod.Labels[inject] == "false" || pod.Annotations[inject] == "false" && pod.Labels[inject] == "":
		return c, inject + " is false", nil
	case pod.Annotations[annotationStatus] == "":
		return c, "no sidecar was injected (annotation " + annotationStatus + ")", nil
	case container(pod.Spec.InitContainers, initContainer) != nil:
		return c, "its init container " + initContainer + " makes the rules", nil
	}
	proxy := container(pod.Spec.Containers, proxyContainer)
	if proxy == nil {
		proxy = container(pod.Spec.InitContainers, proxyContainer) // a native sidecar
	}
	if proxy == nil {
		return c, "it has no container " + proxyContainer, nil
	}
	if pod.Annotations[capture.AnnotationMode] == "NONE" || env(proxy, "ISTIO_META_INTERCEPTION_MODE") == "NONE" {
		return c, "its interception mode is NONE", nil
	}
	c.UIDs, c.GIDs = []uint32{capture.ProxyID}, []uint32{capture.ProxyID}
	if s := proxy.SecurityContext; s != nil {
		if s.RunAsUser != nil && *s.RunAsUser > 0 {
			c.UIDs = []uint32{uint32(*s.RunAsUser)}
		}
		if s.RunAsGroup != nil && *s.RunAsGroup > 0 {
			c.GIDs = []uint32{uint32(*s.RunAsGroup)}
		}
	}
	if m, err := capture.ParseMode(env(proxy, "ISTIO_META_INTERCEPTION_MODE")); err == nil {
		c.Mode = m
	}
	if strings.EqualFold(env(proxy, "ISTIO_META_DNS_CAPTURE"), "true") {
		c.DNSPort = capture.DNSPort
	}
	c, err = capture.FromAnnotations(c, pod.Annotations)
	return c, "", err
}

func container(cs []corev1.Container, name string) *corev1.Container {
	for i := range cs {
		if cs[i].Name == name {
			return &cs[i]
		}
	}
	return nil
}

// env returns a value that the container gives in words; the last of a name counts.
func env(c *corev1.Container, name string) (value string) {
	for _, e := range c.Env {
		if e.Name == name {
			value = e.Value
		}
	}
	return value
}
