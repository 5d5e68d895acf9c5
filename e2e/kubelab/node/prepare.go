package node

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// prepare says how a container is to be started.
func (c *container) prepare(ctx context.Context, spec *corev1.Container, prog Program, id string) (*box.Spec, error) {
	w := c.w
	env, err := c.environment(ctx, spec, prog)
	if err != nil {
		return nil, err
	}
	mounts, err := c.mounts(spec, env.values)
	if err != nil {
		return nil, err
	}
	for target, source := range prog.Files {
		mounts = append(mounts, box.Mount{Source: source, Target: target, ReadOnly: true})
	}
	argv, err := arguments(spec, prog, env.values)
	if err != nil {
		return nil, err
	}
	if len(prog.Command) > 0 && filepath.IsAbs(prog.Command[0]) {
		// The program's folder is on the path, and seen as it is now; of one that others use for other things, it alone.
		if bin := filepath.Dir(prog.Command[0]); !slices.Contains(filepath.SplitList(env.values["PATH"]), bin) {
			seen := bin
			if slices.Contains([]string{"/", "/tmp", "/run", "/var", "/root"}, bin) {
				seen = prog.Command[0]
			}
			mounts = append(mounts, box.Mount{Source: seen, Target: seen, ReadOnly: true})
			env.set("PATH", bin+":"+env.values["PATH"])
		}
	}
	dir := filepath.Join(w.dir(), "containers", id[:16])
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	w.mu.Lock()
	net := w.net
	w.mu.Unlock()
	pod := w.latest()
	b := &box.Spec{
		Dir: dir, Net: net, Mounts: mounts, Files: w.files(ctx, pod), Argv: argv, Env: env.list(), WorkDir: spec.WorkingDir,
	}
	if !pod.Spec.HostNetwork {
		b.Hostname = w.hostname()
	}
	user(b, pod, spec, prog)
	if spec.SecurityContext != nil && isTrue(spec.SecurityContext.RunAsNonRoot) && b.UID == 0 {
		return nil, fmt.Errorf("container has runAsNonRoot and image will run as root")
	}
	return b, nil
}

// arguments are the entry point and arguments, with the Pod's in the place of the image's.
func arguments(spec *corev1.Container, prog Program, values map[string]string) ([]string, error) {
	argv := slices.Clone(prog.Command)
	if len(spec.Command) > 0 {
		argv = nil
		for _, a := range spec.Command {
			argv = append(argv, expand(a, values))
		}
	}
	switch {
	case len(spec.Args) > 0:
		for _, a := range spec.Args {
			argv = append(argv, expand(a, values))
		}
	case len(spec.Command) == 0:
		argv = append(argv, prog.Args...)
	}
	if len(argv) == 0 {
		return nil, fmt.Errorf("no command specified")
	}
	return argv, nil
}

// defaultCapabilities are what runtimes leave to containers.
var defaultCapabilities = []int{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW, unix.CAP_SETGID, unix.CAP_SETUID,
	unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_CHROOT, unix.CAP_KILL, unix.CAP_AUDIT_WRITE,
}

var capabilityNumbers = map[string]int{
	"CHOWN": unix.CAP_CHOWN, "DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH, "FSETID": unix.CAP_FSETID,
	"FOWNER": unix.CAP_FOWNER, "MKNOD": unix.CAP_MKNOD, "NET_RAW": unix.CAP_NET_RAW, "NET_ADMIN": unix.CAP_NET_ADMIN, "SETGID": unix.CAP_SETGID,
	"SETUID": unix.CAP_SETUID, "SETFCAP": unix.CAP_SETFCAP, "SETPCAP": unix.CAP_SETPCAP, "NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
	"SYS_CHROOT": unix.CAP_SYS_CHROOT, "KILL": unix.CAP_KILL, "AUDIT_WRITE": unix.CAP_AUDIT_WRITE, "SYS_ADMIN": unix.CAP_SYS_ADMIN,
	"SYS_PTRACE": unix.CAP_SYS_PTRACE, "SYS_RESOURCE": unix.CAP_SYS_RESOURCE, "IPC_LOCK": unix.CAP_IPC_LOCK, "SYS_TIME": unix.CAP_SYS_TIME,
	"SYS_MODULE": unix.CAP_SYS_MODULE, "BPF": unix.CAP_BPF, "PERFMON": unix.CAP_PERFMON,
}

// user sets whom the container runs as and what root may do in it.
func user(b *box.Spec, pod *corev1.Pod, spec *corev1.Container, prog Program) {
	b.UID, b.GID = int(prog.UID), int(prog.UID)
	set := func(uid, gid *int64) {
		if uid != nil {
			b.UID = int(*uid)
			if gid == nil {
				b.GID = 0
			}
		}
		if gid != nil {
			b.GID = int(*gid)
		}
	}
	if s := pod.Spec.SecurityContext; s != nil {
		set(s.RunAsUser, s.RunAsGroup)
		for _, g := range s.SupplementalGroups {
			b.Groups = append(b.Groups, int(g))
		}
		if s.FSGroup != nil {
			b.Groups = append(b.Groups, int(*s.FSGroup))
		}
	}
	b.Capabilities = slices.Clone(defaultCapabilities)
	s := spec.SecurityContext
	if s == nil {
		return
	}
	gid := s.RunAsGroup
	if gid == nil && pod.Spec.SecurityContext != nil {
		gid = pod.Spec.SecurityContext.RunAsGroup
	}
	set(s.RunAsUser, gid)
	if isTrue(s.Privileged) {
		b.Capabilities = nil
		return
	}
	if s.Capabilities == nil {
		return
	}
	for _, name := range s.Capabilities.Drop {
		drop, all := capabilityNumbers[string(name)], name == "ALL"
		b.Capabilities = slices.DeleteFunc(b.Capabilities, func(c int) bool { return all || c == drop })
	}
	for _, name := range s.Capabilities.Add {
		if name == "ALL" {
			b.Capabilities = nil
			return
		}
		if c, ok := capabilityNumbers[strings.TrimPrefix(string(name), "CAP_")]; ok {
			b.Capabilities = append(b.Capabilities, c)
		}
	}
}

func (w *worker) hostname() string {
	pod := w.latest()
	if pod.Spec.HostNetwork {
		return pod.Spec.NodeName
	}
	name := pod.Spec.Hostname
	if name == "" {
		name = pod.Name
	}
	if len(name) > 63 {
		name = strings.TrimRight(name[:63], "-.")
	}
	return name
}

// files are the container's own files below /etc.
func (w *worker) files(ctx context.Context, pod *corev1.Pod) map[string]string {
	var hosts strings.Builder
	hosts.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	name := w.hostname()
	if pod.Spec.Subdomain != "" {
		name = fmt.Sprintf("%s.%s.%s.svc.%s\t%s", name, pod.Spec.Subdomain, pod.Namespace, w.n.cfg.ClusterDomain, name)
	}
	w.mu.Lock()
	ips := w.ips
	w.mu.Unlock()
	for _, ip := range ips {
		fmt.Fprintf(&hosts, "%v\t%s\n", ip, name)
	}
	for _, a := range pod.Spec.HostAliases {
		fmt.Fprintf(&hosts, "%s\t%s\n", a.IP, strings.Join(a.Hostnames, "\t"))
	}
	return map[string]string{
		"/etc/hosts": hosts.String(), "/etc/hostname": w.hostname() + "\n", "/etc/resolv.conf": w.resolvConf(ctx, pod),
	}
}

func (w *worker) resolvConf(ctx context.Context, pod *corev1.Pod) string {
	var servers, search, options []string
	policy := pod.Spec.DNSPolicy
	switch {
	case policy == corev1.DNSNone:
	case policy == corev1.DNSDefault || policy == corev1.DNSClusterFirst && pod.Spec.HostNetwork:
		servers = []string{w.node.Addresses[0].String()} // the router, as the node's own resolver
	default:
		d := w.n.cfg.ClusterDomain
		search = []string{pod.Namespace + ".svc." + d, "svc." + d, d}
		options = []string{"ndots:5"}
		servers = w.n.clusterDNS(ctx)
		if len(servers) == 0 {
			servers = []string{w.node.Addresses[0].String()}
		}
	}
	if c := pod.Spec.DNSConfig; c != nil {
		servers, search = append(servers, c.Nameservers...), append(search, c.Searches...)
		for _, o := range c.Options {
			text := o.Name
			if o.Value != nil {
				text += ":" + *o.Value
			}
			options = slices.DeleteFunc(options, func(s string) bool { return strings.SplitN(s, ":", 2)[0] == o.Name })
			options = append(options, text)
		}
	}
	var b strings.Builder
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(options, " "))
	}
	return b.String()
}

// clusterDNS is where the cluster's DNS answers: the Service kube-dns.
func (n *Node) clusterDNS(ctx context.Context) []string {
	svc, err := n.factory.Core().V1().Services().Lister().Services("kube-system").Get("kube-dns")
	if err != nil {
		if svc, err = n.client.CoreV1().Services("kube-system").Get(ctx, "kube-dns", metav1.GetOptions{}); err != nil {
			return nil
		}
	}
	var out []string
	for _, ip := range svc.Spec.ClusterIPs {
		if _, err := netip.ParseAddr(ip); err == nil {
			out = append(out, ip)
		}
	}
	return out
}
