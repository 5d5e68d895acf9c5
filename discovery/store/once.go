package store

import "github.com/isthmus-mesh/isthmus/discovery/mesh"

// Once builds the Snapshot that a store would publish of these inputs, by source key, and keeps nothing: for tools that
// look at a set of objects without a control plane. Equal arguments give equal Snapshots, whatever the order.
func Once(cfg Config, inputs map[string]mesh.Input) *mesh.Snapshot {
	cfg.Memory = NoMemory{}
	s := &Store{inputs: map[inputKey]mesh.Input{}}
	for key, in := range inputs {
		s.inputs[inputKey{"", key}] = in
	}
	return newBuilder(cfg).build(s.sorted(), nil)
}
