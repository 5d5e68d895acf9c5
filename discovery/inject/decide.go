package inject

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// Labels that decide.
const (
	namespaceLabel    = "istio-injection"         // on a Namespace: enabled or disabled
	ownNamespaceLabel = "isthmus.io/injection"    // the same, ours
	injectKey         = "sidecar.istio.io/inject" // label of a Pod, and its deprecated annotation
	defaultRevision   = "default"
)

// never are the namespaces whose Pods are left alone whatever their labels say: the cluster's own parts run there, and
// must start before the mesh does.
var never = []string{"kube-system", "kube-public", "kube-node-lease", "local-path-storage"}

// Decision says whether a Pod gets a proxy, and why.
type Decision struct {
	Inject bool   `json:"inject"`
	Reason string `json:"reason"` // one CamelCase word
	Text   string `json:"text"`   // a sentence for people
}

// Decide applies the rules of Istio's documentation: what the Pod or the Namespace disables is off, what one of them
// enables is on, and otherwise the installation's default holds. The error names a label that says neither.
func (c *Config) Decide(pod *corev1.Pod, ns Namespace) (Decision, error) {
	no := func(reason, format string, args ...any) (Decision, error) {
		return Decision{false, reason, fmt.Sprintf(format, args...)}, nil
	}
	if slices.Contains(never, ns.Name) {
		return no("SystemNamespace", "namespace %s is the cluster's own and never injected", ns.Name)
	}
	if Injected(pod) {
		return no("AlreadyInjected", "the pod has the annotation %s and the container %s", StatusAnnotation, ProxyContainer)
	}
	if pod.Spec.HostNetwork {
		return no("HostNetwork", "the pod uses the network of its node (hostNetwork: true), whose traffic is not the pod's alone")
	}
	asked, where, err := podAsks(pod)
	if err != nil {
		return Decision{}, err
	}
	if asked == off {
		return no("DisabledByPod", "the pod's %s says so", where)
	}
	if ns.Known {
		if d := c.byNamespace(pod, ns, asked, where); d.Reason != "" {
			return d, nil
		}
	} else if asked == on {
		return Decision{true, "EnabledByPod", "the pod's " + where + " says so"}, nil
	}
	return c.bySelector(pod, ns)
}

// byNamespace returns a Decision without reason when neither Pod nor Namespace says anything.
func (c *Config) byNamespace(pod *corev1.Pod, ns Namespace, asked answer, where string) Decision {
	enabled, key := namespaceAsks(ns.Labels)
	if enabled == off {
		return Decision{false, "DisabledByNamespace", fmt.Sprintf("the label %s of namespace %s says so", key, ns.Name)}
	}
	mine := c.revision()
	rev, revSet := ns.Labels[revisionLabel]
	who := "namespace " + ns.Name
	if !revSet && enabled == unsaid {
		rev, revSet = pod.Labels[revisionLabel]
		who = "the pod"
	}
	// istio-injection wins over istio.io/rev, as Istio's selectors have it; it means the default revision.
	if enabled == on {
		rev, revSet, who = defaultRevision, true, fmt.Sprintf("namespace %s (label %s)", ns.Name, key)
	}
	switch {
	case revSet && rev != mine:
		return Decision{false, "OtherRevision", fmt.Sprintf("%s asks for revision %s, this is revision %s", who, rev, mine)}
	case enabled == on:
		return Decision{true, "EnabledByNamespace", fmt.Sprintf("namespace %s has the label %s", ns.Name, key)}
	case revSet:
		return Decision{true, "EnabledByRevision", fmt.Sprintf("%s has the label %s=%s", who, revisionLabel, rev)}
	case asked == on && mine == defaultRevision:
		return Decision{true, "EnabledByPod", "the pod's " + where + " says so"}
	case asked == on:
		return Decision{false, "OtherRevision", fmt.Sprintf("the pod's %s asks for the default revision, this is revision %s", where, mine)}
	}
	return Decision{}
}

// bySelector decides where nobody has said anything.
func (c *Config) bySelector(pod *corev1.Pod, ns Namespace) (Decision, error) {
	for _, x := range []struct {
		selectors []metav1.LabelSelector
		inject    bool
		name      string
	}{{c.Values.Webhook.NeverInjectSelector, false, "neverInjectSelector"}, {c.Values.Webhook.AlwaysInjectSelector, true, "alwaysInjectSelector"}} {
		for i := range x.selectors {
			s, err := metav1.LabelSelectorAsSelector(&x.selectors[i])
			if err != nil {
				return Decision{}, fmt.Errorf("%s[%d]: %w", x.name, i, err)
			}
			if !s.Empty() && s.Matches(labels.Set(pod.Labels)) {
				return Decision{x.inject, "BySelector", fmt.Sprintf("%s[%d] of the injector's configuration selects the pod", x.name, i)}, nil
			}
		}
	}
	switch {
	case ns.Known && !c.Values.Webhook.EnableNamespacesByDefault:
		return Decision{false, "NotEnabled", fmt.Sprintf("neither the pod nor namespace %s asks for it: label the namespace %s=enabled, or the pod %s: \"true\"", ns.Name, namespaceLabel, injectKey)}, nil
	case c.Policy == PolicyDisabled:
		return Decision{false, "PolicyDisabled", "the injector's policy is disabled, and the pod does not ask for a proxy"}, nil
	}
	if !ns.Known {
		return Decision{true, "ByDefault", "nothing on the pod says otherwise; the labels of its namespace are not looked at here"}, nil
	}
	return Decision{true, "ByDefault", "the installation injects where nothing says otherwise"}, nil
}

// Injected reports whether the Pod went through an injector before.
func Injected(pod *corev1.Pod) bool {
	named := func(c corev1.Container) bool { return c.Name == ProxyContainer }
	return pod.Annotations[StatusAnnotation] != "" &&
		(slices.ContainsFunc(pod.Spec.Containers, named) || slices.ContainsFunc(pod.Spec.InitContainers, named))
}

type answer int

const (
	unsaid answer = iota
	on
	off
)

func podAsks(pod *corev1.Pod) (answer, string, error) {
	kind, value, ok := "label", pod.Labels[injectKey], false
	if value, ok = pod.Labels[injectKey]; !ok {
		kind = "annotation"
		value, ok = pod.Annotations[injectKey]
	}
	if !ok {
		return unsaid, "", nil
	}
	where := fmt.Sprintf("%s %s=%s", kind, injectKey, value)
	switch strings.ToLower(value) {
	case "true", "y", "yes", "on":
		return on, where, nil
	case "false", "n", "no", "off":
		return off, where, nil
	case "":
		return unsaid, "", nil
	}
	return unsaid, "", fmt.Errorf("%s %s: %q is neither true nor false", kind, injectKey, value)
}

func namespaceAsks(l map[string]string) (answer, string) {
	out, by := unsaid, ""
	for _, key := range []string{namespaceLabel, ownNamespaceLabel} {
		switch l[key] {
		case "disabled":
			return off, key + "=disabled"
		case "enabled":
			if out == unsaid {
				out, by = on, key+"=enabled"
			}
		}
	}
	return out, by
}

// Speaks reports whether labels of a namespace say anything about injection.
func Speaks(labels map[string]string) bool {
	asked, _ := namespaceAsks(labels)
	return asked != unsaid || labels[revisionLabel] != ""
}
