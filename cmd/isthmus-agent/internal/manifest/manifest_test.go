package manifest

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRemove(t *testing.T) {
	for _, x := range []struct {
		name   string
		before func(t *testing.T, path string)
		to     string // end of the name it is kept under; empty: not kept
	}{
		{"as written", func(*testing.T, string) {}, ""},
		{"changed", func(t *testing.T, path string) { write(t, path, "b") }, "/f.saved"},
		{"changed again", func(t *testing.T, path string) { write(t, path, "b"); write(t, path+".saved", "old") }, "/f.saved2"},
		{"gone", func(t *testing.T, path string) { _ = os.Remove(path) }, ""},
	} {
		t.Run(x.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "f")
			var m Manifest
			m.Add(path, []byte("a"))
			write(t, path, "a")
			x.before(t, path)
			saved, err := m.Remove(path)
			if err != nil || (saved != nil) != (x.to != "") {
				t.Fatalf("%v, %v", saved, err)
			}
			if saved != nil {
				if data, err := os.ReadFile(saved.To); err != nil || string(data) != "b" || !strings.HasSuffix(saved.To, x.to) {
					t.Errorf("%s: %q, %v", saved.To, data, err)
				}
			}
			if _, err := os.Lstat(path); err == nil {
				t.Error("it is left")
			}
		})
	}
	other := filepath.Join(t.TempDir(), "other")
	write(t, other, "x")
	if saved, err := new(Manifest).Remove(other); saved != nil || err != nil {
		t.Errorf("%v, %v", saved, err)
	}
	if _, err := os.Lstat(other); err != nil {
		t.Error("a file that was not noted was removed")
	}
}

func TestFolders(t *testing.T) {
	root := t.TempDir()
	old := filepath.Join(root, "old")
	if err := os.Mkdir(old, 0o755); err != nil {
		t.Fatal(err)
	}
	var m Manifest
	deep := filepath.Join(root, "a", "b", "c")
	for _, dir := range []string{deep, old} {
		if err := m.MakeFolder(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(old, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := m.Save(old); err != nil {
		t.Fatal(err)
	}
	again, err := Load(old)
	if err != nil || len(again.Folders) != 4 {
		t.Fatalf("%+v, %v", again, err)
	}
	mine := filepath.Join(root, "a", "mine")
	write(t, mine, "x")
	if err := again.Restore(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(old); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("mode: %v, %v", info, err)
	}
	if _, err := os.Stat(mine); err != nil {
		t.Error("a file of others is gone")
	}
	if _, err := os.Stat(filepath.Join(root, "a", "b")); err == nil {
		t.Error("an empty folder is left")
	}
}

func TestLoad(t *testing.T) {
	for name, text := range map[string]string{
		"not JSON": "x", "too large": strings.Repeat(" ", maxSize+1) + "{}", "relative": `{"files":[{"path":"etc/x","sha256":"00"}]}`,
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, File), text)
		if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), File) {
			t.Errorf("%s: %v", name, err)
		}
	}
	m, err := Load(t.TempDir())
	if err != nil || len(m.Files) != 0 || m.Has("/x") {
		t.Errorf("%+v, %v", m, err)
	}
	m.Add("/x", []byte("a"))
	m.Add("/x", []byte("b"))
	if len(m.Files) != 1 || !m.Has("/x") || m.Files[0].SHA256 != sum([]byte("b")) {
		t.Errorf("%+v", m)
	}
	dir := t.TempDir()
	if err := m.Save(dir); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, File)); err != nil || info.Mode() != fs.FileMode(0o600) {
		t.Errorf("%v, %v", info, err)
	}
}
