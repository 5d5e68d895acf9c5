package preflight

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// good is a machine on which nothing is wrong.
func good() Facts {
	return Facts{
		NetAdmin: true, Kernel: "6.1.0-18-amd64", Capture: true, Systemd: true,
		Ports:     []Port{{Network: "tcp", Number: 15001, For: "outbound"}, {Network: "udp", Number: 15053, For: "names"}},
		Resolvers: []string{"192.0.2.53:53"},
		EnvoyPath: "envoy", EnvoyHint: "get one", EnvoySays: "\nenvoy  version: 0a1b2c/1.40.0/Clean/RELEASE/BoringSSL\n",
		Token:     &Window{noon.Add(-time.Minute), noon.Add(time.Hour)},
		Endpoints: []Endpoint{{Address: "192.0.2.1:15443"}}, Now: noon,
	}
}

func TestJudge(t *testing.T) {
	hinted := diag.Hint(errors.New("no"), "do this")
	for _, x := range []struct {
		name   string
		change func(*Facts)
		check  string // the one finding that is not ok; empty: none
		result Result
		detail string
		remedy string
	}{
		{"good", func(*Facts) {}, "", OK, "", ""},
		{"service without root", func(f *Facts) { f.UID = 1000 }, "rights", Failed, "user 1000", "--systemd=false"},
		{"no capability", func(f *Facts) { f.NetAdmin = false }, "rights", Failed, "CAP_NET_ADMIN", "--no-capture"},
		{"no capability, no need", func(f *Facts) { f.NetAdmin, f.Capture, f.Systemd, f.UID = false, false, false, 1000 }, "", OK, "", ""},
		{"capability without root", func(f *Facts) { f.UID, f.Systemd = 1000, false }, "", OK, "", ""},
		{"old kernel", func(f *Facts) { f.Kernel = "5.1.9" }, "kernel", Warning, "5.1.9", "5.2"},
		{"older kernel", func(f *Facts) { f.Kernel = "4.19" }, "kernel", Warning, "4.19", "5.2"},
		{"old kernel, no capture", func(f *Facts) { f.Kernel, f.Capture = "4.19", false }, "", OK, "", ""},
		{"first good kernel", func(f *Facts) { f.Kernel = "5.2" }, "", OK, "", ""},
		{"strange kernel", func(f *Facts) { f.Kernel = "x" }, "kernel", Warning, `"x"`, "5.2"},
		{"no nftables", func(f *Facts) { f.NFTables = errors.New("protocol not supported") }, "nftables", Failed, "protocol not supported", "nf_tables"},
		{"nftables with a hint", func(f *Facts) { f.NFTables = hinted }, "nftables", Failed, "no", "do this"},
		{"nftables, no capture", func(f *Facts) { f.NFTables, f.Capture = hinted, false }, "", OK, "", ""},
		{"files", func(f *Facts) { f.Files = hinted }, "files", Failed, "no", "do this"},
		{"unit", func(f *Facts) { f.Unit = errors.New("exists") }, "systemd", Failed, "exists", "--systemd=false"},
		{"tcp port", func(f *Facts) { f.Ports[0].Err = errors.New("in use") }, "ports", Failed, "TCP 15001 (outbound): in use", "ss -ltnp 'sport = :15001'"},
		{"udp port", func(f *Facts) { f.Ports[1].Err = errors.New("in use") }, "ports", Failed, "UDP 15053", "ss -lunp 'sport = :15053'"},
		{"no resolv.conf", func(f *Facts) { f.Resolv = errors.New("no such file") }, "resolver", Failed, "no such file", "/etc/resolv.conf"},
		{"no name server", func(f *Facts) { f.Resolvers = nil }, "resolver", Warning, "only names of the mesh", "dns.upstream"},
		{"no Envoy", func(f *Facts) { f.Envoy = errors.New("not found") }, "envoy", Failed, `no Envoy at "envoy": not found`, "get one"},
		{"other Envoy", func(f *Facts) { f.EnvoySays = "envoy version: ab/1.29.3/Clean" }, "envoy", Warning, "1.29.3", "1.40"},
		{"no Envoy at all", func(f *Facts) { f.EnvoySays = "hello" }, "envoy", Warning, "does not say", "1.40"},
		{"clock behind", func(f *Facts) { f.Now = noon.Add(-time.Hour) }, "clock", Warning, "behind by 59m0s", "date -u"},
		{"clock ahead", func(f *Facts) { f.Now = noon.Add(time.Hour) }, "clock", Warning, "expired, or this clock is ahead", "date -u"},
		{"one gateway away", func(f *Facts) {
			f.Endpoints = append(f.Endpoints, Endpoint{"192.0.2.2:15443", errors.New("refused")})
		}, "issuer", Warning, "192.0.2.2:15443: refused", "firewalls"},
		{"all gateways away", func(f *Facts) { f.Endpoints[0].Err = errors.New("refused") }, "issuer", Failed, "no endpoint of the token gave an answer: 192.0.2.1:15443: refused", "firewalls"},
		{"no token", func(f *Facts) { f.Token, f.Endpoints, f.Now = nil, nil, time.Time{} }, "", OK, "", ""},
		{"started later", func(f *Facts) { f.Later, f.Ports[0].Err = true, errors.New("in use") }, "ports", Warning, "in use", "ss"},
		{"files, started later", func(f *Facts) { f.Later, f.Files = true, hinted }, "files", Failed, "no", "do this"},
		{"Envoy not looked at", func(f *Facts) { f.EnvoyPath, f.EnvoySays = "", "" }, "", OK, "", ""},
		{"many lines", func(f *Facts) { f.NFTables = errors.New("a\nb") }, "nftables", Failed, "a; b", "nf_tables"},
	} {
		t.Run(x.name, func(t *testing.T) {
			f := good()
			x.change(&f)
			got := Judge(f)
			if want := x.result != Failed; Ready(got) != want || (len(FailedChecks(got)) == 0) != want {
				t.Errorf("ready: %v, failed: %v", Ready(got), FailedChecks(got))
			}
			found := false
			for _, g := range got {
				if g.Check == x.check {
					found = true
					if g.Result != x.result || !strings.Contains(g.Detail, x.detail) || !strings.Contains(g.Remedy, x.remedy) {
						t.Errorf("got %+v", g)
					}
				} else if g.Result != OK || g.Remedy != "" || g.Detail == "" {
					t.Errorf("and %+v", g)
				}
			}
			if !found && x.check != "" {
				t.Errorf("no finding on %s", x.check)
			}
		})
	}
}

func TestCapabilities(t *testing.T) {
	for _, x := range []struct {
		status string
		want   bool
	}{
		{"Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\n", true},
		{"CapPrm:\t000001ffffffffff\nCapEff:\t0000000000000000\n", false},
		{"CapEff:\t0000000000001000\n", true},
		{"CapEff:\t0000000000000800\n", false},
		{"CapEff:\tx\n", false},
		{"", false},
	} {
		if got := hasCapability(x.status, unix.CAP_NET_ADMIN); got != x.want {
			t.Errorf("%q: %v", x.status, got)
		}
	}
}

func TestFree(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	if err := free(t.Context(), "tcp", port); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a port in use on one address: %v", err)
	}
	l.Close()
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if err := free(t.Context(), "udp", u.LocalAddr().(*net.UDPAddr).Port); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a UDP port in use: %v", err)
	}
	if err := free(t.Context(), "tcp", 0); err != nil {
		t.Errorf("any port: %v", err)
	}
}

func TestGather(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	program := filepath.Join(dir, "envoy")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho envoy  version: 0a/1.40.2/Clean/RELEASE/BoringSSL\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	closed := "127.0.0.1:1"
	called := map[string]int{}
	call := func(name string) func() error {
		return func() error { called[name]++; return fmt.Errorf("%s", name) }
	}
	c := Config{
		ConfigFile: "/etc/isthmus/agent.yaml", DataDir: "/var/lib/x", Envoy: program, Token: &Window{}, Endpoints: []string{l.Addr().String(), closed},
		Files: call("files"), Unit: call("unit"), Probe: call("probe"), Resolvers: func() ([]string, error) { return []string{"192.0.2.1:53"}, nil },
	}
	f := Gather(t.Context(), c)
	if f.Envoy != nil || !strings.Contains(f.EnvoySays, "1.40.2") || f.Kernel == "" || len(f.Ports) != len(ports) || f.Resolvers[0] != "192.0.2.1:53" {
		t.Errorf("got %+v", f)
	}
	if f.Endpoints[0].Err != nil || f.Endpoints[1].Err == nil {
		t.Errorf("endpoints %+v", f.Endpoints)
	}
	if called["files"] != 1 || called["unit"] != 0 || called["probe"] != 0 {
		t.Errorf("called %v without capture and service", called)
	}
	c.Capture, c.UnitFile = true, "/etc/systemd/system/x.service"
	f = Gather(t.Context(), c)
	if called["unit"] != 1 || called["probe"] != 1 || f.NFTables == nil || f.Unit == nil {
		t.Errorf("called %v with both", called)
	}
	c.Envoy = filepath.Join(dir, "none")
	if f = Gather(t.Context(), c); f.Envoy == nil {
		t.Error("an Envoy that is not there")
	}
}

func TestWrite(t *testing.T) {
	c := Config{ConfigFile: "/etc/isthmus/agent.yaml", DataDir: "/var/lib/x/", UnitFile: "/etc/systemd/system/x.service", Capture: true}
	r := Report{Findings: []Finding{ok("kernel", "Linux 6"), {"ports", Failed, "TCP 1: in use", "end it"}}, Changes: c.Changes()}
	var b bytes.Buffer
	if err := r.Write(&b); err != nil {
		t.Fatal(err)
	}
	const want = `this machine:
  ok       kernel    Linux 6
  error    ports     TCP 1: in use
                     hint: end it
joining will change:
  /etc/isthmus/agent.yaml: the configuration, a new file
  /var/lib/x/: key, certificate, root, a list of what was written; later the sockets and Envoy's state
  /etc/systemd/system/x.service: a service, enabled and started
  nftables table inet isthmus: while the agent runs: leads TCP through Envoy and port 53 to the agent; port 22 is left out
`
	if b.String() != want {
		t.Errorf("got\n%s", b.String())
	}
	if n := len(Config{ConfigFile: "/a", DataDir: "/b"}.Changes()); n != 2 {
		t.Errorf("%d changes without capture and service", n)
	}
}
