// Package envoytest finds the real Envoy for tests.
package envoytest

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// Path returns the Envoy binary: the one that the environment's ENVOY names, else the one that "make envoy" fetched. Without either
// the test is skipped, or fails when REQUIRE_TOOLS is set, as "make test" does: there a missing tool is an error.
func Path(t testing.TB) string {
	t.Helper()
	_, here, _, _ := runtime.Caller(0)
	path := os.Getenv("ENVOY")
	if path == "" {
		path = filepath.Join(filepath.Dir(here), "..", "..", "build", "envoy", "envoy")
	}
	if _, err := os.Stat(path); err == nil && !testing.Short() {
		return path
	}
	if os.Getenv("REQUIRE_TOOLS") != "" {
		t.Fatalf("no Envoy at %s: run make envoy, or set ENVOY", path)
	}
	t.Skipf("no Envoy at %s (make envoy fetches it), or -short", path)
	return ""
}
