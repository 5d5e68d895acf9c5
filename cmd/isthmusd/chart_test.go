package main

import (
	"io/fs"
	"maps"
	"path"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/deploy/helm"
)

// TestChart reads the configuration that the chart writes.
func TestChart(t *testing.T) {
	var files []*loader.BufferedFile
	err := fs.WalkDir(helm.Chart(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || path.Dir(name) == "files/crds" {
			return err
		}
		data, err := fs.ReadFile(helm.Chart(), name)
		files = append(files, &loader.BufferedFile{Name: name, Data: data})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := loader.LoadFiles(files)
	if err != nil {
		t.Fatal(err)
	}
	for name, more := range map[string]map[string]any{
		"as it stands": {},
		"all of it": {
			"cluster": map[string]any{"trustDomain": "mesh.example", "network": "n1"}, "advertisedGateways": []any{"192.0.2.1:15443"},
			"federation": map[string]any{"autoApprove": true, "lateAfter": "5s", "lease": "1h"}, "ca": map[string]any{"maxTTL": "12h"},
			"isthmusd": map[string]any{"config": map[string]any{"machineGrace": "30s"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			values := map[string]any{"cluster": map[string]any{"name": "amber"}}
			maps.Copy(values, chartutil.MergeTables(values, more))
			top, err := chartutil.ToRenderValues(c, values, chartutil.ReleaseOptions{Name: "isthmus", Namespace: "mesh"}, nil)
			if err != nil {
				t.Fatal(err)
			}
			out, err := engine.Render(c, top)
			if err != nil {
				t.Fatal(err)
			}
			cm := &corev1.ConfigMap{}
			first, _, _ := strings.Cut(out["isthmus/templates/configmaps.yaml"], "\n---\n")
			if err := yaml.Unmarshal([]byte(first), cm); err != nil || cm.Name != "isthmusd" {
				t.Fatalf("%v: %s", err, cm.Name)
			}
			got, err := loadConfig(writeConfig(t, cm.Data["isthmusd.yaml"]))
			if err != nil {
				t.Fatalf("%v in\n%s", err, cm.Data["isthmusd.yaml"])
			}
			if got.Cluster != "amber" || !got.Source.Kube.Enabled || got.Source.Kube.Namespace != "mesh" || got.State.In != inKubernetes {
				t.Errorf("%+v", got)
			}
		})
	}
}
