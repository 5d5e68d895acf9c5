package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"text/template"
	"time"

	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"
)

// Cluster is one cluster of a lab.
type Cluster struct {
	Spec      ClusterSpec
	Dir       string // its part of the run's folder
	ConfigDir string // the copy of its YAML that isthmusd reads; see Apply
	Socket    string // isthmusd's admin socket
	Router    *Node

	lab          *Lab
	controlPlane daemon
	dns          daemon
	gateways     []*daemon
	machines     []machineLink

	mu   sync.Mutex
	pods map[string]*Pod
}

// daemon is a program of the cluster itself; spec is set for gateways.
type daemon struct {
	spec GatewaySpec
	node *Node
	mu   sync.Mutex
	proc *Proc
}

func (d *daemon) process() *Proc {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.proc
}

func (d *daemon) set(p *Proc) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.proc = p
}

type machineLink struct {
	spec   MachineSpec
	bridge string
}

const xdsPort = 15012

func (c *Cluster) up(ctx context.Context) error {
	source := filepath.Join(c.lab.world.Dir, c.Spec.Config)
	if err := os.CopyFS(c.ConfigDir, os.DirFS(source)); err != nil && !(c.lab.cfg.NetworkOnly && errors.Is(err, os.ErrNotExist)) {
		return fmt.Errorf("copy configuration %s: %w", source, err)
	}
	ready := make(chan struct{}) // closed when isthmusd answers
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		if !c.lab.cfg.NetworkOnly {
			if err := c.lab.tolerate(c.StartControlPlane(ctx)); err != nil {
				return err
			}
		}
		close(ready)
		return nil
	})
	g.Go(func() error { return c.sync(ctx, ready) })
	if !c.lab.cfg.NetworkOnly {
		g.Go(func() error { return c.lab.tolerate(c.startDNS(ctx, ready)) })
		for _, gw := range c.gateways {
			g.Go(func() error { return c.lab.tolerate(c.startGateway(ctx, gw, ready)) })
		}
	}
	return g.Wait()
}

// tolerate turns a missing program into a warning when the configuration says so.
func (l *Lab) tolerate(err error) error {
	if l.cfg.Tolerant && errors.Is(err, ErrNoProgram) {
		l.log.Warn("not started", "err", err)
		return nil
	}
	return err
}

// slot waits for leave to start one more process.
func (l *Lab) slot(ctx context.Context) (release func(), err error) {
	select {
	case l.slots <- struct{}{}:
		return func() { <-l.slots }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func await(ctx context.Context, ready <-chan struct{}) error {
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// waitReady polls until a process is ready, and fails at once when it ends.
func (l *Lab) waitReady(ctx context.Context, p *Proc, check func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-p.done:
			cancel()
		case <-stop:
		}
	}()
	err := Eventually(ctx, l.cfg.Ready, check)
	if err == nil {
		return nil
	}
	what := "is not ready"
	if !p.Alive() {
		what = fmt.Sprintf("ended with code %d before it was ready", p.code.Load())
	}
	return fmt.Errorf("%s of %s %s: %w; the end of %s:\n%s", p.Name, p.Node.Name, what, err, p.Log, p.Tail(15))
}

// get asks for a page on a node's loopback and wants status 200.
func (n *Node) get(ctx context.Context, port int, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	url := "http://" + netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port)).String() + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := n.HTTP().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<16))
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: status %d", url, resp.StatusCode)
	}
	return nil
}

// overlay lays the values of over on those of base; maps are merged, all else is replaced.
func overlay(base, over map[string]any) map[string]any {
	for k, v := range over {
		if o, ok := v.(map[string]any); ok {
			if b, ok := base[k].(map[string]any); ok {
				base[k] = overlay(b, o)
				continue
			}
		}
		base[k] = v
	}
	return base
}

func writeYAML(path string, v any) error {
	b, err := yaml.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return writeFile(path, b, 0o600)
}

func (c *Cluster) dataDir() string { return filepath.Join(c.Dir, "isthmusd") }

// RootCert is the file with the cluster's root certificate, written by isthmusd.
func (c *Cluster) RootCert() string { return filepath.Join(c.dataDir(), "root-cert.pem") }

// ControlPlane returns isthmusd's process, nil before it was started.
func (c *Cluster) ControlPlane() *Proc { return c.controlPlane.process() }

// StartControlPlane starts isthmusd, again after it ended, and waits until its admin socket answers.
func (c *Cluster) StartControlPlane(ctx context.Context) error {
	s := c.Spec
	at := netip.AddrPortFrom(s.ControlPlane, xdsPort).String()
	gateways := []any{}
	for _, g := range s.Gateways {
		gateways = append(gateways, netip.AddrPortFrom(g.WANAddress, GatewayPort).String())
	}
	file := filepath.Join(c.Dir, "isthmusd.yaml")
	if err := writeYAML(file, overlay(map[string]any{
		"cluster": s.Name, "trustDomain": s.TrustDomain, "network": s.Network, "dataDir": c.dataDir(),
		"listen": fmt.Sprintf("0.0.0.0:%d", xdsPort), "advertise": []any{at}, "gateways": gateways,
		"source": map[string]any{"dir": c.ConfigDir}, "admin": map[string]any{"socket": c.Socket},
		"metrics": "0.0.0.0:15014", "federation": map[string]any{"autoApprove": true},
	}, s.Isthmusd)); err != nil {
		return err
	}
	if err := os.MkdirAll(c.dataDir(), 0o700); err != nil {
		return err
	}
	p, err := c.lab.start(c.controlPlane.node, "isthmusd", []string{"isthmusd", "--config", file}, nil)
	if err != nil {
		return err
	}
	c.controlPlane.set(p)
	err = c.lab.waitReady(ctx, p, func(ctx context.Context) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", c.Socket)
		if err != nil {
			return err
		}
		_ = conn.Close()
		_, err = os.Stat(c.RootCert())
		return err
	})
	if err == nil {
		c.lab.log.Info("control plane is up", "cluster", s.Name, "pid", p.PID())
	}
	return err
}

// KillControlPlane sends isthmusd a signal.
func (c *Cluster) KillControlPlane(sig syscall.Signal) error {
	p := c.ControlPlane()
	if p == nil {
		return fmt.Errorf("isthmusd of %s was not started", c.Spec.Name)
	}
	return p.KillGroup(sig)
}

// Isthmus runs the operator's tool beside the cluster's isthmusd, on its admin socket.
func (c *Cluster) Isthmus(ctx context.Context, args ...string) (stdout, stderr string, code int, err error) {
	argv := append([]string{"isthmus", "--socket", c.Socket}, args...)
	return c.lab.Exec(ctx, c.Spec.Name+"/isthmusd", argv)
}

// token asks isthmusd for a workload's token and writes it to a file, as a kubelet does.
func (c *Cluster) token(ctx context.Context, file, namespace, account, pod string) error {
	stdout, stderr, code, err := c.Isthmus(ctx, "token", "workload", "--namespace", namespace, "--service-account", account, "--pod", pod)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d: %s", code, strings.TrimSpace(stderr))
	}
	if err != nil {
		return fmt.Errorf("token of %s/%s: %w", namespace, pod, err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return writeFile(file, []byte(strings.TrimSpace(stdout)), 0o600)
}

// agent describes an isthmus-agent to start.
type agent struct {
	role, name, namespace, account string
	node                           *Node
	labels                         map[string]string
	capture                        bool
}

// startAgent writes an agent's token and configuration, starts it and waits until it is ready.
func (c *Cluster) startAgent(ctx context.Context, a agent) (*Proc, error) {
	dir := filepath.Join(c.Dir, strings.TrimPrefix(a.node.Name, c.Spec.Name+"/"))
	tokenFile, file := filepath.Join(dir, "token"), filepath.Join(dir, "agent.yaml")
	if _, err := c.lab.program("isthmus-agent"); err != nil {
		return nil, err
	}
	if err := c.token(ctx, tokenFile, a.namespace, a.account, a.name); err != nil {
		return nil, err
	}
	addresses := []any{}
	for _, ip := range a.node.Addresses {
		addresses = append(addresses, ip.String())
	}
	if err := writeYAML(file, overlay(map[string]any{
		"role": a.role, "name": a.name, "namespace": a.namespace, "serviceAccount": a.account,
		"cluster": c.Spec.Name, "trustDomain": c.Spec.TrustDomain, "network": c.Spec.Network,
		"addresses": addresses, "labels": a.labels,
		"controlPlane": map[string]any{
			"addresses":  []any{netip.AddrPortFrom(c.Spec.ControlPlane, xdsPort).String()},
			"serverName": "xds." + c.Spec.TrustDomain,
		},
		"rootCert": c.RootCert(), "tokenFile": tokenFile, "dataDir": filepath.Join(dir, "data"),
		"envoy":   map[string]any{"path": c.lab.cfg.Envoy, "concurrency": 1},
		"capture": map[string]any{"enabled": a.capture},
	}, c.Spec.Agent)); err != nil {
		return nil, err
	}
	p, err := c.lab.start(a.node, "agent", []string{"isthmus-agent", "run", "--config", file}, nil)
	if err != nil {
		return nil, err
	}
	return p, c.lab.waitReady(ctx, p, func(ctx context.Context) error { return a.node.get(ctx, 15021, "/healthz/ready") })
}

// Gateways returns the names of the cluster's east-west gateways in the order of the world.
func (c *Cluster) Gateways() []string {
	var out []string
	for _, g := range c.gateways {
		out = append(out, g.spec.Name)
	}
	return out
}

func (c *Cluster) gateway(name string) (*daemon, error) {
	for _, g := range c.gateways {
		if g.spec.Name == name {
			return g, nil
		}
	}
	return nil, fmt.Errorf("cluster %s has no gateway %q; it has %s", c.Spec.Name, name, strings.Join(c.Gateways(), ", "))
}

func (c *Cluster) startGateway(ctx context.Context, g *daemon, ready <-chan struct{}) error {
	if err := await(ctx, ready); err != nil {
		return err
	}
	release, err := c.lab.slot(ctx)
	if err != nil {
		return err
	}
	defer release()
	role := "gateway"
	if g.spec.Kind == KindRelay {
		role = "relay"
	}
	p, err := c.startAgent(ctx, agent{
		role: role, name: g.spec.Name, namespace: "istio-system", account: "eastwestgateway", node: g.node,
		labels: map[string]string{"istio": "eastwestgateway", "app": "eastwestgateway", "topology.istio.io/network": c.Spec.Network},
	})
	if p != nil {
		g.set(p)
	}
	return err
}

// StartGateway starts an east-west gateway, again after KillGateway, and waits until it is ready.
func (c *Cluster) StartGateway(ctx context.Context, name string) error {
	g, err := c.gateway(name)
	if err != nil {
		return err
	}
	ready := make(chan struct{})
	close(ready)
	return c.startGateway(ctx, g, ready)
}

// KillGateway ends every process of an east-west gateway at once (SIGKILL): its connections break.
func (c *Cluster) KillGateway(name string) error {
	if _, err := c.gateway(name); err != nil {
		return err
	}
	return c.lab.KillNode(c.Spec.Name+"/"+name, syscall.SIGKILL)
}

// CorefileData is what the template of the Corefile may use.
type CorefileData struct {
	Cluster, TrustDomain, Server, ServerName, RootCert, Token, DataDir string
}

const corefile = `.:53 {
    errors
    health 127.0.0.1:8080
    ready 127.0.0.1:8181
    isthmus global cluster.local clusterset.local in-addr.arpa ip6.arpa {
        server {{.Server}}
        server_name {{.ServerName}}
        root {{.RootCert}}
        token {{.Token}}
        cluster {{.Cluster}}
        cache {{.DataDir}}/hosts.cache
    }
}
`

func (c *Cluster) startDNS(ctx context.Context, ready <-chan struct{}) error {
	if err := await(ctx, ready); err != nil {
		return err
	}
	release, err := c.lab.slot(ctx)
	if err != nil {
		return err
	}
	defer release()
	dir := filepath.Join(c.Dir, "coredns")
	if _, err := c.lab.program("coredns"); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	d := CorefileData{
		Cluster: c.Spec.Name, TrustDomain: c.Spec.TrustDomain, RootCert: c.RootCert(), Token: filepath.Join(dir, "token"),
		Server: netip.AddrPortFrom(c.Spec.ControlPlane, xdsPort).String(), ServerName: "xds." + c.Spec.TrustDomain, DataDir: dir,
	}
	if err := c.token(ctx, d.Token, "kube-system", "coredns", "coredns"); err != nil {
		return err
	}
	source := corefile
	if c.lab.world.Corefile != "" {
		source = c.lab.world.Corefile
	}
	t, err := template.New("corefile").Option("missingkey=error").Parse(source)
	if err != nil {
		return fmt.Errorf("corefile of the world: %w", err)
	}
	var text strings.Builder
	if err := t.Execute(&text, d); err != nil {
		return fmt.Errorf("corefile of the world: %w", err)
	}
	file := filepath.Join(dir, "Corefile")
	if err := writeFile(file, []byte(text.String()), 0o644); err != nil {
		return err
	}
	p, err := c.lab.start(c.dns.node, "coredns", []string{"coredns", "-conf", file}, nil)
	if err != nil {
		return err
	}
	c.dns.set(p)
	return c.lab.waitReady(ctx, p, func(ctx context.Context) error { return c.dns.node.get(ctx, 8181, "/ready") })
}

// Apply writes a YAML file into the cluster's configuration, as kubectl apply does with a cluster.
func (c *Cluster) Apply(name string, data []byte) error {
	return writeFile(filepath.Join(c.ConfigDir, filepath.Base(name)), data, 0o644)
}

// Delete removes a YAML file from the cluster's configuration.
func (c *Cluster) Delete(name string) error {
	return os.Remove(filepath.Join(c.ConfigDir, filepath.Base(name)))
}
