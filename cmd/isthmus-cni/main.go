// Command isthmus-cni is a CNI plugin that leads the traffic of Pods with a sidecar through it, and the installer that
// puts the plugin on a node.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-cni/internal/installer"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-cni/internal/plugin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-cni/internal/repair"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/version"
)

const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount"

func main() {
	if os.Getenv("CNI_COMMAND") != "" { // a runtime calls: all it says is in the environment and on standard input
		skel.PluginMainFuncs(plugin.New(os.Stderr).Funcs(), plugin.Versions, "isthmus-cni "+version.String())
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := command().ExecuteContext(ctx); err != nil {
		diag.Print(os.Stderr, "isthmus-cni", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use: "isthmus-cni", Short: "The CNI plugin of Isthmus, and its installer",
		Long: `The CNI plugin of Isthmus, and its installer.

A container runtime runs this program as a plugin, with the environment variable
CNI_COMMAND. A DaemonSet runs "isthmus-cni install" on each node.`,
		SilenceErrors: true, SilenceUsage: true,
	}
	root.AddCommand(installCommand(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version.String()) },
	})
	return root
}

type options struct {
	installer.Config
	level     slog.Level
	ready     string
	repair    bool
	node      string
	namespace string
	daemonSet string
}

func installCommand() *cobra.Command {
	var o options
	var levelText string
	cmd := &cobra.Command{
		Use: "install", Short: "Install the plugin on this node and keep it installed", Args: cobra.NoArgs,
		Long: `Install the plugin on this node and keep it installed until SIGTERM or Ctrl-C.

It copies this program into the folder of plugins, writes a kubeconfig for it beside
the network configurations and adds the plugin at the end of the first of them. A
single configuration (.conf) becomes a list (.conflist). When the configuration is
written anew by others the plugin is added again.

At the end everything is put back byte for byte, unless the DaemonSet that this Pod
belongs to is still there: then another installer follows, and Pods that start in
between must be captured, too.`,
		Example: "  isthmus-cni install --cni-bin-dir /host/opt/cni/bin --cni-conf-dir /host/etc/cni/net.d --node-conf-dir /etc/cni/net.d",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.level.UnmarshalText([]byte(levelText)); err != nil {
				return fmt.Errorf("--log-level %q: want debug, info, warn or error", levelText)
			}
			o.LogLevel = levelText
			return install(cmd.Context(), o, cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.BinDir, "cni-bin-dir", env("CNI_BIN_DIR", "/opt/cni/bin"), "folder of plugins, as seen here")
	f.StringVar(&o.ConfDir, "cni-conf-dir", env("CNI_CONF_DIR", "/etc/cni/net.d"), "folder of network configurations, as seen here")
	f.StringVar(&o.NodeConfDir, "node-conf-dir", env("CNI_NODE_CONF_DIR", ""), "the same folder as the node sees it (default: --cni-conf-dir)")
	f.StringVar(&o.ServiceAccount, "service-account", serviceAccount, "folder with token and ca.crt")
	f.StringVar(&o.APIServer, "api-server", net.JoinHostPort(env("KUBERNETES_SERVICE_HOST", ""), env("KUBERNETES_SERVICE_PORT", "443")), "the API server that the plugin asks, HOST:PORT")
	f.StringSliceVar(&o.ExcludeNamespaces, "exclude-namespaces", []string{"istio-system", "kube-system"}, "namespaces whose Pods are never captured")
	f.StringVar(&levelText, "log-level", "info", "debug, info, warn or error; of the plugin, too")
	f.StringVar(&o.ready, "ready", ":8000", "address of /readyz over HTTP")
	f.BoolVar(&o.repair, "repair", true, "delete Pods of this node that started before the plugin was ready")
	f.StringVar(&o.node, "node", env("NODE_NAME", ""), "name of this Node; needed for --repair")
	f.StringVar(&o.namespace, "namespace", env("POD_NAMESPACE", "istio-system"), "namespace of the DaemonSet")
	f.StringVar(&o.daemonSet, "daemonset", env("DAEMONSET_NAME", "isthmus-cni-node"), "name of the DaemonSet; while it exists the plugin stays at the end")
	return cmd
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

func install(ctx context.Context, o options, w io.Writer) error {
	o.Log = slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: o.level}))
	var err error
	if o.Program, err = os.Executable(); err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	client, err := o.client()
	if err != nil {
		return diag.Hint(err, "run it in a Pod with a service account, or name the folder with --service-account")
	}
	o.Leaving = func(ctx context.Context) bool {
		ds, err := client.AppsV1().DaemonSets(o.namespace).Get(ctx, o.daemonSet, metav1.GetOptions{})
		return err == nil && ds.DeletionTimestamp == nil
	}
	in := installer.New(o.Config)
	ln, err := net.Listen("tcp", o.ready)
	if err != nil {
		return diag.Hint(fmt.Errorf("--ready: %w", err), "choose another address with --ready")
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return in.Run(ctx) })
	g.Go(func() error { return serveReady(ctx, ln, in.Ready) })
	if o.repair && o.node != "" {
		g.Go(func() error {
			return repair.Run(ctx, repair.Config{Client: client, Node: o.node, Ready: in.Ready, Log: o.Log})
		})
	}
	return g.Wait()
}

// client asks with the service account's token, read again as it rotates.
func (o options) client() (*kubernetes.Clientset, error) {
	tokenFile := filepath.Join(o.ServiceAccount, "token")
	if _, err := os.Stat(tokenFile); err != nil {
		return nil, fmt.Errorf("service account: %w", err)
	}
	return kubernetes.NewForConfig(&rest.Config{
		Host: "https://" + o.APIServer, BearerTokenFile: tokenFile, Timeout: 0,
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(o.ServiceAccount, "ca.crt")},
	})
}

func serveReady(ctx context.Context, ln net.Listener, ready func() bool) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !ready() {
			http.Error(w, "the plugin is not installed yet", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(ln); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}
