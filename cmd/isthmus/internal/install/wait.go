package install

import (
	"context"
	"fmt"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// TimeoutError says what was not ready in time; all is installed.
type TimeoutError struct {
	After   time.Duration
	Reasons []string // one for each workload
}

func (e *TimeoutError) Error() string {
	return fmt.Sprintf("installed, but not ready after %s: %s", e.After, strings.Join(e.Reasons, "; "))
}

// Wait returns when every Deployment and DaemonSet of the manifest runs as it should, or a TimeoutError. Progress is
// called for each that has become ready.
func (c *Cluster) Wait(ctx context.Context, m *Manifest, timeout time.Duration, progress func(string)) error {
	deadline := time.Now().Add(timeout)
	for _, o := range m.workloads() {
		for {
			why, err := c.rollout(ctx, o)
			if err != nil {
				return err
			}
			if why == "" {
				progress(title(o) + " is ready")
				break
			}
			if time.Now().After(deadline) {
				return c.timedOut(ctx, m, timeout)
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(300 * time.Millisecond):
			}
		}
	}
	return nil
}

func (m *Manifest) workloads() (out []*unstructured.Unstructured) {
	for _, o := range m.Objects {
		if k := o.GetKind(); k == "Deployment" || k == "DaemonSet" {
			out = append(out, o)
		}
	}
	return out
}

func (c *Cluster) timedOut(ctx context.Context, m *Manifest, after time.Duration) error {
	e := &TimeoutError{After: after}
	for _, o := range m.workloads() {
		why, err := c.rollout(ctx, o)
		if err != nil {
			why = err.Error()
		}
		if why != "" {
			e.Reasons = append(e.Reasons, fmt.Sprintf("%s: %s", title(o), why))
		}
	}
	if len(e.Reasons) == 0 {
		return nil // in the last moment
	}
	return diag.Hint(e, "isthmus verify-install shows every object; kubectl -n %s describe pods says more", m.Namespace)
}

// rollout says why a workload is not what it should be; "" when it is.
func (c *Cluster) rollout(ctx context.Context, o *unstructured.Unstructured) (string, error) {
	client, err := c.object(o)
	if err != nil {
		return "", err
	}
	there, err := client.Get(ctx, o.GetName(), metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("get %s: %w", title(o), err)
	}
	number := func(fields ...string) int64 {
		n, _, _ := unstructured.NestedInt64(there.Object, fields...)
		return n
	}
	if number("status", "observedGeneration") < there.GetGeneration() {
		return "no controller has seen it yet", nil
	}
	want, updated, available := number("spec", "replicas"), number("status", "updatedReplicas"), number("status", "availableReplicas")
	if o.GetKind() == "DaemonSet" {
		want, updated, available = number("status", "desiredNumberScheduled"), number("status", "updatedNumberScheduled"), number("status", "numberAvailable")
	} else if total := number("status", "replicas"); total > want && available >= want {
		return fmt.Sprintf("%d old pods are ending", total-want), nil
	}
	if updated >= want && available >= want {
		return "", nil
	}
	return c.failing(ctx, there, want, available), nil
}

// failing names the pods that are not ready, with their reasons.
func (c *Cluster) failing(ctx context.Context, o *unstructured.Unstructured, want, available int64) string {
	count := fmt.Sprintf("%d of %d pods are ready", available, want)
	match, _, _ := unstructured.NestedStringMap(o.Object, "spec", "selector", "matchLabels")
	list, err := c.dynamic.Resource(pods).Namespace(o.GetNamespace()).List(ctx, metav1.ListOptions{LabelSelector: labels.Set(match).String()})
	if err != nil {
		return count
	}
	var said []string
	for i := range list.Items {
		if why := PodTrouble(&list.Items[i]); why != "" {
			said = append(said, list.Items[i].GetName()+" "+why)
		}
	}
	if len(list.Items) == 0 {
		if why := conditionText(o, "ReplicaFailure"); why != "" {
			said = append(said, why)
		}
	}
	return strings.Join(append([]string{count}, said...), ", ")
}

// PodTrouble says why a pod is not ready, or "".
func PodTrouble(pod *unstructured.Unstructured) string {
	if condition(pod, "Ready") == "True" {
		return ""
	}
	for _, field := range []string{"initContainerStatuses", "containerStatuses"} {
		list, _, _ := unstructured.NestedSlice(pod.Object, "status", field)
		for _, x := range list {
			s, _ := x.(map[string]any)
			name, _ := s["name"].(string)
			for _, state := range []string{"waiting", "terminated"} {
				reason, _, _ := unstructured.NestedString(s, "state", state, "reason")
				message, _, _ := unstructured.NestedString(s, "state", state, "message")
				if reason == "" || reason == "Completed" || reason == "PodInitializing" {
					continue
				}
				text := fmt.Sprintf("(%s: %s", name, reason)
				if message != "" {
					text += ", " + message
				} else if code, ok, _ := unstructured.NestedInt64(s, "lastState", "terminated", "exitCode"); ok {
					text += fmt.Sprintf(", exit code %d", code)
				}
				return text + ")"
			}
		}
	}
	for _, kind := range []string{"PodScheduled", "Initialized", "ContainersReady", "Ready"} {
		if condition(pod, kind) == "False" {
			return "(" + conditionText(pod, kind) + ")"
		}
	}
	phase, _, _ := unstructured.NestedString(pod.Object, "status", "phase")
	return "(" + strings.ToLower(phase) + ")"
}

// kindOf returns an empty object of a kind, to name one.
func kindOf(gvk schema.GroupVersionKind, namespace, name string) *unstructured.Unstructured {
	o := &unstructured.Unstructured{}
	o.SetGroupVersionKind(gvk)
	o.SetNamespace(namespace)
	o.SetName(name)
	return o
}
