package operator

import (
	"cmp"
	"context"
	"net/http"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/audit"
)

// caller is who called, and from where.
type caller struct{ who, from string }

// callerKey is where a context says who called.
type callerKey struct{}

// WithCaller is the context of a request that knows who called: the guard, another replica or the socket says it.
func WithCaller(r *http.Request) context.Context {
	return context.WithValue(r.Context(), callerKey{}, caller{r.Header.Get(admin.CallerHeader), r.Header.Get(admin.FromHeader)})
}

// Who called: an account that the API server vouched for, or "operator": whoever may open the socket.
func Who(ctx context.Context) string {
	c, _ := ctx.Value(callerKey{}).(caller)
	return cmp.Or(c.who, "operator")
}

// write writes down what a call did, or that it was refused.
func (s *Server) write(ctx context.Context, action, object string, facts map[string]string, err error) {
	c, _ := ctx.Value(callerKey{}).(caller)
	s.cfg.Audit.Write(audit.Line{Action: action, Object: object, Who: Who(ctx), From: c.from, Result: audit.Result(err), Facts: facts})
}

// audited has f written down. about says what it did to what; no action: it changed nothing by design. What is said of a
// call must not be secret: neither Out of a token nor In of a join is printed whole.
func audited[In, Out any](s *Server, about func(In, Out) (action, object string, facts map[string]string), f func(context.Context, In) (Out, error)) func(context.Context, In) (Out, error) {
	return func(ctx context.Context, in In) (Out, error) {
		out, err := f(ctx, in)
		if action, object, facts := about(in, out); action != "" {
			s.write(ctx, action, object, facts, err)
		}
		return out, err
	}
}

// auditedCall is audited for a call whose path names the object.
func auditedCall[Out any](s *Server, action, name string, f func(*http.Request) (Out, error)) func(*http.Request) (Out, error) {
	return func(r *http.Request) (Out, error) {
		out, err := f(r)
		s.write(r.Context(), action, r.PathValue(name), nil, err)
		return out, err
	}
}

func aboutToken(r admin.TokenRequest, out admin.TokenReply) (string, string, map[string]string) {
	facts := map[string]string{"kind": r.Kind, "for": r.Name}
	if !out.Expires.IsZero() {
		facts["expires"] = out.Expires.UTC().Format("2006-01-02T15:04:05Z")
	}
	return "token.create", out.ID, facts
}

func aboutWorkloadToken(r admin.WorkloadTokenRequest, _ admin.TokenReply) (string, string, map[string]string) {
	return "workload-token.create", r.Namespace + "/" + r.Pod, map[string]string{"serviceAccount": r.ServiceAccount}
}

func aboutJoin(r admin.JoinRequest, out admin.JoinReply) (string, string, map[string]string) {
	if r.DryRun {
		return "", "", nil
	}
	return "mesh.join", out.Issuer, nil
}

func aboutLeave(r admin.LeaveRequest, out admin.LeaveReply) (string, string, map[string]string) {
	if r.DryRun {
		return "", "", nil
	}
	return "mesh.leave", out.Cluster, nil
}

func aboutRotation(r admin.RotateRequest, out admin.Trust) (string, string, map[string]string) {
	if r.Cancel {
		return "trust.cancel", out.TrustDomain, nil
	}
	facts := map[string]string{}
	if r.Now {
		facts["now"] = "true"
	}
	if r.Overlap != "" {
		facts["overlap"] = r.Overlap
	}
	return "trust.rotate", out.TrustDomain, facts
}
