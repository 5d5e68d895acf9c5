package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/envoyadmin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/proxyconfig"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/render"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// errDiffers says what was printed already: the Envoy and the control plane do not agree.
var errDiffers = errors.New("they differ")

// proxyConfig is what the commands below proxy-config share.
type proxyConfig struct {
	o           *options
	admin, file string
	diff, held  bool
	filter      proxyconfig.Filter
}

func proxyConfigCommand(o *options) *cobra.Command {
	c := &proxyConfig{o: o}
	cmd := &cobra.Command{
		Use: "proxy-config", Aliases: []string{"pc"}, Short: "Show the configuration that a workload's Envoy has",
		Long: `Show the configuration that a workload's Envoy has, as its admin interface tells it.

With a --context the Envoy is that of a Pod, reached as kubectl port-forward does: it takes the right to create
pods/portforward in its namespace. Without one it is the Envoy at --admin, on this machine. -f reads a dump instead
(/config_dump?include_eds), --held asks isthmusd what it holds for the proxy, and --diff compares the two. Private keys
are never shown.

The exit code is 1 when --diff finds a difference.`,
	}
	f := cmd.PersistentFlags()
	f.StringVar(&c.admin, "admin", fmt.Sprintf("127.0.0.1:%d", envoyadmin.Port), "admin interface of an Envoy on this machine: HOST:PORT, or a unix socket")
	f.StringVarP(&c.file, "file", "f", "", "read a dump from a file, or - for standard input")
	f.BoolVar(&c.held, "held", false, "show what isthmusd holds for the proxy")
	f.BoolVar(&c.diff, "diff", false, "compare what the Envoy has with what isthmusd holds for it")
	f.IntVar(&c.filter.Port, "port", 0, "only those of this port")
	f.StringVar(&c.filter.FQDN, "fqdn", "", "only those of this host")
	f.StringVar(&c.filter.Subset, "subset", "", "only those of this subset")
	f.StringVar(&c.filter.Direction, "direction", "", "only inbound or outbound ones")
	f.StringVar(&c.filter.Name, "name", "", "only the one of this name")
	_ = cmd.MarkPersistentFlagFilename("file", "json")
	_ = cmd.RegisterFlagCompletionFunc("direction", cobra.FixedCompletions([]string{"inbound", "outbound"}, cobra.ShellCompDirectiveNoFileComp))
	for _, kind := range append(slices.Clone(proxyconfig.Kinds), "all") {
		cmd.AddCommand(c.command(kind))
	}
	return cmd
}

func (c *proxyConfig) command(kind string) *cobra.Command {
	kinds := []string{kind}
	what := "its " + kind
	if kind == "all" {
		kinds, what = proxyconfig.Kinds[:5], "all but its bootstrap"
	}
	out := &cobra.Command{
		Use: kind + " [NAME.NAMESPACE]", Short: "Show " + what, Args: cobra.MaximumNArgs(1), ValidArgsFunction: c.o.completeProxies,
		Example:     "  isthmus --context east proxy-config " + kind + " reviews-v1.default\n  isthmus proxy-config " + kind + " -f config_dump.json",
		Annotations: map[string]string{formats: "short json yaml"},
		RunE: func(cmd *cobra.Command, args []string) error {
			if d := c.filter.Direction; d != "" && d != "inbound" && d != "outbound" {
				return diag.Hint(fmt.Errorf("unknown direction %q", d), "--direction inbound or --direction outbound")
			}
			workload := ""
			if len(args) > 0 {
				workload = args[0]
			}
			d, err := c.read(cmd.Context(), workload, cmd.InOrStdin())
			if err != nil {
				return err
			}
			if c.diff {
				return c.compare(cmd, d, workload, kinds)
			}
			return c.show(cmd, d, kinds)
		},
	}
	if kind[:1] != "a" {
		out.Aliases = []string{strings.TrimSuffix(kind, "s")}
	}
	return out
}

// read gets the dump from where it is said to be.
func (c *proxyConfig) read(ctx context.Context, workload string, in io.Reader) (*proxyconfig.Dump, error) {
	switch {
	case c.file == "-":
		return parse(io.ReadAll(io.LimitReader(in, envoyadmin.MaxBytes)))
	case c.file != "":
		return parse(os.ReadFile(c.file))
	case workload == "":
		return nil, diag.Hint(errors.New("whose configuration is missing"), "name a workload, NAME.NAMESPACE, or a dump with -f")
	case c.held:
		return c.holds(ctx, workload)
	}
	const path = "/config_dump?include_eds"
	if !c.o.cluster.named() {
		d, err := parse(envoyadmin.FromAddress(ctx, c.admin, path))
		if err == nil && workloadOf(d.Node()) != workload {
			return nil, diag.Hint(fmt.Errorf("the Envoy at %s is that of %s", c.admin, d.Node()), "name the admin address of the other one with --admin, or a --context of Kubernetes")
		}
		return d, err
	}
	i := strings.LastIndexByte(workload, '.')
	if i <= 0 || i == len(workload)-1 {
		return nil, diag.Hint(fmt.Errorf("%q is no pod", workload), "name it POD.NAMESPACE")
	}
	cfg, err := c.o.cluster.config()
	if err != nil {
		return nil, err
	}
	return parse(envoyadmin.FromPod(ctx, cfg, workload[i+1:], workload[:i], path))
}

func parse(data []byte, err error) (*proxyconfig.Dump, error) {
	if err != nil {
		return nil, err
	}
	return proxyconfig.Parse(data)
}

// holds asks the control plane.
func (c *proxyConfig) holds(ctx context.Context, workload string) (*proxyconfig.Dump, error) {
	var raw json.RawMessage
	if err := c.o.client().call(ctx, http.MethodGet, "/debug/config_dump?proxyID="+url.QueryEscape(workload), nil, &raw); err != nil {
		return nil, err
	}
	return proxyconfig.Parse(raw)
}

func (c *proxyConfig) compare(cmd *cobra.Command, envoy *proxyconfig.Dump, workload string, kinds []string) error {
	if kinds[0] == "bootstrap" {
		return diag.Hint(errors.New("a bootstrap is the agent's: the control plane holds none"), "leave --diff out")
	}
	if workload == "" {
		workload = envoy.Node()
	}
	held, err := c.holds(cmd.Context(), workload)
	if err != nil {
		return err
	}
	found := proxyconfig.Diff(envoy, held, kinds, c.filter)
	if c.o.output != "short" {
		if err := c.structured(cmd, found); err != nil {
			return err
		}
	} else {
		for _, d := range found {
			switch {
			case !d.Envoy:
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s: isthmusd has it, Envoy does not\n", d.Kind, d.Name)
			case !d.Held:
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s: Envoy has it, isthmusd does not\n", d.Kind, d.Name)
			default:
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s: they differ\n", d.Kind, d.Name)
			}
			for _, f := range d.Fields {
				fmt.Fprintf(cmd.OutOrStdout(), "  %s\n    envoy    %s\n    isthmusd %s\n", f.Path, f.Envoy, f.Held)
			}
		}
		if len(found) == 0 {
			fmt.Fprintln(cmd.OutOrStdout(), "Envoy has what isthmusd holds for it")
		}
	}
	if len(found) > 0 {
		return errDiffers
	}
	return nil
}

func (c *proxyConfig) show(cmd *cobra.Command, d *proxyconfig.Dump, kinds []string) error {
	if kinds[0] == "bootstrap" {
		if d.Bootstrap == nil {
			return diag.Hint(errors.New("the dump has no bootstrap"), "ask the Envoy, not isthmusd")
		}
		return c.structured(cmd, d.Bootstrap)
	}
	if c.o.output != "short" {
		out := map[string][]any{}
		for _, kind := range kinds {
			out[kind] = []any{}
			for _, r := range d.Of(kind) {
				if c.filter.Lets(kind, r) {
					out[kind] = append(out[kind], r.Body)
				}
			}
		}
		if len(kinds) == 1 {
			return c.structured(cmd, out[kinds[0]])
		}
		return c.structured(cmd, out)
	}
	for i, kind := range kinds {
		if i > 0 {
			fmt.Fprintln(cmd.OutOrStdout())
		}
		t := newTable(cmd.OutOrStdout())
		for _, row := range d.Rows(kind, c.filter) {
			t.row(row...)
		}
		if err := t.flush(); err != nil {
			return err
		}
	}
	for _, line := range d.Refused() {
		fmt.Fprintln(cmd.ErrOrStderr(), "refused:", line)
	}
	return nil
}

// structured writes JSON, or YAML.
func (c *proxyConfig) structured(cmd *cobra.Command, v any) error {
	if c.o.output != "yaml" {
		return printJSON(cmd.OutOrStdout(), v)
	}
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if data, err = render.YAML(data); err == nil {
		_, err = cmd.OutOrStdout().Write(data)
	}
	return err
}
