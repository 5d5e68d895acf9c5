// Command isthmus is the operator's tool: it installs isthmusd and asks it, over its unix socket or, with a context of a
// kubeconfig, through the cluster's API server.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/leave"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/peer"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/trust"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		if !errors.Is(err, errInvalid) && !errors.Is(err, errDiffers) { // what is wrong was printed
			diag.Print(os.Stderr, "isthmus", err)
		}
		stop()
		os.Exit(exitCode(err))
	}
}

// options are what every command shares.
type options struct {
	socket  string
	output  string
	cluster kubeTarget
}

func (o *options) client() caller {
	if o.cluster.named() {
		return newKubeClient(o.cluster)
	}
	return newClient(o.socket)
}

// caller asks an isthmusd: it sends in, when it is not nil, and reads the answer into out, when it is not nil.
type caller interface {
	call(ctx context.Context, method, path string, in, out any) error
}

func command() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:   "isthmus",
		Short: "Operate a cluster of an Isthmus mesh",
		Long: `isthmus operates one cluster of an Isthmus mesh through the isthmusd that runs there.

Clusters and machines join the mesh with a token:
  in a member cluster   isthmus token create --for birch
  in the new cluster    isthmus join isth1_...
  to see the result     isthmus peers`,
		SilenceUsage: true, SilenceErrors: true, Version: version.String(),
		// Before anything is done: a command that acted must not end with an error about its output.
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			allowed := strings.Fields(cmd.Annotations[formats])
			if len(allowed) == 0 {
				allowed = []string{"table", "json"}
			}
			if !cmd.Flags().Changed("output") {
				o.output = allowed[0]
			}
			if !slices.Contains(allowed, o.output) {
				return diag.Hint(fmt.Errorf("unknown output format %q", o.output), "-o %s", strings.Join(allowed, " or -o "))
			}
			return nil
		},
	}
	socket := os.Getenv("ISTHMUS_SOCKET")
	if socket == "" {
		socket = admin.DefaultSocket
	}
	root.PersistentFlags().StringVar(&o.socket, "socket", socket, "unix socket of isthmusd (environment: ISTHMUS_SOCKET)")
	o.cluster.flags(root)
	root.PersistentFlags().StringVarP(&o.output, "output", "o", "table", "output format: table or json")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(tokenCommand(o), joinCommand(o), leave.Command(o.leave()), trust.Command(trust.Config{Call: o.ask, Print: o.leave().Print}), peersCommand(o), peer.Command(peer.Config{Call: o.ask, Print: o.leave().Print, JSON: printJSON, Complete: o.completePeers}), statusCommand(o), explainCommand(o), proxyStatusCommand(o), validateCommand(o), renderCommand(o), proxyConfigCommand(o))
	root.AddCommand(remoteSecretCommand(), injectCommand(), checkInjectCommand(o))
	root.AddCommand(installCommand(o), uninstallCommand(o), verifyInstallCommand(o), dnsCommand(o))
	return root
}
