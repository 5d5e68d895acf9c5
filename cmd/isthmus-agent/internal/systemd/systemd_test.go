package systemd

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/manifest"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

// calls is a Runner that remembers, and fails on what begins with fail.
type calls struct {
	got  []string
	fail string
}

func (c *calls) run(_ context.Context, args ...string) error {
	line := strings.Join(args, " ")
	c.got = append(c.got, line)
	if c.fail != "" && strings.HasPrefix(line, c.fail) {
		return errors.New("systemctl " + line + ": it does not want to")
	}
	return nil
}

func newConfig(t *testing.T) (Config, *calls) {
	t.Helper()
	dir := t.TempDir()
	c := &calls{}
	return Config{UnitDir: dir, Run: c.run, Program: "/usr/local/bin/isthmus-agent", Config: "/etc/isthmus/agent.yaml", DataDir: t.TempDir()}, c
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func TestUnit(t *testing.T) {
	for _, g := range golden.Cases(t, "testdata/*.txtar") {
		g.Want(t, Unit, Config{Program: "/usr/local/bin/isthmus-agent", Config: "/etc/isthmus/agent.yaml", DataDir: "/var/lib/isthmus-agent"}.Text())
	}
	if got := (Config{}).Path(); got != "/etc/systemd/system/isthmus-agent.service" {
		t.Error(got)
	}
}

// TestVerify: systemd itself understands every line, where its checker is.
func TestVerify(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze in PATH")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, Unit)
	program := filepath.Join(dir, "isthmus-agent")
	text := Config{Program: program, Config: "/etc/isthmus/agent.yaml", DataDir: "/var/lib/isthmus-agent"}.Text()
	if err := errors.Join(os.WriteFile(path, []byte(text), 0o644), os.WriteFile(program, []byte("#!/bin/sh\n"), 0o755)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, analyze, "verify", "--man=no", path).CombinedOutput()
	// It looks at units of the host, too: only what it says of ours counts.
	if strings.Contains(string(out), "isthmus-agent") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestInstallAndRemove(t *testing.T) {
	c, sys := newConfig(t)
	if err := c.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"daemon-reload", "enable --now isthmus-agent.service"}; !slices.Equal(sys.got, want) {
		t.Errorf("called %q", sys.got)
	}
	if info, err := os.Stat(c.Path()); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("unit: %v, %v", info, err)
	}
	if err := c.Install(t.Context()); err == nil || !strings.Contains(err.Error(), "exists") || diag.HintOf(err) == "" {
		t.Errorf("installed twice: %v", err)
	}
	sys.got = nil
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	saved, err := c.Remove(t.Context())
	if err != nil || saved != nil {
		t.Errorf("remove: %v, %v", saved, err)
	}
	if want := []string{"disable --now isthmus-agent.service", "daemon-reload"}; !slices.Equal(sys.got, want) {
		t.Errorf("called %q", sys.got)
	}
	if exists(c.Path()) {
		t.Error("the unit is left")
	}
}

// TestForeignUnit: a unit of the administrator is neither replaced nor stopped nor deleted.
func TestForeignUnit(t *testing.T) {
	c, sys := newConfig(t)
	if err := os.WriteFile(c.Path(), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Install(t.Context()); err == nil {
		t.Error("replaced")
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := c.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if data, err := os.ReadFile(c.Path()); err != nil || string(data) != "mine" || len(sys.got) != 0 {
		t.Errorf("%q, %v; called %q", data, err, sys.got)
	}
}

func TestChangedUnitIsKept(t *testing.T) {
	c, _ := newConfig(t)
	if err := c.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.Path(), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	saved, err := c.Remove(t.Context())
	if err != nil || saved == nil || saved.Path != c.Path() || exists(c.Path()) {
		t.Fatalf("%v, %v", saved, err)
	}
	if data, err := os.ReadFile(saved.To); err != nil || string(data) != "changed" {
		t.Errorf("%q, %v", data, err)
	}
}

// TestFailuresLeaveNothing: when systemctl fails the unit is gone again, and when a stop fails it stays.
func TestFailuresLeaveNothing(t *testing.T) {
	for _, fail := range []string{"daemon-reload", "enable"} {
		c, sys := newConfig(t)
		sys.fail = fail
		if err := c.Install(t.Context()); err == nil || !strings.Contains(err.Error(), "does not want to") {
			t.Errorf("%s: %v", fail, err)
		}
		if exists(c.Path()) {
			t.Errorf("%s: the unit is left", fail)
		}
		if m, err := manifest.Load(c.DataDir); err != nil || m.Has(c.Path()) {
			t.Errorf("%s: the unit is noted: %v", fail, err)
		}
	}
	c, sys := newConfig(t)
	if err := c.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	sys.fail = "disable"
	if err := c.Stop(t.Context()); err == nil || diag.HintOf(err) == "" || !exists(c.Path()) {
		t.Errorf("a stop that fails: %v", err)
	}
	if err := os.Remove(c.Path()); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Errorf("a unit that someone took away: %v", err)
	}
}

func TestPaths(t *testing.T) {
	for path, want := range map[string]bool{
		"/usr/bin/isthmus-agent": true, "/opt/a-b_c+d@1.2:3/x": true,
		"/a b": false, "/a%h": false, "/a$b": false, "/a\nUser=x": false, `/a"b`: false, "a": false, "": false, "/a;b": false, `/a\b`: false,
	} {
		for _, change := range []func(*Config){func(c *Config) { c.Program = path }, func(c *Config) { c.Config = path }, func(c *Config) { c.DataDir = path }} {
			c, _ := newConfig(t)
			change(&c)
			if err := c.Check(); (err == nil) != want {
				t.Errorf("%q: %v", path, err)
			}
		}
	}
}

func TestRunning(t *testing.T) {
	for _, x := range []struct {
		name, comm, first, own string
		folder, want           bool
	}{
		{"systemd", "systemd\n", "net:[1]", "net:[1]", true, true},
		{"another init", "runit\n", "net:[1]", "net:[1]", true, false},
		{"a network namespace", "systemd\n", "net:[1]", "net:[2]", true, false},
		{"no folder", "systemd\n", "net:[1]", "net:[1]", false, false},
		{"not to be seen", "systemd\n", "", "net:[2]", true, false},
		{"nothing to be seen", "systemd\n", "", "", true, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			root := t.TempDir()
			for name, to := range map[string]string{"1": x.first, "self": x.own} {
				ns := filepath.Join(root, "proc", name, "ns")
				if err := os.MkdirAll(ns, 0o700); err != nil {
					t.Fatal(err)
				}
				if to != "" {
					if err := os.Symlink(to, filepath.Join(ns, "net")); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := os.WriteFile(filepath.Join(root, "proc/1/comm"), []byte(x.comm), 0o600); err != nil {
				t.Fatal(err)
			}
			if x.folder {
				if err := os.MkdirAll(filepath.Join(root, "run/systemd/system"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if got := Running(root); got != x.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

// TestNoFolder: a unit that could not be written is not noted as ours, and systemctl is not called.
func TestNoFolder(t *testing.T) {
	c, sys := newConfig(t)
	c.UnitDir = filepath.Join(c.UnitDir, "none")
	if err := c.Install(t.Context()); err == nil {
		t.Fatal("wrote into a folder that is not there")
	}
	if m, err := manifest.Load(c.DataDir); err != nil || m.Has(c.Path()) || len(sys.got) != 0 {
		t.Errorf("%+v, %v; called %q", m, err, sys.got)
	}
}
