package main

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

func proxyStatusCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "proxy-status [NAME.NAMESPACE]", Aliases: []string{"ps"}, Short: "Show how far each proxy has taken its configuration", Args: cobra.MaximumNArgs(1),
		Long: `Show how far each proxy has taken its configuration, by resource type: SYNCED, STALE (sent and not answered yet),
NOT SENT, or NACK (refused; it goes on with the version before). With a name, one proxy in detail.`,
		Example:           "  isthmus proxy-status\n  isthmus proxy-status reviews-v1.default",
		ValidArgsFunction: o.completeProxies,
		RunE: func(cmd *cobra.Command, args []string) error {
			var proxies []admin.Proxy
			if err := o.client().call(cmd.Context(), http.MethodGet, "/v1/proxies", nil, &proxies); err != nil {
				return err
			}
			if len(args) == 0 {
				return o.print(cmd, proxies, func(t *table) { proxyRows(t, proxies) })
			}
			proxies = slices.DeleteFunc(proxies, func(p admin.Proxy) bool { return p.Node != args[0] && workloadOf(p.Node) != args[0] })
			if len(proxies) == 0 {
				return diag.Hint(fmt.Errorf("no proxy %q is connected", args[0]), "isthmus proxy-status lists those that are; the log of its isthmus-agent says why it is not")
			}
			return o.print(cmd, proxies, func(t *table) { proxyDetail(t, proxies) })
		},
	}
}

// workloadOf is NAME.NAMESPACE in a node id, TYPE~IP~NAME.NAMESPACE~DOMAIN; empty for other clients.
func workloadOf(node string) string {
	if parts := strings.Split(node, "~"); len(parts) == 4 {
		return parts[2]
	}
	return ""
}

func (o *options) completeProxies(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var proxies []admin.Proxy
	if len(args) > 0 || o.client().call(context.Background(), http.MethodGet, "/v1/proxies", nil, &proxies) != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names := map[string]bool{}
	for _, p := range proxies {
		if name := workloadOf(p.Node); name != "" {
			names[name] = true
		}
	}
	return slices.Sorted(maps.Keys(names)), cobra.ShellCompDirectiveNoFileComp
}

func proxyRows(t *table, proxies []admin.Proxy) {
	types := map[string]bool{}
	for _, p := range proxies {
		for k := range p.Types {
			types[k] = true
		}
	}
	cols := slices.Sorted(maps.Keys(types))
	t.row(append([]string{"NODE", "ADDRESS"}, cols...)...)
	for _, p := range proxies {
		cells := []string{p.Node, p.Address}
		for _, c := range cols {
			cells = append(cells, or(p.Types[c].State, "-"))
		}
		t.row(cells...)
	}
	for _, p := range proxies {
		for _, c := range cols {
			if n := p.Types[c].Nack; n != "" {
				t.say("\n%s refused %s: %s", p.Node, c, n)
			}
		}
	}
}

// proxyDetail shows one proxy; beside its Envoy an agent has a stream of its own.
func proxyDetail(t *table, proxies []admin.Proxy) {
	for i, p := range proxies {
		if i > 0 {
			t.say("")
		}
		t.say("%s\nfrom %s as %s", p.Node, p.Address, or(p.Identity, "nobody: without authentication"))
		t.row("TYPE", "STATE", "RESOURCES", "WAITING", "SENT", "TAKEN")
		for _, name := range slices.Sorted(maps.Keys(p.Types)) {
			s := p.Types[name]
			t.row(name, s.State, fmt.Sprint(s.Held), fmt.Sprint(s.Pending), or(s.Sent, "-"), or(s.Acked, "-"))
		}
		for _, name := range slices.Sorted(maps.Keys(p.Types)) {
			if n := p.Types[name].Nack; n != "" {
				t.say("refused %s: %s", name, n)
			}
		}
	}
}
