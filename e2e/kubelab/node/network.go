package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// network calls the nodes' network plugins.
type network struct {
	n   *Node
	cni *libcni.CNIConfig
}

func newNetwork(n *Node) (*network, error) {
	nw := &network{n: n}
	nw.cni = libcni.NewCNIConfigWithCacheDir([]string{"/opt/cni/bin"}, filepath.Join(n.cfg.RunDir, "cni"), &pluginExec{n: n})
	if n.cfg.CNIPlugin == "" {
		return nw, nil
	}
	program, err := os.ReadFile(n.cfg.CNIPlugin)
	if err != nil {
		return nil, fmt.Errorf("network plugin: %w; build it first", err)
	}
	if err := os.WriteFile(filepath.Join(n.cfg.CNIBinDir, "labcni"), program, 0o755); err != nil {
		return nil, fmt.Errorf("network plugin: %w", err)
	}
	if files, err := libcni.ConfFiles(n.cfg.CNIConfDir, []string{".conflist", ".conf", ".json"}); err != nil || len(files) > 0 {
		return nw, err
	}
	const conf = `{
  "cniVersion": "1.0.0",
  "name": "lab",
  "plugins": [
    {"type": "labcni", "capabilities": {"ipRanges": true}}
  ]
}
`
	return nw, os.WriteFile(filepath.Join(n.cfg.CNIConfDir, "10-lab.conflist"), []byte(conf), 0o644)
}

// list reads the configuration that is in force: the first by name.
func (nw *network) list() (*libcni.NetworkConfigList, error) {
	files, err := libcni.ConfFiles(nw.n.cfg.CNIConfDir, []string{".conflist", ".conf", ".json"})
	if err != nil {
		return nil, err
	}
	sort.Strings(files)
	var errs []error
	for _, f := range files {
		list, err := load(f)
		if err == nil && len(list.Plugins) > 0 {
			return list, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", filepath.Base(f), err))
	}
	return nil, errors.Join(append(errs, errors.New("cni plugin not initialized: no network configuration in /etc/cni/net.d"))...)
}

func load(file string) (*libcni.NetworkConfigList, error) {
	if strings.HasSuffix(file, ".conflist") {
		return libcni.NetworkConfFromFile(file)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	conf, err := libcni.NetworkPluginConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	one, err := json.Marshal(map[string]any{"cniVersion": conf.Network.CNIVersion, "name": conf.Network.Name, "plugins": []json.RawMessage{data}})
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(one)
}

// sandbox is a Pod's network.
type sandbox struct {
	id   string
	ns   *box.NetNS
	conf *libcni.NetworkConfigList
	rt   *libcni.RuntimeConf
	ips  []netip.Addr
}

// add makes a network namespace and has the plugins connect it.
func (nw *network) add(ctx context.Context, w *worker, id string) (*sandbox, error) {
	list, err := nw.list()
	if err != nil {
		return nil, err
	}
	ns, err := box.NewNetNS()
	if err != nil {
		return nil, err
	}
	s := &sandbox{id: id, ns: ns, conf: list}
	fail := func(err error) (*sandbox, error) {
		return nil, errors.Join(err, nw.del(context.WithoutCancel(ctx), s))
	}
	if err := nw.n.host.Bind(ns, "cni-"+id[:16]); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	var ranges [][]map[string]string
	for _, p := range w.node.PodCIDRs {
		ranges = append(ranges, []map[string]string{{"subnet": p.Masked().String()}})
	}
	s.rt = &libcni.RuntimeConf{
		ContainerID: id, NetNS: ns.Path, IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", w.namespace}, {"K8S_POD_NAME", w.name},
			{"K8S_POD_INFRA_CONTAINER_ID", id}, {"K8S_POD_UID", string(w.uid)},
		},
		CapabilityArgs: map[string]any{"ipRanges": ranges},
	}
	res, err := nw.cni.AddNetworkList(ctx, list, s.rt)
	if err != nil {
		return fail(fmt.Errorf("plugin chain %s: %w", list.Name, err))
	}
	got, err := current.NewResultFromResult(res)
	if err != nil {
		return fail(err)
	}
	for _, ip := range got.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			s.ips = append(s.ips, a.Unmap())
		}
	}
	if len(s.ips) == 0 {
		return fail(fmt.Errorf("plugin chain %s gave no address", list.Name))
	}
	return s, nil
}

// check asks the plugins whether the Pod's network is as they made it.
func (nw *network) check(ctx context.Context, s *sandbox) error {
	if s.conf.DisableCheck {
		return nil
	}
	return nw.cni.CheckNetworkList(ctx, s.conf, s.rt)
}

// del has the plugins disconnect the namespace, by the configuration it was connected with, and gives it up.
func (nw *network) del(ctx context.Context, s *sandbox) error {
	var errs []error
	if s.rt != nil {
		errs = append(errs, nw.cni.DelNetworkList(ctx, s.conf, s.rt))
	}
	errs = append(errs, nw.n.host.Unbind(s.ns), s.ns.Close())
	return errors.Join(errs...)
}

// pluginExec runs plugins as the node would: in its file system and network namespace.
type pluginExec struct {
	version.PluginDecoder
	n *Node
}

var _ invoke.Exec = (*pluginExec)(nil)

// FindInPath looks where the node keeps its plugins.
func (e *pluginExec) FindInPath(plugin string, _ []string) (string, error) {
	if plugin == "" || strings.ContainsRune(plugin, '/') {
		return "", fmt.Errorf("invalid plugin name %q", plugin)
	}
	if st, err := os.Stat(filepath.Join(e.n.cfg.CNIBinDir, plugin)); err != nil || !st.Mode().IsRegular() {
		return "", fmt.Errorf("failed to find plugin %q in path [/opt/cni/bin]", plugin)
	}
	return "/opt/cni/bin/" + plugin, nil
}

// ExecPlugin runs one.
func (e *pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	out, errOut, code, err := e.n.host.Run(ctx, e.n.router, []string{path}, env, strings.NewReader(string(stdin)))
	if len(errOut) > 0 {
		e.n.log.Debug("network plugin", "plugin", filepath.Base(path), "says", string(errOut))
	}
	if err != nil {
		return nil, err
	}
	if code == 0 {
		return out, nil
	}
	said := &cnitypes.Error{}
	if json.Unmarshal(out, said) == nil && said.Msg != "" {
		return nil, said
	}
	return nil, fmt.Errorf("%s ended with code %d: %s", filepath.Base(path), code, lastLine(string(out)+string(errOut)))
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndex(s, "\n")+1:]
}
