package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/install"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// formats is the annotation of a command that takes other output formats than table and json.
const formats = "isthmus/formats"

// Exit codes beside 1, an error.
const (
	exitUsage   = 2 // refused before anything was done: flags, values, rights, conflicts
	exitTimeout = 3 // all is done, but not everything was ready in time
)

// coded is an error with its exit code.
type coded struct {
	error
	code int
}

func (c coded) Unwrap() error { return c.error }

func exitCode(err error) int {
	var c coded
	var late *install.TimeoutError
	switch {
	case errors.As(err, &late):
		return exitTimeout
	case errors.As(err, &c):
		return c.code
	}
	return 1
}

// refused marks an error that came before anything was changed.
func refused(err error) error {
	if err == nil {
		return nil
	}
	return coded{err, exitUsage}
}

// target is the cluster that installing commands work on.
type target struct {
	install.Target
	namespace string
}

func (t *target) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&t.Kubeconfig, "kubeconfig", "", "kubeconfig (default: the environment's KUBECONFIG, then ~/.kube/config)")
	f.StringVar(&t.Context, "context", "", "context of the kubeconfig (default: the current one)")
	f.StringVarP(&t.namespace, "namespace", "n", "istio-system", "namespace of the installation")
	if cmd.Annotations == nil {
		cmd.Annotations = map[string]string{}
	}
	cmd.Annotations[formats] = "table json yaml"
}

type installFlags struct {
	target
	values  install.ValuesFrom
	reuse   bool
	dryRun  bool
	wait    bool
	timeout time.Duration
	skipDNS bool
	yes     bool
}

func installCommand(o *options) *cobra.Command {
	var f installFlags
	cmd := &cobra.Command{
		Use: "install", Short: "Install Isthmus on a Kubernetes cluster, or change or upgrade it", Args: cobra.NoArgs,
		Long: `Install Isthmus on the cluster of a kubeconfig's context, or change or upgrade what is there. What is as it should be is
not touched: a second run changes nothing. It keeps a record as Helm does, so that "helm list" and "helm upgrade" work on it.

Without --set, --values and --profile the values of the last run hold. The cluster's name is that of the context unless
cluster.name says it.

Exit codes: 0 done; 1 an error; 2 refused before anything was changed; 3 done, but not everything was ready in time.`,
		Example: `  isthmus install --context amber --set cluster.name=amber
  isthmus install --context amber -f values.yaml --yes
  isthmus install --profile remote --set cluster.name=birch,remote.controlPlane={10.1.0.7}
  isthmus install --dry-run --set cluster.name=amber | kubectl apply --server-side -f -`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.dryRun {
				return f.print(cmd.OutOrStdout())
			}
			return f.run(cmd, o)
		},
	}
	f.flags(cmd)
	fl := cmd.Flags()
	fl.StringArrayVarP(&f.values.Files, "values", "f", nil, "file of values; may be given again, later ones win")
	fl.StringArrayVar(&f.values.Set, "set", nil, "one value or several, a.b=c,d={x,y}; wins over files")
	fl.StringVar(&f.values.Profile, "profile", "", "values to begin with: "+strings.Join(install.Profiles(), ", "))
	fl.BoolVar(&f.reuse, "reuse-values", false, "lay the values over those of the last run")
	fl.BoolVar(&f.dryRun, "dry-run", false, "print the manifests and do nothing; needs no cluster")
	fl.BoolVar(&f.wait, "wait", true, "wait until everything runs")
	fl.DurationVar(&f.timeout, "timeout", 5*time.Minute, "how long to wait")
	fl.BoolVar(&f.skipDNS, "skip-dns", false, "leave the cluster's DNS as it is")
	fl.BoolVar(&f.yes, "yes", false, "change the cluster's DNS without asking")
	_ = cmd.RegisterFlagCompletionFunc("profile", cobra.FixedCompletions(install.Profiles(), cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// print writes the manifests.
func (f *installFlags) print(out io.Writer) error {
	name, err := f.Name()
	if err != nil && f.Context != "" {
		return refused(err)
	}
	ch, err := install.Chart()
	if err != nil {
		return err
	}
	values, err := f.values.Read()
	if err != nil {
		return refused(err)
	}
	install.Name(values, install.ClusterName(name), "")
	m, err := install.Render(ch, values, f.namespace, false)
	if err != nil {
		return refused(err)
	}
	_, err = io.WriteString(out, m.NamespaceText()+m.Text)
	return err
}

func (f *installFlags) run(cmd *cobra.Command, o *options) error {
	ctx, say := cmd.Context(), sayer(cmd, o)
	name, err := f.Name()
	if err != nil {
		return refused(err)
	}
	c, err := install.Connect(ctx, f.Target)
	if err != nil {
		return refused(err)
	}
	say(fmt.Sprintf("context %s: %s, Kubernetes %s", c.Context, c.Server, c.Version))
	plan, err := c.Prepare(ctx, f.values, f.reuse, f.namespace, install.ClusterName(name))
	if err != nil {
		return refused(err)
	}
	for _, w := range plan.Warnings {
		say("warning: " + w)
	}
	say(fmt.Sprintf("checked: %d objects for namespace %s", len(plan.Manifest.Objects), f.namespace))
	res, err := c.Apply(ctx, plan, say)
	if err != nil {
		return err
	}
	if err := f.stub(ctx, cmd, c, plan.Manifest, res, say); err != nil {
		return err
	}
	if f.wait {
		if err := c.Wait(ctx, plan.Manifest, f.timeout, say); err != nil {
			return err
		}
	}
	return o.printResult(cmd, res, func(w io.Writer) {
		if res.Changed == 0 {
			fmt.Fprintf(w, "nothing to change: revision %d is what is wanted\n", res.Revision)
			return
		}
		fmt.Fprintf(w, "installed revision %d in namespace %s of context %s: %d objects changed\n\n%s", res.Revision, res.Namespace, res.Context, res.Changed, res.Notes)
	})
}

// stub leads the mesh's zones of the cluster's DNS to the installation's.
func (f *installFlags) stub(ctx context.Context, cmd *cobra.Command, c *install.Cluster, m *install.Manifest, res *install.Result, say func(string)) error {
	zones, err := m.Zones()
	if err != nil || len(zones) == 0 || f.skipDNS {
		return err
	}
	s, err := c.StubAdd(ctx, f.namespace, zones)
	if errors.Is(err, install.ErrNoDNS) {
		say("dns: " + err.Error() + "; " + diag.HintOf(err))
		return nil
	} else if err != nil {
		return err
	}
	changed, err := writeStub(ctx, cmd, c, s, f.yes, say)
	if changed {
		res.Changed++
	}
	return err
}

func uninstallCommand(o *options) *cobra.Command {
	var t target
	how := install.Removal{}
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Remove Isthmus from a Kubernetes cluster", Args: cobra.NoArgs,
		Long: `Remove the installation, all that it wrote while it ran, and the definitions of its resources; the cluster's DNS becomes
what it was. Where objects of users would be lost with the definitions, they are listed and nothing is removed, unless
--purge or --keep-crds says what to do with them.

Exit codes: 0 done; 1 an error; 2 refused before anything was changed.`,
		Example: "  isthmus uninstall --context amber\n  isthmus uninstall --context amber --purge",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if how.Purge && how.KeepCRDs {
				return refused(fmt.Errorf("--purge and --keep-crds exclude each other"))
			}
			c, err := install.Connect(cmd.Context(), t.Target)
			if err != nil {
				return refused(err)
			}
			say := sayer(cmd, o)
			say(fmt.Sprintf("context %s: %s, Kubernetes %s", c.Context, c.Server, c.Version))
			res, err := c.Uninstall(cmd.Context(), t.namespace, how, say)
			var users *install.UserObjects
			if errors.As(err, &users) || errors.Is(err, install.ErrNothing) {
				return refused(err)
			} else if err != nil {
				return err
			}
			return o.printResult(cmd, res, func(w io.Writer) {
				fmt.Fprintf(w, "removed from context %s: %d objects\n", res.Context, res.Changed)
			})
		},
	}
	t.flags(cmd)
	cmd.Flags().Bool("yes", true, "taken as of install; uninstall never asks")
	cmd.Flags().BoolVar(&how.Purge, "purge", false, "delete users' objects of the kinds it defined, too")
	cmd.Flags().BoolVar(&how.KeepCRDs, "keep-crds", false, "leave the definitions and users' objects of their kinds")
	cmd.Flags().BoolVar(&how.KeepDNS, "skip-dns", false, "leave the cluster's DNS as it is")
	cmd.Flags().DurationVar(&how.Wait, "timeout", 2*time.Minute, "how long pods may take to end")
	return cmd
}

func verifyInstallCommand(o *options) *cobra.Command {
	var t target
	cmd := &cobra.Command{
		Use: "verify-install", Short: "List every object of the installation and its state", Args: cobra.NoArgs,
		Long: "List every object of the installation and its state. The exit code is 1 when one is missing or not ready.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := install.Connect(cmd.Context(), t.Target)
			if err != nil {
				return refused(err)
			}
			res, err := c.Verify(cmd.Context(), t.namespace)
			if err != nil {
				return err
			}
			err = o.printResult(cmd, res, func(w io.Writer) {
				tab := newTable(w)
				tab.row("KIND", "NAMESPACE", "NAME", "STATE")
				for _, x := range res.Objects {
					state := string(x.State)
					if x.Note != "" {
						state += ": " + x.Note
					}
					tab.row(x.Kind, x.Namespace, x.Name, state)
				}
				_ = tab.flush()
				for _, x := range res.Warnings {
					fmt.Fprintln(w, "warning: "+x)
				}
			})
			if bad := res.Bad(); err == nil && bad > 0 {
				err = diag.Hint(fmt.Errorf("%d of %d objects are missing or not ready", bad, len(res.Objects)), "isthmus install puts back what is missing")
			}
			return err
		},
	}
	t.flags(cmd)
	return cmd
}

// sayer returns what tells the operator of each step: on standard output, or beside the result where that is for machines.
func sayer(cmd *cobra.Command, o *options) func(string) {
	w := cmd.OutOrStdout()
	if o.output != "table" {
		w = cmd.ErrOrStderr()
	}
	return func(line string) { fmt.Fprintln(w, line) }
}

func (o *options) printResult(cmd *cobra.Command, v any, text func(io.Writer)) error {
	switch o.output {
	case "json":
		return printJSON(cmd.OutOrStdout(), v)
	case "yaml":
		data, err := json.Marshal(v)
		if err == nil {
			data, err = yaml.JSONToYAML(data)
		}
		if err != nil {
			return err
		}
		_, err = cmd.OutOrStdout().Write(data)
		return err
	}
	text(cmd.OutOrStdout())
	return nil
}

// confirmed asks the operator, where there is one.
func confirmed(cmd *cobra.Command, question string) (bool, error) {
	if in, ok := cmd.InOrStdin().(*os.File); ok {
		if st, err := in.Stat(); err != nil || st.Mode()&os.ModeCharDevice == 0 {
			return false, nil
		}
	}
	fmt.Fprint(cmd.ErrOrStderr(), question+" [y/N] ")
	line, err := bufio.NewReader(io.LimitReader(cmd.InOrStdin(), 100)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	answer := strings.ToLower(strings.TrimSpace(line))
	return answer == "y" || answer == "yes", nil
}
