package node

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// schedule binds Pods that are bound to no node.
func (n *Node) schedule(ctx context.Context) error {
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[string]())
	enqueue := func(obj any) {
		if p, ok := obj.(*corev1.Pod); ok && p.Spec.NodeName == "" && p.DeletionTimestamp == nil {
			queue.Add(p.Namespace + "/" + p.Name)
		}
	}
	select {
	case <-n.ready:
	case <-ctx.Done():
		return nil
	}
	nodes := n.factory.Core().V1().Nodes().Informer()
	n.factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), nodes.HasSynced) {
		return nil
	}
	if _, err := n.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: enqueue, UpdateFunc: func(_, obj any) { enqueue(obj) }}); err != nil {
		return fmt.Errorf("scheduler: %w", err)
	}
	stop := context.AfterFunc(ctx, queue.ShutDown)
	defer stop()
	assumed := map[types.UID]string{} // bound, but not seen so yet
	for {
		key, down := queue.Get()
		if down {
			return nil
		}
		if err := n.bind(ctx, key, assumed); err != nil {
			n.log.Debug("pod not scheduled", "pod", key, "err", err)
			queue.AddRateLimited(key)
		} else {
			queue.Forget(key)
		}
		queue.Done(key)
	}
}

func (n *Node) bind(ctx context.Context, key string, assumed map[types.UID]string) error {
	obj, ok, err := n.pods.GetStore().GetByKey(key)
	if err != nil || !ok {
		return err
	}
	pod := obj.(*corev1.Pod)
	if pod.Spec.NodeName != "" || pod.DeletionTimestamp != nil || assumed[pod.UID] != "" || len(pod.Spec.SchedulingGates) > 0 {
		return nil
	}
	name := n.choose(pod, assumed)
	if name == "" {
		n.events.Event(pod, corev1.EventTypeWarning, "FailedScheduling", "no node matches the pod's node selector, affinity and tolerations")
		return fmt.Errorf("no node fits")
	}
	err = n.client.CoreV1().Pods(pod.Namespace).Bind(ctx, &corev1.Binding{
		ObjectMeta: metav1.ObjectMeta{Name: pod.Name, Namespace: pod.Namespace, UID: pod.UID},
		Target:     corev1.ObjectReference{Kind: "Node", Name: name},
	}, metav1.CreateOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // gone, or bound by another
	}
	if err != nil {
		return err
	}
	assumed[pod.UID] = name
	return nil
}

// choose returns the fitting node with the fewest Pods of the same owner, then the fewest at all, then the first.
func (n *Node) choose(pod *corev1.Pod, assumed map[types.UID]string) string {
	same, all := map[string]int{}, map[string]int{}
	for _, obj := range n.pods.GetStore().List() {
		p := obj.(*corev1.Pod)
		on := p.Spec.NodeName
		if on == "" {
			on = assumed[p.UID]
		} else {
			delete(assumed, p.UID)
		}
		all[on]++
		if owner(p) == owner(pod) && p.Namespace == pod.Namespace {
			same[on]++
		}
	}
	var best string
	for _, s := range n.cfg.Nodes {
		obj, ok, err := n.factory.Core().V1().Nodes().Informer().GetStore().GetByKey(s.Name)
		if err != nil || !ok || !fits(pod, obj.(*corev1.Node)) {
			continue
		}
		if best == "" || same[s.Name] < same[best] || same[s.Name] == same[best] && all[s.Name] < all[best] {
			best = s.Name
		}
	}
	return best
}

func owner(p *corev1.Pod) types.UID {
	if c := metav1.GetControllerOf(p); c != nil {
		return c.UID
	}
	return p.UID
}

// fits reports whether a node is one that the Pod asks for and tolerates. Resources are not counted.
func fits(pod *corev1.Pod, node *corev1.Node) bool {
	for k, v := range pod.Spec.NodeSelector {
		if node.Labels[k] != v {
			return false
		}
	}
	if a := pod.Spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		terms := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
		if !slices.ContainsFunc(terms, func(t corev1.NodeSelectorTerm) bool { return matches(t, node) }) {
			return false
		}
	}
	for _, t := range node.Spec.Taints {
		if t.Effect == corev1.TaintEffectPreferNoSchedule || t.Key == corev1.TaintNodeNotReady {
			continue // not ready: a node that this process serves is
		}
		if !slices.ContainsFunc(pod.Spec.Tolerations, func(x corev1.Toleration) bool { return tolerates(x, t) }) {
			return false
		}
	}
	return true
}

func tolerates(x corev1.Toleration, t corev1.Taint) bool {
	if x.Effect != "" && x.Effect != t.Effect || x.Key != "" && x.Key != t.Key {
		return false
	}
	return x.Operator == corev1.TolerationOpExists || x.Value == t.Value
}

func matches(t corev1.NodeSelectorTerm, node *corev1.Node) bool {
	if len(t.MatchExpressions)+len(t.MatchFields) == 0 {
		return false
	}
	for _, e := range t.MatchExpressions {
		v, ok := node.Labels[e.Key]
		if !meets(e, v, ok) {
			return false
		}
	}
	for _, e := range t.MatchFields {
		if !meets(e, node.Name, e.Key == "metadata.name") {
			return false
		}
	}
	return true
}

func meets(e corev1.NodeSelectorRequirement, v string, ok bool) bool {
	switch e.Operator {
	case corev1.NodeSelectorOpIn:
		return ok && slices.Contains(e.Values, v)
	case corev1.NodeSelectorOpNotIn:
		return !ok || !slices.Contains(e.Values, v)
	case corev1.NodeSelectorOpExists:
		return ok
	case corev1.NodeSelectorOpDoesNotExist:
		return !ok
	case corev1.NodeSelectorOpGt, corev1.NodeSelectorOpLt:
		if len(e.Values) != 1 {
			return false
		}
		a, errA := strconv.ParseInt(v, 10, 64)
		b, errB := strconv.ParseInt(e.Values[0], 10, 64)
		return errA == nil && errB == nil && (a > b) == (e.Operator == corev1.NodeSelectorOpGt) && a != b
	}
	return false
}
