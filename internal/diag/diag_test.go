package diag

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"
)

func TestHint(t *testing.T) {
	missing := Hint(fs.ErrNotExist, "create %s", "config.yaml")
	for _, c := range []struct {
		name, hint, printed string
		err                 error
	}{
		{"no hint", "", "isthmus: plain\n", errors.New("plain")},
		{"a hint", "create config.yaml", "isthmus: file does not exist\n  hint: create config.yaml\n", missing},
		{"kept when wrapped", "create config.yaml", "isthmus: start: file does not exist\n  hint: create config.yaml\n", fmt.Errorf("start: %w", missing)},
		{"the last one wins", "run isthmus init", "isthmus: file does not exist\n  hint: run isthmus init\n", Hint(missing, "run isthmus init")},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := HintOf(c.err); got != c.hint {
				t.Errorf("hint %q, want %q", got, c.hint)
			}
			var out strings.Builder
			if Print(&out, "isthmus", c.err); out.String() != c.printed {
				t.Errorf("printed %q, want %q", out.String(), c.printed)
			}
		})
	}
	if !errors.Is(missing, fs.ErrNotExist) {
		t.Error("a hint hides what the error is")
	}
	if Hint(nil, "nothing to do") != nil {
		t.Error("a hint made an error of nil")
	}
}
