// Command isthmusd is one cluster's control plane, certificate authority and peer agent in one process.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/idle"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		diag.Print(os.Stderr, "isthmusd", err)
		stop()
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var path, level, plaintext string
	var check bool
	cmd := &cobra.Command{
		Use:   "isthmusd --config FILE",
		Short: "The control plane of one cluster of an Isthmus mesh",
		Long: `isthmusd is the control plane of one cluster: it reads Kubernetes and Istio objects, serves Envoy over xDS, signs workload
certificates, and is this cluster's peer agent in the federation. Everything but the log level is in one YAML file, described in docs/guide/isthmusd.md.`,
		Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true, Version: version.String(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			if plaintext != "" {
				cfg.XDSPlaintext = plaintext
				if err := cfg.validate(); err != nil {
					return diag.Hint(fmt.Errorf("--xds-plaintext: %w", err), "name a loopback address, for example 127.0.0.1:15010")
				}
			}
			if check {
				fmt.Fprintf(cmd.OutOrStdout(), "%s is good: cluster %s\n", path, cfg.Cluster)
				return nil
			}
			var l slog.Level
			if err := l.UnmarshalText([]byte(level)); err != nil {
				return diag.Hint(fmt.Errorf("--log-level %s: not a level", level), "debug, info, warn or error")
			}
			log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})).With("cluster", cfg.Cluster)
			reg := prometheus.NewRegistry()
			reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
			resting := make(chan error, 1)
			ctx, end := context.WithCancel(cmd.Context())
			go func() { resting <- idle.Run(ctx, idle.Config{}) }()
			defer func() { end(); <-resting }()
			if err := run(ctx, cfg, log, reg); err != nil && !errors.Is(err, context.Canceled) {
				return err
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "config", "/etc/isthmus/isthmusd.yaml", "configuration file")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&plaintext, "xds-plaintext", "", "serve xDS without authentication on this loopback address, for tests and benchmarks; off unless given")
	f.BoolVar(&check, "check", false, "check the configuration file and end")
	_ = cmd.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}
