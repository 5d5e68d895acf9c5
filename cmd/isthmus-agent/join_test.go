package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/preflight"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/systemd"
)

// TestCheck: `join --check` says what is wrong and what would change, and changes nothing.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	if l, err := net.Listen("tcp", "127.0.0.1:15090"); err == nil { // else another has it, which is the same here
		defer l.Close()
	}
	envoy := filepath.Join(dir, "envoy")
	if err := os.WriteFile(envoy, []byte("#!/bin/sh\necho envoy  version: 0a/1.40.0/Clean/RELEASE/BoringSSL\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	conf, data := filepath.Join(dir, "etc"), filepath.Join(dir, "lib")
	args := []string{"join", "--check", "--no-capture", "--systemd=false", "--envoy", envoy, "--config-dir", conf, "--data-dir", data}
	check := func(more ...string) (preflight.Report, int, string) {
		cmd := program(append(args, more...)...)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.Output()
		code := 0
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		var r preflight.Report
		if slices.Contains(more, "json") {
			if err := json.Unmarshal(out, &r); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
		return r, code, string(out) + errs.String()
	}
	result := func(r preflight.Report, name string) preflight.Finding {
		i := slices.IndexFunc(r.Findings, func(f preflight.Finding) bool { return f.Check == name })
		if i < 0 {
			t.Fatalf("no finding on %s in %+v", name, r)
		}
		return r.Findings[i]
	}
	r, code, said := check("-o", "json")
	if ports := result(r, "ports"); code != 1 || r.Ready || ports.Result != preflight.Failed || !strings.Contains(ports.Detail, "15090") || !strings.Contains(said, "not ready to join: ") {
		t.Errorf("a port in use: exit %d, %s", code, said)
	}
	if result(r, "envoy").Result != preflight.OK || result(r, "files").Result != preflight.OK || len(r.Changes) != 2 || r.Changes[0].Where != filepath.Join(conf, "agent.yaml") {
		t.Errorf("got %s", said)
	}
	// Without starting the agent a port in use is worth a warning.
	r, code, said = check("-o", "json", "--no-run")
	if code != 0 || !r.Ready || result(r, "ports").Result != preflight.Warning {
		t.Errorf("--no-run: exit %d, %s", code, said)
	}
	if _, code, said = check("--no-run"); code != 0 || !strings.Contains(said, "joining will change:") || !strings.Contains(said, "hint: see who has it") {
		t.Errorf("as text: exit %d, %s", code, said)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("in the folder now: %v, %v", left, err)
	}
}

// TestLeave: the service is stopped first, then all that join wrote is gone.
func TestLeave(t *testing.T) {
	dir := t.TempDir()
	conf := &config.Config{Role: config.Machine, Name: "ratings", Namespace: "default", Cluster: "birch", DataDir: filepath.Join(dir, "lib")}
	var calls []string
	service := systemd.Config{
		UnitDir: dir, Program: "/usr/bin/isthmus-agent", Config: "/etc/isthmus/agent.yaml", DataDir: conf.DataDir,
		Run: func(_ context.Context, args ...string) error { calls = append(calls, args[0]); return nil },
	}
	if err := os.Mkdir(conf.DataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := service.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := leave(t.Context(), &out, filepath.Join(dir, "agent.yaml"), conf, systemd.Config{UnitDir: dir, Run: service.Run, DataDir: conf.DataDir}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"daemon-reload", "enable", "disable", "daemon-reload"}; !slices.Equal(calls, want) {
		t.Errorf("systemctl %q", calls)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 || out.String() != "left birch: default/ratings\n" {
		t.Errorf("left %v, %v; said %s", left, err, out.String())
	}
}
