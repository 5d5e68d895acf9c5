package file

import (
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestKeepPolicies: a policy that an edit broke stays as it was; one that was never valid is closed, and stays so when
// the file no longer parses.
func TestKeepPolicies(t *testing.T) {
	const (
		good    = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec: {rules: [{to: [{operation: {methods: [GET]}}]}]}\n"
		bad     = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec: {action: DENY, rule: []}\n"
		rubbish = "apiVersion: [\n"
	)
	for _, c := range []struct {
		edits  []string
		closed bool
		n      int
		says   bool // that it fails closed
	}{
		{[]string{good}, false, 1, false},
		{[]string{bad}, true, 1, true},
		{[]string{good, bad}, false, 1, false},
		{[]string{bad, bad}, true, 1, true},
		{[]string{bad, good}, false, 1, false},
		{[]string{good, bad, rubbish}, false, 1, false},
		{[]string{bad, rubbish}, true, 1, false},
		{[]string{bad, ""}, false, 0, false},
	} {
		var in mesh.Input
		var problems []mesh.Problem
		for _, text := range c.edits {
			var now mesh.Input
			now, problems = config.Decode("f.yaml", []byte(text), config.Options{})
			in, problems = keepBroken(now, in, problems)
		}
		says := false
		for _, p := range problems {
			says = says || p.Reason == written.ReasonClosed
		}
		if len(in.AuthorizationPolicies) != c.n || c.n > 0 && in.AuthorizationPolicies[0].Closed != c.closed || says != c.says {
			t.Errorf("%q: %d policies, %v", c.edits, len(in.AuthorizationPolicies), problems)
		}
	}
}
