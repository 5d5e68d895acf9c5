package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
	"github.com/isthmus-mesh/isthmus/e2e/story"
)

func TestMain(m *testing.M) { os.Exit(lab.Main(func(context.Context) int { return m.Run() })) }

// TestMainJob runs the demo's steps against the built programs. A step that fails does not end the story: later ones say
// what else is wrong.
func TestMainJob(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(root, "build", "bin")
	if _, err := os.Stat(filepath.Join(bin, "isthmusd")); err != nil || testing.Short() {
		if os.Getenv("REQUIRE_TOOLS") != "" {
			t.Fatal("the programs are not built: run make build")
		}
		t.Skip("the programs are not built (make build), or -short")
	}
	if err := lab.Allowed(); err != nil {
		if os.Getenv("REQUIRE_TOOLS") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	world, err := lab.LoadWorld(filepath.Join(root, "e2e", "worlds", "bookstore"))
	if err != nil {
		t.Fatal(err)
	}
	logs := filepath.Join(root, "build", "test-logs")
	if err := os.RemoveAll(logs); err != nil {
		t.Fatal(err)
	}
	l, err := lab.New(lab.Config{World: world, BinDir: bin, LogDir: logs})
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
