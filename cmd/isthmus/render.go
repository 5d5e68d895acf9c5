package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/render"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/validate"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// asResources is the output format of what is served; all others are of the bootstrap.
const asResources = "resources"

func renderCommand(o *options) *cobra.Command {
	var c render.Config
	var paths, labels []string
	var form string
	cmd := &cobra.Command{
		Use: "render -f FILE --node NODE", Short: "Show what a proxy would be served for objects in files, without a cluster", Args: cobra.ArbitraryArgs,
		Long: `Show everything that one proxy would be served for the Kubernetes and Istio objects in files, made with the code that
isthmusd uses. Equal files give equal bytes, in whatever order they are named.

  -o bootstrap   one JSON file that a plain Envoy starts with: listeners, routes, clusters and endpoints stand in it, and
                 throw-away certificates, unless --certs names a folder with real ones (cert-chain.pem, key.pem, root-cert.pem)
  -o resources   the xDS resources by type, as they are served; private keys are left out
  -o json        the same as bootstrap
  -o yaml        the same as bootstrap, as YAML; -o resources --as yaml: the resources as YAML

NODE is POD.NAMESPACE of a sidecar, "router POD.NAMESPACE" of a gateway, or a whole node id, TYPE~IP~POD.NAMESPACE~DOMAIN.
The files say its address and labels; --labels says others.

What is wrong with the objects, and what only a running mesh knows, is said on standard error. The exit code is 0 when
something was rendered, else 1.`,
		Example: `  isthmus render -f config/ --node productpage-v1.default > envoy.json && envoy -c envoy.json
  isthmus render -f config/ --node 'router ingress-1.istio-system' --labels istio=ingressgateway -o resources
  kubectl get pods,services,virtualservices -A -o yaml | isthmus render -f - --node reviews-v1.default -o yaml`,
		Annotations: map[string]string{formats: "bootstrap resources json yaml"},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if c.Node == "" {
				return diag.Hint(fmt.Errorf("whose configuration is missing: --node POD.NAMESPACE"), "for example: isthmus render -f config/ --node productpage-v1.default")
			}
			if !slices.Contains([]string{"", "json", "yaml"}, form) {
				return diag.Hint(fmt.Errorf("unknown form %q", form), "--as json or --as yaml")
			}
			if len(labels) > 0 {
				if c.Labels, err = pairs(labels, "KEY=VALUE"); err != nil {
					return err
				}
			}
			if c.Files, err = validate.Read(append(paths, args...), cmd.InOrStdin()); err != nil {
				return err
			}
			r, err := render.New(c)
			if err != nil {
				return err
			}
			write := r.Bootstrap
			if o.output == asResources {
				write = r.JSON
			}
			data, err := write()
			if err == nil && (o.output == "yaml" || form == "yaml") {
				data, err = render.YAML(data)
			}
			if err != nil {
				return err
			}
			for _, p := range r.Problems {
				fmt.Fprintln(cmd.ErrOrStderr(), "problem:", p)
			}
			for _, w := range r.Warnings {
				fmt.Fprintln(cmd.ErrOrStderr(), "note:", w)
			}
			_, err = cmd.OutOrStdout().Write(data)
			return err
		},
	}
	f := cmd.Flags()
	f.StringSliceVarP(&paths, "filename", "f", nil, "file, folder, or - for standard input; repeatable")
	f.StringVar(&c.Node, "node", "", "the proxy: POD.NAMESPACE, 'router POD.NAMESPACE' or a whole node id")
	f.StringVar(&c.Cluster, "cluster", "local", "name of the cluster")
	f.StringVar(&c.Network, "network", "", "network of the cluster")
	f.StringVar(&c.TrustDomain, "trust-domain", "cluster.local", "trust domain of the cluster")
	f.StringSliceVar(&labels, "labels", nil, "labels of the proxy, KEY=VALUE; those of its pod in the files unless given")
	f.StringVar(&c.Certs, "certs", "", "folder with cert-chain.pem, key.pem and root-cert.pem for Envoy to read")
	f.BoolVar(&c.Keys, "private-keys", false, "put private keys of Secrets among the files into the bootstrap")
	f.IntVar(&c.AdminPort, "admin-port", 15000, "port of Envoy's admin interface on 127.0.0.1; 0: none")
	f.StringVar(&form, "as", "", "json or yaml")
	_ = cmd.MarkFlagFilename("filename", "yaml", "yml", "json")
	_ = cmd.MarkFlagDirname("certs")
	return cmd
}
