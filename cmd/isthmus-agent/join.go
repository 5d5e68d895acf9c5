package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/agent"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/bootstrap"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/dns"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/join"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/preflight"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/systemd"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
	"github.com/isthmus-mesh/isthmus/internal/capture"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// joinOptions are the flags of join.
type joinOptions struct {
	join.Config
	noRun, noCapture bool
	systemd          bool
	check, dryRun    bool
	output           string
}

func joinCommand(log *slog.Logger) *cobra.Command {
	var o joinOptions
	cmd := &cobra.Command{
		Use: "join TOKEN", Short: "Make this machine a member of the mesh, and run the agent",
		Args: func(cmd *cobra.Command, args []string) error {
			if o.check || o.dryRun {
				return cobra.MaximumNArgs(1)(cmd, args)
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		Long: `Redeem the token that "isthmus token create --vm NAME" printed ("-" reads it from
standard input), write the configuration and the certificate, and run the agent.

The machine is checked first: rights, kernel, nftables, files, ports, name servers,
Envoy, clock, and whether the issuer is within reach. When something is marked
"error" nothing is written and the token is still good. --check stops after that, and
needs no token.

Where systemd runs the machine, the agent becomes a service and the command ends;
elsewhere it runs until SIGTERM or Ctrl-C.

The key is made here and never leaves the machine. When anything fails, nothing is
written; a token whose redemption was answered is spent.`,
		Example: "  isthmus-agent join --check\n  isthmus-agent join isth1_...\n  isthmus-agent join --no-run --envoy /usr/local/bin/envoy - < token",
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Capture, o.Log = !o.noCapture, log
			o.Hostname, _ = os.Hostname() // only a note for the issuer
			if !cmd.Flags().Changed("systemd") {
				o.systemd = !o.noRun && systemd.Running("/")
			}
			if o.noRun && !cmd.Flags().Changed("envoy") {
				o.Envoy = ""
			}
			return o.run(cmd, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.ConfigDir, "config-dir", defaultConfigDir, "folder for agent.yaml")
	f.StringVar(&o.DataDir, "data-dir", defaultDataDir, "folder for the certificate, sockets and Envoy's state")
	f.StringSliceVar(&o.Addresses, "address", nil, "address at which the mesh reaches this machine (default: those of the interfaces)")
	f.StringVar(&o.Envoy, "envoy", "envoy", "Envoy binary")
	f.BoolVar(&o.noRun, "no-run", false, "only write the files")
	f.BoolVar(&o.noCapture, "no-capture", false, "do not lead traffic through Envoy")
	f.BoolVar(&o.systemd, "systemd", false, "have systemd run the agent (default: where systemd runs the machine, unless --no-run)")
	f.BoolVar(&o.check, "check", false, "check the machine and say what would change; exit code 1 when it is not ready")
	f.BoolVar(&o.dryRun, "dry-run", false, "the same as --check")
	f.StringVarP(&o.output, "output", "o", "text", "of --check: text or json")
	return cmd
}

func (o *joinOptions) run(cmd *cobra.Command, args []string) error {
	only := o.check || o.dryRun
	switch {
	case o.systemd && o.noRun:
		return diag.Hint(errors.New("--systemd starts the agent, --no-run does not"), "give one of the two")
	case o.output != "text" && (o.output != "json" || !only):
		return diag.Hint(fmt.Errorf("no output format %q here", o.output), "text, or with --check json")
	}
	text := ""
	look := preflight.Config{}
	if len(args) > 0 {
		var err error
		if text, err = join.ReadToken(args[0], cmd.InOrStdin()); err != nil {
			return err
		}
		p, err := join.Parse(text)
		if err != nil {
			return err
		}
		look.Token, look.Endpoints = &preflight.Window{NotBefore: p.NotBefore, Expires: p.Expires}, p.Endpoints
	}
	service, err := o.service()
	if err != nil {
		return err
	}
	report := preflight.Check(cmd.Context(), o.look(look, service))
	if err := writeReport(cmd.OutOrStdout(), report, o.output); err != nil {
		return err
	}
	if !report.Ready {
		return diag.Hint(fmt.Errorf("this machine is not ready to join: %s", strings.Join(preflight.FailedChecks(report.Findings), ", ")),
			"nothing was changed and no token was spent: follow the hints above, then run the same command again")
	}
	if only {
		return nil
	}
	return o.join(cmd, text, service)
}

// join redeems the token, and starts the agent as asked for.
func (o *joinOptions) join(cmd *cobra.Command, text string, service systemd.Config) error {
	if o.systemd { // its PATH is another than ours
		if path, err := exec.LookPath(o.Envoy); err == nil {
			if o.Envoy, err = filepath.Abs(path); err != nil {
				return fmt.Errorf("path of Envoy: %w", err)
			}
		}
	}
	path, err := join.Join(cmd.Context(), text, o.Config)
	if err != nil {
		return err
	}
	loaded, err := config.Load(path)
	if err != nil {
		return err
	}
	out := cmd.OutOrStdout()
	fmt.Fprintf(out, "joined %s as %s/%s (%s), configuration %s\n", loaded.Cluster, loaded.Namespace, loaded.Name, loaded.SPIFFE(), path)
	switch {
	case o.noRun:
		return nil
	case o.systemd:
		if err := service.Install(cmd.Context()); err != nil {
			return diag.Hint(fmt.Errorf("the machine has joined, but its service was not started: %w", err),
				"start the agent with: isthmus-agent run --config %s", path)
		}
		fmt.Fprintf(out, "started %s; its log: journalctl -u %s\n", systemd.Unit, systemd.Unit)
		return nil
	}
	return agent.Run(cmd.Context(), loaded, o.Log)
}

// service is the agent as a service, whether or not it is to be one.
func (o *joinOptions) service() (systemd.Config, error) {
	program, err := os.Executable()
	if err != nil {
		return systemd.Config{}, fmt.Errorf("path of this program: %w", err)
	}
	return systemd.Config{Program: program, Config: filepath.Join(o.ConfigDir, join.ConfigFile), DataDir: filepath.Clean(o.DataDir)}, nil
}

// look fills in what is to be looked at.
func (o *joinOptions) look(c preflight.Config, service systemd.Config) preflight.Config {
	c.ConfigFile, c.DataDir, c.Capture, c.Later = service.Config, o.DataDir, o.Capture, o.noRun
	c.Envoy, c.EnvoyHint = o.Envoy, join.EnvoyHint
	c.Files = o.Check
	if o.systemd {
		c.UnitFile = service.Path()
		c.Unit = func() error {
			if _, err := exec.LookPath("systemctl"); err != nil {
				return diag.Hint(errors.New("no systemctl in PATH"), "join with --systemd=false")
			}
			return service.Check()
		}
	}
	c.Probe = func() error {
		return capture.Probe(capture.Config{Mark: bootstrap.Mark, ExcludeInboundPorts: []uint16{22}, DNSPort: 15053})
	}
	c.Resolvers = func() ([]string, error) { return dns.Resolvers("/etc/resolv.conf") }
	c.Dialer = upstream.NetDialer(upstream.CanMark())
	return c
}

func writeReport(w io.Writer, r preflight.Report, format string) error {
	if format != "json" {
		return r.Write(w)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}

func leaveCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use: "leave", Short: "Stop the agent of this machine and take back what join wrote", Args: cobra.NoArgs,
		Long: `Stop the agent and its service, remove the capture rules, and delete what join and
the agent wrote. A file of join's that was changed since is not deleted but moved to
the same name with .saved at its end.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(path)
			if err != nil {
				return err
			}
			if c.Role != config.Machine {
				return diag.Hint(fmt.Errorf("%s is of role %s, not of a machine", path, c.Role), "end the agent with SIGTERM instead")
			}
			return leave(cmd.Context(), cmd.OutOrStdout(), path, c, systemd.Config{DataDir: c.DataDir})
		},
	}
	configFlag(cmd, &path)
	return cmd
}

func leave(ctx context.Context, out io.Writer, path string, c *config.Config, service systemd.Config) error {
	if err := service.Stop(ctx); err != nil {
		return err
	}
	if err := agent.Stop(ctx, c.DataDir, time.Minute); err != nil {
		return err
	}
	if c.Capture.Enabled {
		if err := capture.Clean(); err != nil {
			return err
		}
	}
	unit, err := service.Remove(ctx)
	if err != nil {
		return err
	}
	saved, err := join.Leave(path, c)
	if unit != nil {
		saved = append(saved, *unit)
	}
	for _, s := range saved {
		fmt.Fprintf(out, "%s was changed since join: kept as %s\n", s.Path, s.To)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "left %s: %s/%s\n", c.Cluster, c.Namespace, c.Name)
	return nil
}
