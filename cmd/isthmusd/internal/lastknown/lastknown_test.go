package lastknown

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
)

func open(t *testing.T, dir, secrets string) *Store {
	t.Helper()
	return Open(Config{Dir: dir, Secrets: secrets, Log: slog.New(slog.DiscardHandler)})
}

func text(s string) func(io.Writer) error {
	return func(w io.Writer) error { _, err := io.WriteString(w, s); return err }
}

func TestFile(t *testing.T) {
	d, err := openFolder(filepath.Join(t.TempDir(), "a", "b"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.read("x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	at := time.Unix(1790000000, 7)
	for _, content := range []string{"", "one", strings.Repeat("two", 1<<20)} {
		if err := d.write("x", at, text(content)); err != nil {
			t.Fatal(err)
		}
		r, when, err := d.read("x")
		if err != nil || !when.Equal(at) {
			t.Fatalf("%v, %v", when, err)
		}
		if got, err := io.ReadAll(r); err != nil || string(got) != content {
			t.Errorf("%d bytes are %d, %v", len(content), len(got), err)
		}
	}
	for path, want := range map[string]fs.FileMode{d.path: 0o700, filepath.Join(d.path, "x"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	failed := errors.New("failed")
	if err := d.write("x", at, func(w io.Writer) error { _, _ = w.Write([]byte("half")); return failed }); !errors.Is(err, failed) {
		t.Errorf("%v", err)
	}
	if _, _, err := d.read("x"); err != nil {
		t.Errorf("a write that failed broke what was there: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(d.path, ".new-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestFileTooLarge: neither what does not compress nor what does is written without a limit.
func TestFileTooLarge(t *testing.T) {
	d, err := openFolder(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	for what, block := range map[string][]byte{"noise": noise, "zeroes": make([]byte, 1<<20)} {
		err := d.write("x", time.Now(), func(w io.Writer) error {
			for range maxUnpacked>>20 + 1 {
				if _, err := w.Write(block); err != nil {
					return err
				}
			}
			return nil
		})
		if !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestDamaged breaks a file in every way that a disk or another version does: it is refused, and never read in part.
func TestDamaged(t *testing.T) {
	d, err := openFolder(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.write("x", time.Now(), text("some content that is compressed")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(d.path, "x")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := unseal("y", good); !errors.Is(err, ErrCorrupt) {
		t.Errorf("under another name: %v", err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		if _, _, err := unseal("x", bad); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
			t.Fatalf("byte %d: %v", i, err)
		}
		if _, _, err := unseal("x", good[:i]); err == nil {
			t.Fatalf("cut at %d", i)
		}
	}
	newer := bytes.Clone(good)
	newer[11]++
	if _, _, err := unseal("x", newer); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer one: %v", err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.read("x"); !errors.Is(err, ErrOpen) {
		t.Errorf("readable by others: %v", err)
	}
	if err := errors.Join(os.Remove(path), os.Symlink("/etc/passwd", path)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.read("x"); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a link: %v", err)
	}
}

func FuzzUnseal(f *testing.F) {
	d, err := openFolder(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	if err := d.write("objects-a", time.Now(), text(`{"cluster":"a","server":"s"}{"kind":"pods","key":"a/b","body":{}}`)); err != nil {
		f.Fatal(err)
	}
	good, err := os.ReadFile(filepath.Join(d.path, "objects-a"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:headerSize])
	f.Fuzz(func(t *testing.T, data []byte) {
		r, _, err := unseal("objects-a", data)
		if err == nil && !bytes.Equal(data, good) {
			t.Error("another file is taken")
		}
		if err == nil {
			if _, err := decodeObjects(r, "a", "s"); err != nil {
				t.Error(err)
			}
		}
		_, _ = decodeObjects(bytes.NewReader(data), "a", "s")
	})
}

// TestSecrets: keys are kept where the setting and the file system allow it, and nowhere else.
func TestSecrets(t *testing.T) {
	disk := t.TempDir()
	memory, err := os.MkdirTemp("/dev/shm", "lastknown")
	if err != nil {
		t.Skip("no file system in memory: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(memory) })
	for _, c := range []struct {
		dir, secrets string
		kept         bool
	}{{disk, Memory, false}, {disk, Always, true}, {disk, Never, false}, {memory, Memory, true}, {memory, Always, true}, {memory, Never, false}, {"", Always, false}} {
		s := open(t, c.dir, c.secrets)
		if kept, why := s.KeepsSecrets(); kept != c.kept || kept != (why == "") {
			t.Errorf("%s in %s: %v, %q", c.secrets, c.dir, kept, why)
		}
		s.SaveKeys("a key")
		var got string
		if _, ok := s.LoadKeys(&got); ok != c.kept || c.kept && got != "a key" {
			t.Errorf("%s in %s: kept %v, %q", c.secrets, c.dir, ok, got)
		}
	}
	if s := open(t, disk, Always); s != nil {
		s.SaveKeys("old")
	}
	open(t, disk, Never)
	if _, err := os.Stat(filepath.Join(disk, keysFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("keys stay on disk when they are not to be kept any more: %v", err)
	}
}

// told is a Sink.
type told map[string]mesh.Input

func (s told) Report(key string, in mesh.Input) { s[key] = in }
func (s told) Forget(key string)                { delete(s, key) }
func (s told) Synced()                          {}

// TestProblems: what cannot be used is named with its remedy, until it is written anew.
func TestProblems(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Always)
	sink := told{}
	if err := errors.Join(os.WriteFile(filepath.Join(dir, keysFile), []byte("rubbish"), 0o600), os.WriteFile(filepath.Join(dir, "objects-a"), []byte("rubbish"), 0o600)); err != nil {
		t.Fatal(err)
	}
	var v string
	if _, ok := s.LoadKeys(&v); ok {
		t.Error("rubbish is taken")
	}
	if objects, _ := s.Load("a", "s"); len(objects) > 0 {
		t.Error("rubbish is taken")
	}
	if objects, _ := s.Load("b", "s"); len(objects) > 0 {
		t.Error("objects of a cluster that was never read")
	}
	s.Report(sink)
	for _, name := range []string{keysFile, "objects-a"} {
		p := sink[name].Problems
		if len(p) != 1 || p[0].Reason != ReasonUnusable || p[0].Remedy == "" || !strings.Contains(p[0].Message, ErrCorrupt.Error()) {
			t.Errorf("%s: %v", name, p)
		}
	}
	if len(sink) != 2 {
		t.Errorf("%v", sink)
	}
	s.SaveKeys("good")
	if len(sink[keysFile].Problems) > 0 {
		t.Errorf("%v", sink[keysFile])
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if p := open(t, filepath.Join(file, "x"), Always).Problems(); len(p) != 1 || p[0].Remedy == "" {
		t.Errorf("a folder that cannot be: %v", p)
	}
}

func TestObjects(t *testing.T) {
	dir := t.TempDir()
	for _, secrets := range []string{Always, Never} {
		k := keeper{Store: open(t, dir, secrets)}
		known := kube.Known{Cluster: "a", Server: "s", At: time.Unix(5, 0), Objects: func() iter.Seq2[kube.Object, error] {
			return func(yield func(kube.Object, error) bool) {
				for i := range 3 {
					if !yield(kube.Object{Kind: "pods", Key: fmt.Sprint("a/", i), Body: []byte(`"<&>"`), Secret: i == 1}, nil) {
						return
					}
				}
			}
		}}
		if !k.write("objects-a", known.At, func(w io.Writer) error { return k.encode(w, known) }) {
			t.Fatal(k.Problems())
		}
		got, at := k.Load("a", "s")
		want := 3
		if secrets == Never {
			want = 2
		}
		if len(got) != want || !at.Equal(known.At) || string(got[0].Body) != `"<&>"` {
			t.Errorf("%s: %v, %v", secrets, got, at)
		}
		if got, _ := k.Load("a", "elsewhere"); len(got) > 0 {
			t.Error("objects of another API server are taken")
		}
		k.forget([]kube.Known{{Cluster: "b"}})
		if got, _ := k.Load("a", "s"); len(got) > 0 {
			t.Error("objects of a cluster that is read no more stay")
		}
	}
}
