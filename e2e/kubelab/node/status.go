package node

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// status is the Pod's status as a kubelet would write it.
func (w *worker) status() corev1.PodStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	pod := w.pod
	start := metav1.NewTime(w.startTime)
	s := corev1.PodStatus{Phase: w.phase(), StartTime: &start, QOSClass: pod.Status.QOSClass}
	if w.failed != "" {
		s.Reason, s.Message = "", w.failed
	}
	for _, ip := range w.ips {
		s.PodIPs = append(s.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	if len(s.PodIPs) > 0 {
		s.PodIP = s.PodIPs[0].IP
	}
	for _, ip := range w.node.Addresses {
		s.HostIPs = append(s.HostIPs, corev1.HostIP{IP: ip.String()})
	}
	s.HostIP = w.node.Addresses[0].String()
	for _, c := range w.containers {
		if c.kind == kindMain {
			s.ContainerStatuses = append(s.ContainerStatuses, c.status(pod.Spec.Containers))
		} else {
			s.InitContainerStatuses = append(s.InitContainerStatuses, c.status(pod.Spec.InitContainers))
		}
	}
	s.Conditions = w.conditionsOf(s.Phase)
	return s
}

// status is one container's; the worker's lock is held.
func (c *container) status(specs []corev1.Container) corev1.ContainerStatus {
	started := c.started
	s := corev1.ContainerStatus{
		Name: c.name, State: c.state, LastTerminationState: c.last, Ready: c.ready, RestartCount: c.restarts, ContainerID: c.id, Started: &started,
	}
	for i := range specs {
		if specs[i].Name == c.name {
			s.Image = specs[i].Image
		}
	}
	if c.image != "" {
		s.ImageID = "lab://" + c.image
	}
	return s
}

// phase derives the Pod's phase; the lock is held.
func (w *worker) phase() corev1.PodPhase {
	if w.failed != "" {
		return corev1.PodFailed
	}
	if w.pod.Status.Phase == corev1.PodSucceeded || w.pod.Status.Phase == corev1.PodFailed {
		return w.pod.Status.Phase // for good
	}
	if !w.initialized {
		if w.stopped && !slices.ContainsFunc(w.containers, func(c *container) bool { return c.looping && !c.final }) {
			return corev1.PodFailed
		}
		return corev1.PodPending
	}
	over, bad, begun := true, false, true
	for _, c := range w.containers {
		if c.kind != kindMain {
			continue
		}
		over = over && c.final
		bad = bad || c.state.Terminated == nil || c.state.Terminated.ExitCode != 0
		begun = begun && (c.state.Waiting == nil || c.last.Terminated != nil)
	}
	switch {
	case over && bad:
		return corev1.PodFailed
	case over:
		return corev1.PodSucceeded
	case !begun:
		return corev1.PodPending
	}
	return corev1.PodRunning
}

// conditionsOf derives the Pod's conditions; the lock is held.
func (w *worker) conditionsOf(phase corev1.PodPhase) []corev1.PodCondition {
	var unready, uninit []string
	for _, c := range w.containers {
		if c.kind != kindInit && !c.ready {
			unready = append(unready, c.name)
		}
		if c.kind == kindInit && (c.state.Terminated == nil || c.state.Terminated.ExitCode != 0) || c.kind == kindSidecar && !c.started {
			uninit = append(uninit, c.name)
		}
	}
	ended := phase == corev1.PodSucceeded || phase == corev1.PodFailed
	ready := corev1.PodCondition{Status: corev1.ConditionTrue}
	switch {
	case ended:
		ready.Status, ready.Reason = corev1.ConditionFalse, "PodCompleted"
		if phase == corev1.PodFailed {
			ready.Reason = "PodFailed"
		}
	case len(unready) > 0:
		ready.Status, ready.Reason = corev1.ConditionFalse, "ContainersNotReady"
		ready.Message = fmt.Sprintf("containers with unready status: [%s]", strings.Join(unready, " "))
	}
	whole := ready
	for _, g := range w.pod.Spec.ReadinessGates {
		met := slices.ContainsFunc(w.pod.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == g.ConditionType && c.Status == corev1.ConditionTrue
		})
		if !met && whole.Status == corev1.ConditionTrue {
			whole.Status, whole.Reason = corev1.ConditionFalse, "ReadinessGatesNotReady"
			whole.Message = fmt.Sprintf("corresponding condition of pod readiness gate %q does not exist or is not True.", g.ConditionType)
		}
	}
	initialized := corev1.PodCondition{Status: corev1.ConditionTrue}
	if !w.initialized && !ended {
		initialized = corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "ContainersNotInitialized",
			Message: fmt.Sprintf("containers with incomplete status: [%s]", strings.Join(uninit, " "))}
	}
	sandboxed := corev1.PodCondition{Status: corev1.ConditionFalse}
	if w.net != nil && !ended {
		sandboxed.Status = corev1.ConditionTrue
	}
	var out []corev1.PodCondition
	add := func(t corev1.PodConditionType, c corev1.PodCondition) {
		c.Type = t
		if old, ok := w.conditions[t]; ok && old.Status == c.Status && !old.LastTransitionTime.IsZero() {
			c.LastTransitionTime = old.LastTransitionTime
		} else {
			c.LastTransitionTime = metav1.NewTime(time.Now().Truncate(time.Second))
		}
		w.conditions[t] = c
		out = append(out, c)
	}
	add(corev1.PodReadyToStartContainers, sandboxed)
	add(corev1.PodInitialized, initialized)
	add(corev1.PodReady, whole)
	add(corev1.ContainersReady, ready)
	add(corev1.PodScheduled, corev1.PodCondition{Status: corev1.ConditionTrue})
	return out
}

// writeStatus writes the status whenever it changed, until ctx ends.
func (w *worker) writeStatus(ctx context.Context) {
	var last string
	w.changed()
	for pause := time.Duration(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-w.dirty:
		}
		if w.n.isFrozen(w.node.Name) {
			w.changed()
			if !sleep(ctx, 100*time.Millisecond) {
				return
			}
			continue
		}
		patch := w.statusPatch()
		if string(patch) == last {
			continue
		}
		err := w.patchStatus(ctx, patch)
		switch {
		case err == nil:
			last, pause = string(patch), 0
		case apierrors.IsNotFound(err) || apierrors.IsConflict(err): // another Pod by now, or none
			return
		case ctx.Err() == nil:
			w.n.log.Debug("status not written", "pod", w.namespace+"/"+w.name, "err", err)
			pause = min(2*pause+50*time.Millisecond, 2*time.Second)
			w.changed()
			if !sleep(ctx, pause) {
				return
			}
		}
	}
}

func (w *worker) statusPatch() []byte {
	patch, _ := json.Marshal(map[string]any{"metadata": map[string]any{"uid": w.uid}, "status": w.status()}) // API types can be encoded
	return patch
}

func (w *worker) patchStatus(ctx context.Context, patch []byte) error {
	_, err := w.n.client.CoreV1().Pods(w.namespace).Patch(ctx, w.name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}

// finish writes the last status of a Pod that is to be deleted and removes it.
func (w *worker) finish(ctx context.Context, write bool) {
	now, uid := int64(0), w.uid
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		w.mu.Lock()
		gone := w.gone
		w.mu.Unlock()
		if gone {
			return
		}
		var err error
		if write {
			err = w.patchStatus(ctx, w.statusPatch())
		}
		if err == nil {
			write = false
			err = w.n.client.CoreV1().Pods(w.namespace).Delete(ctx, w.name, metav1.DeleteOptions{
				GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &uid},
			})
		}
		if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return
		}
		w.n.log.Debug("pod not deleted yet", "pod", w.namespace+"/"+w.name, "err", err)
		if !sleep(ctx, pause) {
			return
		}
	}
}
