package preflight

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Limits of one look.
const (
	envoyLimit   = 10 * time.Second
	dialLimit    = 5 * time.Second
	maxEndpoints = 16 // asked at once; more are not asked
)

// Config is what Gather looks at. Functions that are nil are not called.
type Config struct {
	ConfigFile, DataDir string // absolute
	Capture             bool
	Later               bool   // the agent is not started now
	Envoy               string // program; empty: not looked at
	EnvoyHint           string
	UnitFile            string // absolute; empty: no service is to be made
	Token               *Window
	Endpoints           []string // of the token

	Files     func() error             // whether the files may be written
	Unit      func() error             // whether the service can be made
	Probe     func() error             // tries the capture rules
	Resolvers func() ([]string, error) // name servers, host:port
	Dialer    *net.Dialer              // to the endpoints
}

// ports are those that the agent and Envoy listen on, unless the configuration is changed later.
var ports = []Port{
	{Network: "tcp", Number: 15000, For: "Envoy's administration"},
	{Network: "tcp", Number: 15001, For: "captured outbound traffic"},
	{Network: "tcp", Number: 15006, For: "captured inbound traffic"},
	{Network: "tcp", Number: 15021, For: "health"},
	{Network: "tcp", Number: 15053, For: "names"},
	{Network: "udp", Number: 15053, For: "names"},
	{Network: "tcp", Number: 15090, For: "Envoy's metrics"},
}

// Check looks at the machine, decides, and says what joining would change.
func Check(ctx context.Context, c Config) Report {
	findings := Judge(Gather(ctx, c))
	return Report{Ready: Ready(findings), Findings: findings, Changes: c.Changes()}
}

// Gather looks at the machine. It changes nothing: ports are opened for a moment, and so are connections to the issuer,
// over which nothing is sent.
func Gather(ctx context.Context, c Config) Facts {
	f := Facts{
		UID: os.Geteuid(), NetAdmin: netAdmin(), Kernel: kernel(), Capture: c.Capture, Later: c.Later, Systemd: c.UnitFile != "",
		EnvoyPath: c.Envoy, EnvoyHint: c.EnvoyHint, Token: c.Token, Now: time.Now(),
	}
	if c.Files != nil {
		f.Files = c.Files()
	}
	if c.Unit != nil && f.Systemd {
		f.Unit = c.Unit()
	}
	if c.Probe != nil && c.Capture {
		f.NFTables = c.Probe()
	}
	if c.Resolvers != nil {
		f.Resolvers, f.Resolv = c.Resolvers()
	}
	for _, p := range ports {
		p.Err = free(ctx, p.Network, p.Number)
		f.Ports = append(f.Ports, p)
	}
	if c.Envoy != "" {
		f.EnvoySays, f.Envoy = ask(ctx, c.Envoy)
	}
	f.Endpoints = c.dial(ctx)
	return f
}

func (c Config) dial(ctx context.Context) []Endpoint {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	dialer := c.Dialer
	if dialer == nil {
		dialer = new(net.Dialer)
	}
	out := make([]Endpoint, min(len(c.Endpoints), maxEndpoints))
	var all sync.WaitGroup
	for i := range out {
		all.Go(func() {
			out[i].Address = c.Endpoints[i]
			conn, err := dialer.DialContext(ctx, "tcp", c.Endpoints[i])
			if out[i].Err = err; err == nil {
				_ = conn.Close()
			}
		})
	}
	all.Wait()
	return out
}

// free reports whether a port can be had on all addresses.
func free(ctx context.Context, network string, port int) error {
	var lc net.ListenConfig
	address := ":" + strconv.Itoa(port)
	if network == "udp" {
		conn, err := lc.ListenPacket(ctx, network, address)
		if err != nil {
			return inner(err)
		}
		return conn.Close()
	}
	l, err := lc.Listen(ctx, network, address)
	if err != nil {
		return inner(err)
	}
	return l.Close()
}

// inner is why, without the address.
func inner(err error) error {
	if cause := errors.Unwrap(err); cause != nil {
		return cause
	}
	return err
}

// ask has Envoy say its version.
func ask(ctx context.Context, program string) (string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		var e *exec.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, envoyLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", path, err)
	}
	return string(out[:min(len(out), 4096)]), nil
}

// netAdmin reports whether this process has CAP_NET_ADMIN.
func netAdmin() bool {
	data, err := os.ReadFile("/proc/self/status")
	return err == nil && hasCapability(string(data), unix.CAP_NET_ADMIN)
}

// hasCapability reads the effective capabilities out of a /proc/PID/status.
func hasCapability(status string, number uint) bool {
	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && set&(1<<number) != 0
		}
	}
	return false
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// Changes says what joining changes on the machine. It is pure.
func (c Config) Changes() []Change {
	out := []Change{
		{"the configuration, a new file", c.ConfigFile},
		{"key, certificate, root, a list of what was written; later the sockets and Envoy's state", filepath.Clean(c.DataDir) + "/"},
	}
	if c.UnitFile != "" {
		out = append(out, Change{"a service, enabled and started", c.UnitFile})
	}
	if c.Capture {
		out = append(out, Change{"while the agent runs: leads TCP through Envoy and port 53 to the agent; port 22 is left out", "nftables table inet isthmus"})
	}
	return out
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

func hintOr(err error, remedy string) string {
	if h := diag.HintOf(err); h != "" {
		return h
	}
	return remedy
}
