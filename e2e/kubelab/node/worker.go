package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// worker carries one Pod from its binding to its deletion.
type worker struct {
	n               *Node
	node            *Spec
	uid             types.UID
	namespace, name string
	vol             *volumes

	stopping chan struct{} // closed when the Pod is to end
	killed   chan struct{} // closed when it is to end at once
	dirty    chan struct{} // its status is to be written

	mu          sync.Mutex
	pod         *corev1.Pod // the newest
	stopped     bool
	gone        bool
	sandbox     *sandbox
	net         *box.NetNS
	ips         []netip.Addr
	containers  []*container // init containers first, in the order of the spec
	initialized bool
	failed      string // why the Pod failed for good, when no container says so
	startTime   time.Time
	conditions  map[corev1.PodConditionType]corev1.PodCondition
}

func newWorker(n *Node, spec *Spec, pod *corev1.Pod) *worker {
	w := &worker{
		n: n, node: spec, uid: pod.UID, namespace: pod.Namespace, name: pod.Name,
		stopping: make(chan struct{}), killed: make(chan struct{}), dirty: make(chan struct{}, 1),
		startTime: time.Now(), conditions: map[corev1.PodConditionType]corev1.PodCondition{},
	}
	w.vol = newVolumes(w)
	for _, c := range pod.Spec.InitContainers {
		kind := kindInit
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			kind = kindSidecar
		}
		w.containers = append(w.containers, newContainer(w, c.Name, kind))
	}
	for _, c := range pod.Spec.Containers {
		w.containers = append(w.containers, newContainer(w, c.Name, kindMain))
	}
	for _, c := range pod.Status.Conditions {
		w.conditions[c.Type] = c
	}
	w.update(pod)
	return w
}

// update takes a newer version of the Pod. It does not block.
func (w *worker) update(pod *corev1.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pod = pod
	if pod.DeletionTimestamp != nil && !w.stopped {
		w.stopped = true
		close(w.stopping)
	}
	if g := pod.DeletionGracePeriodSeconds; pod.DeletionTimestamp != nil && g != nil && *g == 0 {
		w.killLocked()
	}
	w.resync()
}

// vanish ends the Pod at once: the API server has forgotten it.
func (w *worker) vanish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.stopped {
		w.stopped = true
		close(w.stopping)
	}
	w.gone = true
	w.killLocked()
}

func (w *worker) killLocked() {
	select {
	case <-w.killed:
	default:
		close(w.killed)
	}
}

// latest returns the newest version of the Pod, not to be changed.
func (w *worker) latest() *corev1.Pod {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pod
}

// resync has the volumes be compared with what they are made of.
func (w *worker) resync() { poke(w.vol.again) }

// changed has the status be written.
func (w *worker) changed() { poke(w.dirty) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// serve runs the Pod to its deletion, or until ctx ends. ended says that it had come to its end before.
func (w *worker) serve(ctx context.Context, ended bool) {
	var background sync.WaitGroup
	defer background.Wait()
	writing, stopWriting := context.WithCancel(ctx)
	defer stopWriting()
	if !ended {
		background.Go(func() { w.writeStatus(writing) })
		w.live(ctx)
	}
	select {
	case <-w.stopping:
	case <-ctx.Done():
		return
	}
	stopWriting()
	background.Wait()
	w.finish(ctx, !ended)
}

// live runs the Pod's containers to their end.
func (w *worker) live(ctx context.Context) {
	live, end := context.WithCancel(ctx)
	defer end()
	var background sync.WaitGroup
	defer background.Wait()
	background.Go(func() {
		select {
		case <-w.stopping:
			end()
		case <-live.Done():
		}
	})
	if w.setUp(live) {
		w.changed()
		background.Go(func() { w.vol.keep(live) })
		w.start(live)
	}
	end()
	w.shutDown(ctx)
	background.Wait()
	w.tearDown(ctx)
	w.changed()
}

// setUp makes the volumes and the network, again and again until it succeeds. It reports false when the Pod ended.
func (w *worker) setUp(live context.Context) bool {
	retry := func(event string, do func() error) bool {
		for pause := 250 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
			err := do()
			if live.Err() != nil {
				return false
			}
			if err == nil {
				return true
			}
			w.event(corev1.EventTypeWarning, event, err.Error())
			w.n.log.Debug("pod not set up yet", "pod", w.namespace+"/"+w.name, "err", err)
			if !sleep(live, pause) {
				return false
			}
		}
	}
	if !retry("FailedMount", func() error { return w.vol.sync(live) }) {
		return false
	}
	if w.latest().Spec.HostNetwork {
		w.mu.Lock()
		w.net, w.ips = w.n.router, w.node.Addresses
		w.mu.Unlock()
		return true
	}
	return retry("FailedCreatePodSandBox", func() error {
		s, err := w.n.cni.add(live, w, newID())
		if err != nil {
			return fmt.Errorf("Failed to create pod sandbox: failed to setup network for sandbox: %w", err) //nolint:staticcheck // an event's sentence
		}
		w.mu.Lock()
		w.sandbox, w.net, w.ips = s, s.ns, s.ips
		w.mu.Unlock()
		return nil
	})
}

// start starts the containers in their order and returns when none of the main ones is to run on, or live ends.
func (w *worker) start(live context.Context) {
	var main []*container
	for _, c := range w.containers {
		switch c.kind {
		case kindInit:
			c.begin()
			c.loop(live)
			if live.Err() != nil {
				return
			}
			if code := c.exitCode(); code != 0 {
				w.fail(fmt.Sprintf("init container %s ended with code %d", c.name, code))
				return
			}
		case kindSidecar:
			c.begin()
			go c.loop(live)
			select {
			case <-c.up:
			case <-live.Done():
				return
			}
		default:
			main = append(main, c)
		}
	}
	w.mu.Lock()
	w.initialized = true
	w.mu.Unlock()
	w.changed()
	for _, c := range main {
		c.begin()
		go c.loop(live)
		select {
		case <-c.attempted:
		case <-live.Done():
			return
		}
	}
	for _, c := range main {
		select {
		case <-c.done:
		case <-live.Done():
			return
		}
	}
}

func (w *worker) fail(why string) {
	w.mu.Lock()
	w.failed = why
	w.mu.Unlock()
	w.changed()
}

// shutDown ends the containers: the main ones together, then the sidecars in the reverse of their order.
func (w *worker) shutDown(ctx context.Context) {
	grace := w.grace()
	deadline := time.Now().Add(grace)
	stop := func(cs []*container) {
		var wait sync.WaitGroup
		for _, c := range cs {
			wait.Go(func() {
				c.end(ctx, func() time.Duration {
					if ctx.Err() != nil {
						return 0
					}
					return max(time.Until(deadline), min(grace, 2*time.Second))
				})
			})
		}
		wait.Wait()
	}
	var first []*container
	for _, c := range w.containers {
		if c.kind != kindSidecar {
			first = append(first, c)
		}
	}
	stop(first)
	for i := len(w.containers) - 1; i >= 0; i-- {
		if c := w.containers[i]; c.kind == kindSidecar {
			stop([]*container{c})
		}
	}
}

// grace is how long the Pod's containers may take to end.
func (w *worker) grace() time.Duration {
	pod := w.latest()
	seconds := int64(30)
	if pod.Spec.TerminationGracePeriodSeconds != nil {
		seconds = *pod.Spec.TerminationGracePeriodSeconds
	}
	if pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil {
		seconds = *pod.DeletionGracePeriodSeconds
	}
	return time.Duration(seconds) * time.Second
}

// tearDown gives up network and volumes.
func (w *worker) tearDown(ctx context.Context) {
	w.mu.Lock()
	s := w.sandbox
	w.sandbox = nil
	w.mu.Unlock()
	if s != nil {
		if err := box.KillAll(s.ns); err != nil {
			w.n.log.Warn("processes of a pod are left", "pod", w.namespace+"/"+w.name, "err", err)
		}
		short, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if err := w.n.cni.del(short, s); err != nil {
			w.event(corev1.EventTypeWarning, "FailedKillPod", err.Error())
			w.n.log.Warn("network of a pod not removed", "pod", w.namespace+"/"+w.name, "err", err)
		}
	}
	w.vol.remove()
}

func (w *worker) event(kind, reason, message string) {
	w.n.events.Event(w.latest(), kind, reason, message)
}

func (w *worker) dir() string { return filepath.Join(w.n.cfg.RunDir, "pods", string(w.uid)) }

func (w *worker) logDir() string { return filepath.Join(w.n.cfg.LogDir, w.namespace+"_"+w.name) }

func newID() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
