package reconcile

import (
	"encoding/json"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/gatewayapi"
)

func TestStatus(t *testing.T) {
	if Controller != gatewayapi.ControllerName {
		t.Errorf("entries of %s are ours here, of %s there", Controller, gatewayapi.ControllerName)
	}
	const ours = `"controllerName":"isthmus.io/gateway-controller"`
	for _, c := range []struct{ name, had, want, out string }{
		{
			"first", `{}`, `{"conditions":[{"type":"A","status":"True","lastTransitionTime":null}]}`,
			`{"conditions":[{"lastTransitionTime":"now","status":"True","type":"A"}]}`,
		},
		{
			"the time stays with the status, and what is not wanted goes",
			`{"conditions":[{"type":"A","status":"True","reason":"Old","lastTransitionTime":"then"},{"type":"B","status":"True","lastTransitionTime":"then"},{"type":"C","status":"True"}]}`,
			`{"conditions":[{"type":"A","status":"True","reason":"New"},{"type":"B","status":"False"}]}`,
			`{"conditions":[{"lastTransitionTime":"then","reason":"New","status":"True","type":"A"},{"lastTransitionTime":"now","status":"False","type":"B"}]}`,
		},
		{
			"a placeholder of the API's own definition has no time",
			`{"conditions":[{"type":"A","status":"Unknown","lastTransitionTime":"1970-01-01T00:00:00Z"}]}`, `{"conditions":[{"type":"A","status":"True"}]}`,
			`{"conditions":[{"lastTransitionTime":"now","status":"True","type":"A"}]}`,
		},
		{
			"other controllers",
			`{"parents":[{"controllerName":"other","parentRef":{"name":"g"},"conditions":[{"type":"A"}]},{` + ours + `,"parentRef":{"name":"gone"}},{` + ours + `,"parentRef":{"name":"g"},"conditions":[{"type":"A","status":"True","lastTransitionTime":"then"}]}]}`,
			`{"parents":[{` + ours + `,"parentRef":{"name":"g"},"conditions":[{"type":"A","status":"True"}]}]}`,
			`{"parents":[{"conditions":[{"type":"A"}],"controllerName":"other","parentRef":{"name":"g"}},{"conditions":[{"lastTransitionTime":"then","status":"True","type":"A"}],` + ours + `,"parentRef":{"name":"g"}}]}`,
		},
		{
			"listeners by name",
			`{"listeners":[{"name":"x","conditions":[{"type":"A","status":"True","lastTransitionTime":"1"}]},{"name":"y","conditions":[{"type":"A","status":"True","lastTransitionTime":"2"}]}]}`,
			`{"listeners":[{"name":"y","conditions":[{"type":"A","status":"True"}]}]}`,
			`{"listeners":[{"conditions":[{"lastTransitionTime":"2","status":"True","type":"A"}],"name":"y"}]}`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var had, want map[string]any
			if err := json.Unmarshal([]byte(c.had), &had); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte(c.want), &want); err != nil {
				t.Fatal(err)
			}
			out := Status(had, want, "now")
			got, err := json.Marshal(out)
			if err != nil || string(got) != c.out {
				t.Errorf("got  %s\nwant %s", got, c.out)
			}
			if again := Status(out, want, "later"); !Equal(out, again) {
				t.Errorf("what is right is written again: %v", again)
			}
		})
	}
	if !Equal(map[string]any(nil), map[string]any{"parents": []any{}}) || Equal(map[string]any{"a": int64(1)}, map[string]any{"a": 2.0}) || !Equal(map[string]any{"a": int64(1)}, map[string]any{"a": 1.0}) {
		t.Error("equal values differ, or different ones are equal")
	}
}
