package main

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/audit"
)

// audit is what was written down of changes.
func (d *daemonTest) audit(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(d.cfg.Audit.File)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// wrote checks that exactly these lines were written down: action, object, who, from (without port), result.
func (d *daemonTest) wrote(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	for line := range strings.Lines(d.audit(t)) {
		var x audit.Line
		if err := json.Unmarshal([]byte(line), &x); err != nil || x.Time.IsZero() {
			t.Fatalf("line %q: %v", line, err)
		}
		from, _, _ := strings.Cut(x.From, ":")
		got = append(got, strings.Join([]string{x.Action, x.Object, x.Who, from, x.Result}, " "))
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s wrote\n%s\nwant\n%s", d.cfg.Cluster, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
