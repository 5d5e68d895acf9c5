package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"sync"

	"github.com/spf13/cobra"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// kubeTarget is the isthmusd of a cluster, reached through its API server.
type kubeTarget struct {
	kubeconfig, context, namespace, account string
}

func (k *kubeTarget) named() bool { return k.context != "" || k.kubeconfig != "" }

func (k *kubeTarget) flags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringVar(&k.context, "context", os.Getenv("ISTHMUS_CONTEXT"), "context of the kubeconfig: ask the isthmusd of that cluster through its API server (environment: ISTHMUS_CONTEXT)")
	f.StringVar(&k.kubeconfig, "kubeconfig", "", "kubeconfig file; KUBECONFIG or ~/.kube/config unless given")
	f.StringVarP(&k.namespace, "istio-namespace", "i", "istio-system", "namespace of isthmusd")
	f.StringVar(&k.namespace, "namespace", "istio-system", "the same, where a command has no --namespace of its own")
	f.StringVar(&k.account, "as-account", admin.OperatorAccount, "service account in that namespace to act as; "+admin.ViewerAccount+" looks only")
	_ = f.MarkHidden("namespace")
}

// tokenSeconds is the least life of a token that the API server gives.
const tokenSeconds = 600

// kubeClient asks an isthmusd through the API server's proxy of its Service. The user's own credentials go to the API
// server alone; isthmusd gets a short-lived token that is good for nothing else.
type kubeClient struct {
	target kubeTarget
	open   func() (*kubeConn, error)
}

type kubeConn struct {
	web   *http.Client
	base  string
	token string
}

func newKubeClient(t kubeTarget) *kubeClient {
	c := &kubeClient{target: t}
	c.open = sync.OnceValues(c.connect)
	return c
}

// config reads the kubeconfig.
func (k *kubeTarget) config() (*rest.Config, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = k.kubeconfig
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: k.context}).ClientConfig()
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("context %s: %w", k.name(), err), "kubectl config get-contexts shows those that are; --kubeconfig names another file")
	}
	cfg.UserAgent = "isthmus"
	return cfg, nil
}

// connect asks for a token.
func (c *kubeClient) connect() (*kubeConn, error) {
	t := c.target
	cfg, err := t.config()
	if err != nil {
		return nil, err
	}
	web, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", t.name(), err)
	}
	core, err := coreclient.NewForConfigAndClient(cfg, web)
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", t.name(), err)
	}
	seconds := int64(tokenSeconds)
	reply, err := core.ServiceAccounts(t.namespace).CreateToken(context.Background(), t.account, &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{Audiences: []string{admin.Audience}, ExpirationSeconds: &seconds},
	}, metav1.CreateOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, diag.Hint(fmt.Errorf("context %s: there is no service account %s/%s", t.name(), t.namespace, t.account), "install Isthmus there (isthmus install), or name its namespace with --istio-namespace")
	case apierrors.IsForbidden(err):
		return nil, diag.Hint(fmt.Errorf("context %s: %w", t.name(), err), "you need the right to create serviceaccounts/token of %s in namespace %s; to look only: --as-account %s", t.account, t.namespace, admin.ViewerAccount)
	case err != nil:
		return nil, diag.Hint(fmt.Errorf("context %s: %w", t.name(), err), "%s get --raw /readyz says whether the API server answers", t.kubectl())
	}
	base, _, err := rest.DefaultServerUrlFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("context %s: %w", t.name(), err)
	}
	path := base.JoinPath("api", "v1", "namespaces", t.namespace, "services", fmt.Sprintf("https:%s:%d", admin.ServiceName, admin.Port), "proxy")
	return &kubeConn{web: web, base: path.String(), token: reply.Status.Token}, nil
}

func (k *kubeTarget) name() string {
	if k.context == "" {
		return "(current)"
	}
	return k.context
}

// kubectl is the command that reaches the same cluster.
func (k *kubeTarget) kubectl() string {
	out := "kubectl"
	if k.kubeconfig != "" {
		out += " --kubeconfig " + k.kubeconfig
	}
	if k.context != "" {
		out += " --context " + k.context
	}
	return out
}

// call implements caller. What only looks is asked again when a replica that is gone was chosen.
func (c *kubeClient) call(ctx context.Context, method, path string, in, out any) error {
	conn, err := c.open()
	if err != nil {
		return err
	}
	for tries := 1; ; tries++ {
		err = c.once(ctx, conn, method, path, in, out)
		var away *proxyError
		if !errors.As(err, &away) || method != http.MethodGet || tries == 3 {
			return err
		}
	}
}

// proxyError is the API server's word, not that of isthmusd.
type proxyError struct{ error }

// Unwrap returns what it said.
func (e *proxyError) Unwrap() error { return e.error }

func (c *kubeClient) once(ctx context.Context, conn *kubeConn, method, path string, in, out any) error {
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, conn.base+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set(admin.TokenHeader, conn.token)
	if in != nil {
		req.Header.Set("content-type", "application/json")
	}
	resp, err := conn.web.Do(req)
	if err != nil {
		return fmt.Errorf("ask isthmusd by way of context %s: %w", c.target.name(), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		var buf bytes.Buffer
		_, _ = buf.ReadFrom(http.MaxBytesReader(nil, resp.Body, 1<<20))
		var e admin.Error
		if json.Unmarshal(buf.Bytes(), &e) == nil && e.Reason != "" && e.Message != "" && !isStatus(buf.Bytes()) {
			if e.Hint == "" {
				return &e
			}
			return diag.Hint(&e, "%s", e.Hint)
		}
		return c.fromProxy(resp, buf.Bytes())
	}
	return answer(resp, method+" "+path, out)
}

// isStatus tells the API server's own answers from those of isthmusd.
func isStatus(data []byte) bool {
	var s metav1.Status
	return json.Unmarshal(data, &s) == nil && s.Kind == "Status"
}

// fromProxy says why the API server did not get through.
func (c *kubeClient) fromProxy(resp *http.Response, data []byte) error {
	message := resp.Status
	var s metav1.Status
	if json.Unmarshal(data, &s) == nil && s.Message != "" {
		message = s.Message
	} else if text := bytes.TrimSpace(data); len(text) > 0 && len(text) < 300 {
		message += ": " + string(text)
	}
	err := &proxyError{fmt.Errorf("context %s: the API server does not get through to isthmusd: %s", c.target.name(), message)}
	ns := c.target.namespace
	switch resp.StatusCode {
	case http.StatusForbidden:
		return diag.Hint(err, "you need the right to get and create services/proxy of https:%s:%d in namespace %s", admin.ServiceName, admin.Port, ns)
	case http.StatusNotFound:
		return diag.Hint(err, "install Isthmus there (isthmus install), or name its namespace with --istio-namespace")
	}
	return diag.Hint(err, "see whether it runs: %s -n %s get pods -l app=%s", c.target.kubectl(), ns, admin.ServiceName)
}
