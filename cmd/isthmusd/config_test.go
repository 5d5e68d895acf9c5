package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// writeConfig makes a configuration file out of the lines.
func writeConfig(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "isthmusd.yaml")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfig(t *testing.T) {
	cases := map[string]struct {
		lines []string
		text  []string // all of them in the error; none: it is good
	}{
		"least":                {lines: []string{"cluster: amber", "source: {dir: /tmp}"}},
		"unknown field":        {lines: []string{"cluster: amber", "source: {dir: /tmp}", "clustr: birch"}, text: []string{"line 3", "clustr"}},
		"unknown inner field":  {lines: []string{"cluster: amber", "source:", "  dir: /tmp", "  kube: yes"}, text: []string{"line 4", "kube"}},
		"not for users":        {lines: []string{"cluster: amber", "source: {dir: /tmp}", "allowLoopback: true"}, text: []string{"line 3", "allowLoopback"}},
		"not YAML":             {lines: []string{"cluster: [amber", "source: {dir: /tmp}"}, text: []string{"line 1"}},
		"wrong type":           {lines: []string{"cluster: amber", "source: {dir: /tmp}", "machineGrace: soon"}, text: []string{"line 3", "soon"}},
		"two documents":        {lines: []string{"cluster: amber", "source: {dir: /tmp}", "---", "cluster: birch"}, text: []string{"second document"}},
		"empty":                {lines: []string{""}, text: []string{"cluster"}},
		"no cluster":           {lines: []string{"source: {dir: /tmp}"}, text: []string{"cluster:", "DNS label"}},
		"bad cluster":          {lines: []string{"cluster: Amber_1", "source: {dir: /tmp}"}, text: []string{"Amber_1", "DNS label"}},
		"bad trust domain":     {lines: []string{"cluster: amber", "trustDomain: a/b", "source: {dir: /tmp}"}, text: []string{"trustDomain", "a/b"}},
		"no source":            {lines: []string{"cluster: amber"}, text: []string{"source.dir"}},
		"bad gateway":          {lines: []string{"cluster: amber", "source: {dir: /tmp}", "gateways: [gw.example.com:15443]"}, text: []string{"gateways[0]", "gw.example.com:15443"}},
		"bad advertise":        {lines: []string{"cluster: amber", "source: {dir: /tmp}", "advertise: [10.0.0.1]"}, text: []string{"advertise[0]", "10.0.0.1"}},
		"bad listen":           {lines: []string{"cluster: amber", "source: {dir: /tmp}", "listen: 15012"}, text: []string{"listen", "15012"}},
		"bad metrics":          {lines: []string{"cluster: amber", "source: {dir: /tmp}", "metrics: 15014"}, text: []string{"metrics", "15014"}},
		"open plaintext":       {lines: []string{"cluster: amber", "source: {dir: /tmp}", "xdsPlaintext: 0.0.0.0:15010"}, text: []string{"xdsPlaintext", "loopback"}},
		"plaintext on loop":    {lines: []string{"cluster: amber", "source: {dir: /tmp}", "xdsPlaintext: 127.0.0.1:15010"}},
		"lease before late":    {lines: []string{"cluster: amber", "source: {dir: /tmp}", "federation: {lateAfter: 5s, lease: 5s}"}, text: []string{"federation.lease", "lateAfter"}},
		"negative late":        {lines: []string{"cluster: amber", "source: {dir: /tmp}", "federation: {lateAfter: -5s}"}, text: []string{"federation.lateAfter"}},
		"negative grace":       {lines: []string{"cluster: amber", "source: {dir: /tmp}", "machineGrace: -1s"}, text: []string{"machineGrace"}},
		"negative certificate": {lines: []string{"cluster: amber", "source: {dir: /tmp}", "ca: {maxTTL: -1h}"}, text: []string{"ca.maxTTL"}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			path := writeConfig(t, c.lines...)
			cmd := command()
			var out bytes.Buffer
			cmd.SetOut(&out)
			cmd.SetArgs([]string{"--check", "--config", path})
			err := cmd.Execute()
			if len(c.text) == 0 {
				if err != nil || !strings.Contains(out.String(), "is good: cluster amber") {
					t.Errorf("got %v, %q", err, out.String())
				}
				return
			}
			oneLine(t, err, append(c.text, path)...)
		})
	}
	t.Run("no file", func(t *testing.T) {
		_, err := loadConfig(filepath.Join(t.TempDir(), "nowhere.yaml"))
		oneLine(t, err, "nowhere.yaml")
	})
	t.Run("defaults", func(t *testing.T) {
		c, err := loadConfig(writeConfig(t, "cluster: amber", "source: {dir: /tmp}"))
		if err != nil || c.TrustDomain != "amber.mesh" || c.Network != "amber" || c.Listen != "0.0.0.0:15012" || c.allowLoopback {
			t.Errorf("got %+v, %v", c, err)
		}
	})
}

// oneLine checks that an error is one line that says all of the parts, with a remedy.
func oneLine(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("%q is more than one line", err)
	}
	if diag.HintOf(err) == "" {
		t.Errorf("%q has no remedy", err)
	}
}

// ends runs an isthmusd that cannot start and returns why.
func ends(t *testing.T, cfg Config) error {
	t.Helper()
	d := launch(cfg)
	defer d.cancel()
	select {
	case <-d.done:
		return d.err
	case <-time.After(patience):
		t.Fatal("it runs")
		return nil
	}
}

// TestCannotStart is about each thing that keeps an isthmusd from starting; none of them leaves anything running or locked.
func TestCannotStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().String()
	cases := map[string]struct {
		change func(t *testing.T, c *Config)
		text   []string
	}{
		"port in use":           {func(_ *testing.T, c *Config) { c.Listen = port }, []string{port, "address already in use"}},
		"metrics port in use":   {func(_ *testing.T, c *Config) { c.Metrics = port }, []string{"metrics", port, "address already in use"}},
		"plaintext port in use": {func(_ *testing.T, c *Config) { c.XDSPlaintext = port }, []string{"xdsPlaintext", port, "address already in use"}},
		"no source folder":      {func(_ *testing.T, c *Config) { c.Source.Dir += "/nowhere" }, []string{"nowhere"}},
		"source is a file": {func(t *testing.T, c *Config) {
			c.Source.Dir = writeConfig(t, "x: y")
		}, []string{"isthmusd.yaml", "not a folder"}},
		"data folder is a file": {func(t *testing.T, c *Config) {
			c.DataDir = writeConfig(t, "x: y")
		}, []string{"isthmusd.yaml"}},
		"socket path is a folder": {func(t *testing.T, c *Config) {
			c.Admin.Socket = filepath.Dir(c.Source.Dir)
		}, []string{"admin socket"}},
		"no such CA": {func(t *testing.T, c *Config) { c.CA.Dir = t.TempDir() }, []string{"ca-cert.pem"}},
		"root certificate cut": {func(t *testing.T, c *Config) {
			if err := errors.Join(os.MkdirAll(c.DataDir, 0o700), os.WriteFile(c.data("root-cert.pem"), []byte("-----BEGIN"), 0o600), os.WriteFile(c.data("root-key.pem"), nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}, []string{"root-"}},
		"federation key cut": {func(t *testing.T, c *Config) {
			if err := errors.Join(os.MkdirAll(c.DataDir, 0o700), os.WriteFile(c.data("federation.key"), []byte("x"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}, []string{"federation.key"}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t, "amber")
			good := cfg
			c.change(t, &cfg)
			err := ends(t, cfg)
			if err == nil {
				t.Fatal("it ended without an error")
			}
			for _, part := range c.text {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
			if diag.HintOf(err) == "" && !strings.Contains(err.Error(), "; ") {
				t.Errorf("%q has no remedy", err)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q is more than one line", err)
			}
			if _, err := os.Stat(cfg.DataDir); strings.Contains(name, "port in use") && err == nil {
				t.Error("it wrote its data directory before it knew that it can run")
			}
			if cfg.DataDir != good.DataDir || strings.Contains(name, "cut") {
				return
			}
			start(t, good).stop(t) // all is free again
		})
	}
}

func TestSecondOnOneDataDir(t *testing.T) {
	cfg := testConfig(t, "amber")
	first := start(t, cfg)
	second := cfg
	second.Listen, second.Admin.Socket = freeAddr(t), cfg.Admin.Socket+"2"
	oneLine(t, ends(t, second), cfg.DataDir, "ledger.db")

	second.DataDir += "2"
	second.Admin.Socket = cfg.Admin.Socket
	oneLine(t, ends(t, second), cfg.Admin.Socket, "another isthmusd")
	if s := first.status(t); !s.Ready {
		t.Error("the first one is disturbed")
	}
	// Its data survives the one that could not start.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", cfg.Admin.Socket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
