package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"helm.sh/helm/v3/pkg/strvals"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/manifest"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/validate"
	"github.com/isthmus-mesh/isthmus/discovery/inject"
	"github.com/isthmus-mesh/isthmus/discovery/inject/webhook"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// injectFlags say where the injector's configuration comes from: a cluster, files, or the built-in defaults.
type injectFlags struct {
	kubeconfig, context string
	system, revision    string
	config, mesh        string
	values, set         []string
	namespace           string
	paths               []string
}

func (f *injectFlags) register(cmd *cobra.Command) {
	fs := cmd.Flags()
	fs.StringSliceVarP(&f.paths, "filename", "f", nil, "file, folder, or - for standard input; repeatable")
	fs.StringVarP(&f.namespace, "namespace", "n", "", "namespace of objects that name none (default: default)")
	fs.StringVar(&f.kubeconfig, "kubeconfig", "", "kubeconfig of the cluster (default: KUBECONFIG, else ~/.kube/config)")
	fs.StringVar(&f.context, "context", "", "read the injector's configuration from the cluster of this context")
	fs.StringVar(&f.system, "istio-namespace", "istio-system", "namespace of the control plane")
	fs.StringVar(&f.revision, "revision", "", "revision of the control plane")
	fs.StringArrayVar(&f.values, "values", nil, "file with values of the installation; repeatable, later ones win")
	fs.StringArrayVar(&f.set, "set", nil, "one value, for example global.proxy.logLevel=debug; repeatable")
	fs.StringVar(&f.config, "inject-config", "", "file with what the key config of the ConfigMap istio-sidecar-injector has")
	fs.StringVar(&f.mesh, "mesh-config", "", "file with Istio's MeshConfig")
	_ = cmd.MarkFlagFilename("filename", "yaml", "yml", "json")
}

func (f *injectFlags) cluster() bool { return f.context != "" || f.kubeconfig != "" }

func (f *injectFlags) client() (kubernetes.Interface, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = f.kubeconfig
	c, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: f.context}).ClientConfig()
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("kubeconfig: %w", err), "kubectl config get-contexts lists what --context may name")
	}
	return kubernetes.NewForConfig(c)
}

// load returns the configuration.
func (f *injectFlags) load(ctx context.Context) (*inject.Config, error) {
	if f.cluster() {
		if len(f.values)+len(f.set) > 0 || f.config != "" || f.mesh != "" {
			return nil, diag.Hint(errors.New("the configuration is asked of a cluster and given in files"), "leave out --context and --kubeconfig, or --values, --set, --inject-config and --mesh-config")
		}
		client, err := f.client()
		if err != nil {
			return nil, err
		}
		return webhook.ReadConfig(ctx, client, f.system, f.revision)
	}
	values := map[string]any{}
	for _, path := range f.values {
		text, err := readSmall(path)
		if err != nil {
			return nil, err
		}
		over := map[string]any{}
		if err := yaml.Unmarshal([]byte(text), &over); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		values = mergeValues(values, over)
	}
	for _, s := range f.set {
		if err := strvals.ParseInto(s, values); err != nil {
			return nil, diag.Hint(fmt.Errorf("--set %s: %w", s, err), "--set KEY.KEY=VALUE")
		}
	}
	text, err := yaml.Marshal(values)
	if err != nil {
		return nil, err
	}
	d := inject.Documents{Values: string(text), Defaults: inject.Identity{Namespace: f.system, Revision: f.revision}}
	for _, x := range []struct {
		path string
		to   *string
	}{{f.config, &d.Config}, {f.mesh, &d.Mesh}} {
		if x.path != "" {
			if *x.to, err = readSmall(x.path); err != nil {
				return nil, err
			}
		}
	}
	c, err := inject.Parse(d)
	return c, diag.Hint(err, "correct the file, or --set; docs/guide/injection.md lists the values")
}

func readSmall(path string) (string, error) {
	r, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, inject.MaxConfig+1))
	if err == nil && len(data) > inject.MaxConfig {
		err = fmt.Errorf("%s has over %d bytes", path, inject.MaxConfig)
	}
	return string(data), err
}

// mergeValues lays over on base: maps merge, all else is replaced.
func mergeValues(base, over map[string]any) map[string]any {
	for k, v := range over {
		if m, ok := v.(map[string]any); ok {
			if b, ok := base[k].(map[string]any); ok {
				base[k] = mergeValues(b, m)
				continue
			}
		}
		base[k] = v
	}
	return base
}

func injectCommand() *cobra.Command {
	var f injectFlags
	cmd := &cobra.Command{
		Use: "inject -f FILE", Short: "Put the proxy into the pods of files, as the webhook would", Args: cobra.ArbitraryArgs,
		Long: `Put the proxy into the pods of files, as the webhook does in a cluster, and write the result to standard output.

Pods in workloads of every kind and in lists are injected; all other documents pass as they are. A pod is left alone when
it is injected already, says sidecar.istio.io/inject: "false", or uses its node's network; and when its namespace, if that is
among the documents, says istio-injection: disabled. "isthmus check-inject" explains.

The values come from the cluster when --context or --kubeconfig is given, else from --values and --set, else they are the
built-in ones. When an object is wrong nothing is written and the exit code is 1.`,
		Example: `  isthmus inject -f bookinfo.yaml | kubectl apply -f -
  isthmus inject -f deploy/ --set global.hub=registry.example.com/mesh --set global.tag=1.2
  helm template . | isthmus inject -f - --context east`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.load(cmd.Context())
			if err != nil {
				return err
			}
			text, _, err := f.run(c, append(f.paths, args...), cmd.InOrStdin())
			if err != nil && diag.HintOf(err) == "" {
				err = diag.Hint(err, "nothing was written; correct the objects")
			}
			if err != nil {
				return err
			}
			_, err = io.WriteString(cmd.OutOrStdout(), text)
			return err
		},
	}
	f.register(cmd)
	return cmd
}

func (f *injectFlags) run(c *inject.Config, paths []string, in io.Reader) (string, []manifest.Outcome, error) {
	if len(paths) == 0 {
		return "", nil, diag.Hint(errors.New("no file is named"), "-f FILE, -f FOLDER, or -f - for standard input")
	}
	files, err := validate.Read(paths, in)
	if err != nil {
		return "", nil, err
	}
	var out strings.Builder
	var all []manifest.Outcome
	var errs []error
	for i, file := range files {
		text, outcomes, err := manifest.Inject(file.Name, file.Data, manifest.Options{Config: c, Namespace: f.namespace})
		errs = append(errs, err)
		all = append(all, outcomes...)
		if i > 0 && !strings.HasPrefix(string(text), "---") {
			if s := out.String(); s != "" && !strings.HasSuffix(s, "\n") {
				out.WriteString("\n")
			}
			out.WriteString("---\n")
		}
		out.Write(text)
	}
	return out.String(), all, errors.Join(errs...)
}

func checkInjectCommand(o *options) *cobra.Command {
	var f injectFlags
	cmd := &cobra.Command{
		Use: "check-inject (-f FILE | POD | KIND/NAME)", Short: "Say whether pods are injected, or why not", Args: cobra.ArbitraryArgs,
		Long: `Say for each pod whether it gets the proxy, and why or why not: which label, annotation or default decides.

For files it looks at what the webhook would be shown, with the labels of the namespaces that are among them. With --context
or --kubeconfig, and without -f, it looks at pods of a cluster, all of a namespace unless some are named.`,
		Example: `  isthmus check-inject -f bookinfo.yaml
  isthmus check-inject --context east -n shop
  isthmus check-inject --context east -n shop web-5c6d8b9f4-x2x7k`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(f.paths) == 0 {
				rows, err := f.checkCluster(cmd.Context(), args)
				if err != nil {
					return err
				}
				return o.printOutcomes(cmd, rows)
			}
			c, err := f.load(cmd.Context())
			if err != nil {
				return err
			}
			_, rows, err := f.run(c, append(f.paths, args...), cmd.InOrStdin())
			return errors.Join(o.printOutcomes(cmd, rows), err)
		},
	}
	f.register(cmd)
	return cmd
}

func (o *options) printOutcomes(cmd *cobra.Command, rows []manifest.Outcome) error {
	if rows == nil {
		rows = []manifest.Outcome{}
	}
	return o.print(cmd, rows, func(t *table) {
		t.row("OBJECT", "INJECTED", "REASON", "WHY")
		for _, r := range rows {
			answer := "no"
			if r.Inject || r.Reason == "AlreadyInjected" {
				answer = "yes"
			}
			t.row(r.Object, answer, r.Reason, r.Text)
		}
	})
}

// checkCluster looks at the pods of a namespace: at what they are, and what they would be if they were made now.
func (f *injectFlags) checkCluster(ctx context.Context, names []string) ([]manifest.Outcome, error) {
	client, err := f.client()
	if err != nil {
		return nil, err
	}
	c, err := webhook.ReadConfig(ctx, client, f.system, f.revision)
	if err != nil {
		return nil, err
	}
	namespace := f.namespace
	if namespace == "" {
		namespace = "default"
	}
	ns, err := client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", namespace, err)
	}
	var pods []corev1.Pod
	if len(names) == 0 {
		list, err := client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("list the pods of %s: %w", namespace, err)
		}
		pods = list.Items
	}
	for _, name := range names {
		p, err := client.CoreV1().Pods(namespace).Get(ctx, strings.TrimPrefix(name, "pod/"), metav1.GetOptions{})
		if err != nil {
			return nil, diag.Hint(fmt.Errorf("pod %s/%s: %w", namespace, name, err), "kubectl -n %s get pods lists those that are", namespace)
		}
		pods = append(pods, *p)
	}
	hook := f.webhookProblem(ctx, client)
	var rows []manifest.Outcome
	for i := range pods {
		d, err := decideRunning(c, &pods[i], inject.Namespace{Name: namespace, Labels: ns.Labels, Known: true}, hook)
		if err != nil {
			return nil, fmt.Errorf("pod %s/%s: %w", namespace, pods[i].Name, err)
		}
		rows = append(rows, manifest.Outcome{Object: "Pod/" + namespace + "/" + pods[i].Name, Decision: d})
	}
	return rows, nil
}

func decideRunning(c *inject.Config, pod *corev1.Pod, ns inject.Namespace, hook string) (inject.Decision, error) {
	if inject.Injected(pod) {
		return inject.Decision{Inject: true, Reason: "Injected", Text: "it has the proxy"}, nil
	}
	d, err := c.Decide(pod, ns)
	if err != nil {
		return inject.Decision{Reason: "Refused", Text: err.Error()}, nil
	}
	if !d.Inject {
		return d, nil
	}
	if hook != "" {
		return inject.Decision{Reason: "Webhook", Text: "it should be (" + d.Text + "), but " + hook}, nil
	}
	return inject.Decision{Reason: "MadeBefore", Text: "it would be now (" + d.Text + "): it was made before that held; delete it, and it is made anew"}, nil
}

// webhookProblem says what keeps the API server from asking the webhook; "" when nothing is seen.
func (f *injectFlags) webhookProblem(ctx context.Context, client kubernetes.Interface) string {
	name := webhook.InjectorConfigMap + webhook.Suffix(f.revision)
	cfg, err := client.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return "there is no MutatingWebhookConfiguration " + name
	case err != nil:
		return ""
	case len(cfg.Webhooks) == 0:
		return "MutatingWebhookConfiguration " + name + " has no webhooks"
	}
	for _, w := range cfg.Webhooks {
		if len(w.ClientConfig.CABundle) == 0 && w.ClientConfig.URL == nil {
			return "MutatingWebhookConfiguration " + name + " has no caBundle yet: isthmusd writes it when it runs"
		}
	}
	return ""
}
