package install

import (
	"context"
	"fmt"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Verify lists every object of the installation with its state. It is an error when there is none.
func (c *Cluster) Verify(ctx context.Context, namespace string) (*Result, error) {
	res := &Result{Context: c.Context, Namespace: namespace}
	history, err := c.history(ctx, namespace, false)
	if err != nil {
		return res, err
	}
	rec := last(history)
	if rec == nil {
		return res, diag.Hint(fmt.Errorf("%w of release %s in namespace %s of context %s", ErrNothing, ReleaseName, namespace, c.Context), "isthmus install makes one; --namespace and --context name another")
	}
	res.Revision = rec.Version
	if rec.Info.Status.IsPending() || rec.Info.Status == "failed" {
		res.Warnings = append(res.Warnings, fmt.Sprintf("revision %d is %s: %s", rec.Version, rec.Info.Status, rec.Info.Description))
	}
	objects, err := recorded(rec)
	if err != nil {
		return res, err
	}
	for _, o := range objects {
		client, err := c.heads(o)
		if err != nil {
			res.Objects = append(res.Objects, report(o, Missing, err.Error()))
			continue
		}
		there, err := head(ctx, client, o)
		switch {
		case err != nil:
			return res, err
		case there == nil:
			res.Objects = append(res.Objects, report(o, Missing, ""))
		case o.GetKind() == "Deployment" || o.GetKind() == "DaemonSet":
			why, err := c.rollout(ctx, o)
			if err != nil {
				return res, err
			}
			res.Objects = append(res.Objects, report(o, ready(why == ""), why))
		case isDefinition(o):
			why := ""
			if d, err := c.definition(ctx, o.GetName()); err != nil {
				why = err.Error()
			} else {
				why = d.established()
			}
			res.Objects = append(res.Objects, report(o, ready(why == ""), why))
		default:
			res.Objects = append(res.Objects, report(o, Ready, ""))
		}
	}
	return res, nil
}

func ready(ok bool) State {
	if ok {
		return Ready
	}
	return NotReady
}

// Bad counts the objects that are missing or not ready.
func (r *Result) Bad() (n int) {
	for _, o := range r.Objects {
		if o.State == Missing || o.State == NotReady {
			n++
		}
	}
	return n
}
