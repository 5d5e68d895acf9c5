// Package repair finds Pods of this node that started before the CNI plugin was ready: their init container
// istio-validation fails, because nothing is captured, and would fail for ever. Such a Pod is deleted, so that its
// owner makes a new one, which the plugin sees.
package repair

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// Container is the name of the init container that checks for the capture rules.
const Container = "istio-validation"

// again is how long to wait after a lost watch.
const again = 2 * time.Second

// Config says where to look.
type Config struct {
	Client kubernetes.Interface
	Node   string // name of the Node that this process runs on
	// Ready reports whether a new Pod would be captured; before that deleting one would be in vain.
	Ready func() bool
	Log   *slog.Logger
}

// Broken reports whether a Pod lacks the capture rules for good: its check failed, and it has an owner that makes another.
func Broken(pod *corev1.Pod) bool {
	if pod.DeletionTimestamp != nil || metav1.GetControllerOf(pod) == nil {
		return false
	}
	for _, s := range pod.Status.InitContainerStatuses {
		if s.Name != Container {
			continue
		}
		for _, state := range []corev1.ContainerState{s.State, s.LastTerminationState} {
			if t := state.Terminated; t != nil && t.ExitCode != 0 {
				return s.State.Running == nil && !s.Ready
			}
		}
	}
	return false
}

// Run deletes broken Pods of the node until ctx ends.
func Run(ctx context.Context, c Config) error {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	for ctx.Err() == nil {
		if err := c.follow(ctx); err != nil && ctx.Err() == nil {
			c.Log.Warn("watch pods of the node", "err", err)
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
		}
	}
	return nil
}

// follow lists and watches once.
func (c Config) follow(ctx context.Context) error {
	opts := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("spec.nodeName", c.Node).String()}
	pods, err := c.Client.CoreV1().Pods("").List(ctx, opts)
	if err != nil {
		return err
	}
	waiting := false
	for i := range pods.Items {
		waiting = c.look(ctx, &pods.Items[i]) || waiting
	}
	opts.ResourceVersion = pods.ResourceVersion
	if waiting { // look again soon: the installer was not ready
		seconds := int64(again / time.Second)
		opts.TimeoutSeconds = &seconds
	}
	w, err := c.Client.CoreV1().Pods("").Watch(ctx, opts)
	if err != nil {
		return err
	}
	defer w.Stop()
	for {
		select {
		case e, open := <-w.ResultChan():
			if !open {
				return nil
			}
			switch e.Type {
			case watch.Added, watch.Modified:
				if pod, ok := e.Object.(*corev1.Pod); ok && c.look(ctx, pod) {
					return nil
				}
			case watch.Error:
				return fmt.Errorf("watch: %w", apierrors.FromObject(e.Object))
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// look deletes a broken Pod; it reports true when that has to wait.
func (c Config) look(ctx context.Context, pod *corev1.Pod) (later bool) {
	if !Broken(pod) {
		return false
	}
	if !c.Ready() {
		return true
	}
	uid := pod.UID // not one that took its name since
	err := c.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
	log := c.Log.With("namespace", pod.Namespace, "pod", pod.Name)
	switch {
	case err == nil:
		log.Info("pod started before the plugin was ready: deleted, to be made anew")
	case apierrors.IsNotFound(err), apierrors.IsConflict(err):
	default:
		log.Warn("pod without capture rules could not be deleted", "err", err)
		return true
	}
	return false
}
