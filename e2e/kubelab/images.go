package kubelab

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node"
)

// image says which program of Config.Bin, or of this machine, an image stands for.
type image struct {
	program string
	entry   []string // arguments that are always there
	args    []string // those of Pods that give none
	envoy   bool     // holds Envoy, too
}

// known are the images of the product's chart, of Istio's samples and of the lab's applications, by the last part of
// their names. A prefix is enough: the longest one counts.
var known = map[string]image{
	"isthmusd":      {program: "isthmusd"},
	"isthmus-agent": {program: "isthmus-agent", envoy: true},
	"proxyv2":       {program: "isthmus-agent", envoy: true},
	"isthmus-cni":   {program: "isthmus-cni"},
	"isthmus":       {program: "isthmus"},
	"coredns":       {program: "coredns"},

	"hello":           {program: "hello"},
	"nginx":           {program: "hello", args: []string{"--app", "nginx", "--http", "80"}},
	"tcp-echo-server": {program: "hello", args: []string{"--app", "tcp-echo", "--http", "", "--tcp", "9000,9001"}},
	"caller":          {program: "caller"},
	"bookstore":       {program: "bookstore"},

	"examples-helloworld-v1":           sample("helloworld", "v1"),
	"examples-helloworld-v2":           sample("helloworld", "v2"),
	"examples-helloworld-v3":           sample("helloworld", "v3"),
	"examples-bookinfo-productpage-v1": sample("productpage", "v1"),
	"examples-bookinfo-details-v1":     sample("details", "v1"),
	"examples-bookinfo-details-v2":     sample("details", "v2"),
	"examples-bookinfo-ratings-v1":     sample("ratings", "v1"),
	"examples-bookinfo-reviews-v1":     sample("reviews", "v1"),
	"examples-bookinfo-reviews-v2":     sample("reviews", "v2", "--stars", "black"),
	"examples-bookinfo-reviews-v3":     sample("reviews", "v3", "--stars", "red"),
	"httpbin":                          sample("httpbin", "v1"),
	"curl":                             {program: "samples", args: []string{"sleep"}},
	"sleep":                            {program: "samples", args: []string{"sleep"}},
	"pause":                            {program: "samples", args: []string{"sleep"}},
	"busybox":                          {program: "sh"},
	"alpine":                           {program: "sh"},
}

// sample is one of the sample applications; a Pod's own arguments come after these.
func sample(app, version string, more ...string) image {
	return image{program: "samples", entry: append([]string{app, "--version", version}, more...)}
}

// programs finds the programs of all images. One that was not built is left out: a Pod that wants it says so.
func (l *Lab) programs() (map[string]node.Program, error) {
	out := map[string]node.Program{}
	envoy := os.Getenv("ENVOY")
	if envoy == "" {
		envoy = filepath.Join(l.cfg.Bin, "..", "envoy", "envoy")
	}
	envoy, err := filepath.Abs(envoy)
	if err != nil {
		return nil, err
	}
	for name, im := range known {
		path, err := l.net.Program(im.program)
		if err != nil {
			continue
		}
		p := node.Program{Command: append([]string{path}, im.entry...), Args: im.args}
		if _, err := os.Stat(envoy); im.envoy && err == nil {
			p.Files = map[string]string{"/usr/local/bin/envoy": envoy}
		}
		out[name] = p
	}
	names := make([]string, 0, len(l.topology.Images))
	for name := range l.topology.Images {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		path, err := l.net.Program(l.topology.Images[name])
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", name, err)
		}
		out[name] = node.Program{Command: []string{path}}
	}
	return out, nil
}
