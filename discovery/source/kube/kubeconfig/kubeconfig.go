// Package kubeconfig says how API servers are reached: the local one, and those that remote secrets name.
package kubeconfig

import (
	"fmt"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// maxKubeconfig bounds a kubeconfig in a remote secret; one with certificates has about 6 KiB.
const maxKubeconfig = 256 << 10

// Local returns how to reach the local API server: by the kubeconfig in that file and one of its contexts ("": the
// current one), or, without a file, as a Pod of the cluster.
func Local(file, context string) (*rest.Config, error) {
	if file == "" {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, diag.Hint(fmt.Errorf("source.kube: %w", err), "outside of a cluster name a kubeconfig: source.kube.kubeconfig")
		}
		return cfg, nil
	}
	rules := &clientcmd.ClientConfigLoadingRules{ExplicitPath: file}
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: context}).ClientConfig()
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("source.kube.kubeconfig %s: %w", file, err), "kubectl --kubeconfig %s get nodes must work", file)
	}
	return cfg, nil
}

// Remote reads the kubeconfig of a remote secret. Whoever may write the secret must not thereby run programs or
// read files here, so all that would is refused. No error holds a credential.
func Remote(data []byte) (*rest.Config, error) {
	if len(data) > maxKubeconfig {
		return nil, diag.Hint(fmt.Errorf("the kubeconfig has %d bytes", len(data)), "leave all but one context out")
	}
	if len(strings.TrimSpace(string(data))) == 0 {
		return nil, diag.Hint(fmt.Errorf("the kubeconfig is empty"), "%s", RemakeSecret)
	}
	kc, err := clientcmd.Load(data)
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("the kubeconfig does not parse"), "%s", RemakeSecret) // the parser quotes what it read
	}
	ctx := kc.Contexts[kc.CurrentContext]
	if ctx == nil {
		return nil, diag.Hint(fmt.Errorf("the kubeconfig has no context %.80q, its current-context", kc.CurrentContext), "%s", RemakeSecret)
	}
	cluster, user := kc.Clusters[ctx.Cluster], kc.AuthInfos[ctx.AuthInfo]
	if cluster == nil {
		return nil, diag.Hint(fmt.Errorf("the kubeconfig has no cluster %.80q, that of its current-context", ctx.Cluster), "%s", RemakeSecret)
	}
	if user == nil {
		user = &clientcmdapi.AuthInfo{}
	}
	if err := refuse(cluster, user); err != nil {
		return nil, err
	}
	cfg, err := clientcmd.NewDefaultClientConfig(*kc, &clientcmd.ConfigOverrides{}).ClientConfig()
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("the kubeconfig cannot be used"), "%s", RemakeSecret)
	}
	return cfg, nil
}

// RemakeSecret is the remedy for a remote secret that cannot be used.
const RemakeSecret = "make the secret with isthmus create-remote-secret or istioctl create-remote-secret"

// refuse names what a remote secret must not hold.
func refuse(c *clientcmdapi.Cluster, u *clientcmdapi.AuthInfo) error {
	for _, x := range []struct {
		found            bool
		what, why, other string
	}{
		{u.Exec != nil, "users.user.exec", "it would run a program in the control plane", "use a token"},
		{u.AuthProvider != nil, "users.user.auth-provider", "it would run code in the control plane", "use a token"},
		{u.TokenFile != "", "users.user.tokenFile", "it names a file of the control plane", "write the token itself"},
		{u.ClientCertificate != "", "users.user.client-certificate", "it names a file of the control plane", "use client-certificate-data"},
		{u.ClientKey != "", "users.user.client-key", "it names a file of the control plane", "use client-key-data"},
		{c.CertificateAuthority != "", "clusters.cluster.certificate-authority", "it names a file of the control plane", "use certificate-authority-data"},
		{c.InsecureSkipTLSVerify, "clusters.cluster.insecure-skip-tls-verify", "anyone on the way could answer as that cluster", "use certificate-authority-data"},
		{!strings.HasPrefix(c.Server, "https://"), "clusters.cluster.server", "it is not an https:// address", "write the address of the API server"},
		{u.Token == "" && len(u.ClientCertificateData) == 0 && u.Username == "", "users.user", "it has no credentials", "use a token"},
	} {
		if x.found {
			return diag.Hint(fmt.Errorf("the kubeconfig is refused: %s: %s", x.what, x.why), "%s; %s", x.other, RemakeSecret)
		}
	}
	return nil
}
