package inject

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"text/template"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"sigs.k8s.io/yaml"
)

// imageAuto is the image of a container that the user declared for the injector to fill in.
const imageAuto = "auto"

// maxTemplate is the most bytes that a custom template may write.
const maxTemplate = 256 << 10

// overlay lays a Pod over the one that is being built, as kubectl apply would: lists merge by their keys.
func (b *build) overlay(over *corev1.Pod) error {
	data, err := sparse(over)
	if err != nil {
		return fmt.Errorf("write a template: %w", err)
	}
	return b.overlayJSON(data)
}

func (b *build) overlayJSON(over []byte) error {
	base, err := json.Marshal(b.pod)
	if err != nil {
		return fmt.Errorf("write the pod: %w", err)
	}
	merged, err := strategicpatch.StrategicMergePatch(base, over, corev1.Pod{})
	if err != nil {
		return fmt.Errorf("merge into the pod: %w", err)
	}
	out := &corev1.Pod{}
	if err := json.Unmarshal(merged, out); err != nil {
		return fmt.Errorf("read the merged pod: %w", err)
	}
	b.pod = out
	return nil
}

// overlayOwn lays the user's containers of our names over ours and writes them down, so that they are not lost.
func (b *build) overlayOwn() error {
	if len(b.own.Containers)+len(b.own.InitContainers) == 0 {
		return nil
	}
	text, err := json.Marshal(b.own)
	if err != nil {
		return fmt.Errorf("write %s: %w", OverridesAnnotation, err)
	}
	over := &corev1.Pod{}
	for _, c := range append(append([]corev1.Container{}, b.own.Containers...), b.own.InitContainers...) {
		if c.Image == imageAuto {
			c.Image = ""
		}
		switch {
		case named(b.pod.Spec.InitContainers, c.Name):
			over.Spec.InitContainers = append(over.Spec.InitContainers, c)
		case named(b.pod.Spec.Containers, c.Name):
			over.Spec.Containers = append(over.Spec.Containers, c)
		}
	}
	data, err := sparse(over)
	if err != nil {
		return err
	}
	if err := b.overlayJSON(data); err != nil {
		return err
	}
	if b.pod.Annotations == nil {
		b.pod.Annotations = map[string]string{}
	}
	b.pod.Annotations[OverridesAnnotation] = string(text)
	return nil
}

func named(cs []corev1.Container, name string) bool {
	for _, c := range cs {
		if c.Name == name {
			return true
		}
	}
	return false
}

// sparse writes a Pod without what is null or an empty image: laid over another they would take something away.
func sparse(pod *corev1.Pod) ([]byte, error) {
	data, err := json.Marshal(pod)
	if err != nil {
		return nil, err
	}
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		return nil, err
	}
	return json.Marshal(prune(v))
}

func prune(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			if x = prune(x); x == nil || x == "" && k == "image" {
				delete(v, k)
			} else {
				v[k] = x
			}
		}
	case []any:
		for i := range v {
			v[i] = prune(v[i])
		}
	}
	return v
}

// templateFuncs are what a custom template may call beside the functions of text/template.
var templateFuncs = template.FuncMap{
	"annotation": func(m metav1.ObjectMeta, key, otherwise string) string {
		if v, ok := m.Annotations[key]; ok {
			return v
		}
		return otherwise
	},
	"quote":  func(v any) (string, error) { return toJSON(fmt.Sprint(v)) },
	"toJSON": toJSON,
}

func toJSON(v any) (string, error) {
	data, err := json.Marshal(v)
	return string(data), err
}

// templateData is what a custom template sees; the names are Istio's.
type templateData struct {
	TypeMeta       metav1.TypeMeta
	DeploymentMeta metav1.ObjectMeta
	ObjectMeta     metav1.ObjectMeta
	Spec           corev1.PodSpec
	Revision       string
	Values         map[string]any
	ProxyConfig    any
}

var errLong = errors.New("it writes too much")

// bounded is a buffer with an end.
type bounded struct{ bytes.Buffer }

// Write refuses what does not fit.
func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxTemplate {
		return 0, errLong
	}
	return b.Buffer.Write(p)
}

// overlayCustom runs a template of the ConfigMap, whose result is a part of a Pod, and lays it over.
func (b *build) overlayCustom(name string) error {
	data := templateData{
		TypeMeta:       metav1.TypeMeta{APIVersion: b.owner.APIVersion, Kind: b.owner.Kind},
		DeploymentMeta: metav1.ObjectMeta{Name: b.owner.Name, Namespace: b.namespace()},
		ObjectMeta:     *b.in.ObjectMeta.DeepCopy(), Spec: *b.in.Spec.DeepCopy(), Revision: b.c.revision(), Values: b.c.raw, ProxyConfig: b.set.proxy,
	}
	var out bounded
	if err := b.c.custom[name].Execute(&out, data); err != nil {
		return fmt.Errorf("template %s of the injector: %w", name, err)
	}
	over := &corev1.Pod{}
	if err := yaml.Unmarshal(out.Bytes(), over); err != nil {
		return fmt.Errorf("template %s of the injector does not write a pod: %w", name, err)
	}
	text, err := sparse(over)
	if err != nil || string(text) == "null" {
		return err
	}
	if err := b.overlayJSON(text); err != nil {
		return fmt.Errorf("template %s of the injector: %w", name, err)
	}
	return nil
}
