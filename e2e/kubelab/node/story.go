package node

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// find returns the worker of a Pod that is being served.
func (n *Node) find(namespace, pod string) (*worker, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.workers {
		if w.namespace == namespace && w.name == pod {
			return w, nil
		}
	}
	return nil, fmt.Errorf("pod %s/%s is not on these nodes", namespace, pod)
}

// Pods returns the Pods of a namespace that are being served, as they were seen last: without an API server, too.
func (n *Node) Pods(namespace string) []corev1.Pod {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []corev1.Pod
	for _, w := range n.workers {
		if w.namespace == namespace {
			out = append(out, *w.latest().DeepCopy())
		}
	}
	return out
}

func (w *worker) process(name string) (*box.Process, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.containers {
		if c.name == name || name == "" && c.kind == kindMain {
			if c.proc == nil {
				return nil, fmt.Errorf("container %s of pod %s/%s does not run", c.name, w.namespace, w.name)
			}
			return c.proc, nil
		}
	}
	return nil, fmt.Errorf("pod %s/%s has no container %q", w.namespace, w.name, name)
}

// Exec runs a program in a container ("" is the first) as its user, with its files, network and environment, to its
// end. The error is nil when the program ran, whatever its code; when ctx ends it is killed.
func (n *Node) Exec(ctx context.Context, namespace, pod, container string, argv []string, stdin io.Reader) (stdout, stderr string, code int, err error) {
	w, err := n.find(namespace, pod)
	if err != nil {
		return "", "", -1, err
	}
	p, err := w.process(container)
	if err != nil {
		return "", "", -1, err
	}
	out, errOut, code, err := p.Exec(ctx, argv, stdin)
	return string(out), string(errOut), code, err
}

// Attach is Exec with streams of the caller's.
func (n *Node) Attach(ctx context.Context, namespace, pod, container string, argv []string, io box.Streams) (code int, err error) {
	w, err := n.find(namespace, pod)
	if err != nil {
		return -1, err
	}
	p, err := w.process(container)
	if err != nil {
		return -1, err
	}
	return p.Attach(ctx, argv, io)
}

// Log is the file with what a container printed, over all its restarts; it may not be there yet.
func (n *Node) Log(namespace, pod, container string) (string, error) {
	w, err := n.find(namespace, pod)
	if err != nil {
		return "", err
	}
	if w.containerSpec(container) == nil {
		return "", fmt.Errorf("pod %s/%s has no container %q", namespace, pod, container)
	}
	return filepath.Join(w.logDir(), container+".log"), nil
}

// KillContainer sends a signal to a container ("" is the first) and its children. It is started again as its Pod says.
func (n *Node) KillContainer(namespace, pod, container string, sig syscall.Signal) error {
	w, err := n.find(namespace, pod)
	if err != nil {
		return err
	}
	p, err := w.process(container)
	if err != nil {
		return err
	}
	return p.SignalGroup(sig)
}

// StopPod ends every process of a Pod at once, as when its machine loses it. Its containers are started again as the
// Pod says.
func (n *Node) StopPod(namespace, pod string) error {
	w, err := n.find(namespace, pod)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.containers {
		if c.proc != nil {
			if err := c.proc.SignalGroup(syscall.SIGKILL); err != nil {
				return err
			}
		}
	}
	return nil
}

// RotateTokens has the projected service account tokens of a Pod be replaced now.
func (n *Node) RotateTokens(namespace, pod string) error {
	w, err := n.find(namespace, pod)
	if err != nil {
		return err
	}
	w.vol.expire()
	return nil
}

// CheckNetwork asks the network plugins whether a Pod's network is as they made it.
func (n *Node) CheckNetwork(ctx context.Context, namespace, pod string) error {
	w, err := n.find(namespace, pod)
	if err != nil {
		return err
	}
	w.mu.Lock()
	s := w.sandbox
	w.mu.Unlock()
	if s == nil {
		return fmt.Errorf("pod %s/%s has no network of its own", namespace, pod)
	}
	return n.cni.check(ctx, s)
}

// NetNS returns a Pod's network namespace, which stays the node's, and its addresses.
func (n *Node) NetNS(namespace, pod string) (*box.NetNS, []netip.Addr, error) {
	w, err := n.find(namespace, pod)
	if err != nil {
		return nil, nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.net == nil {
		return nil, nil, fmt.Errorf("pod %s/%s has no network yet", namespace, pod)
	}
	return w.net, w.ips, nil
}

// LoadBalancers returns the addresses of the Services of type LoadBalancer, by NAMESPACE/NAME: also of those whose status
// gives a host name.
func (n *Node) LoadBalancers() map[string]netip.Addr {
	n.mu.Lock()
	proxy := n.proxy
	n.mu.Unlock()
	if proxy == nil {
		return nil
	}
	return proxy.Addresses()
}

// Router returns the network namespace that the nodes share.
func (n *Node) Router() *box.NetNS { return n.router }

// Freeze stops all processes of a node's Pods, its heartbeats and what it writes, as when its machine hangs. The API
// server takes the node for lost some 40 s later. Freezing twice is freezing once.
func (n *Node) Freeze(node string) error { return n.freeze(node, true, syscall.SIGSTOP) }

// Thaw undoes Freeze.
func (n *Node) Thaw(node string) error { return n.freeze(node, false, syscall.SIGCONT) }

func (n *Node) freeze(node string, frozen bool, sig syscall.Signal) error {
	if n.nodes[node] == nil {
		return fmt.Errorf("node %s is not served here", node)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.frozen[node] = frozen
	for _, w := range n.workers {
		if w.node.Name != node {
			continue
		}
		w.mu.Lock()
		for _, c := range w.containers {
			if c.proc != nil {
				_ = c.proc.SignalGroup(sig)
			}
		}
		w.mu.Unlock()
	}
	if !frozen && n.run != nil {
		ctx, cancel := context.WithTimeout(n.run, 10*time.Second)
		s := n.nodes[node]
		n.wait.Go(func() {
			defer cancel()
			if err := n.renew(ctx, s); err != nil {
				n.log.Debug("lease not renewed", "node", node, "err", err)
			}
		})
	}
	return nil
}

func (n *Node) isFrozen(node string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.frozen[node]
}
