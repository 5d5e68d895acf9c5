// Package golden keeps test cases in txtar files, input and wanted output in one file, and rewrites the output with
// `go test PACKAGE -update`. It knows nothing of the values it compares: they come as text.
package golden

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// update is the one flag this package adds to the test binaries that import it.
var update = flag.Bool("update", false, "rewrite the wanted output in golden files")

// Case is one txtar file.
type Case struct {
	Name    string // file name without directory and extension
	Comment string // text above the first file, without white space around it

	path    string
	archive *txtar.Archive
	rewrite bool
	changed bool
}

// Cases reads every file that matches pattern, sorted by name. Without a match the test fails. Under -update the files
// are rewritten when t and its subtests have ended.
func Cases(t *testing.T, pattern string) []*Case {
	t.Helper()
	return load(t, pattern, *update)
}

func load(t *testing.T, pattern string, rewrite bool) []*Case {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatalf("golden files %s: %v", pattern, err)
	}
	if len(paths) == 0 {
		t.Fatalf("golden files %s: none found", pattern)
	}
	var cases []*Case
	for _, path := range paths {
		archive, err := txtar.ParseFile(path)
		if err != nil {
			t.Fatalf("golden file %s: %v", path, err)
		}
		c := &Case{
			Name:    strings.TrimSuffix(filepath.Base(path), filepath.Ext(path)),
			Comment: strings.TrimSpace(string(archive.Comment)),
			path:    path,
			archive: archive,
			rewrite: rewrite,
		}
		cases = append(cases, c)
		t.Cleanup(func() {
			if !c.changed {
				return
			}
			if err := os.WriteFile(c.path, txtar.Format(c.archive), 0o644); err != nil {
				t.Errorf("rewrite golden file: %v", err)
			}
		})
	}
	return cases
}

// File returns the content of the file with that name in the case, nil when there is none.
func (c *Case) File(name string) []byte {
	if i := c.index(name); i >= 0 {
		return c.archive.Files[i].Data
	}
	return nil
}

// Names returns the names of the files in the case, in their order.
func (c *Case) Names() []string {
	var names []string
	for _, f := range c.archive.Files {
		names = append(names, f.Name)
	}
	return names
}

// Want fails the test with the first differing line unless got is the content of the file with that name. Under -update
// it takes got as the content. An empty got and an absent file are equal, and got may lack the last newline.
func (c *Case) Want(t *testing.T, name, got string) {
	t.Helper()
	if got != "" && !strings.HasSuffix(got, "\n") {
		got += "\n"
	}
	want := string(c.File(name))
	if got == want {
		return
	}
	if c.rewrite {
		c.set(name, got)
		return
	}
	t.Errorf("%s: %s differs (rewrite with: go test . -update)\n%s", c.path, name, firstDifference(want, got))
}

func (c *Case) set(name, got string) {
	c.changed = true
	i := c.index(name)
	switch {
	case got == "":
		c.archive.Files = slices.Delete(c.archive.Files, i, i+1) // got differs from an empty file: it is there
	case i < 0:
		c.archive.Files = append(c.archive.Files, txtar.File{Name: name, Data: []byte(got)})
	default:
		c.archive.Files[i].Data = []byte(got)
	}
}

func (c *Case) index(name string) int {
	return slices.IndexFunc(c.archive.Files, func(f txtar.File) bool { return f.Name == name })
}

// firstDifference shows the first line that differs, with two lines before and five after it.
func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	at := 0
	for at < len(w) && at < len(g) && w[at] == g[at] {
		at++
	}
	var b strings.Builder
	fmt.Fprintf(&b, "first difference at line %d\n", at+1)
	for _, line := range w[max(0, at-2):at] {
		fmt.Fprintf(&b, "  %s\n", line)
	}
	for _, line := range w[at:min(len(w), at+5)] {
		fmt.Fprintf(&b, "- %s\n", line)
	}
	for _, line := range g[at:min(len(g), at+5)] {
		fmt.Fprintf(&b, "+ %s\n", line)
	}
	return b.String()
}

// ProtoJSON returns ms as a JSON array in the given order, with field names as in the .proto files and stable white
// space. No message gives the empty string.
func ProtoJSON[T proto.Message](t *testing.T, ms []T) string {
	t.Helper()
	if len(ms) == 0 {
		return ""
	}
	var all bytes.Buffer
	for i, m := range ms {
		b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			t.Fatalf("message %d to JSON: %v", i, err)
		}
		all.WriteString(map[bool]string{true: "[", false: ","}[i == 0])
		all.Write(b)
	}
	all.WriteByte(']')
	var out bytes.Buffer
	if err := json.Indent(&out, all.Bytes(), "", "  "); err != nil {
		t.Fatalf("indent JSON: %v", err)
	}
	out.WriteByte('\n')
	return out.String()
}

// Lines returns one line for each value, in the given order.
func Lines[T fmt.Stringer](xs []T) string {
	var b strings.Builder
	for _, x := range xs {
		b.WriteString(x.String())
		b.WriteByte('\n')
	}
	return b.String()
}
