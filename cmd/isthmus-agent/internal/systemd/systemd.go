// Package systemd has the agent run as a service: it writes its unit and takes it back. It calls systemctl through a
// function, and knows nothing of what the agent does.
package systemd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/manifest"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Unit is the name of the service, Dir the folder of units that an administrator adds.
const (
	Unit = "isthmus-agent.service"
	Dir  = "/etc/systemd/system"
)

// limit bounds one call of systemctl; a stop waits for open connections to end.
const limit = 2 * time.Minute

// Runner runs systemctl with these arguments. Its error holds what it said.
type Runner func(ctx context.Context, args ...string) error

// Systemctl is the Runner of the machine.
func Systemctl(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err == nil {
		return nil
	}
	said := strings.Join(strings.Fields(string(out[:min(len(out), 1000)])), " ")
	return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, said)
}

// Config is one service.
type Config struct {
	UnitDir string // empty: Dir
	Run     Runner // nil: Systemctl
	Program string // absolute path of isthmus-agent
	Config  string // absolute path of its configuration
	DataDir string // absolute path; all that the service may write
}

func (c Config) path() string {
	if c.UnitDir == "" {
		c.UnitDir = Dir
	}
	return filepath.Join(c.UnitDir, Unit)
}

func (c Config) run() Runner {
	if c.Run == nil {
		return Systemctl
	}
	return c.Run
}

// Path returns where the unit is.
func (c Config) Path() string { return c.path() }

// plain are paths that mean the same in a unit as anywhere: no quotes, no specifiers (%), no variables ($), no space.
var plain = regexp.MustCompile(`^/[A-Za-z0-9._+@/:-]*$`)

// Check reports what would keep Install from working: it is called before anything is spent.
func (c Config) Check() error {
	for _, p := range []string{c.Program, c.Config, c.DataDir} {
		if !plain.MatchString(p) {
			return diag.Hint(fmt.Errorf("%q cannot stand in a systemd unit", p), "choose an absolute path of letters, digits and ._+@:-, or join with --systemd=false")
		}
	}
	if _, err := os.Lstat(c.path()); err == nil {
		return diag.Hint(fmt.Errorf("%s exists", c.path()), "move it away, or join with --systemd=false and start the agent your own way")
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look at the unit: %w", err)
	}
	return nil
}

// Text returns the unit. The agent is all that is signalled and Envoy outlives it (KillMode=process): after a crash the
// next agent takes Envoy over with its open connections.
func (c Config) Text() string {
	return fmt.Sprintf(`# Written by "isthmus-agent join"; "isthmus-agent leave" removes it.
# Changes belong into a drop-in: systemctl edit isthmus-agent
[Unit]
Description=Isthmus agent: this machine as a workload of the mesh
Wants=network-online.target
After=network-online.target nss-lookup.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart=%[1]s run --config %[2]s
Restart=always
RestartSec=2
KillMode=process
KillSignal=SIGTERM
TimeoutStopSec=90
LimitNOFILE=1048576

# Capture and marked sockets need CAP_NET_ADMIN and nothing else of root's.
CapabilityBoundingSet=CAP_NET_ADMIN
NoNewPrivileges=yes
ProtectSystem=strict
ReadWritePaths=%[3]s
ProtectHome=read-only
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
PrivateDevices=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
UMask=0077

[Install]
WantedBy=multi-user.target
`, c.Program, c.Config, c.DataDir)
}

// Install writes the unit, notes it in the manifest of DataDir, and enables and starts the service. After an error
// nothing of it is left.
func (c Config) Install(ctx context.Context) (err error) {
	if err := c.Check(); err != nil {
		return err
	}
	m, err := manifest.Load(c.DataDir)
	if err != nil {
		return err
	}
	text := []byte(c.Text())
	m.Add(c.path(), text) // before it is written: a crash between the two leaves none unknown
	if err := m.Save(c.DataDir); err != nil {
		return err
	}
	written := false
	defer func() {
		if err == nil {
			return
		}
		undo := context.WithoutCancel(ctx)
		if written {
			_ = c.run()(undo, "disable", "--now", Unit)
			_ = os.Remove(c.path())
			_ = c.run()(undo, "daemon-reload")
		}
		m.Forget(c.path()) // a later unit of this name is not ours
		_ = m.Save(c.DataDir)
	}()
	if err := ca.WriteFile(c.path(), text, 0o644); err != nil {
		return err
	}
	written = true
	for _, args := range [][]string{{"daemon-reload"}, {"enable", "--now", Unit}} {
		if err := c.run()(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// Stop stops and disables the service if the manifest of DataDir says that join made one.
func (c Config) Stop(ctx context.Context) error {
	m, err := manifest.Load(c.DataDir)
	if err != nil || !m.Has(c.path()) {
		return err
	}
	if _, err := os.Lstat(c.path()); errors.Is(err, fs.ErrNotExist) {
		return nil // someone took it away
	}
	return diag.Hint(c.run()(ctx, "disable", "--now", Unit), "as root: systemctl disable --now %s, then run isthmus-agent leave again", Unit)
}

// Remove deletes the unit after Stop, or moves it aside when it was changed since.
func (c Config) Remove(ctx context.Context) (*manifest.Saved, error) {
	m, err := manifest.Load(c.DataDir)
	if err != nil || !m.Has(c.path()) {
		return nil, err
	}
	saved, err := m.Remove(c.path())
	if err != nil {
		return nil, fmt.Errorf("remove the unit: %w", err)
	}
	return saved, c.run()(ctx, "daemon-reload")
}

// Running reports whether systemd runs this machine, and this process sees the machine's own network: in a container or
// a network namespace a unit would run the agent elsewhere. root is the root of the file system, "/".
func Running(root string) bool {
	if info, err := os.Stat(filepath.Join(root, "run/systemd/system")); err != nil || !info.IsDir() {
		return false
	}
	name, err := os.ReadFile(filepath.Join(root, "proc/1/comm"))
	if err != nil || strings.TrimSpace(string(name)) != "systemd" {
		return false
	}
	first, err := os.Readlink(filepath.Join(root, "proc/1/ns/net"))
	own, err2 := os.Readlink(filepath.Join(root, "proc/self/ns/net"))
	return err == nil && err2 == nil && first == own
}
