package join

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/catest"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

func issue(t *testing.T, kind token.Kind, endpoint string) string {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := token.IssueConfig{Kind: kind, TrustDomain: "birch.mesh", Key: key, Pins: []token.Pin{{1}}, Endpoints: []string{endpoint}}
	if kind == token.VM {
		c.Machine = &token.Machine{Name: "ratings", Namespace: "default", ServiceAccount: "ratings"}
	} else {
		c.Subject = "cedar"
	}
	text, _, err := token.Issue(c)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func answer(t *testing.T, root *catest.Authority, change func(*federationv1.Machine)) func(context.Context, string, token.RedeemConfig) (*federationv1.JoinResult, error) {
	return func(_ context.Context, _ string, c token.RedeemConfig) (*federationv1.JoinResult, error) {
		chain, err := root.Sign([]byte(c.Body.(*federationv1.MachineJoin).GetCsrPem()), "spiffe://birch.mesh/ns/default/sa/ratings", time.Hour)
		if err != nil {
			t.Error(err)
		}
		m := &federationv1.Machine{
			CertChainPem: chain, Bundle: root.PEM, Cluster: "birch", TrustDomain: "birch.mesh", Network: "dune-net", Name: "ratings", Namespace: "default",
			ServiceAccount: "ratings", Labels: map[string]string{"app": "ratings"}, ControlPlane: []string{"10.0.0.1:15443"}, ControlPlaneName: "xds.birch.mesh",
		}
		if change != nil {
			change(m)
		}
		return &federationv1.JoinResult{Machine: m}, nil
	}
}

func newConfig(t *testing.T) Config {
	dir := t.TempDir()
	return Config{ConfigDir: filepath.Join(dir, "etc", "isthmus"), DataDir: filepath.Join(dir, "lib"), Addresses: []string{"192.0.2.1"}, Hostname: "dune", Capture: true}
}

func empty(t *testing.T, c Config) {
	t.Helper()
	var left []string
	_ = filepath.WalkDir(filepath.Dir(c.DataDir), func(path string, d os.DirEntry, _ error) error {
		if d != nil && !d.IsDir() {
			left = append(left, path)
		}
		return nil
	})
	if len(left) > 0 {
		t.Errorf("written: %v", left)
	}
}

func TestJoinAndLeave(t *testing.T) {
	c := newConfig(t)
	c.Redeem = answer(t, catest.New(t), nil)
	text := issue(t, token.VM, "127.0.0.1:1")
	path, err := Join(t.Context(), text, c)
	if err != nil {
		t.Fatal(err)
	}
	conf, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if conf.Role != config.Machine || conf.SPIFFE() != "spiffe://birch.mesh/ns/default/sa/ratings" || !conf.Capture.DNS || conf.Addresses[0] != "192.0.2.1" ||
		conf.ControlPlane.ServerName != "xds.birch.mesh" || conf.Labels["app"] != "ratings" {
		t.Errorf("got %+v", conf)
	}
	for _, f := range []string{"identity.pem", "root-cert.pem"} {
		info, err := os.Stat(filepath.Join(c.DataDir, f))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", f, info, err)
		}
	}
	if info, err := os.Stat(c.DataDir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("dataDir: %v, %v", info, err)
	}
	if _, err := Join(t.Context(), text, c); err == nil || !strings.Contains(err.Error(), "joined already") {
		t.Errorf("a second join: %v", err)
	}
	if saved, err := Leave(path, conf); err != nil || len(saved) != 0 {
		t.Error(saved, err)
	}
	empty(t, c)
}

// tree lists a folder: path, mode and content of all that is in it.
func tree(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var data []byte
		if !d.IsDir() {
			if data, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		fmt.Fprintf(&b, "%s %s %q\n", path, info.Mode(), data)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestByteForByte: after join and leave everything is as it was, and what was changed in between is kept.
func TestByteForByte(t *testing.T) {
	put := func(path, text string) {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	for name, x := range map[string]struct {
		before, between func(c Config)
		saved           int
	}{
		"nothing there": {func(Config) {}, func(Config) {}, 0},
		"folders there": {func(c Config) {
			put(filepath.Join(c.ConfigDir, "other.yaml"), "mine")
			put(filepath.Join(c.DataDir, "mine"), "mine, too")
		}, func(c Config) { _ = os.Chmod(c.DataDir, 0o700) }, 0},
		"the agent ran": {func(Config) {}, func(c Config) {
			put(filepath.Join(c.DataDir, "identity.pem"), "renewed")
			put(filepath.Join(c.DataDir, "told-roots.pem"), "told")
		}, 0},
		"changed": {func(Config) {}, func(c Config) { put(filepath.Join(c.ConfigDir, ConfigFile), "") }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			c := newConfig(t)
			c.Redeem = answer(t, catest.New(t), nil)
			x.before(c)
			root := filepath.Dir(c.DataDir)
			was := tree(t, root)
			path, err := Join(t.Context(), issue(t, token.VM, "127.0.0.1:1"), c)
			if err != nil {
				t.Fatal(err)
			}
			conf, err := config.Load(path)
			if err != nil {
				t.Fatal(err)
			}
			x.between(c)
			saved, err := Leave(path, conf)
			if err != nil || len(saved) != x.saved {
				t.Fatal(saved, err)
			}
			for _, s := range saved {
				if err := os.Remove(s.To); err != nil || s.Path != path {
					t.Error(s, err)
				}
				_ = os.Remove(c.ConfigDir) // what was kept kept it
				_ = os.Remove(filepath.Dir(c.ConfigDir))
			}
			if is := tree(t, root); is != was {
				t.Errorf("is\n%s\nwas\n%s", is, was)
			}
		})
	}
}

// TestExistingFilesAreRefused: what join would write over it refuses, before the token is spent.
func TestExistingFilesAreRefused(t *testing.T) {
	for _, name := range []string{"etc/isthmus/agent.yaml", "lib/identity.pem", "lib/root-cert.pem", "lib/manifest.json"} {
		c := newConfig(t)
		c.Redeem = func(context.Context, string, token.RedeemConfig) (*federationv1.JoinResult, error) {
			t.Errorf("%s: the token was sent", name)
			return nil, errors.New("spent")
		}
		root := filepath.Dir(c.DataDir)
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("mine"), 0o600)); err != nil {
			t.Fatal(err)
		}
		was := tree(t, root)
		if _, err := Join(t.Context(), issue(t, token.VM, "127.0.0.1:1"), c); err == nil || !strings.Contains(err.Error(), path) || diag.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		if is := tree(t, root); is != was {
			t.Errorf("%s: is\n%s\nwas\n%s", name, is, was)
		}
	}
}

func TestRefusalsWriteNothing(t *testing.T) {
	root := catest.New(t)
	good := issue(t, token.VM, "127.0.0.1:1")
	refuse := func(err error) func(context.Context, string, token.RedeemConfig) (*federationv1.JoinResult, error) {
		return func(context.Context, string, token.RedeemConfig) (*federationv1.JoinResult, error) { return nil, err }
	}
	i := strings.LastIndexByte(good, '.') - 5
	for name, x := range map[string]struct {
		text   string
		change func(*Config)
		want   string
	}{
		"cut":          {good[:len(good)-20], nil, "cut"},
		"edited":       {good[:i] + flip(good[i]) + good[i+1:], nil, "token"},
		"no token":     {"hello", nil, "not a join token"},
		"of a cluster": {issue(t, token.Cluster, "127.0.0.1:1"), nil, "is for cluster"},
		"unreachable":  {good, func(c *Config) { c.Redeem = nil }, "127.0.0.1:1"},
		"spent": {good, func(c *Config) {
			c.Redeem = refuse(&token.Refused{Reason: token.ReasonSpent, Message: "redeemed before"})
		}, "TokenSpent"},
		"pin": {good, func(c *Config) { c.Redeem = refuse(errors.Join(errors.New("10.0.0.1:15443"), token.ErrPin)) }, "not the issuer"},
		"other id": {good, func(c *Config) {
			c.Redeem = answer(t, root, func(m *federationv1.Machine) { m.ServiceAccount = "admin" })
		}, "identity"},
		"bad reply": {good, func(c *Config) { c.Redeem = answer(t, root, func(m *federationv1.Machine) { m.ControlPlane = nil }) }, "controlPlane"},
		"no bundle": {good, func(c *Config) { c.Redeem = answer(t, root, func(m *federationv1.Machine) { m.Bundle = nil }) }, "root certificate"},
		"no machine": {good, func(c *Config) {
			c.Redeem = func(context.Context, string, token.RedeemConfig) (*federationv1.JoinResult, error) {
				return &federationv1.JoinResult{}, nil
			}
		}, "no machine"},
		"no envoy": {good, func(c *Config) { c.Envoy = "/nowhere/envoy" }, "no Envoy"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newConfig(t)
			c.Redeem = answer(t, root, nil)
			if x.change != nil {
				x.change(&c)
			}
			_, err := Join(t.Context(), x.text, c)
			if err == nil || !strings.Contains(err.Error(), x.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %q (%s), want %s", err, diag.HintOf(err), x.want)
			}
			empty(t, c)
		})
	}
}

func flip(b byte) string {
	if b == 'A' {
		return "B"
	}
	return "A"
}
