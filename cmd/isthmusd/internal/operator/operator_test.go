package operator

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/federation/token"
)

func grants(t *testing.T) *token.Grants {
	t.Helper()
	out := token.NewGrants(&token.Memory{})
	now := time.Now()
	used := []token.Redemption{{Key: []byte("k"), Name: "n3", At: now}}
	for _, g := range []token.Grant{
		{ID: "fresh", Kind: token.Cluster, Subject: "n3", Uses: 1},
		{ID: "used", Kind: token.Cluster, Subject: "n3", Uses: 1, Redemptions: used},
		{ID: "other", Kind: token.Cluster, Subject: "n4", Uses: 1, Redemptions: []token.Redemption{{Key: []byte("l"), Name: "n4", At: now}}},
		{ID: "machine", Kind: token.VM, Subject: "default/n3", Uses: 1, Redemptions: used},
		{ID: "half", Kind: token.VM, Subject: "default/pool", Uses: 2, Redemptions: used},
	} {
		g.Expires = now.Add(time.Hour)
		if err := out.Put(g); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// TestRevoke: what would change nothing is an error that says what does.
func TestRevoke(t *testing.T) {
	s := &Server{cfg: Config{Grants: grants(t), Log: slog.New(slog.DiscardHandler)}}
	for _, c := range []struct {
		id, message, hint string
		state             token.State
	}{
		{"fresh", "", "", token.Revoked},
		{"fresh", "", "", token.Revoked}, // twice changes nothing
		{"half", "", "", token.Revoked},
		{"used", "token used was redeemed by n3 already: revoking changes nothing", "to put that cluster out: isthmus peer evict n3", token.Redeemed},
		{"machine", "token machine was redeemed by machine default/n3 already: revoking changes nothing", "to take machine default/n3 out, run there: isthmus-agent leave", token.Redeemed},
		{"none", "token none: no such token", "isthmus token list shows those that are", ""},
	} {
		w := httptest.NewRecorder()
		s.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodDelete, "/v1/tokens/"+c.id, nil))
		var e admin.Error
		if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		if (w.Code == http.StatusOK) != (c.message == "") || e.Message != c.message || e.Hint != c.hint {
			t.Errorf("%s: %d %q, hint %q; want %q, hint %q", c.id, w.Code, e.Message, e.Hint, c.message, c.hint)
		}
		if g, _ := s.cfg.Grants.Get(c.id); c.state != "" && g.State(time.Now()) != c.state {
			t.Errorf("%s is %s, want %s", c.id, g.State(time.Now()), c.state)
		}
	}
}

// TestRetire: whoever redeemed a token may repeat the join with it for a while; not after an eviction.
func TestRetire(t *testing.T) {
	s := &Server{cfg: Config{Grants: grants(t), Log: slog.New(slog.DiscardHandler)}}
	if err := s.retire(t.Context(), "n3"); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]token.State{"fresh": token.Issued, "used": token.Revoked, "other": token.Redeemed, "machine": token.Redeemed, "half": token.Issued} {
		if g, _ := s.cfg.Grants.Get(id); g.State(time.Now()) != want {
			t.Errorf("%s is %s, want %s", id, g.State(time.Now()), want)
		}
	}
}
