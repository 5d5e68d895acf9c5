package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// TestLines: one line of JSON for each change, whatever others put into it.
func TestLines(t *testing.T) {
	var out bytes.Buffer
	l := New(&out, slog.New(slog.DiscardHandler))
	l.now = func() time.Time { return time.Unix(1700000000, 0) }
	l.Write(Line{Action: "peer.evict", Object: "birch", Who: "operator", From: "socket", Result: Done})
	l.Redeemed(token.Grant{ID: "t1", Kind: token.VM, Subject: "default/ratings"}, token.Redemption{Name: "x\n\xff" + strings.Repeat("y", 1000), From: "192.0.2.1:9", Key: []byte{1, 2}}, false, &token.Refused{Reason: "TokenSpent"})
	l.Trust("rotate", "operator", nil)
	l.Trust("retire", "", map[string]string{"authority": "ab"})
	l.Standing("birch", protocol.Approved, protocol.Evicted, []mesh.ClusterID{"cedar"})
	l.Standing("birch", protocol.Approved, protocol.Gone, nil)
	l.Standing("birch", protocol.Evicted, "", nil)
	var got []Line
	for line := range strings.Lines(out.String()) {
		var x Line
		if err := json.Unmarshal([]byte(line), &x); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got = append(got, x)
	}
	if len(got) != 6 {
		t.Fatalf("%d lines:\n%s", len(got), out.String())
	}
	if want := `{"time":"2023-11-14T22:13:20Z","action":"peer.evict","object":"birch","who":"operator","from":"socket","result":"done"}`; !strings.HasPrefix(out.String(), want+"\n") {
		t.Errorf("first line %s", out.String())
	}
	for i, want := range []string{"peer.evict done operator", "token.redeem TokenSpent ", "trust.retire done isthmusd", "peer.standing evicted cluster cedar", "peer.standing left cluster birch", "peer.standing forgotten "} {
		if have := got[i].Action + " " + got[i].Result + " " + got[i].Who; !strings.HasPrefix(have, want) {
			t.Errorf("line %d: %q, want %q", i, have, want)
		}
	}
	if r := got[1]; len(r.Who) > maxText+10 || r.Facts["key"] != "0102" || r.Facts["for"] != "default/ratings" || r.From != "192.0.2.1:9" {
		t.Errorf("%+v", r)
	}
}

func TestResult(t *testing.T) {
	for _, x := range []struct {
		err  error
		want string
	}{
		{nil, "done"}, {errors.New("no"), "Failed"}, {&protocol.Refusal{Reason: "UnknownPeer"}, "UnknownPeer"},
		{diag.Hint(errors.Join(&token.Refused{Reason: "TokenSpent"}), "try"), "TokenSpent"},
	} {
		if got := Result(x.err); got != x.want {
			t.Errorf("%v: %s, want %s", x.err, got, x.want)
		}
	}
}

// TestFile: lines are added to what is there, also after the file was cut; what cannot be written is an error in the log.
func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	if err := os.WriteFile(path, []byte("before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	l, err := Open(Config{File: path}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	l.Write(Line{Action: "peer.approve", Result: Done})
	if data, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(data), "before\n{") {
		t.Errorf("%q, %v", data, err)
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	l.Write(Line{Action: "peer.approve", Result: Done})
	if data, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(data), "{") {
		t.Errorf("%q, %v", data, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.Write(Line{Action: "peer.evict", Object: "birch", Result: Done})
	if !strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), "object=birch") {
		t.Errorf("log: %s", log.String())
	}
	if _, err := Open(Config{File: filepath.Join(path, "below")}, nil); err == nil || diag.HintOf(err) == "" {
		t.Errorf("a file that cannot be: %v", err)
	}
	var none *Log
	none.Write(Line{})
	if err := none.Close(); err != nil {
		t.Error(err)
	}
}
