// Package version says which build this is.
package version

import "runtime/debug"

// Version is set by the linker, as "make build" does: -X github.com/isthmus-mesh/isthmus/internal/version.Version=v0.1.0.
var Version = "dev"

// String returns the version, and of a build without one the commit if it is known.
func String() string {
	if info, ok := debug.ReadBuildInfo(); ok && Version == "dev" { // "go build" and "go install" know the commit
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return Version + " (" + s.Value[:12] + ")"
			}
		}
	}
	return Version
}
