package kubelab

import (
	"embed"
	"fmt"
	"os"
	"strings"
)

//go:embed topologies/*.yaml
var topologies embed.FS

// Topologies returns the names of the built-in topologies, sorted.
func Topologies() []string {
	files, _ := topologies.ReadDir("topologies") // embedded: it is there
	var out []string
	for _, f := range files {
		out = append(out, strings.TrimSuffix(f.Name(), ".yaml"))
	}
	return out
}

// FindTopology returns a built-in topology by its name, or reads a file.
func FindTopology(name string) (*Topology, error) {
	if text, err := topologies.ReadFile("topologies/" + name + ".yaml"); err == nil {
		t, err := ParseTopology(text)
		if err != nil {
			return nil, fmt.Errorf("topology %s: %w", name, err)
		}
		return t, nil
	}
	if _, err := os.Stat(name); err != nil {
		return nil, fmt.Errorf("topology %q is neither a file nor one of %s", name, strings.Join(Topologies(), ", "))
	}
	return LoadTopology(name)
}
