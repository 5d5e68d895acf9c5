package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRender(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.yaml")
	pod := "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: default, labels: {app: a}}\nspec: {containers: [{name: a}]}\nstatus: {podIP: 10.0.0.1, phase: Running}\n"
	if err := os.WriteFile(path, []byte(pod+"---\nkind: nothing\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, `"id": "sidecar~10.0.0.1~a.default~default.svc.cluster.local"`},
		{[]string{"-o", "yaml"}, "id: sidecar~10.0.0.1~a.default~default.svc.cluster.local"},
		{[]string{"-o", "resources"}, `"listeners": [`},
		{[]string{"-o", "resources", "--as", "yaml"}, "\nlisteners:\n"},
	} {
		out, said, err := isthmus(append([]string{"render", "-f", path, "--node", "a.default"}, c.args...)...)
		if err != nil || !strings.Contains(out, c.want) || !strings.Contains(said, "problem: ") {
			t.Errorf("render %v: %v, no %q or no problem\n%s%s", c.args, err, c.want, out, said)
		}
	}
	for _, args := range [][]string{{"-f", path}, {"--node", "a.default"}, {"-f", path, "--node", "a"}, {"-f", path, "--node", "a.default", "-o", "table"}, {"-f", path, "--node", "a.default", "--as", "toml"}} {
		if _, _, err := isthmus(append([]string{"render"}, args...)...); err == nil {
			t.Errorf("render %v: no error", args)
		}
	}
}
