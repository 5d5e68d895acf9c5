package installer

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"k8s.io/client-go/tools/clientcmd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const network = "{\n \"cniVersion\": \"0.4.0\", \"name\": \"n\",\n\t\"plugins\": [ {\"type\":\"bridge\"} ] }"

type node struct {
	t   *testing.T
	cfg Config
}

func newNode(t *testing.T, files map[string]string) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{t, Config{
		Program: filepath.Join(dir, "program"), BinDir: filepath.Join(dir, "bin"), ConfDir: filepath.Join(dir, "net.d"), NodeConfDir: "/etc/cni/net.d",
		ServiceAccount: filepath.Join(dir, "sa"), APIServer: "10.96.0.1:443", LogLevel: "info", ExcludeNamespaces: []string{"kube-system"}, Recheck: 50 * time.Millisecond,
	}}
	for _, d := range []string{n.cfg.BinDir, n.cfg.ConfDir, n.cfg.ServiceAccount} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.put(n.cfg.Program, "#!program")
	n.put(filepath.Join(n.cfg.ServiceAccount, "token"), "token-1")
	n.put(filepath.Join(n.cfg.ServiceAccount, "ca.crt"), "ca")
	for name, data := range files {
		n.put(filepath.Join(n.cfg.ConfDir, name), data)
	}
	return n
}

func (n *node) put(path, data string) {
	n.t.Helper()
	if err := os.WriteFile(path, []byte(data), 0o640); err != nil {
		n.t.Fatal(err)
	}
}

// files returns what lies in the folder of configurations.
func (n *node) files() map[string]string {
	n.t.Helper()
	out := map[string]string{}
	entries, err := os.ReadDir(n.cfg.ConfDir)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(n.cfg.ConfDir, e.Name()))
		if err != nil {
			n.t.Fatal(err)
		}
		out[e.Name()] = string(data)
	}
	return out
}

func same(a, b map[string]string) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if b[k] != v {
			return false
		}
	}
	return true
}

func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("%s: not within 20 s; files %v", what, n.files())
		}
	}
}

// run installs until stop is called.
func (n *node) run() (in *Installer, stop func()) {
	n.t.Helper()
	in = New(n.cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- in.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("run: %v", err)
		}
	}
	n.t.Cleanup(stop)
	return in, stop
}

func TestByteForByte(t *testing.T) {
	for name, file := range map[string]string{"a list": "10-net.conflist", "a single configuration": "10-net.conf", "a single one in .json": "10-net.json"} {
		t.Run(name, func(t *testing.T) {
			content := network
			if file != "10-net.conflist" {
				content = "{ \"cniVersion\":\"0.4.0\",\n\n\"name\":\"n\",  \"type\":\"bridge\" }"
			}
			before := map[string]string{file: content, "99-zzz.conf": `{"type":"loopback"}`, "note": "not a network"}
			n := newNode(t, before)
			in, stop := n.run()
			n.eventually("installed", in.Ready)
			got := n.files()
			if !strings.Contains(got["10-net.conflist"], `"isthmus-cni"`) {
				t.Errorf("no entry in %v", got)
			}
			if file != "10-net.conflist" && got[file] != "" {
				t.Errorf("%s is still there and comes first by name", file)
			}
			if data, err := os.ReadFile(filepath.Join(n.cfg.BinDir, "isthmus-cni")); err != nil || string(data) != "#!program" {
				t.Errorf("program: %q, %v", data, err)
			}
			stop()
			if after := n.files(); !same(after, before) {
				t.Errorf("after: %v\nbefore: %v", after, before)
			}
			if _, err := os.Stat(filepath.Join(n.cfg.BinDir, "isthmus-cni")); !os.IsNotExist(err) {
				t.Errorf("program is left behind: %v", err)
			}
		})
	}
}

func TestKubeconfig(t *testing.T) {
	n := newNode(t, map[string]string{"10-net.conflist": network})
	in, _ := n.run()
	n.eventually("installed", in.Ready)
	token := func() string {
		c, err := clientcmd.LoadFromFile(filepath.Join(n.cfg.ConfDir, KubeconfigFile))
		if err != nil {
			return err.Error()
		}
		if server := c.Clusters["isthmus-cni"].Server; server != "https://10.96.0.1:443" {
			t.Errorf("server %s", server)
		}
		return c.AuthInfos["isthmus-cni"].Token
	}
	if got := token(); got != "token-1" {
		t.Errorf("token %q", got)
	}
	if info, err := os.Stat(filepath.Join(n.cfg.ConfDir, KubeconfigFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the kubeconfig: %v, %v", info.Mode(), err)
	}
	n.put(filepath.Join(n.cfg.ServiceAccount, "token"), "token-2")
	n.eventually("the new token is written", func() bool { return token() == "token-2" })
}

func TestLaterNetwork(t *testing.T) {
	n := newNode(t, nil)
	in, stop := n.run()
	n.eventually("the program is there", func() bool { _, err := os.Stat(filepath.Join(n.cfg.BinDir, "isthmus-cni")); return err == nil })
	if in.Ready() {
		t.Error("ready without a network")
	}
	n.put(filepath.Join(n.cfg.ConfDir, "10-net.conflist"), network)
	n.eventually("installed", in.Ready)

	// The main plugin writes its configuration anew: our entry comes back, and in the end the new one is restored.
	rewritten := strings.Replace(network, `"n"`, `"m"`, 1)
	n.put(filepath.Join(n.cfg.ConfDir, "10-net.conflist"), rewritten)
	n.eventually("the entry is back", func() bool {
		got := n.files()["10-net.conflist"]
		return strings.Contains(got, `"isthmus-cni"`) && strings.Contains(got, `"m"`)
	})
	stop()
	if after := n.files(); !same(after, map[string]string{"10-net.conflist": rewritten}) {
		t.Errorf("after: %v", after)
	}
}

func TestEditedSince(t *testing.T) {
	n := newNode(t, map[string]string{"10-net.conflist": network})
	in, stop := n.run()
	n.eventually("installed", in.Ready)
	edited := strings.Replace(n.files()["10-net.conflist"], `"bridge"`, `"bridge", "mtu": 1400`, 1)
	n.put(filepath.Join(n.cfg.ConfDir, "10-net.conflist"), edited)
	stop()
	after := n.files()
	if got := after["10-net.conflist"]; !strings.Contains(got, "1400") || strings.Contains(got, "isthmus") || len(after) != 1 {
		t.Errorf("the edit is lost or our entry is left: %v", after)
	}
}

func TestUpgrade(t *testing.T) {
	before := map[string]string{"10-net.conflist": network}
	n := newNode(t, before)
	n.cfg.Leaving = func(context.Context) bool { return true }
	in, stop := n.run()
	n.eventually("installed", in.Ready)
	installed := n.files()
	stop()
	if after := n.files(); !same(after, installed) {
		t.Errorf("an installer that is followed by another removed something: %v", after)
	}
	n.cfg.Leaving = nil
	in, stop = n.run()
	n.eventually("installed again", in.Ready)
	stop()
	if after := n.files(); !same(after, before) {
		t.Errorf("after the last: %v", after)
	}
}

func TestNoChange(t *testing.T) {
	n := newNode(t, map[string]string{"10-net.conflist": network})
	in := New(n.cfg)
	if err := in.Apply(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.cfg.ConfDir, "10-net.conflist")
	first, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := in.Apply(); err != nil {
		t.Fatal(err)
	}
	second, err := os.Stat(path)
	if err != nil || !os.SameFile(first, second) || !first.ModTime().Equal(second.ModTime()) {
		t.Errorf("a second look wrote the file again: %v", err)
	}
}

func TestErrors(t *testing.T) {
	n := newNode(t, map[string]string{"10-net.conflist": network})
	n.cfg.APIServer = "nonsense"
	if err := New(n.cfg).Apply(); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("bad address: %v", err)
	}
	n = newNode(t, nil)
	os.Remove(filepath.Join(n.cfg.ServiceAccount, "token"))
	if err := New(n.cfg).Apply(); err == nil || !strings.Contains(err.Error(), "service account") {
		t.Errorf("no token: %v", err)
	}
	n = newNode(t, nil)
	os.RemoveAll(n.cfg.ConfDir)
	if err := New(n.cfg).Run(context.Background()); err == nil || !strings.Contains(err.Error(), n.cfg.ConfDir) {
		t.Errorf("no folder: %v", err)
	}
}
