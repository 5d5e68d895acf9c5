// Package kubestate keeps in the Kubernetes API what a cluster must not forget and what its replicas share: keys in
// Secrets, grants of join tokens and the standing of peers in custom resources, and who leads in a Lease. It knows the
// objects and how they are raced for, not what keys sign or records mean. All is in one namespace.
package kubestate

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	coordinationclient "k8s.io/client-go/kubernetes/typed/coordination/v1"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/api/isthmus/v1alpha1"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// callTimeout bounds one call of the API where the caller brings no deadline.
const callTimeout = 5 * time.Second

// Client reads and writes the objects of one namespace. It is safe for concurrent use.
type Client struct {
	namespace string
	core      coreclient.CoreV1Interface
	leases    coordinationclient.CoordinationV1Interface
	resources rest.Interface // isthmus.io
}

// NewClient makes a client for the namespace; it calls nothing.
func NewClient(cfg *rest.Config, namespace string) (*Client, error) {
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = 100, 200 // joins come in bursts; each is two calls
	cfg.UserAgent = "isthmusd/state"
	fail := func(err error) (*Client, error) { return nil, fmt.Errorf("client of the Kubernetes API: %w", err) }
	web, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return fail(err)
	}
	c := &Client{namespace: namespace}
	if c.core, err = coreclient.NewForConfigAndClient(cfg, web); err != nil {
		return fail(err)
	}
	if c.leases, err = coordinationclient.NewForConfigAndClient(cfg, web); err != nil {
		return fail(err)
	}
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return fail(err)
	}
	own := rest.CopyConfig(cfg)
	own.APIPath, own.GroupVersion = "/apis", &v1alpha1.GroupVersion
	own.ContentType, own.AcceptContentTypes = "application/json", "application/json"
	own.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	if c.resources, err = rest.RESTClientForConfigAndClient(own, web); err != nil {
		return fail(err)
	}
	return c, nil
}

// Namespace returns the namespace of the objects.
func (c *Client) Namespace() string { return c.namespace }

// explain names the object, and the remedy where the operator has one.
func (c *Client) explain(verb, resource, name string, err error) error {
	err = fmt.Errorf("%s %s %s/%s: %w", verb, resource, c.namespace, name, err)
	switch {
	case meta.IsNoMatchError(err) || isMissingResource(err):
		return diag.Hint(err, "install the custom resources of isthmus.io: isthmus install")
	case isForbidden(err):
		return diag.Hint(err, "give the service account of isthmusd the rights of its chart: isthmus install")
	}
	return err
}

func timeout() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), callTimeout)
}
