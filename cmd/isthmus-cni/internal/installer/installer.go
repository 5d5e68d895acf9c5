// Package installer puts the CNI plugin on a node and keeps it there: the program, a kubeconfig for it, and its entry
// at the end of the node's network configuration. What it changed it puts back byte for byte.
package installer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-cni/internal/chain"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Names of our files beside the network configurations. Runtimes read neither: the first is no configuration, the
// others have no ending that they look for.
const (
	KubeconfigFile = "ZZZ-isthmus-cni-kubeconfig"
	backupSuffix   = ".before-isthmus"
	oursSuffix     = ".by-isthmus"
)

// Config says where things are. Paths are as this process sees them.
type Config struct {
	Program string // the program to install: this one
	BinDir  string // folder of plugins, usually /opt/cni/bin
	ConfDir string // folder of network configurations, usually /etc/cni/net.d
	// NodeConfDir is ConfDir as the node sees it: the plugin runs there. Empty: ConfDir.
	NodeConfDir string
	// ServiceAccount is the folder with token and ca.crt; the token is read again as it rotates.
	ServiceAccount string
	APIServer      string // host:port
	LogLevel       string
	// ExcludeNamespaces are those whose Pods are never captured.
	ExcludeNamespaces []string
	// Recheck is how often files are compared although nobody reported a change; 0 means 10 s.
	Recheck time.Duration
	// Leaving says, at the end, whether the plugin must stay in place because another installer follows (an upgrade).
	Leaving func(context.Context) (stay bool)
	Log     *slog.Logger
}

// Installer does what Config says. Make one with New.
type Installer struct {
	cfg   Config
	ready atomic.Bool
}

// New returns an Installer; it starts nothing.
func New(c Config) *Installer {
	if c.NodeConfDir == "" {
		c.NodeConfDir = c.ConfDir
	}
	if c.Recheck == 0 {
		c.Recheck = 10 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Installer{cfg: c}
}

// Ready reports whether a Pod that starts now is captured.
func (i *Installer) Ready() bool { return i.ready.Load() }

// Run installs, keeps what it installed in place until ctx ends, and then removes it, unless Leaving says that it stays.
func (i *Installer) Run(ctx context.Context) error {
	if err := i.program(); err != nil {
		return err
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", i.cfg.ConfDir, err)
	}
	defer watcher.Close()
	for _, dir := range []string{i.cfg.ConfDir, i.cfg.ServiceAccount} {
		if err := watcher.Add(dir); err != nil {
			return diag.Hint(fmt.Errorf("watch %s: %w", dir, err), "mount the node's folder there, or name another with a flag")
		}
	}
	tick := time.NewTicker(i.cfg.Recheck)
	defer tick.Stop()
	last := ""
	for {
		err := i.Apply()
		i.ready.Store(err == nil)
		if text := fmt.Sprint(err); text != last { // once, not at each look
			if last = text; err != nil {
				i.cfg.Log.Warn("not installed yet", "err", err)
			} else {
				i.cfg.Log.Info("installed", "path", i.cfg.ConfDir)
			}
		}
		select {
		case <-watcher.Events:
		case err := <-watcher.Errors:
			i.cfg.Log.Warn("watch of files", "err", err)
		case <-tick.C:
		case <-ctx.Done():
			return i.leave()
		}
	}
}

func (i *Installer) leave() error {
	i.ready.Store(false)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if i.cfg.Leaving != nil && i.cfg.Leaving(ctx) {
		i.cfg.Log.Info("ends; the plugin stays for the installer that follows")
		return nil
	}
	return i.Remove()
}

// Apply writes what is not yet as it should be. It changes no file that is.
func (i *Installer) Apply() error {
	if err := i.kubeconfig(); err != nil {
		return err
	}
	names, err := i.names()
	if err != nil {
		return err
	}
	main, err := chain.Main(names, i.read)
	if err != nil {
		return fmt.Errorf("%s: %w", i.cfg.ConfDir, err)
	}
	data, err := i.read(main)
	if err != nil {
		return err
	}
	out, changed, err := chain.Insert(data, chain.Plugin{LogLevel: i.cfg.LogLevel, Kubernetes: chain.Kubernetes{
		Kubeconfig: filepath.Join(i.cfg.NodeConfDir, KubeconfigFile), ExcludeNamespaces: i.cfg.ExcludeNamespaces,
	}})
	if err != nil {
		return fmt.Errorf("%s: %w", i.path(main), err)
	}
	list := chain.ListName(main)
	if !changed && list == main {
		return nil
	}
	// The original is kept first. One that holds our entry already is another installer's work, not an original.
	if _, had, _ := chain.Remove(data); !had {
		if err := i.write(main+backupSuffix, data, 0o600); err != nil {
			return err
		}
	}
	if err := i.write(list+oursSuffix, out, 0o600); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if info, err := os.Stat(i.path(main)); err == nil {
		mode = info.Mode().Perm()
	}
	if err := i.write(list, out, mode); err != nil {
		return err
	}
	if list != main { // by name the single configuration would come first
		if err := os.Remove(i.path(main)); err != nil {
			return fmt.Errorf("replace %s by %s: %w", main, list, err)
		}
	}
	i.cfg.Log.Info("network configuration has the plugin", "path", i.path(list))
	return nil
}

// Remove puts back what Apply changed: a configuration nobody touched since byte for byte, another without our entry.
func (i *Installer) Remove() error {
	names, err := i.names()
	if err != nil {
		return err
	}
	var errs []error
	do := func(err error) {
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, name := range names {
		if ext := filepath.Ext(name); ext != ".conf" && ext != ".conflist" && ext != ".json" {
			continue
		}
		data, err := i.read(name)
		if err != nil {
			do(err)
			continue
		}
		out, had, err := chain.Remove(data)
		if err != nil || !had {
			continue // not ours, or no configuration
		}
		do(i.restore(name, data, out, names))
	}
	for _, name := range names {
		if strings.HasSuffix(name, backupSuffix) || strings.HasSuffix(name, oursSuffix) || name == KubeconfigFile {
			do(os.Remove(i.path(name)))
		}
	}
	do(os.Remove(filepath.Join(i.cfg.BinDir, chain.PluginType)))
	if len(errs) == 0 {
		i.cfg.Log.Info("removed", "path", i.cfg.ConfDir)
	}
	return errors.Join(errs...)
}

// restore puts a configuration back that holds our entry; without is the same without it.
func (i *Installer) restore(name string, data, without []byte, names []string) error {
	original := ""
	for _, n := range names {
		if o, ok := strings.CutSuffix(n, backupSuffix); ok && chain.ListName(o) == name {
			original = o
		}
	}
	ours, err := i.read(name + oursSuffix)
	if original == "" || err != nil || !bytes.Equal(ours, data) { // somebody edited it since: take out what is ours, no more
		return i.write(name, without, i.mode(name))
	}
	back, err := i.read(original + backupSuffix)
	if err != nil {
		return err
	}
	if err := i.write(original, back, i.mode(name)); err != nil {
		return err
	}
	if original != name {
		return os.Remove(i.path(name))
	}
	return nil
}

func (i *Installer) path(name string) string { return filepath.Join(i.cfg.ConfDir, name) }

func (i *Installer) mode(name string) fs.FileMode {
	if info, err := os.Stat(i.path(name)); err == nil {
		return info.Mode().Perm()
	}
	return 0o644
}

func (i *Installer) names() ([]string, error) {
	entries, err := os.ReadDir(i.cfg.ConfDir)
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("folder of network configurations: %w", err), "mount the node's folder there, or name another with --cni-conf-dir")
	}
	var names []string
	for _, e := range entries {
		if e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (i *Installer) read(name string) ([]byte, error) {
	f, err := os.Open(i.path(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, chain.MaxSize+1))
}

// write replaces a file at once; one with that content already is left alone.
func (i *Installer) write(name string, data []byte, mode fs.FileMode) error {
	return replace(i.path(name), data, mode)
}

func replace(path string, data []byte, mode fs.FileMode) error {
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, data) {
		return nil
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".isthmus-*.tmp")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(tmp.Name()) // fails after the rename, as it should
	_, err = tmp.Write(data)
	if err == nil {
		err = tmp.Chmod(mode)
	}
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// program copies this program into the folder of plugins.
func (i *Installer) program() error {
	data, err := os.ReadFile(i.cfg.Program)
	if err != nil {
		return fmt.Errorf("read the plugin: %w", err)
	}
	if err := replace(filepath.Join(i.cfg.BinDir, chain.PluginType), data, 0o755); err != nil {
		return diag.Hint(err, "mount the node's folder of plugins there, or name another with --cni-bin-dir")
	}
	return nil
}

// kubeconfig writes what the plugin asks the API server with; the token in it is the newest.
func (i *Installer) kubeconfig() error {
	token, err := os.ReadFile(filepath.Join(i.cfg.ServiceAccount, "token"))
	if err != nil {
		return fmt.Errorf("service account: %w", err)
	}
	ca, err := os.ReadFile(filepath.Join(i.cfg.ServiceAccount, "ca.crt"))
	if err != nil {
		return fmt.Errorf("service account: %w", err)
	}
	if _, _, err := net.SplitHostPort(i.cfg.APIServer); err != nil {
		return diag.Hint(fmt.Errorf("address of the API server %q: %w", i.cfg.APIServer, err), "set KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT, or --api-server HOST:PORT")
	}
	const name = "isthmus-cni"
	c := clientcmdapi.NewConfig()
	c.Clusters[name] = &clientcmdapi.Cluster{Server: "https://" + i.cfg.APIServer, CertificateAuthorityData: ca}
	c.AuthInfos[name] = &clientcmdapi.AuthInfo{Token: strings.TrimSpace(string(token))}
	c.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name}
	c.CurrentContext = name
	data, err := clientcmd.Write(*c)
	if err != nil {
		return fmt.Errorf("kubeconfig: %w", err)
	}
	return i.write(KubeconfigFile, data, 0o600)
}
