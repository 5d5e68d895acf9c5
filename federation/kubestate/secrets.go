package kubestate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"syscall"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// managedBy marks what is made here.
var managedBy = map[string]string{"app.kubernetes.io/managed-by": "isthmusd"}

func isForbidden(err error) bool { return apierrors.IsForbidden(err) }

// Transient reports whether an error came from the way to the API, or from what an operator may yet install or allow:
// it is worth to ask again.
func Transient(err error) bool {
	var status apierrors.APIStatus
	var way net.Error
	return errors.As(err, &status) || errors.As(err, &way) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNREFUSED)
}

// isMissingResource tells a resource that the API does not have from an object that is not there.
func isMissingResource(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) || status.Status().Reason != metav1.StatusReasonNotFound {
		return false
	}
	d := status.Status().Details
	return d == nil || d.Name == ""
}

// Secret returns the data of a Secret; nil when there is none.
func (c *Client) Secret(ctx context.Context, name string) (map[string][]byte, error) {
	s, err := c.core.Secrets(c.namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, c.explain("read", "Secret", name, err)
	}
	return s.Data, nil
}

// EnsureSecret returns the data of a Secret, with every key that fill gives: missing ones are added, those that are
// there are never changed. Replicas that race all return what the first of them wrote. fill is given what is there.
func (c *Client) EnsureSecret(ctx context.Context, name string, fill func(held map[string][]byte) (map[string][]byte, error)) (map[string][]byte, error) {
	return c.UpdateSecret(ctx, name, func(data map[string][]byte) (bool, error) {
		add, err := fill(data)
		if err != nil {
			return false, err
		}
		maps.DeleteFunc(add, func(k string, _ []byte) bool { return len(data[k]) > 0 })
		maps.Copy(data, add)
		return len(add) > 0, nil
	})
}

// UpdateSecret changes a Secret by compare-and-swap, and returns what it holds then. change works on a copy of what is
// there, possibly nothing, and says whether to write; it may be called again when another was faster.
func (c *Client) UpdateSecret(ctx context.Context, name string, change func(data map[string][]byte) (bool, error)) (map[string][]byte, error) {
	secrets := c.core.Secrets(c.namespace)
	for {
		s, err := secrets.Get(ctx, name, metav1.GetOptions{})
		missing := apierrors.IsNotFound(err)
		if missing {
			s = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: managedBy}, Type: corev1.SecretTypeOpaque}
		} else if err != nil {
			return nil, c.explain("read", "Secret", name, err)
		}
		if s.Data == nil {
			s.Data = map[string][]byte{}
		}
		write, err := change(s.Data)
		if err != nil {
			return nil, fmt.Errorf("change Secret %s/%s: %w", c.namespace, name, err)
		}
		if !write {
			return s.Data, nil
		}
		if missing {
			s, err = secrets.Create(ctx, s, metav1.CreateOptions{})
		} else {
			s, err = secrets.Update(ctx, s, metav1.UpdateOptions{})
		}
		switch {
		case err == nil:
			return s.Data, nil
		case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err): // another was first
		default:
			return nil, c.explain("write", "Secret", name, err)
		}
	}
}

// ConfigMap returns the data of a ConfigMap; nil when there is none.
func (c *Client) ConfigMap(ctx context.Context, name string) (map[string]string, error) {
	m, err := c.core.ConfigMaps(c.namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, c.explain("read", "ConfigMap", name, err)
	}
	return m.Data, nil
}

// UpdateConfigMap changes a ConfigMap by compare-and-swap. change works on what is there, possibly nothing, and says
// whether to write; it may be called again when another was faster.
func (c *Client) UpdateConfigMap(ctx context.Context, name string, change func(data map[string]string) bool) error {
	maps := c.core.ConfigMaps(c.namespace)
	for {
		m, err := maps.Get(ctx, name, metav1.GetOptions{})
		missing := apierrors.IsNotFound(err)
		if missing {
			m = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: managedBy}}
		} else if err != nil {
			return c.explain("read", "ConfigMap", name, err)
		}
		if m.Data == nil {
			m.Data = map[string]string{}
		}
		if !change(m.Data) {
			return nil
		}
		if missing {
			_, err = maps.Create(ctx, m, metav1.CreateOptions{})
		} else {
			_, err = maps.Update(ctx, m, metav1.UpdateOptions{})
		}
		if err == nil {
			return nil
		}
		if !apierrors.IsAlreadyExists(err) && !apierrors.IsConflict(err) {
			return c.explain("write", "ConfigMap", name, err)
		}
	}
}
