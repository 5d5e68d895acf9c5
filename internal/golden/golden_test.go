package golden

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
)

func TestExample(t *testing.T) {
	for _, c := range Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			if c.Comment != "A comment, for options." {
				t.Errorf("comment %q", c.Comment)
			}
			lines := strings.Fields(string(c.File("in.txt")))
			slices.Sort(lines)
			c.Want(t, "out.txt", strings.Join(lines, "\n"))
			c.Want(t, "absent.txt", "")
			if got := c.File("absent.txt"); got != nil {
				t.Errorf("absent file has content %q", got)
			}
		})
	}
}

func TestUpdate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "case.txtar")
	if err := os.WriteFile(path, []byte("note\n-- in --\nx\n-- out --\nold\n-- gone --\nold\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Run("rewrite", func(t *testing.T) {
		for _, c := range load(t, path, true) {
			c.Want(t, "out", "new")
			c.Want(t, "gone", "")
			c.Want(t, "more", "added\n")
		}
	})
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := "note\n-- in --\nx\n-- out --\nnew\n-- more --\nadded\n"; string(got) != want {
		t.Errorf("rewritten file:\n%s\nwant:\n%s", got, want)
	}
}

func TestFirstDifference(t *testing.T) {
	got := firstDifference("a\nb\nc\n", "a\nx\nc\n")
	if !strings.Contains(got, "line 2") || !strings.Contains(got, "- b") || !strings.Contains(got, "+ x") {
		t.Errorf("difference shown as\n%s", got)
	}
}

func TestProtoJSON(t *testing.T) {
	got := ProtoJSON(t, []*durationpb.Duration{durationpb.New(time.Second), durationpb.New(2 * time.Second)})
	if want := "[\n  \"1s\",\n  \"2s\"\n]\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := ProtoJSON[*durationpb.Duration](t, nil); got != "" {
		t.Errorf("no message gives %q", got)
	}
}

func TestLines(t *testing.T) {
	if got := Lines([]time.Duration{time.Second, time.Minute}); got != "1s\n1m0s\n" {
		t.Errorf("got %q", got)
	}
}
