package config

import "github.com/isthmus-mesh/isthmus/discovery/mesh"

// Locator finds the lines of fields in one file, for findings that were made long after it was read.
type Locator struct{ objects map[mesh.ObjectRef]*object }

// NewLocator reads a file again, as Decode does.
func NewLocator(source string, data []byte) *Locator {
	l := &Locator{map[mesh.ObjectRef]*object{}}
	for _, o := range newDecoder(source, data, Options{}).objects {
		if l.objects[o.Ref] == nil {
			l.objects[o.Ref] = o
		}
	}
	return l
}

// Line returns the line at which a field of the object begins, or the deepest part of its path that the object has;
// 0 when the file has no such object, or the object nothing of the path.
func (l *Locator) Line(object mesh.ObjectRef, field string) int {
	if o := l.objects[object]; o != nil && field != "" {
		return o.Doc.LineOf(o.Prefix + field)
	}
	return 0
}
