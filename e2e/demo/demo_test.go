package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/e2e/story"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(func(context.Context) int { return m.Run() })) }

// TestMainJob runs the demo's steps against the built programs. A step that fails does not end the story: later ones say
// what else is wrong.
func TestMainJob(t *testing.T) {
	if os.Getenv("REQUIRE_TOOLS") == "" || testing.Short() {
		t.Skip("takes over a minute and both processors: make e2e runs it, or REQUIRE_TOOLS=1 after make build")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(root, "build", "bin")
	if _, err := os.Stat(filepath.Join(bin, "isthmusd")); err != nil {
		t.Fatal("the programs are not built: run make build")
	}
	if err := lab.Allowed(); err != nil {
		t.Fatal(err)
	}
	world, err := lab.LoadWorld(filepath.Join(root, "e2e", "worlds", "bookstore"))
	if err != nil {
		t.Fatal(err)
	}
	logs := filepath.Join(root, "build", "test-logs")
	if err := os.RemoveAll(logs); err != nil {
		t.Fatal(err)
	}
	l, err := lab.New(lab.Config{World: world, BinDir: bin, LogDir: logs, RunDir: os.Getenv("ISTHMUS_LAB_DIR"), Envoy: envoytest.Path(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	})
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	w := &story.World{Lab: l}
	for _, s := range story.Steps() {
		t.Run(s.Title, func(t *testing.T) {
			seen, err := s.Run(t.Context(), w)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(seen)
		})
	}
}
