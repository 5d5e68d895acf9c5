package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// TestLeave: it says what ends, and does nothing that was not confirmed.
func TestLeave(t *testing.T) {
	reply := admin.LeaveReply{
		Cluster: "cedar", Members: []string{"amber", "birch"}, Exports: []string{"reviews.default.svc.cluster.local"}, Imports: []string{"reviews.default.global"},
		Heard: []string{"amber"}, Unheard: []string{"birch"},
	}
	socket := daemon(t, map[string]any{"POST /v1/leave": reply})
	const plan = "cluster cedar would leave amber, birch\nends there: reviews.default.svc.cluster.local\nends here, or loses its endpoints of others: reviews.default.global\n"
	if out, _, err := isthmus("leave", "--dry-run", "--socket", socket); err != nil || out != plan {
		t.Errorf("--dry-run: %q, %v", out, err)
	}
	out, stderr, err := isthmus("leave", "--socket", socket)
	if err == nil || !strings.Contains(err.Error(), "cedar does not leave") || diag.HintOf(err) != "isthmus leave --yes" || out != "" || !strings.HasPrefix(stderr, plan) {
		t.Errorf("without a yes: %q, %q, %v", out, stderr, err)
	}
	out, _, err = isthmus("leave", "--yes", "--socket", socket)
	if err != nil || out != "cluster cedar has left the mesh\nheard by amber\nnot reached: birch; if the others do not tell them, run there: isthmus peer evict cedar\n" {
		t.Errorf("--yes: %q, %v", out, err)
	}
	var got admin.LeaveReply
	if out, _, err = isthmus("leave", "--yes", "-o", "json", "--socket", socket); err != nil || json.Unmarshal([]byte(out), &got) != nil || got.Cluster != "cedar" || len(got.Heard) != 1 {
		t.Errorf("-o json: %q, %v", out, err)
	}
	if _, _, err = isthmus("leave", "--yes", "--socket", daemon(t, nil)); err == nil {
		t.Error("a refusal is no error")
	}
}
