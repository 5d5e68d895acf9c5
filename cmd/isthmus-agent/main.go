// Command isthmus-agent runs beside a workload: it starts Envoy, keeps its certificate, answers names on machines and
// reports health.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/agent"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/join"
	"github.com/isthmus-mesh/isthmus/internal/capture"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/version"
)

const (
	defaultConfigDir = "/etc/isthmus"
	defaultConfig    = defaultConfigDir + "/agent.yaml"
	defaultDataDir   = "/var/lib/isthmus-agent"
)

func main() {
	// The first signal asks for a clean end, which is bounded; a second one ends the process at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := command().ExecuteContext(ctx); err != nil {
		diag.Print(os.Stderr, "isthmus-agent", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	level := new(slog.LevelVar)
	root := &cobra.Command{
		Use: "isthmus-agent", Short: "Runs beside a workload of the mesh: Envoy, its certificate, names and health",
		SilenceErrors: true, SilenceUsage: true,
	}
	root.PersistentFlags().TextVar(level, "log-level", level, "debug, info, warn or error")
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	root.AddCommand(runCommand(log), bootstrapCommand(), joinCommand(log), leaveCommand(), captureCommand(),
		proxyCommand(log, level), initCommand(level), waitCommand(), &cobra.Command{
			Use: "version", Short: "Print the version", Args: cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version.String()) },
		})
	return root
}

func configFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVarP(path, "config", "c", defaultConfig, "configuration file")
}

func runCommand(log *slog.Logger) *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use: "run", Short: "Run the agent", Args: cobra.NoArgs,
		Long: `Run the agent until SIGTERM or Ctrl-C, which drains Envoy first.

An agent that is killed leaves Envoy and the capture rules in place; the next one
takes Envoy over without a restart.

The configuration file; unknown fields are refused:

` + config.Example,
		Example: "  isthmus-agent run --config /etc/isthmus/agent.yaml",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(path)
			if err != nil {
				return err
			}
			return agent.Run(cmd.Context(), c, log)
		},
	}
	configFlag(cmd, &path)
	return cmd
}

func bootstrapCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use: "bootstrap", Short: "Print the configuration that Envoy starts with", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(path)
			if err != nil {
				return err
			}
			data, err := agent.Bootstrap(c)
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(data)
			return err
		},
	}
	configFlag(cmd, &path)
	return cmd
}

func joinCommand(log *slog.Logger) *cobra.Command {
	var c join.Config
	var noRun, noCapture bool
	hostname, _ := os.Hostname() // only a note for the issuer
	cmd := &cobra.Command{
		Use: "join TOKEN", Short: "Make this machine a member of the mesh, and run the agent", Args: cobra.ExactArgs(1),
		Long: `Redeem the token that "isthmus token create --vm NAME" printed ("-" reads it from
standard input), write the configuration and the certificate, and run the agent.

The key is made here and never leaves the machine. When anything fails, nothing is
written; a token whose redemption was answered is spent.`,
		Example: "  isthmus-agent join isth1_...\n  isthmus-agent join --no-run --envoy /usr/local/bin/envoy - < token",
		RunE: func(cmd *cobra.Command, args []string) error {
			text, err := join.ReadToken(args[0], cmd.InOrStdin())
			if err != nil {
				return err
			}
			c.Capture, c.Log, c.Hostname = !noCapture, log, hostname
			if noRun && !cmd.Flags().Changed("envoy") {
				c.Envoy = ""
			}
			path, err := join.Join(cmd.Context(), text, c)
			if err != nil {
				return err
			}
			loaded, err := config.Load(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "joined %s as %s/%s (%s), configuration %s\n", loaded.Cluster, loaded.Namespace, loaded.Name, loaded.SPIFFE(), path)
			if noRun {
				return nil
			}
			return agent.Run(cmd.Context(), loaded, log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.ConfigDir, "config-dir", defaultConfigDir, "folder for agent.yaml")
	f.StringVar(&c.DataDir, "data-dir", defaultDataDir, "folder for the certificate, sockets and Envoy's state")
	f.StringSliceVar(&c.Addresses, "address", nil, "address at which the mesh reaches this machine (default: those of the interfaces)")
	f.StringVar(&c.Envoy, "envoy", "envoy", "Envoy binary")
	f.BoolVar(&noRun, "no-run", false, "only write the files")
	f.BoolVar(&noCapture, "no-capture", false, "do not lead traffic through Envoy")
	return cmd
}

func leaveCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use: "leave", Short: "Stop the agent of this machine and delete what join wrote", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := config.Load(path)
			if err != nil {
				return err
			}
			if c.Role != config.Machine {
				return diag.Hint(fmt.Errorf("%s is of role %s, not of a machine", path, c.Role), "end the agent with SIGTERM instead")
			}
			if err := agent.Stop(cmd.Context(), c.DataDir, time.Minute); err != nil {
				return err
			}
			if err := capture.Clean(); c.Capture.Enabled && err != nil {
				return err
			}
			if err := join.Leave(path, c); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "left %s: %s/%s\n", c.Cluster, c.Namespace, c.Name)
			return nil
		},
	}
	configFlag(cmd, &path)
	return cmd
}

func captureCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{Use: "capture", Short: "The nftables rules that lead traffic through Envoy"}
	apply := &cobra.Command{
		Use: "apply", Short: "Install the rules of the configuration", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := config.Load(path)
			if err != nil {
				return err
			}
			rules, err := agent.CaptureConfig(c)
			if err != nil {
				return err
			}
			return capture.Apply(rules)
		},
	}
	configFlag(apply, &path)
	cmd.AddCommand(apply, &cobra.Command{
		Use: "clean", Short: "Remove the rules", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return capture.Clean() },
	}, &cobra.Command{
		Use: "show", Short: "Print the rules that are in place", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			chains, err := capture.Installed()
			if err != nil {
				return err
			}
			if len(chains) == 0 {
				return diag.Hint(errors.New("no capture rules are in place"), "isthmus-agent capture apply, or run with capture.enabled: true")
			}
			fmt.Fprint(cmd.OutOrStdout(), capture.Text(chains))
			return nil
		},
	})
	return cmd
}
