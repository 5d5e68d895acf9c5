package kubestate

import (
	"context"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// page is how many objects are asked for at once.
const page = "250"

// list hands every page of a resource to each. L is the list type.
func list[L any, P interface {
	*L
	runtime.Object
	metav1.ListInterface
}](ctx context.Context, c *Client, resource string, each func(P) error) error {
	for next := ""; ; {
		r := c.resources.Get().Namespace(c.namespace).Resource(resource).Param("limit", page)
		if next != "" {
			r = r.Param("continue", next)
		}
		l := P(new(L))
		if err := r.Do(ctx).Into(l); err != nil {
			return err
		}
		if err := each(l); err != nil {
			return err
		}
		if next = l.GetContinue(); next == "" {
			return nil
		}
	}
}
