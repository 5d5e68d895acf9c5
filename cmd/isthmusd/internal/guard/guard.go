// Package guard decides who may call the admin API over the network: who brings a token that the API server reviews, for
// this audience, and whom the API server then allows the one thing that the call does. Nothing of a request but its
// method, path and token is looked at before.
package guard

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationclient "k8s.io/client-go/kubernetes/typed/authentication/v1"
	authorizationclient "k8s.io/client-go/kubernetes/typed/authorization/v1"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

// Limits of a call.
const (
	maxToken  = 16 << 10
	atOnce    = 16 // reviews under way; more calls wait for their turn
	reviewFor = 5 * time.Second
)

// Config says whom to ask.
type Config struct {
	Tokens    authenticationclient.TokenReviewInterface
	Access    authorizationclient.SubjectAccessReviewInterface
	Namespace string // of isthmusd: rights are those in it
	Log       *slog.Logger
}

// Guard is in front of the admin API.
type Guard struct {
	cfg   Config
	turns chan struct{}
}

// New makes a guard.
func New(cfg Config) *Guard { return &Guard{cfg: cfg, turns: make(chan struct{}, atOnce)} }

// Action is what a call does, in the words of a Role: a verb on a resource of the group admin.isthmus.io.
type Action struct{ Verb, Resource, Name string }

// debugPages are what may be asked below /debug/.
var debugPages = []string{"", "adsz", "syncz", "configz", "endpointz", "registryz", "config_dump"}

// action reads it out of a call; false for one that the admin API does not have.
func action(method, path string) (Action, bool) {
	if page, ok := strings.CutPrefix(path, "/debug/"); ok {
		if method != http.MethodGet || !slices.Contains(debugPages, page) {
			return Action{}, false
		}
		return Action{Verb: "get", Resource: "debug"}, true
	}
	parts := strings.Split(strings.TrimPrefix(path, "/v1/"), "/")
	if !strings.HasPrefix(path, "/v1/") || slices.Contains(parts, "") || slices.Contains(parts, "..") {
		return Action{}, false
	}
	name := ""
	if len(parts) > 1 {
		name = parts[1]
	}
	key := method + " " + parts[0]
	if len(parts) == 3 {
		key += " " + parts[2]
	}
	verb := map[string]string{
		"GET status": "get", "GET peers": "list", "GET proxies": "list", "GET tokens": "list", "POST explain": "create", "POST tokens": "create",
		"DELETE tokens": "delete", "POST workload-tokens": "create", "POST join": "create", "POST leave": "create", "POST peers approve": "approve", "POST peers evict": "evict", "POST peers drain": "drain", "GET trust": "get", "POST trust": "rotate",
	}[key]
	named := method == http.MethodDelete || len(parts) == 3
	if verb == "" || len(parts) > 3 || named != (name != "") {
		return Action{}, false
	}
	return Action{verb, parts[0], name}, true
}

// Handler lets calls through to next that are allowed.
func (g *Guard) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a, ok := action(r.Method, r.URL.Path)
		if !ok {
			refuse(w, http.StatusNotFound, "NotFound", "isthmusd has no such call: "+clip(r.Method+" "+r.URL.Path), "use an isthmus of isthmusd's version")
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), reviewFor)
		user, refusal := g.who(ctx, r)
		if refusal == "" {
			refusal = g.may(ctx, user, a)
		}
		cancel()
		switch {
		case refusal != "" && user == nil:
			refuse(w, http.StatusUnauthorized, "Unauthenticated", refusal, "isthmus --context NAME brings a token of the service account "+admin.OperatorAccount)
		case refusal != "":
			g.cfg.Log.Warn("admin call refused", "part", "guard", "user", user.Username, "verb", a.Verb, "resource", a.Resource)
			refuse(w, http.StatusForbidden, "Forbidden", refusal, "bind a Role in namespace "+g.cfg.Namespace+" with verb "+a.Verb+" on "+a.Resource+" of "+admin.AccessGroup)
		default:
			g.cfg.Log.Info("admin call", "part", "guard", "user", user.Username, "verb", a.Verb, "resource", a.Resource, "name", a.Name)
			r.Header.Del(admin.TokenHeader)
			r.Header.Del("Authorization")
			r.Header.Set(admin.CallerHeader, user.Username)
			r.Header.Set(admin.FromHeader, r.RemoteAddr)
			next.ServeHTTP(w, r)
		}
	})
}

// who asks the API server whose token it is. On refusal the user is nil.
func (g *Guard) who(ctx context.Context, r *http.Request) (*authenticationv1.UserInfo, string) {
	values := r.Header.Values(admin.TokenHeader)
	if len(values) != 1 || values[0] == "" || len(values[0]) > maxToken {
		return nil, "the call brings no token in the header " + admin.TokenHeader
	}
	select {
	case g.turns <- struct{}{}:
		defer func() { <-g.turns }()
	case <-ctx.Done():
		return nil, "too many calls at once"
	}
	review, err := g.cfg.Tokens.Create(ctx, &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: values[0], Audiences: []string{admin.Audience}}}, metav1.CreateOptions{})
	switch {
	case err != nil:
		g.cfg.Log.Error("token not reviewed", "part", "guard", "err", err)
		return nil, "the token cannot be reviewed now"
	case !review.Status.Authenticated || !slices.Contains(review.Status.Audiences, admin.Audience):
		return nil, "the token is not one for " + admin.Audience
	}
	return &review.Status.User, ""
}

// may asks the API server whether the user may do it.
func (g *Guard) may(ctx context.Context, user *authenticationv1.UserInfo, a Action) string {
	extra := map[string]authorizationv1.ExtraValue{}
	for k, v := range user.Extra {
		extra[k] = authorizationv1.ExtraValue(v)
	}
	review, err := g.cfg.Access.Create(ctx, &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: user.Username, UID: user.UID, Groups: user.Groups, Extra: extra,
		ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: g.cfg.Namespace, Verb: a.Verb, Group: admin.AccessGroup, Resource: a.Resource, Name: a.Name},
	}}, metav1.CreateOptions{})
	if err != nil {
		g.cfg.Log.Error("access not reviewed", "part", "guard", "err", err)
		return "what " + user.Username + " may do cannot be reviewed now"
	}
	if !review.Status.Allowed || review.Status.Denied {
		return fmt.Sprintf("%s may not %s %s of %s in namespace %s", user.Username, a.Verb, a.Resource, admin.AccessGroup, g.cfg.Namespace)
	}
	return ""
}

func refuse(w http.ResponseWriter, code int, reason, message, hint string) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(&admin.Error{Reason: reason, Message: message, Hint: hint})
}

// clip bounds foreign text in an answer.
func clip(s string) string {
	if len(s) > 100 {
		s = s[:100] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
