package kubelab

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"text/template"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

//go:embed addons/*.yaml
var addons embed.FS

// startNodes serves the cluster's Nodes until life ends, and returns when they are ready.
func (c *Cluster) startNodes(ctx, life context.Context, images map[string]node.Program) error {
	s := c.Spec
	plugin, err := c.lab.net.Program("labcni")
	if err != nil {
		return err
	}
	cfg := node.Config{
		REST: c.REST(), Router: c.Router.Path, Images: images, CNIPlugin: plugin,
		CNIConfDir: filepath.Join(c.Dir, "cni", "net.d"), CNIBinDir: filepath.Join(c.Dir, "cni", "bin"),
		RunDir: filepath.Join(c.Dir, "node"), LogDir: filepath.Join(c.lab.net.LogDir(), s.Name),
		ServiceCIDRs: []netip.Prefix{s.ServiceCIDR}, ProxyNamespaces: []string{c.Control.Path},
		LoadBalancer: s.LoadBalancer, WANLink: lab.LinkWAN, Scheduler: !c.lab.cfg.Scheduler,
		Env: []string{c.lab.net.Mark()}, Log: c.lab.log.With("cluster", s.Name),
	}
	if s.ServiceCIDR6.IsValid() {
		cfg.ServiceCIDRs = append(cfg.ServiceCIDRs, s.ServiceCIDR6)
	}
	var addresses []netip.Addr
	for _, n := range s.Nodes {
		addresses = append(addresses, n.Address, n.address6)
	}
	if cfg.TLS, err = c.plane.KubeletTLS(addresses); err != nil {
		return err
	}
	for _, n := range s.Nodes {
		spec := node.Spec{Name: n.Name, Labels: map[string]string{}, PodCIDRs: []netip.Prefix{n.pods}, Addresses: []netip.Addr{n.Address}}
		if n.pods6.IsValid() {
			spec.PodCIDRs, spec.Addresses = append(spec.PodCIDRs, n.pods6), append(spec.Addresses, n.address6)
		}
		if n.Region != "" {
			spec.Labels[corev1.LabelTopologyRegion] = n.Region
		}
		if n.Zone != "" {
			spec.Labels[corev1.LabelTopologyZone] = n.Zone
		}
		maps.Copy(spec.Labels, n.Labels)
		cfg.Nodes = append(cfg.Nodes, spec)
	}
	if c.nodes, err = node.New(cfg); err != nil {
		return err
	}
	failed := make(chan error, 1)
	c.lab.parts.Go(func() error {
		err := c.nodes.Run(life)
		failed <- err
		return err
	})
	select {
	case <-c.nodes.Ready():
		return nil
	case err := <-failed:
		return errors.Join(err, errors.New("the nodes ended before they were ready"))
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Addon applies objects that every such cluster has: "coredns".
func (c *Cluster) addon(ctx context.Context, name string) error {
	text, err := addons.ReadFile("addons/" + name + ".yaml")
	if err != nil {
		return err
	}
	t, err := template.New(name).Parse(string(text))
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := t.Execute(&out, map[string]any{"ClusterDNS": c.Spec.ClusterDNS(), "IPv6": c.Spec.ServiceCIDR6.IsValid()}); err != nil {
		return err
	}
	file := filepath.Join(c.Dir, name+".yaml")
	if err := write(file, out.Bytes()); err != nil {
		return err
	}
	_, err = c.Kubectl(ctx, "apply", "-f", file)
	return err
}

// Kubectl runs kubectl as the administrator, beside the API server, and returns what it printed. An exit code other
// than 0 is an error with what it complained about.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	argv := append([]string{"kube", "kubectl", "--kubeconfig", c.plane.Admin()}, args...)
	stdout, stderr, code, err := c.lab.net.Exec(ctx, c.Control.Name, argv)
	if err == nil && code != 0 {
		err = fmt.Errorf("kubectl %s in %s: exit code %d: %s", strings.Join(args, " "), c.Name(), code, strings.TrimSpace(stderr))
	}
	return stdout, err
}

// Nodes is what serves the cluster's Nodes; nil with ControlOnly.
func (c *Cluster) Nodes() *node.Node { return c.nodes }

// Pod finds a Pod by NAMESPACE/NAME: the one of that name, else one that runs and belongs to a Deployment or
// StatefulSet of that name, ready ones first; or by NAMESPACE/LABEL=VALUE. While the API server is away it is looked for
// at the nodes, as the nodes saw it last.
func (c *Cluster) Pod(ctx context.Context, which string) (*corev1.Pod, error) {
	namespace, name, ok := strings.Cut(which, "/")
	if !ok {
		return nil, fmt.Errorf("pod %q: say NAMESPACE/NAME or NAMESPACE/LABEL=VALUE", which)
	}
	client, err := c.Client()
	if err != nil {
		return nil, err
	}
	var o metav1.ListOptions
	if strings.Contains(name, "=") {
		o.LabelSelector, name = name, ""
	}
	var pods []corev1.Pod
	list, err := client.CoreV1().Pods(namespace).List(ctx, o)
	switch {
	case err == nil:
		pods = list.Items
	case apierrors.ReasonForError(err) == metav1.StatusReasonUnknown && c.nodes != nil: // nobody answers
		chosen, failed := labels.Parse(o.LabelSelector)
		if failed != nil {
			return nil, failed
		}
		for _, p := range c.nodes.Pods(namespace) {
			if chosen.Matches(labels.Set(p.Labels)) {
				pods = append(pods, p)
			}
		}
	default:
		return nil, err
	}
	var found []*corev1.Pod
	for i := range pods {
		p := &pods[i]
		if p.Name == name {
			return p, nil
		}
		if (name == "" || strings.HasPrefix(p.Name, name+"-")) && p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
			found = append(found, p)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("cluster %s has no running pod %s", c.Name(), which)
	}
	sort.SliceStable(found, func(i, j int) bool { return ready(found[i]) && !ready(found[j]) })
	return found[0], nil
}

func ready(p *corev1.Pod) bool {
	for _, k := range p.Status.Conditions {
		if k.Type == corev1.PodReady {
			return k.Status == corev1.ConditionTrue
		}
	}
	return false
}

// Exec runs a program in a container of a Pod ("" is the first), found as Pod does, to its end, as its user and with its
// network. The error is nil when the program ran, whatever its code.
func (c *Cluster) Exec(ctx context.Context, pod, container string, argv ...string) (stdout, stderr string, code int, err error) {
	p, err := c.Pod(ctx, pod)
	if err != nil {
		return "", "", -1, err
	}
	if len(argv) > 0 && !strings.ContainsRune(argv[0], '/') {
		if path, err := c.lab.net.Program(argv[0]); err == nil { // the lab's programs are in no container's PATH
			argv = append([]string{path}, argv[1:]...)
		}
	}
	return c.nodes.Exec(ctx, p.Namespace, p.Name, container, argv, nil)
}

// Signal sends a signal to a container of a Pod ("" is the first), found as Pod does.
func (c *Cluster) Signal(ctx context.Context, pod, container string, sig syscall.Signal) error {
	p, err := c.Pod(ctx, pod)
	if err != nil {
		return err
	}
	return c.nodes.KillContainer(p.Namespace, p.Name, container, sig)
}

// PodsReady returns nil when the namespace has Pods and all of them are ready, else an error that names one that is not.
func (c *Cluster) PodsReady(ctx context.Context, namespace, selector string) error {
	client, err := c.Client()
	if err != nil {
		return err
	}
	list, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return err
	}
	for i := range list.Items {
		if p := &list.Items[i]; !ready(p) && p.Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("pod %s/%s of %s is not ready: %s", p.Namespace, p.Name, c.Name(), why(p))
		}
	}
	if len(list.Items) == 0 {
		return fmt.Errorf("namespace %s of %s has no pods %s", namespace, c.Name(), selector)
	}
	return nil
}

// why says what a Pod waits for.
func why(p *corev1.Pod) string {
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		switch {
		case s.State.Waiting != nil && s.State.Waiting.Message != "":
			return fmt.Sprintf("container %s: %s: %s", s.Name, s.State.Waiting.Reason, s.State.Waiting.Message)
		case s.State.Terminated != nil && s.State.Terminated.ExitCode != 0:
			return fmt.Sprintf("container %s ended with code %d", s.Name, s.State.Terminated.ExitCode)
		}
	}
	return string(p.Status.Phase)
}

// dns starts CoreDNS in the cluster and waits until it answers.
func (c *Cluster) dns(ctx context.Context) error {
	if err := c.addon(ctx, "coredns"); err != nil {
		return err
	}
	return lab.Eventually(ctx, time.Minute, func(ctx context.Context) error { return c.PodsReady(ctx, "kube-system", "k8s-app=kube-dns") })
}
