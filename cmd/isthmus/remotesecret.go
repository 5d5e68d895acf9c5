package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"time"

	"github.com/spf13/cobra"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// remoteSecret says what create-remote-secret makes.
type remoteSecret struct {
	kubeconfig, context string
	name                string // of the cluster
	namespace, account  string
	server              string
	duration            time.Duration // 0: a token that lasts as long as its Secret
}

func remoteSecretCommand() *cobra.Command {
	var r remoteSecret
	cmd := &cobra.Command{
		Use:   "create-remote-secret --context CONTEXT --name CLUSTER",
		Short: "Print the Secret by which another cluster's control plane reads this one",
		Long: `Print a Secret with a kubeconfig for the cluster of the context, in the form that istioctl create-remote-secret prints. Apply it in the
cluster whose isthmusd is to read this one. The service account is made when it is missing; it may read Services, EndpointSlices, Pods, Namespaces
and Nodes, and have tokens reviewed.`,
		Example: "  isthmus create-remote-secret --context birch --name birch | kubectl --context amber apply -f -",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			out, warning, err := r.make(ctx)
			if err != nil {
				return err
			}
			if warning != "" {
				fmt.Fprintln(cmd.ErrOrStderr(), "isthmus: "+warning)
			}
			_, err = cmd.OutOrStdout().Write(out)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&r.kubeconfig, "kubeconfig", "", "kubeconfig file; as kubectl finds it unless given")
	f.StringVar(&r.context, "context", "", "context of the cluster that is to be read; the current one unless given")
	f.StringVar(&r.name, "name", "", "name of that cluster in the mesh, a DNS label")
	f.StringVarP(&r.namespace, "namespace", "n", "istio-system", "namespace of the service account, and of the Secret that is printed")
	f.StringVar(&r.account, "service-account", "istio-reader-service-account", "service account whose token is used")
	f.StringVar(&r.server, "server", "", "https address of the API server as the other cluster dials it; that of the context unless given")
	f.DurationVar(&r.duration, "duration", 0, "life of the token; without it the token lasts as long as its Secret in the cluster")
	_ = cmd.MarkFlagRequired("name")
	return cmd
}

// make creates what is missing in the cluster and returns the Secret, and a warning.
func (r *remoteSecret) make(ctx context.Context) (out []byte, warning string, err error) {
	if !mesh.IsLabel(r.name) {
		return nil, "", diag.Hint(fmt.Errorf("--name %q is not the name of a cluster", r.name), "use a-z, 0-9 and -")
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = r.kubeconfig
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: r.context}).ClientConfig()
	if err != nil {
		return nil, "", diag.Hint(fmt.Errorf("context %q: %w", r.context, err), "kubectl config get-contexts lists them")
	}
	server := r.server
	if server == "" {
		server = cfg.Host
	}
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, "", diag.Hint(fmt.Errorf("the API server's address %q is not https://HOST:PORT", server), "name one: --server https://HOST:PORT")
	}
	if ip := net.ParseIP(u.Hostname()); u.Hostname() == "localhost" || ip != nil && ip.IsLoopback() {
		warning = "warning: other clusters cannot reach " + server + "; name the address that they dial with --server"
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, "", err
	}
	if err := r.ensure(ctx, client); err != nil {
		return nil, "", err
	}
	token, ca, err := r.token(ctx, client)
	if err != nil {
		return nil, "", err
	}
	if own, err := authority(cfg); err != nil {
		return nil, "", err
	} else if len(own) > 0 {
		ca = own
	}
	out, err = r.render(server, token, ca)
	return out, warning, err
}

// authority is the CA by which the context knows the API server.
func authority(cfg *rest.Config) ([]byte, error) {
	if len(cfg.CAData) > 0 || cfg.CAFile == "" {
		return cfg.CAData, nil
	}
	return os.ReadFile(cfg.CAFile)
}

// ofIsthmus marks what is made here: isthmus install takes it over.
var ofIsthmus = map[string]string{"app.kubernetes.io/part-of": "isthmus"}

// ensure makes the namespace, the account and its rights where they are missing.
func (r *remoteSecret) ensure(ctx context.Context, client kubernetes.Interface) error {
	read := []string{"get", "list", "watch"}
	name := "istio-reader-" + r.namespace
	for _, x := range []struct {
		what   string
		create func() error
	}{
		{"namespace " + r.namespace, func() error {
			_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: r.namespace}}, metav1.CreateOptions{})
			return err
		}},
		{"service account " + r.account, func() error {
			_, err := client.CoreV1().ServiceAccounts(r.namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: r.account, Labels: ofIsthmus}}, metav1.CreateOptions{})
			return err
		}},
		{"cluster role " + name, func() error {
			_, err := client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: ofIsthmus}, Rules: []rbacv1.PolicyRule{
				{APIGroups: []string{""}, Resources: []string{"namespaces", "nodes", "pods", "services"}, Verbs: read},
				{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: read},
				{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}},
			}}, metav1.CreateOptions{})
			return err
		}},
		{"cluster role binding " + name, func() error {
			_, err := client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
				ObjectMeta: metav1.ObjectMeta{Name: name, Labels: ofIsthmus}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
				Subjects: []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: r.account, Namespace: r.namespace}},
			}, metav1.CreateOptions{})
			return err
		}},
	} {
		if err := x.create(); err != nil && !apierrors.IsAlreadyExists(err) {
			return diag.Hint(fmt.Errorf("create %s: %w", x.what, err), "run it with a context that may administer the cluster")
		}
	}
	return nil
}

// token returns a token of the account, and the cluster's CA if that comes with it.
func (r *remoteSecret) token(ctx context.Context, client kubernetes.Interface) (token string, ca []byte, err error) {
	if r.duration > 0 {
		seconds := int64(r.duration / time.Second)
		reply, err := client.CoreV1().ServiceAccounts(r.namespace).CreateToken(ctx, r.account,
			&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}, metav1.CreateOptions{})
		if err != nil {
			return "", nil, fmt.Errorf("create a token of service account %s/%s: %w", r.namespace, r.account, err)
		}
		return reply.Status.Token, nil, nil
	}
	secrets, name := client.CoreV1().Secrets(r.namespace), r.account+"-istio-remote-secret-token"
	_, err = secrets.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: ofIsthmus, Annotations: map[string]string{corev1.ServiceAccountNameKey: r.account}}, Type: corev1.SecretTypeServiceAccountToken,
	}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return "", nil, fmt.Errorf("create secret %s/%s: %w", r.namespace, name, err)
	}
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		s, err := secrets.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", nil, fmt.Errorf("read secret %s/%s: %w", r.namespace, name, err)
		}
		if len(s.Data[corev1.ServiceAccountTokenKey]) > 0 {
			return string(s.Data[corev1.ServiceAccountTokenKey]), s.Data[corev1.ServiceAccountRootCAKey], nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return "", nil, ctx.Err()
		case <-deadline.C:
			return "", nil, diag.Hint(fmt.Errorf("no token is put into secret %s/%s", r.namespace, name), "check that kube-controller-manager runs, or ask for a token that ends: --duration 8760h")
		}
	}
}

// render writes the Secret as istioctl does.
func (r *remoteSecret) render(server, token string, ca []byte) ([]byte, error) {
	if len(ca) == 0 {
		return nil, diag.Hint(errors.New("the CA of the API server is not known"), "use a context with certificate-authority or certificate-authority-data")
	}
	k := clientcmdapi.NewConfig()
	k.Clusters[r.name] = &clientcmdapi.Cluster{Server: server, CertificateAuthorityData: ca}
	k.AuthInfos[r.name] = &clientcmdapi.AuthInfo{Token: token}
	k.Contexts[r.name] = &clientcmdapi.Context{Cluster: r.name, AuthInfo: r.name}
	k.CurrentContext = r.name
	kubeconfig, err := clientcmd.Write(*k)
	if err != nil {
		return nil, fmt.Errorf("write the kubeconfig: %w", err)
	}
	body, err := yaml.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Secret",
		"metadata": map[string]any{
			"name": "istio-remote-secret-" + r.name, "namespace": r.namespace,
			"labels":      map[string]string{"istio/multiCluster": "true"},
			"annotations": map[string]string{"networking.istio.io/cluster": r.name},
		},
		"stringData": map[string]string{r.name: string(kubeconfig)},
	})
	if err != nil {
		return nil, fmt.Errorf("write the secret: %w", err)
	}
	var out bytes.Buffer
	out.WriteString("# This file is autogenerated, do not edit.\n")
	out.Write(body)
	out.WriteString("---\n")
	return out.Bytes(), nil
}
