package plugin

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestBearer: the token is that of the file now, and the cluster is said so that its own API server reviews it.
func TestBearer(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	for _, token := range []string{"first\n", "second"} {
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := bearer{file, "c2"}.GetRequestMetadata(context.Background())
		if err != nil || got["authorization"] != "Bearer "+strings.TrimSpace(token) || got["clusterid"] != "c2" {
			t.Errorf("token %q: %v, %v", token, got, err)
		}
	}
	if got, _ := (bearer{file, ""}).GetRequestMetadata(context.Background()); len(got) != 1 {
		t.Errorf("without a cluster: %v", got)
	}
	if _, err := (bearer{file + "x", ""}).GetRequestMetadata(context.Background()); err == nil {
		t.Error("no token, no error")
	}
}
