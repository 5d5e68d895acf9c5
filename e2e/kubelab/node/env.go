package node

import (
	"context"
	"fmt"
	"math/big"
	"net/netip"
	"sort"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// environ is a container's environment, in order, each name once.
type environ struct {
	names  []string
	values map[string]string
}

func (e *environ) set(name, value string) {
	if _, ok := e.values[name]; !ok {
		e.names = append(e.names, name)
	}
	e.values[name] = value
}

func (e *environ) list() []string {
	out := make([]string, 0, len(e.names))
	for _, n := range e.names {
		out = append(out, n+"="+e.values[n])
	}
	return out
}

// environment makes a container's environment: what every container has, the image's, envFrom, env.
func (c *container) environment(ctx context.Context, spec *corev1.Container, prog Program) (*environ, error) {
	e := &environ{values: map[string]string{}}
	e.set("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	e.set("HOME", "/root")
	e.set("LANG", "C.UTF-8")
	e.set("HOSTNAME", c.w.hostname())
	svc, err := c.w.n.factory.Core().V1().Services().Lister().Services("default").Get("kubernetes")
	if apierrors.IsNotFound(err) {
		svc, err = c.w.n.client.CoreV1().Services("default").Get(ctx, "kubernetes", metav1.GetOptions{ResourceVersion: "0"})
	}
	if err == nil {
		e.set("KUBERNETES_SERVICE_HOST", svc.Spec.ClusterIP)
		e.set("KUBERNETES_SERVICE_PORT", strconv.Itoa(int(svc.Spec.Ports[0].Port)))
		e.set("KUBERNETES_SERVICE_PORT_HTTPS", strconv.Itoa(int(svc.Spec.Ports[0].Port)))
	} else if !apierrors.IsNotFound(err) {
		return nil, err
	}
	for _, list := range [][]string{c.w.n.cfg.Env, prog.Env} {
		for _, nv := range list {
			name, value, _ := strings.Cut(nv, "=")
			e.set(name, value)
		}
	}
	if err := c.envFrom(ctx, e, spec.EnvFrom); err != nil {
		return nil, err
	}
	for _, v := range spec.Env {
		if v.ValueFrom == nil {
			e.set(v.Name, expand(v.Value, e.values))
			continue
		}
		value, ok, err := c.valueFrom(ctx, spec, v.ValueFrom)
		if err != nil {
			return nil, fmt.Errorf("env %s: %w", v.Name, err)
		}
		if ok {
			e.set(v.Name, value)
		}
	}
	return e, nil
}

func (c *container) envFrom(ctx context.Context, e *environ, sources []corev1.EnvFromSource) error {
	for _, s := range sources {
		values := map[string]string{}
		var err error
		switch {
		case s.ConfigMapRef != nil:
			var data map[string][]byte
			data, err = c.w.configMap(ctx, s.ConfigMapRef.Name, isTrue(s.ConfigMapRef.Optional))
			toStrings(values, data)
		case s.SecretRef != nil:
			var data map[string][]byte
			data, err = c.w.secret(ctx, s.SecretRef.Name, isTrue(s.SecretRef.Optional))
			toStrings(values, data)
		}
		if err != nil {
			return err
		}
		names := make([]string, 0, len(values))
		for n := range values {
			names = append(names, n)
		}
		sort.Strings(names)
		for _, n := range names {
			e.set(s.Prefix+n, values[n])
		}
	}
	return nil
}

func toStrings(to map[string]string, from map[string][]byte) {
	for k, v := range from {
		to[k] = string(v)
	}
}

func isTrue(b *bool) bool { return b != nil && *b }

// valueFrom returns a value that env takes from elsewhere; ok is false when it is optional and missing.
func (c *container) valueFrom(ctx context.Context, spec *corev1.Container, s *corev1.EnvVarSource) (value string, ok bool, err error) {
	switch {
	case s.FieldRef != nil:
		value, err = c.w.field(s.FieldRef.FieldPath)
		return value, err == nil, err
	case s.ResourceFieldRef != nil:
		if name := s.ResourceFieldRef.ContainerName; name != "" {
			spec = c.w.containerSpec(name)
		}
		value, err = resourceField(spec, s.ResourceFieldRef)
		return value, err == nil, err
	case s.ConfigMapKeyRef != nil:
		r := s.ConfigMapKeyRef
		data, err := c.w.configMap(ctx, r.Name, isTrue(r.Optional))
		return pick(data, r.Key, "ConfigMap "+r.Name, isTrue(r.Optional), err)
	case s.SecretKeyRef != nil:
		r := s.SecretKeyRef
		data, err := c.w.secret(ctx, r.Name, isTrue(r.Optional))
		return pick(data, r.Key, "Secret "+r.Name, isTrue(r.Optional), err)
	}
	return "", false, fmt.Errorf("valueFrom of a kind the lab does not know")
}

func pick(data map[string][]byte, key, what string, optional bool, err error) (string, bool, error) {
	if err != nil {
		return "", false, err
	}
	value, ok := data[key]
	if !ok && !optional {
		return "", false, fmt.Errorf("couldn't find key %s in %s", key, what)
	}
	return string(value), ok, nil
}

func (w *worker) containerSpec(name string) *corev1.Container {
	pod := w.latest()
	for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// expand replaces $(NAME) by the value of NAME, leaves unknown names as they are, and $$ as $.
func expand(s string, values map[string]string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '$' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		switch s[i+1] {
		case '$':
			b.WriteByte('$')
			i++
		case '(':
			end := strings.IndexByte(s[i:], ')')
			if end < 0 {
				b.WriteByte('$')
				continue
			}
			ref := s[i : i+end+1]
			if v, ok := values[ref[2:len(ref)-1]]; ok {
				b.WriteString(v)
			} else {
				b.WriteString(ref)
			}
			i += end
		default:
			b.WriteByte('$')
		}
	}
	return b.String()
}

// field is the value of a field of the Pod that the downward API offers.
func (w *worker) field(path string) (string, error) {
	pod := w.latest()
	if kind, key, ok := strings.Cut(path, "["); ok {
		key = strings.Trim(strings.TrimSuffix(key, "]"), `'"`)
		switch kind {
		case "metadata.labels":
			return pod.Labels[key], nil
		case "metadata.annotations":
			return pod.Annotations[key], nil
		}
	}
	w.mu.Lock()
	ips := w.ips
	w.mu.Unlock()
	switch path {
	case "metadata.name":
		return pod.Name, nil
	case "metadata.namespace":
		return pod.Namespace, nil
	case "metadata.uid":
		return string(pod.UID), nil
	case "metadata.labels":
		return quoted(pod.Labels), nil
	case "metadata.annotations":
		return quoted(pod.Annotations), nil
	case "spec.nodeName":
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return w.node.Addresses[0].String(), nil
	case "status.hostIPs":
		return joined(w.node.Addresses), nil
	case "status.podIP":
		if len(ips) == 0 {
			return "", nil
		}
		return ips[0].String(), nil
	case "status.podIPs":
		return joined(ips), nil
	}
	return "", fmt.Errorf("unsupported fieldPath %q", path)
}

func joined(addrs []netip.Addr) string {
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return strings.Join(out, ",")
}

// quoted is how the downward API writes labels and annotations.
func quoted(m map[string]string) string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	var b strings.Builder
	for i, k := range keys {
		if i > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "%s=%q", k, m[k])
	}
	return b.String()
}

// resourceField is a limit or request of a container in units of the divisor, rounded up.
func resourceField(spec *corev1.Container, r *corev1.ResourceFieldSelector) (string, error) {
	if spec == nil {
		return "", fmt.Errorf("no container %q", r.ContainerName)
	}
	which, name, _ := strings.Cut(r.Resource, ".")
	list := spec.Resources.Limits
	if which == "requests" {
		list = spec.Resources.Requests
	}
	q, ok := list[corev1.ResourceName(name)]
	if !ok { // what the node has
		switch corev1.ResourceName(name) {
		case corev1.ResourceCPU:
			q = resource.MustParse("16")
		case corev1.ResourceMemory:
			q = resource.MustParse("64Gi")
		default:
			return "0", nil
		}
		if which == "requests" {
			return "0", nil
		}
	}
	divisor := r.Divisor
	if divisor.IsZero() {
		divisor = resource.MustParse("1")
	}
	value, unit := milli(q), milli(divisor)
	out := new(big.Int).Add(value, new(big.Int).Sub(unit, big.NewInt(1)))
	return out.Div(out, unit).String(), nil
}

func milli(q resource.Quantity) *big.Int {
	if q.CmpInt64(1<<40) < 0 {
		return big.NewInt(q.MilliValue())
	}
	return new(big.Int).Mul(big.NewInt(q.Value()), big.NewInt(1000))
}

// configMap returns the data of a ConfigMap; an optional one that is missing is empty.
func (w *worker) configMap(ctx context.Context, name string, optional bool) (map[string][]byte, error) {
	cm, err := w.n.factory.Core().V1().ConfigMaps().Lister().ConfigMaps(w.namespace).Get(name)
	if apierrors.IsNotFound(err) { // perhaps made a moment ago
		cm, err = w.n.client.CoreV1().ConfigMaps(w.namespace).Get(ctx, name, metav1.GetOptions{})
	}
	if err != nil && optional && (apierrors.IsNotFound(err) || apierrors.ReasonForError(err) == metav1.StatusReasonUnknown) {
		return nil, nil // there is none, as far as is known
	}
	if err != nil {
		return nil, err
	}
	out := make(map[string][]byte, len(cm.Data)+len(cm.BinaryData))
	for k, v := range cm.Data {
		out[k] = []byte(v)
	}
	for k, v := range cm.BinaryData {
		out[k] = v
	}
	return out, nil
}

// secret returns the data of a Secret; an optional one that is missing is empty.
func (w *worker) secret(ctx context.Context, name string, optional bool) (map[string][]byte, error) {
	s, err := w.n.factory.Core().V1().Secrets().Lister().Secrets(w.namespace).Get(name)
	if apierrors.IsNotFound(err) {
		s, err = w.n.client.CoreV1().Secrets(w.namespace).Get(ctx, name, metav1.GetOptions{})
	}
	if err != nil && optional && (apierrors.IsNotFound(err) || apierrors.ReasonForError(err) == metav1.StatusReasonUnknown) {
		return nil, nil // there is none, as far as is known
	}
	if err != nil {
		return nil, err
	}
	return s.Data, nil
}
