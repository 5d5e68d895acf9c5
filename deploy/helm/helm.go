// Package helm holds the chart that installs Isthmus on Kubernetes, so that a program carries it.
package helm

import (
	"embed"
	"io/fs"
)

// Its resource definitions come from the modules that define them.
//go:generate go run ../../hack/crds isthmus/files/crds

// The schema and the table of the guide come from values.yaml.
//go:generate go run ../../hack/values isthmus/values.yaml isthmus/values.schema.json ../../docs/guide/isthmus-install.md

//go:embed all:isthmus
var files embed.FS

// Chart returns the chart's folder, Chart.yaml at its top.
func Chart() fs.FS {
	sub, err := fs.Sub(files, "isthmus")
	if err != nil {
		panic(err) // the name is a constant
	}
	return sub
}
