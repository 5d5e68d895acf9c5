package validate

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestSamples: objects as the guides of Istio have users write them, in all versions, are found to be right.
func TestSamples(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, version := range []string{"v1", "v1beta1", "v1alpha3", ""} {
			text := string(data)
			if version != "" {
				for _, old := range []string{"v1", "v1beta1", "v1alpha3"} {
					text = strings.ReplaceAll(text, "networking.istio.io/"+old+"\n", "networking.istio.io/"+version+"\n")
				}
			}
			for _, ending := range []string{"\n", "\r\n"} {
				r := Check([]File{{name, []byte(strings.ReplaceAll(text, "\n", ending))}})
				for _, f := range r.Findings {
					t.Errorf("%s as %q: %v", name, version, f)
				}
			}
		}
	}
}

// TestMany: the time for a file grows with its size, not with the square of it.
func TestMany(t *testing.T) {
	var text strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&text, "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: x%d}\nspec: {host: a%d}\n", i, i)
	}
	start := time.Now()
	if r := Check([]File{{"a.yaml", []byte(text.String())}}); r.Warnings != 5000 || r.Findings[4999].Line != 25000 {
		t.Errorf("%d warnings, the last %v", r.Warnings, r.Findings[len(r.Findings)-1])
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("5,000 objects took %s", d)
	}
}
