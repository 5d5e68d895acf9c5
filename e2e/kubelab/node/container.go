package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

const (
	kindInit = iota
	kindSidecar
	kindMain
)

// container is one container of a Pod over all its restarts. Fields below mu are guarded by the worker's.
type container struct {
	w         *worker
	name      string
	kind      int
	attempted chan struct{} // closed after the first start was tried
	up        chan struct{} // closed when it first was started: startup probe and hook included
	done      chan struct{} // closed when it is not to run again
	looping   bool

	state    corev1.ContainerState
	last     corev1.ContainerState
	restarts int32
	started  bool
	ready    bool
	final    bool
	id       string
	image    string
	proc     *box.Process
}

func newContainer(w *worker, name string, kind int) *container {
	reason := "PodInitializing"
	if len(w.containers) == 0 {
		reason = "ContainerCreating"
	}
	return &container{
		w: w, name: name, kind: kind, attempted: make(chan struct{}), up: make(chan struct{}), done: make(chan struct{}),
		state: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason}},
	}
}

// spec returns the container as the newest Pod has it.
func (c *container) spec() *corev1.Container {
	pod := c.w.latest()
	list := pod.Spec.Containers
	if c.kind != kindMain {
		list = pod.Spec.InitContainers
	}
	for i := range list {
		if list[i].Name == c.name {
			return &list[i]
		}
	}
	return &corev1.Container{Name: c.name} // containers of a Pod cannot be removed
}

// set changes the container's state and has it be written.
func (c *container) set(change func()) {
	c.w.mu.Lock()
	change()
	c.w.mu.Unlock()
	c.w.changed()
}

func closeOnce(ch chan struct{}) {
	select {
	case <-ch:
	default:
		close(ch)
	}
}

func (c *container) exitCode() int32 {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	if t := c.state.Terminated; t != nil {
		return t.ExitCode
	}
	return 0
}

// end stops the container by the deadline and returns when it is not to run any more.
func (c *container) end(ctx context.Context, left func() time.Duration) {
	c.w.mu.Lock()
	looping := c.looping
	c.w.mu.Unlock()
	for looping {
		c.stop(ctx, left())
		select {
		case <-c.done:
			return
		case <-time.After(20 * time.Millisecond): // it was being started just now
		}
	}
}

// begin marks the container as about to be looped.
func (c *container) begin() {
	c.w.mu.Lock()
	c.looping = true
	c.w.mu.Unlock()
}

// loop runs the container, and again as its restart policy says, until it is not to run any more or live has ended and
// its process too.
func (c *container) loop(live context.Context) {
	defer func() {
		c.set(func() { c.final = true })
		closeOnce(c.attempted)
		close(c.done)
	}()
	var pause time.Duration // before the next attempt
	for live.Err() == nil {
		begun := time.Now()
		reason, err := c.once(live)
		closeOnce(c.attempted)
		var again bool
		if err != nil {
			again = true
			pause = max(pause, c.w.n.cfg.Backoff/2)
			c.set(func() {
				c.state = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: err.Error()}}
			})
			c.w.event(corev1.EventTypeWarning, "Failed", "Error: "+reason+": "+err.Error())
		} else {
			again = c.again()
		}
		if !again || live.Err() != nil {
			return
		}
		if time.Since(begun) > 10*time.Minute {
			pause = 0
		}
		if !c.pause(live, pause, err) {
			return
		}
		pause = min(max(2*pause, c.w.n.cfg.Backoff), 30*c.w.n.cfg.Backoff)
		if err == nil {
			c.set(func() { c.restarts++ })
		}
	}
}

// pause waits before a restart.
func (c *container) pause(live context.Context, d time.Duration, err error) bool {
	if d == 0 {
		return true
	}
	if err == nil {
		c.set(func() {
			c.last = c.state
			c.state = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{
				Reason:  "CrashLoopBackOff",
				Message: fmt.Sprintf("back-off %v restarting failed container=%s pod=%s_%s(%s)", d, c.name, c.w.name, c.w.namespace, c.w.uid),
			}}
		})
		c.w.event(corev1.EventTypeWarning, "BackOff", "Back-off restarting failed container "+c.name)
	}
	return sleep(live, d)
}

// again reports whether the ended container is to run again.
func (c *container) again() bool {
	switch policy := c.w.latest().Spec.RestartPolicy; {
	case c.kind == kindSidecar:
		return true
	case policy == corev1.RestartPolicyNever:
		return false
	case policy == corev1.RestartPolicyOnFailure || c.kind == kindInit:
		return c.exitCode() != 0
	}
	return true
}

// once runs the container to its end. An error says that it did not start, reason is the API's word for why.
func (c *container) once(live context.Context) (reason string, err error) {
	spec, id := c.spec(), newID()
	prog, err := c.w.n.program(spec.Image)
	if err != nil {
		return "ErrImagePull", err
	}
	b, err := c.prepare(live, spec, prog, id)
	if err != nil {
		return "CreateContainerConfigError", err
	}
	defer os.RemoveAll(b.Dir)
	log, err := c.openLog()
	if err != nil {
		return "CreateContainerError", err
	}
	defer log.Close()
	b.Output = log
	proc, err := c.w.n.host.Start(*b)
	if err != nil {
		return "RunContainerError", err
	}
	c.set(func() {
		if c.state.Terminated != nil {
			c.last = c.state
		}
		c.proc, c.id, c.image = proc, "lab://"+id, spec.Image
		c.started, c.ready = false, false
		c.state = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(proc.Started)}}
	})
	c.w.event(corev1.EventTypeNormal, "Started", "Started container "+c.name)
	c.w.n.log.Debug("container started", "pod", c.w.namespace+"/"+c.w.name, "container", c.name, "pid", proc.PID)
	running, end := context.WithCancel(context.WithoutCancel(live))
	probing := c.watch(running, live, spec, proc)
	<-proc.Done()
	end()
	probing.Wait()
	c.ended(proc)
	return "", nil
}

// ended takes down how the process ended.
func (c *container) ended(proc *box.Process) {
	code, signal, at := proc.Exit()
	t := &corev1.ContainerStateTerminated{
		ExitCode: int32(code), Signal: int32(signal), Reason: "Error", ContainerID: c.id,
		StartedAt: metav1.NewTime(proc.Started), FinishedAt: metav1.NewTime(at),
	}
	if code == 0 {
		t.Reason = "Completed"
	}
	c.set(func() {
		c.proc, c.started, c.ready = nil, false, c.kind == kindInit && code == 0
		c.state = corev1.ContainerState{Terminated: t}
	})
}

func (c *container) openLog() (*os.File, error) {
	if err := os.MkdirAll(c.w.logDir(), 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(filepath.Join(c.w.logDir(), c.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
}

// stop ends the running process: its hook, SIGTERM, and SIGKILL when the time is up or the Pod is to end at once.
func (c *container) stop(ctx context.Context, grace time.Duration) {
	c.w.mu.Lock()
	proc := c.proc
	c.w.mu.Unlock()
	if proc == nil {
		return
	}
	limit, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	over := make(chan struct{})
	go func() {
		defer close(over)
		if h := c.spec().Lifecycle; h != nil && h.PreStop != nil && grace > 0 {
			if err := c.hook(limit, proc, h.PreStop); err != nil && limit.Err() == nil {
				c.w.event(corev1.EventTypeWarning, "FailedPreStopHook", err.Error())
			}
			if limit.Err() != nil { // it used all the time: the process still gets a little
				_ = proc.Signal(syscall.SIGTERM)
				_ = sleep(ctx, min(grace, 2*time.Second))
				return
			}
		}
		if grace > 0 {
			_ = proc.Signal(syscall.SIGTERM)
		}
		select {
		case <-proc.Done():
		case <-limit.Done():
		}
	}()
	select {
	case <-over:
	case <-proc.Done():
	case <-c.w.killed:
	}
	cancel()
	_ = proc.SignalGroup(syscall.SIGKILL)
	<-proc.Done()
	<-over
}

// hook runs a lifecycle hook.
func (c *container) hook(ctx context.Context, proc *box.Process, h *corev1.LifecycleHandler) error {
	switch {
	case h.Exec != nil:
		out, errOut, code, err := proc.Exec(ctx, h.Exec.Command, nil)
		if err == nil && code != 0 {
			err = fmt.Errorf("hook of %s ended with code %d: %s", c.name, code, lastLine(string(out)+string(errOut)))
		}
		return err
	case h.HTTPGet != nil:
		return c.httpGet(ctx, h.HTTPGet)
	case h.TCPSocket != nil:
		return c.tcp(ctx, h.TCPSocket)
	case h.Sleep != nil:
		sleep(ctx, time.Duration(h.Sleep.Seconds)*time.Second)
		return nil
	}
	return errors.New("a hook of an unknown kind")
}
