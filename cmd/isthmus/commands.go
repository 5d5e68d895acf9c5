package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/inspect"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/leave"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

func tokenCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Make, list and revoke join tokens"}
	cmd.AddCommand(tokenCreateCommand(o), tokenListCommand(o), inspect.Command(printJSON), tokenRevokeCommand(o), tokenWorkloadCommand(o))
	return cmd
}

func tokenCreateCommand(o *options) *cobra.Command {
	var cluster, vm string
	var req admin.TokenRequest
	var labels, ports []string
	cmd := &cobra.Command{
		Use:   "create (--for CLUSTER | --vm NAME)",
		Short: "Make a token with which one cluster or one machine joins",
		Long: `Make a token with which one cluster or one machine joins the mesh. It is printed once, is good for one use,
and this cluster keeps only what it needs to recognise it: whoever reads this cluster's data cannot join with it.

A cluster that redeems its token waits for "isthmus peer approve" here, unless the token was made with --auto-approve
or isthmusd is configured with federation.autoApprove. A machine is a member at once.`,
		Example: `  isthmus token create --for birch
  isthmus token create --for birch --ttl 1h --auto-approve
  isthmus token create --vm ratings --namespace default --service-account ratings`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case (cluster == "") == (vm == ""):
				return diag.Hint(fmt.Errorf("name either a cluster or a machine"), "isthmus token create --for CLUSTER, or --vm NAME --namespace NS --service-account SA")
			case cluster != "":
				req.Kind, req.Name = "cluster", cluster
			default:
				req.Kind, req.Name = "vm", vm
			}
			var err error
			if req.Labels, err = pairs(labels, "KEY=VALUE"); err != nil {
				return err
			}
			if req.Ports, err = numbers(ports); err != nil {
				return err
			}
			var reply admin.TokenReply
			if err := o.client().call(cmd.Context(), http.MethodPost, "/v1/tokens", req, &reply); err != nil {
				return err
			}
			if o.output == "json" {
				return printJSON(cmd.OutOrStdout(), reply)
			}
			fmt.Fprintln(cmd.OutOrStdout(), reply.Token)
			fmt.Fprintf(cmd.ErrOrStderr(), "token %s for %s %s, good for one use until %s\n", reply.ID, req.Kind, req.Name, reply.Expires.Format("2006-01-02 15:04:05 MST"))
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&cluster, "for", "", "name of the one cluster that may join")
	f.StringVar(&vm, "vm", "", "name of the one machine that may join")
	f.StringVar(&req.TTL, "ttl", "15m", "how long the token is good, 24h at most")
	f.BoolVar(&req.AutoApprove, "auto-approve", false, "the cluster is a member without a second word")
	f.StringVar(&req.Namespace, "namespace", "default", "namespace of the machine")
	f.StringVar(&req.ServiceAccount, "service-account", "default", "service account whose identity the machine gets")
	f.StringSliceVar(&labels, "labels", nil, "labels of the machine, KEY=VALUE; app=NAME unless given")
	f.StringSliceVar(&ports, "ports", nil, "named ports of the machine, NAME=NUMBER")
	return cmd
}

// pairs splits each at its first "="; form is how the help writes them.
func pairs(in []string, form string) (map[string]string, error) {
	out := map[string]string{}
	for _, kv := range in {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%q is not %s", kv, form)
		}
		out[k] = v
	}
	return out, nil
}

func numbers(in []string) (map[string]uint32, error) {
	kvs, err := pairs(in, "NAME=NUMBER")
	if err != nil {
		return nil, err
	}
	out := map[string]uint32{}
	for k, v := range kvs {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("port %s=%s: a number from 1 to 65535 is wanted", k, v)
		}
		out[k] = uint32(n)
	}
	return out, nil
}

func tokenListCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the tokens this cluster has issued, and who redeemed them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var reply []admin.Token
			if err := o.client().call(cmd.Context(), http.MethodGet, "/v1/tokens", nil, &reply); err != nil {
				return err
			}
			return o.print(cmd, reply, func(t *table) {
				t.row("ID", "KIND", "NAME", "STATE", "EXPIRES", "REDEEMED BY", "FROM")
				for _, x := range reply {
					by := x.RedeemedBy
					if !x.RedeemedAt.IsZero() {
						by += " at " + x.RedeemedAt.Format("15:04:05")
					}
					t.row(x.ID, x.Kind, x.Name, x.State, x.Expires.Format("2006-01-02 15:04:05"), by, x.From)
				}
			})
		},
	}
}

func tokenRevokeCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "revoke ID", Short: "Make an unused token worthless", Args: cobra.ExactArgs(1),
		Long: `Make an unused token worthless. One that was redeemed is refused: its cluster is put out with "isthmus peer evict",
its machine leaves with "isthmus-agent leave".`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.client().call(cmd.Context(), http.MethodDelete, "/v1/tokens/"+url.PathEscape(args[0]), nil, nil); err != nil {
				return err
			}
			done := struct {
				Token string `json:"token"`
				State string `json:"state"`
			}{args[0], "revoked"}
			return o.print(cmd, done, func(t *table) { t.say("token %s is revoked", args[0]) })
		},
	}
}

func tokenWorkloadCommand(o *options) *cobra.Command {
	var req admin.WorkloadTokenRequest
	cmd := &cobra.Command{
		Use:   "workload --namespace NS --service-account SA --pod NAME",
		Short: "Make the service-account token of one workload",
		Long: `Make the token with which isthmus-agent gets the certificate of one workload. On Kubernetes the kubelet mounts such a
token; where there is no Kubernetes API, whoever starts the workload takes its place with this command.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var reply admin.TokenReply
			if err := o.client().call(cmd.Context(), http.MethodPost, "/v1/workload-tokens", req, &reply); err != nil {
				return err
			}
			if o.output == "json" {
				return printJSON(cmd.OutOrStdout(), reply)
			}
			fmt.Fprintln(cmd.OutOrStdout(), reply.Token)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Namespace, "namespace", "default", "namespace of the workload")
	f.StringVar(&req.ServiceAccount, "service-account", "default", "service account of the workload")
	f.StringVar(&req.Pod, "pod", "", "name of the workload")
	f.StringVar(&req.TTL, "ttl", "1h", "how long the token is good")
	return cmd
}

func joinCommand(o *options) *cobra.Command {
	var req admin.JoinRequest
	cmd := &cobra.Command{
		Use:   "join TOKEN",
		Short: "Join this cluster to the mesh with a token",
		Long: `Join this cluster to the mesh with a token that a member made with "isthmus token create --for THIS-CLUSTER".
Both sides learn each other's roots, keys and gateways; every member that the issuer knows becomes known here, too. "-" reads the token from standard input.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req.Token = strings.TrimSpace(args[0])
			if req.Token == "-" {
				data := make([]byte, 4096)
				n, err := cmd.InOrStdin().Read(data)
				if err != nil {
					return fmt.Errorf("read the token from standard input: %w", err)
				}
				req.Token = strings.TrimSpace(string(data[:n]))
			}
			if p, err := token.Parse(req.Token); err != nil {
				return fmt.Errorf("read the token: %w", err)
			} else if o.output != "json" {
				fmt.Fprintf(cmd.ErrOrStderr(), "joining %s through %s ...\n", p.Issuer, strings.Join(p.Endpoints, ", "))
			}
			var reply admin.JoinReply
			if err := o.client().call(cmd.Context(), http.MethodPost, "/v1/join", req, &reply); err != nil {
				return err
			}
			if o.output == "json" {
				return printJSON(cmd.OutOrStdout(), reply)
			}
			switch {
			case reply.DryRun:
				fmt.Fprintf(cmd.OutOrStdout(), "the token is good: this cluster would join %s\n", reply.Issuer)
			case reply.Pending:
				fmt.Fprintf(cmd.OutOrStdout(), "admitted by %s, waiting for its operator to run: isthmus peer approve %s\n", reply.Issuer, reply.Cluster)
			default:
				fmt.Fprintf(cmd.OutOrStdout(), "joined %s; the mesh has %d clusters: %s\n", reply.Issuer, len(reply.Members), strings.Join(reply.Members, ", "))
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "check the token and its issuer, redeem nothing")
	cmd.Flags().BoolVar(&req.AllowOverlap, "allow-overlap", false, "join though address ranges of this cluster and of another one on its network overlap")
	return cmd
}

func (o *options) completePeers(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var peers []admin.Peer
	if len(args) > 0 || o.client().call(context.Background(), http.MethodGet, "/v1/peers", nil, &peers) != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, p := range peers {
		names = append(names, p.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func peersCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "peers", Short: "List the other clusters: trust domain, topology, freshness and path", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var peers []admin.Peer
			if err := o.client().call(cmd.Context(), http.MethodGet, "/v1/peers", nil, &peers); err != nil {
				return err
			}
			return o.print(cmd, peers, func(t *table) { peerRows(t, peers) })
		},
	}
}

func statusCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show this cluster on one screen: links, exports, imports, proxies and problems", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s admin.Status
			if err := o.client().call(cmd.Context(), http.MethodGet, "/v1/status", nil, &s); err != nil {
				return err
			}
			return o.print(cmd, s, func(t *table) { statusScreen(t, s) })
		},
	}
}

func explainCommand(o *options) *cobra.Command {
	var req admin.ExplainRequest
	var headers []string
	cmd := &cobra.Command{
		Use:   "explain --from WORKLOAD.NAMESPACE URL",
		Short: "Show the way of a request: name, address, route, subset, endpoints, gateways and handshakes",
		Long: `Show how a request from a workload of this cluster would travel, step by step: what the name is and resolves to, which route
and subset it takes, which endpoints it can reach and through which gateways, under which server name, and by which filter chain it is taken there.
Each way is tried with a TLS handshake, unless --no-probe is given.`,
		Example: "  isthmus explain --from productpage.default http://reviews.default.global:9080/\n  isthmus explain --from productpage.default -H end-user=jason http://reviews.default.global:9080/",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if req.From == "" {
				return diag.Hint(fmt.Errorf("where the request comes from is missing: --from WORKLOAD.NAMESPACE"), "for example: isthmus explain --from productpage.default %s", args[0])
			}
			var err error
			req.URL = args[0]
			if req.Headers, err = pairs(headers, "NAME=VALUE"); err != nil {
				return err
			}
			var e admin.Explanation
			if err := o.client().call(cmd.Context(), http.MethodPost, "/v1/explain", req, &e); err != nil {
				return err
			}
			return o.print(cmd, e, func(t *table) { explainScreen(t, e) })
		},
	}
	cmd.Flags().StringVar(&req.From, "from", "", "workload or service the request comes from, NAME.NAMESPACE")
	cmd.Flags().StringVar(&req.Method, "method", "GET", "HTTP method")
	cmd.Flags().StringArrayVarP(&headers, "header", "H", nil, "request header, NAME=VALUE")
	cmd.Flags().BoolVar(&req.NoProbe, "no-probe", false, "do not try handshakes")
	return cmd
}

func (o *options) ask(ctx context.Context, method, path string, in, out any) error {
	return o.client().call(ctx, method, path, in, out)
}

// leave is what the command of that name needs.
func (o *options) leave() leave.Config {
	return leave.Config{
		Call: func(ctx context.Context, path string, in, out any) error {
			return o.ask(ctx, http.MethodPost, path, in, out)
		},
		Print: func(cmd *cobra.Command, v any, lines []string) error {
			return o.print(cmd, v, func(t *table) { t.say("%s", strings.Join(lines, "\n")) })
		},
		Confirm: confirmed,
	}
}

// print writes v as JSON or by rows, as --output says.
func (o *options) print(cmd *cobra.Command, v any, rows func(*table)) error {
	if o.output == "json" {
		return printJSON(cmd.OutOrStdout(), v)
	}
	t := newTable(cmd.OutOrStdout())
	rows(t)
	return t.flush()
}
