// Package version says which build this is.
package version

import "runtime/debug"

// Version is set by the linker: -X github.com/isthmus-mesh/isthmus/internal/version.Version=v0.1.0.
var Version = "dev"

// String returns the version and, when the build knows it, the commit.
func String() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return Version + " (" + s.Value[:12] + ")"
			}
		}
	}
	return Version
}
