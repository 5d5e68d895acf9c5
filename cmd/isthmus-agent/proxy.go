package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/agent"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/podenv"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

func proxyCommand(log *slog.Logger, level *slog.LevelVar) *cobra.Command {
	var f podenv.Flags
	var output string
	var dryRun bool
	cmd := &cobra.Command{
		Use: "proxy (sidecar | router)", Short: "Run the agent of a Pod, configured by its environment", Args: cobra.ExactArgs(1),
		ValidArgs: []string{"sidecar", "router"},
		Long: `Run the agent beside a workload in a Pod (sidecar) or as a gateway (router), until SIGTERM.

It needs no configuration file: injection sets the environment variables and mounts
the token, the root certificate and the Pod's labels. docs/guide/injection.md lists them.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := setLevel(level, output); err != nil {
				return err
			}
			c, err := podenv.Load(podenv.Source{Kind: args[0], Getenv: os.Getenv, Environ: os.Environ(), Flags: f})
			if err != nil {
				return err
			}
			if dryRun {
				data, err := agent.Bootstrap(c)
				if err != nil {
					return err
				}
				_, err = cmd.OutOrStdout().Write(data)
				return err
			}
			if err := awaitFiles(cmd.Context(), c, log); err != nil {
				return err
			}
			return agent.Run(cmd.Context(), c, log)
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.Domain, "domain", "", "suffix of the node id (default: NAMESPACE.svc.cluster.local)")
	fs.StringVar(&f.ProxyLogLevel, "proxyLogLevel", "warning", "Envoy's log level")
	fs.StringVar(&f.ComponentLevel, "proxyComponentLogLevel", "", "log levels of Envoy's components, NAME:LEVEL,...")
	fs.IntVar(&f.Concurrency, "concurrency", 0, "Envoy's workers (default: PROXY_CONFIG, else the CPU limit, else 2)")
	fs.StringVar(&f.Envoy, "envoy", "", "Envoy binary (default: ENVOY, else PROXY_CONFIG, else envoy)")
	fs.StringVar(&f.ServiceCluster, "serviceCluster", "", "taken and not used, as by Istio's agent today")
	fs.StringVar(&output, "log_output_level", "", "the agent's own log level, default:LEVEL")
	fs.BoolVar(&dryRun, "dry-run", false, "print Envoy's bootstrap and end")
	return cmd
}

// setLevel takes Istio's SCOPE:LEVEL,...; there is one scope here, so that of "default" or the last counts.
func setLevel(level *slog.LevelVar, text string) error {
	for s := range strings.SplitSeq(text, ",") {
		_, name, ok := strings.Cut(s, ":")
		if !ok {
			name = s
		}
		switch name {
		case "":
			continue
		case "none", "fatal":
			name = "error"
		}
		var l slog.Level
		if err := l.UnmarshalText([]byte(name)); err != nil {
			return diag.Hint(fmt.Errorf("--log_output_level %q: %q is not a level", text, name), "for example default:info")
		}
		level.Set(l)
	}
	return nil
}

// awaitFiles waits for the token and the root certificate: the kubelet and the control plane bring them, and either may
// be a moment behind.
func awaitFiles(ctx context.Context, c *config.Config, log *slog.Logger) error {
	for attempt := 0; ; attempt++ {
		missing := ""
		for _, path := range []string{c.RootCert, c.TokenFile} {
			if info, err := os.Stat(path); err != nil || info.Size() == 0 {
				missing = path
			}
		}
		if missing == "" {
			return nil
		}
		if attempt%25 == 0 {
			log.Warn("waiting for a file", "path", missing)
		}
		select {
		case <-ctx.Done():
			return diag.Hint(fmt.Errorf("ended while waiting for %s", missing), "the control plane writes the ConfigMap istio-ca-root-cert into every namespace; the token is a projected volume")
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func waitCommand() *cobra.Command {
	var url string
	var timeout, period time.Duration
	cmd := &cobra.Command{
		Use: "wait", Short: "Wait until the proxy is ready", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			client := &http.Client{Timeout: time.Second}
			last := errors.New("it was not asked")
			for {
				r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
				if err != nil {
					return err
				}
				resp, err := client.Do(r)
				if err == nil {
					text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
					resp.Body.Close()
					if resp.StatusCode == http.StatusOK {
						return nil
					}
					err = fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(text)))
				}
				if ctx.Err() == nil {
					last = err
				}
				select {
				case <-ctx.Done():
					return diag.Hint(fmt.Errorf("the proxy is not ready after %s: %w", timeout, last), "look at the log of the container istio-proxy")
				case <-time.After(period):
				}
			}
		},
	}
	cmd.Flags().StringVar(&url, "url", "http://localhost:15021/healthz/ready", "what to ask")
	cmd.Flags().DurationVar(&timeout, "timeout", 60*time.Second, "how long to wait")
	cmd.Flags().DurationVar(&period, "period", 500*time.Millisecond, "how often to ask")
	return cmd
}
