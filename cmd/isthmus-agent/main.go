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

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/agent"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
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
