package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Pod is one pod of a cluster, as the lab runs it.
type Pod struct {
	Name, Namespace, ServiceAccount string
	Labels                          map[string]string
	IP                              netip.Addr
	Meshed                          bool // has a sidecar
	Gateway                         bool // is a gateway at the edge of the mesh: label istio: ingressgateway or egressgateway
	Node                            *Node
	Apps                            []*Proc // one a container
	Agent                           *Proc   // nil when neither meshed nor a gateway

	object *corev1.Pod
}

// ProxyImage is the image of a gateway's container. It stands for no program: the lab starts an agent.
const ProxyImage = "isthmus/proxy"

// nodeName is the pod's node in the lab.
func nodeName(cluster, namespace, name string) string {
	if namespace == "default" {
		return cluster + "/" + name
	}
	return cluster + "/" + namespace + "." + name
}

// Pod returns a pod by NAME (namespace default) or NAMESPACE.NAME, nil when it does not run.
func (c *Cluster) Pod(name string) *Pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pods[c.Spec.Name+"/"+name]
}

// Pods returns all pods that run, sorted by name.
func (c *Cluster) Pods() []*Pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*Pod
	for _, p := range c.pods {
		out = append(out, p)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Node.Name < out[j].Node.Name })
	return out
}

// Sync makes the running pods those in the cluster's configuration: it starts new ones and ends those that are gone.
// A pod whose YAML changed in another way stays as it is.
func (c *Cluster) Sync(ctx context.Context) error {
	ready := make(chan struct{})
	close(ready)
	return c.sync(ctx, ready)
}

func (c *Cluster) sync(ctx context.Context, ready <-chan struct{}) error {
	want, err := c.readPods()
	if err != nil {
		return err
	}
	var gone []*Pod
	c.mu.Lock()
	for name, p := range c.pods {
		if want[name] == nil {
			gone = append(gone, p)
			delete(c.pods, name)
		}
		delete(want, name)
	}
	c.mu.Unlock()
	for _, p := range gone {
		if err := c.lab.removeNode(p.Node); err != nil {
			return err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	for name, p := range want {
		g.Go(func() error {
			if err := c.startPod(ctx, p, ready); err != nil {
				return fmt.Errorf("pod %s: %w", name, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// readPods reads the pods of the configuration by node name. What does not parse is left out: isthmusd reports it.
func (c *Cluster) readPods() (map[string]*Pod, error) {
	pods, namespaces := map[string]*Pod{}, map[string]map[string]string{}
	err := filepath.WalkDir(c.ConfigDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), ".") || (filepath.Ext(path) != ".yaml" && filepath.Ext(path) != ".yml") {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return c.decode(path, data, pods, namespaces)
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read pods: %w", err)
	}
	for _, p := range pods {
		p.Gateway = p.Labels["istio"] == "ingressgateway" || p.Labels["istio"] == "egressgateway"
		p.Meshed = !p.Gateway && meshed(p.object, namespaces[p.Namespace])
	}
	return pods, nil
}

func (c *Cluster) decode(path string, data []byte, pods map[string]*Pod, namespaces map[string]map[string]string) error {
	for r := kyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data))); ; {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		var head struct {
			metav1.TypeMeta   `json:",inline"`
			metav1.ObjectMeta `json:"metadata"`
		}
		if err != nil || yaml.Unmarshal(doc, &head) != nil || head.APIVersion != "v1" {
			if err != nil {
				return nil
			}
			continue
		}
		switch head.Kind {
		case "Namespace":
			namespaces[head.Name] = head.Labels
		case "Pod":
			p, err := c.newPod(doc)
			if err != nil {
				c.lab.log.Warn("pod left out", "file", path, "pod", head.Name, "err", err)
				continue
			}
			pods[nodeName(c.Spec.Name, p.Namespace, p.Name)] = p
		}
	}
}

func (c *Cluster) newPod(doc []byte) (*Pod, error) {
	o := &corev1.Pod{}
	if err := yaml.Unmarshal(doc, o); err != nil {
		return nil, err
	}
	p := &Pod{Name: o.Name, Namespace: o.Namespace, ServiceAccount: o.Spec.ServiceAccountName, Labels: o.Labels, object: o}
	if p.Namespace == "" {
		p.Namespace = "default"
	}
	if p.ServiceAccount == "" {
		p.ServiceAccount = "default"
	}
	ip, err := netip.ParseAddr(o.Status.PodIP)
	if err != nil || !c.Spec.PodCIDR.Contains(ip) {
		return nil, fmt.Errorf("status.podIP %q: give an address in podCIDR %v", o.Status.PodIP, c.Spec.PodCIDR)
	}
	p.IP = ip
	return p, nil
}

// meshed is the rule by which a pod gets a sidecar, as Istio's injector has it.
func meshed(p *corev1.Pod, namespace map[string]string) bool {
	const inject = "sidecar.istio.io/inject"
	switch {
	case p.Labels[inject] == "false" || p.Annotations[inject] == "false":
		return false
	case p.Labels[inject] == "true" || p.Labels["security.istio.io/tlsMode"] == "istio":
		return true
	}
	return namespace["istio-injection"] == "enabled" || namespace["isthmus.io/injection"] == "enabled"
}

func (c *Cluster) startPod(ctx context.Context, p *Pod, ready <-chan struct{}) error {
	name := nodeName(c.Spec.Name, p.Namespace, p.Name)
	var more []netip.Addr
	for _, ip := range p.object.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			more = append(more, a)
		}
	}
	var err error
	if p.Node, err = c.podNode(strings.TrimPrefix(name, c.Spec.Name+"/"), p.Namespace, p.IP, more...); err != nil {
		return err
	}
	c.mu.Lock()
	c.pods[name] = p
	c.mu.Unlock()
	if c.lab.cfg.NetworkOnly {
		return nil
	}
	for i := range p.object.Spec.Containers {
		if p.Gateway && image(p.object.Spec.Containers[i].Image) == ProxyImage {
			continue
		}
		if err := c.lab.tolerate(c.startContainer(ctx, p, &p.object.Spec.Containers[i])); err != nil {
			return err
		}
	}
	if !p.Meshed && !p.Gateway {
		return nil
	}
	if err := await(ctx, ready); err != nil {
		return err
	}
	release, err := c.lab.slot(ctx)
	if err != nil {
		return err
	}
	defer release()
	role := "sidecar"
	if p.Gateway {
		role = "gateway"
	}
	proc, err := c.startAgent(ctx, agent{role: role, name: p.Name, namespace: p.Namespace, account: p.ServiceAccount,
		node: p.Node, labels: p.Labels, capture: !p.Gateway})
	c.mu.Lock()
	p.Agent = proc
	c.mu.Unlock()
	return c.lab.tolerate(err)
}

func (c *Cluster) startContainer(ctx context.Context, p *Pod, k *corev1.Container) error {
	env := environment(p, k)
	argv, err := c.lab.argv(k.Image, k.Command, k.Args, env)
	if err != nil {
		return err
	}
	release, err := c.lab.slot(ctx)
	if err != nil {
		return err
	}
	defer release()
	var list []string
	for _, e := range env {
		list = append(list, e[0]+"="+e[1])
	}
	proc, err := c.lab.start(p.Node, k.Name, argv, list)
	if err != nil {
		return err
	}
	c.mu.Lock()
	p.Apps = append(p.Apps, proc)
	c.mu.Unlock()
	probe := k.ReadinessProbe
	if probe == nil || probe.HTTPGet == nil {
		return nil
	}
	port := probe.HTTPGet.Port.IntValue()
	for _, kp := range k.Ports {
		if kp.Name == probe.HTTPGet.Port.StrVal && port == 0 {
			port = int(kp.ContainerPort)
		}
	}
	return c.lab.waitReady(ctx, proc, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		return p.Node.get(ctx, port, probe.HTTPGet.Path)
	})
}

// image is an image's name without tag and digest.
func image(name string) string {
	name, _, _ = strings.Cut(name, "@")
	if i := strings.LastIndex(name, ":"); i > strings.LastIndex(name, "/") {
		name = name[:i]
	}
	return name
}

// argv maps a container's image to a program; a command of its own replaces the image's.
func (l *Lab) argv(name string, command, args []string, env [][2]string) ([]string, error) {
	argv := command
	if len(argv) == 0 {
		program, ok := l.world.Images[image(name)]
		if !ok {
			return nil, fmt.Errorf("image %s has no program; add it to images in world.yaml", image(name))
		}
		argv = []string{program}
	}
	var out []string
	for _, a := range append(append([]string{}, argv...), args...) {
		for _, e := range env {
			a = strings.ReplaceAll(a, "$("+e[0]+")", e[1])
		}
		out = append(out, a)
	}
	return out, nil
}

// environment is a container's, with the fields of the pod that the downward API offers.
func environment(p *Pod, k *corev1.Container) [][2]string {
	out := [][2]string{{"HOSTNAME", p.Name}}
	for _, e := range k.Env {
		v := e.Value
		if e.ValueFrom != nil && e.ValueFrom.FieldRef != nil {
			switch path := e.ValueFrom.FieldRef.FieldPath; path {
			case "metadata.name":
				v = p.Name
			case "metadata.namespace":
				v = p.Namespace
			case "status.podIP":
				v = p.IP.String()
			case "spec.serviceAccountName":
				v = p.ServiceAccount
			default:
				key, ok := strings.CutPrefix(path, "metadata.labels['")
				if ok {
					v = p.Labels[strings.TrimSuffix(key, "']")]
				}
			}
		}
		for _, o := range out {
			v = strings.ReplaceAll(v, "$("+o[0]+")", o[1])
		}
		out = append(out, [2]string{e.Name, v})
	}
	return out
}

// startMachine starts the programs that a machine runs from the beginning.
func (l *Lab) startMachine(m MachineSpec) error {
	if l.cfg.NetworkOnly {
		return nil
	}
	for _, s := range m.Processes {
		env := [][2]string{{"HOSTNAME", m.Name}}
		for k, v := range s.Env {
			env = append(env, [2]string{k, v})
		}
		sort.Slice(env, func(i, j int) bool { return env[i][0] < env[j][0] })
		argv, err := l.argv(s.Image, s.Command, s.Args, env)
		if err != nil {
			return err
		}
		var list []string
		for _, e := range env {
			list = append(list, e[0]+"="+e[1])
		}
		if _, err := l.Start(m.Name, s.Name, argv, list); l.tolerate(err) != nil {
			return err
		}
	}
	return nil
}
