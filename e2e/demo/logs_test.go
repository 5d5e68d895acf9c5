package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestLogs keeps the logs of the newest runs and points at what a step logged.
func TestLogs(t *testing.T) {
	base := t.TempDir()
	var dirs []string
	for i := range keptLogs + 2 {
		dir, err := newLogs(base, time.Date(2030, 1, 2, 3, 4, i, 0, time.UTC))
		if err != nil {
			t.Fatal(err)
		}
		dirs = append(dirs, dir)
	}
	got, err := filepath.Glob(filepath.Join(base, "*"))
	if err != nil {
		t.Fatal(err)
	}
	if want := dirs[2:]; !slices.Equal(got, want) {
		t.Errorf("kept %v, want %v", got, want)
	}

	dir := dirs[len(dirs)-1]
	write := func(name, text string) {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	write("a.log", "level=ERROR old\n")
	write("b.log", "level=INFO old\n")
	before := sizes(dir)
	if got := tails(dir, before); got != nil {
		t.Errorf("nothing was logged, yet %v", got)
	}
	write("a.log", "level=INFO new\n")
	write("b.log", "level=WARN new\n")
	want := []string{"tail -c +16 " + filepath.Join(dir, "b.log") + "  # 1 warnings and errors"}
	if got := tails(dir, before); !slices.Equal(got, want) {
		t.Errorf("tails %q, want %q", got, want)
	}
}
