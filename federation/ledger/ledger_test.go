package ledger

import (
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, path string) *Ledger {
	t.Helper()
	l, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func record(origin, key string, epoch, seq uint64) *federationv1.Record {
	return &federationv1.Record{Origin: origin, Kind: protocol.KindService, Key: key, Epoch: epoch, Seq: seq, Body: []byte{1}, Signature: make([]byte, 64)}
}

func TestCommitAndLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	l := open(t, path)
	a, b := record("birch", "default/a", 1, 7), record("birch", "default/b", 1, 9)
	if err := l.Commit([]protocol.Action{
		protocol.Persist{Record: b}, protocol.Broadcast{Record: b}, protocol.Persist{Record: a},
		protocol.Remove{Origin: "birch", Kind: protocol.KindService, Key: "default/b"},
	}); err != nil {
		t.Fatal(err)
	}
	wall := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if err := l.Heard(map[mesh.ClusterID]time.Time{"birch": wall, "cedar": wall}); err != nil {
		t.Fatal(err)
	}
	// Neither the mark nor the time falls.
	if err := l.Commit([]protocol.Action{protocol.Persist{Record: record("birch", "default/c", 1, 2)}}); err != nil {
		t.Fatal(err)
	}
	if err := l.Heard(map[mesh.ClusterID]time.Time{"birch": wall.Add(-time.Hour)}); err != nil {
		t.Fatal(err)
	}
	if err := l.Commit(nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := open(t, path).Load()
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Records) != 2 || !proto.Equal(got.Records[0], a) || len(got.Skipped) != 0 {
		t.Errorf("loaded %v, skipped %v", got.Records, got.Skipped)
	}
	if m := got.Meta["birch"]; m.Epoch != 1 || m.Seq != 9 || !m.LastHeard.Equal(wall) {
		t.Errorf("meta is %+v", m)
	}
	s := got.State(5*time.Second, wall.Add(time.Minute))
	if s.LastHeard["birch"] != -55*time.Second || s.Marks["birch"] != (protocol.Mark{Epoch: 1, Seq: 9}) {
		t.Errorf("state is %+v", s)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the ledger: %v %v", info.Mode(), err)
	}
}

func TestCorruptEntriesAreSkipped(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	l := open(t, path)
	if err := l.Commit([]protocol.Action{protocol.Persist{Record: record("birch", "default/a", 1, 1)}, protocol.Persist{Record: record("birch", "default/b", 1, 2)}}); err != nil {
		t.Fatal(err)
	}
	grants := l.Bucket("grants")
	for _, key := range []string{"good", "bad"} {
		if err := grants.CAS(key, []byte("x"), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketRecords)
		v := append([]byte{}, b.Get([]byte("birch/service/default/a"))...)
		v[len(v)-1] ^= 1
		return errors.Join(
			b.Put([]byte("birch/service/default/a"), v), b.Put([]byte("short"), []byte{1}), b.Put([]byte("form"), make([]byte, 9)),
			b.Put([]byte("elsewhere"), b.Get([]byte("birch/service/default/b"))),
			tx.Bucket(bucketMeta).Put([]byte("cedar"), seal([]byte("no"))),
			tx.Bucket([]byte("kv/grants")).Put([]byte("bad"), []byte("no")))
	}); err != nil {
		t.Fatal(err)
	}
	got, err := l.Load()
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Records) != 1 || len(got.Skipped) != 5 {
		t.Errorf("loaded %v, skipped %v", got.Records, got.Skipped)
	}
	for _, err := range got.Skipped {
		if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), path) {
			t.Errorf("%v does not say what is corrupt", err)
		}
	}
	all, err := grants.List("")
	if !errors.Is(err, ErrCorrupt) || string(all["good"]) != "x" || len(all) != 1 {
		t.Errorf("list: %v, %v", all, err)
	}
	if _, _, err := grants.Get("bad"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("get: %v", err)
	}
}

func TestOpenFails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ledger.db")
	open(t, path)
	if _, err := Open(path); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "another process") {
		t.Errorf("locked: %v", err)
	}
	junk := filepath.Join(dir, "junk.db")
	if err := os.WriteFile(junk, []byte(strings.Repeat("junk", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(junk); err == nil || !strings.Contains(err.Error(), "move it away") {
		t.Errorf("junk: %v", err)
	}
	if _, err := Open(filepath.Join(dir, "missing", "ledger.db")); err == nil {
		t.Error("missing folder: no error")
	}
}

func TestBucket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.db")
	l := open(t, path)
	b := l.Bucket("grants")
	if v, version, err := b.Get("a"); v != nil || version != 0 || err != nil {
		t.Errorf("missing: %v %d %v", v, version, err)
	}
	if all, err := b.List(""); len(all) != 0 || err != nil {
		t.Errorf("empty: %v %v", all, err)
	}
	if err := b.CAS("a", []byte("one"), 3); !errors.Is(err, ErrVersion) {
		t.Errorf("wrong version: %v", err)
	}
	for _, step := range []struct{ key, value string }{{"a", "one"}, {"a", "two"}, {"ab", "three"}, {"b", ""}} {
		_, version, err := b.Get(step.key)
		if err = errors.Join(err, b.CAS(step.key, []byte(step.value), version)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.CAS("a", nil, 0); !errors.Is(err, ErrVersion) {
		t.Errorf("made twice: %v", err)
	}
	_, old, _ := b.Get("a")
	if err := errors.Join(b.Delete("a"), b.Delete("a"), b.Delete("nothing"), b.CAS("a", []byte("new"), 0)); err != nil {
		t.Fatal(err)
	}
	if err := b.CAS("a", nil, old); !errors.Is(err, ErrVersion) {
		t.Errorf("a version came back: %v", err)
	}
	if err := b.CAS("", nil, 0); err == nil {
		t.Error("empty key: no error")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	all, err := open(t, path).Bucket("grants").List("a")
	if err != nil || fmt.Sprint(all) != fmt.Sprint(map[string][]byte{"a": []byte("new"), "ab": []byte("three")}) {
		t.Errorf("after a restart: %v %v", all, err)
	}
}

func TestOneWriterWins(t *testing.T) {
	b := open(t, filepath.Join(t.TempDir(), "ledger.db")).Bucket("grants")
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if b.CAS("token", []byte("mine"), 0) == nil {
				won.Add(1)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d writers won", won.Load())
	}
}

func TestKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "federation.key")
	key, err := LoadOrCreateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	again, err := LoadOrCreateKey(path)
	if err != nil || !again.Public().Equal(key.Public()) {
		t.Fatalf("the key is another one: %v", err)
	}
	if !ed25519.Verify(key.Public(), []byte("x"), again.Sign([]byte("x"))) {
		t.Error("signature does not verify")
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode: %v %v", info.Mode(), err)
	}
	held := struct {
		K Key
		k *Key
	}{key, &key}
	text, err := json.Marshal(map[string]any{"k": key})
	if err != nil || string(text) != `{"k":"[redacted]"}` {
		t.Errorf("json: %s %v", text, err)
	}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "key", key)
	for _, s := range []string{fmt.Sprint(key), fmt.Sprintf("%x %#v %d %s", key, key, key, &key), fmt.Sprintf("%+v", held), log.String()} {
		if !strings.Contains(s, "[redacted]") {
			t.Errorf("prints %s", s)
		}
	}
}

func TestKeyIsRefused(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open.key")
	if _, err := LoadOrCreateKey(open); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreateKey(open); err == nil || !strings.Contains(err.Error(), "chmod 600 "+open) {
		t.Errorf("readable by others: %v", err)
	}
	for name, data := range map[string]string{
		"empty":  "",
		"noise":  "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		"public": "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadOrCreateKey(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
		if now, _ := os.ReadFile(path); string(now) != data {
			t.Errorf("%s was overwritten", name)
		}
	}
	if _, err := LoadOrCreateKey(filepath.Join(dir, "missing", "key")); err == nil {
		t.Error("missing folder: no error")
	}
}

func FuzzEntries(f *testing.F) {
	data, err := proto.Marshal(record("birch", "default/a", 1, 1))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seal(data))
	f.Add([]byte{})
	f.Add(seal(make([]byte, 24)))
	f.Fuzz(func(t *testing.T, v []byte) {
		if data, err := unseal(v); err == nil && string(seal(data)) != string(v) {
			t.Fatalf("%x does not come back", v)
		}
		_, _ = decodeMeta(v)
		_, _, _ = decodeValue(v)
	})
}
