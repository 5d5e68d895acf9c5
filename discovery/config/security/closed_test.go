package security_test

import (
	"fmt"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
)

// TestClosed: what is left of a policy with a mistake in it.
func TestClosed(t *testing.T) {
	for _, c := range []struct{ kind, metadata, spec, want string }{
		{"AuthorizationPolicy", "", `{rules: [{form: []}]}`, ""},
		{"AuthorizationPolicy", "", `{selector: {matchLabels: {app: a}}, action: ALLOW, rules: [{from: [{source: {ipBlocks: [x]}}]}]}`, `selector:{match_labels:{key:"app" value:"a"}}`},
		{"AuthorizationPolicy", "", `{selector: {match_labels: {app: a}}, action: DENY, rules: [{to: [{operation: {ports: [http]}}]}]}`, `selector:{match_labels:{key:"app" value:"a"}} rules:{} action:DENY`},
		{"AuthorizationPolicy", "", `{selector: {matchLabel: {app: a}}, action: DENY, rules: [{}]}`, "rules:{} action:DENY"},
		{"AuthorizationPolicy", "", `{selector: [], action: Deny, rules: [{}]}`, "rules:{} action:DENY"},
		{"AuthorizationPolicy", "", `{action: CUSTOM, rules: [{}]}`, "rules:{} action:DENY"},
		{"AuthorizationPolicy", "", `[]`, ""},
		{"AuthorizationPolicy", ", annotations: {istio.io/dry-run: yes}", `{action: DENY, rules: [{}]}`, "rules:{} action:DENY"},
		{"AuthorizationPolicy", `, annotations: {istio.io/dry-run: "true"}`, `{action: DENY, rules: [{form: []}]}`, "none"},
		{"AuthorizationPolicy", "", `{action: AUDIT, rules: [{form: []}]}`, "none"},
		{"AuthorizationPolicy", "", `{action: DENY}`, "none"}, // matches nothing
		{"AuthorizationPolicy", "", `{action: DENY, rule: [{}]}`, "rules:{} action:DENY"},
		{"AuthorizationPolicy", "", `{targetRefs: [{kind: Service, group: "", name: a}]}`, "none"}, // for a waypoint
		{"AuthorizationPolicy", "", `{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: g}], rule: []}`, `targetRefs:{group:"gateway.networking.k8s.io" kind:"Gateway" name:"g"}`},
		{"AuthorizationPolicy", "", `{targetRefs: {kind: Gateway}, action: DENY, rules: [{}]}`, "rules:{} action:DENY"},
		{"RequestAuthentication", "", `{selector: {matchLabels: {app: a}}, jwtRules: [{issuer: i, jwks: "{"}]}`, `selector:{match_labels:{key:"app" value:"a"}}`},
		{"RequestAuthentication", "", `{jwtRules: [{issuer: i}, {}]}`, ""},
		{"RequestAuthentication", "", `{jwtRules: [{issuer: i, jwksUri: "ftp://x"}], targetRefs: [{kind: Service, name: a}]}`, "none"},
	} {
		doc := fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: %s\nmetadata: {name: x%s}\nspec: %s\n", c.kind, c.metadata, c.spec)
		in, problems := config.Decode("f.yaml", []byte(doc), config.Options{})
		got, said := "none", false
		for _, p := range in.AuthorizationPolicies {
			if got = p.Spec.String(); !p.Closed {
				got = "open"
			}
		}
		for _, r := range in.RequestAuthentications {
			if got = r.Spec.String(); !r.Closed {
				got = "open"
			}
		}
		for _, p := range problems {
			said = said || p.Reason == written.ReasonClosed
		}
		if compact(got) != compact(c.want) || said != (c.want != "none") || len(problems) == 0 {
			t.Errorf("%s %s: %s, want %s; %v", c.kind, c.spec, got, c.want, problems)
		}
	}
}

// compact takes out the white space that protobuf's text varies on purpose.
func compact(s string) string {
	var out []rune
	for _, r := range s {
		if r != ' ' {
			out = append(out, r)
		}
	}
	return string(out)
}
