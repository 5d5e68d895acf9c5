// Package validate checks Kubernetes and Istio objects in files, without a cluster: each object by itself and all of
// them together, with the code that isthmusd uses.
package validate

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/refs"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/gatewayapi"
	"github.com/isthmus-mesh/isthmus/discovery/lint"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Limits of what is read.
const (
	MaxFile  = 16 << 20 // bytes of one file
	MaxFiles = 20_000
)

// Severity says whether a finding makes the whole invalid.
type Severity string

// The severities. A warning is about what is left unused or unresolved: it may be right once other objects are there.
const (
	Error   Severity = "error"
	Warning Severity = "warning"
)

// Finding is one thing that is wrong.
type Finding struct {
	File     string   `json:"file,omitempty"`
	Line     int      `json:"line,omitempty"` // from 1; 0 when unknown
	Severity Severity `json:"severity"`
	Object   string   `json:"object"` // KIND/NAMESPACE/NAME
	Field    string   `json:"field,omitempty"`
	Reason   string   `json:"reason"`
	Message  string   `json:"message"`
	Remedy   string   `json:"remedy,omitempty"`
}

// String is the finding as a line that editors can follow.
func (f Finding) String() string {
	s := ""
	if f.File != "" {
		s = f.File + ":"
		if f.Line > 0 {
			s += strconv.Itoa(f.Line) + ":"
		}
		s += " "
	}
	s += string(f.Severity) + ": " + f.Object
	if f.Field != "" {
		s += " " + f.Field
	}
	s += ": " + f.Reason + ": " + f.Message
	if f.Remedy != "" {
		s += "; " + f.Remedy
	}
	return s
}

// Report is what a look at some files found.
type Report struct {
	Files    int       `json:"files"`
	Errors   int       `json:"errors"`
	Warnings int       `json:"warnings"`
	Findings []Finding `json:"findings"` // by file and line; never null
}

// File is one file's name and content.
type File struct {
	Name string
	Data []byte
}

// Read reads files, folders (all .yaml, .yml and .json below) and, for "-", in. Files are returned by name, each once.
func Read(paths []string, in io.Reader) ([]File, error) {
	byName := map[string][]byte{}
	add := func(name string, r io.Reader) error {
		data, err := io.ReadAll(io.LimitReader(r, MaxFile+1))
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		if len(data) > MaxFile {
			return diag.Hint(fmt.Errorf("read %s: it is over %d MiB", name, MaxFile>>20), "split it")
		}
		if byName[name] = data; len(byName) > MaxFiles {
			return diag.Hint(fmt.Errorf("over %d files", MaxFiles), "name a smaller folder")
		}
		return nil
	}
	open := func(path string) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return add(path, f)
	}
	for _, p := range paths {
		if p == "-" {
			if err := add("-", in); err != nil {
				return nil, err
			}
			continue
		}
		info, err := os.Stat(p)
		if err != nil {
			return nil, diag.Hint(err, "name a file, a folder, or - for standard input")
		}
		if !info.IsDir() {
			if err := open(p); err != nil {
				return nil, err
			}
			continue
		}
		found := false
		err = filepath.WalkDir(p, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if name := d.Name(); d.IsDir() && path != p && strings.HasPrefix(name, ".") {
				return fs.SkipDir
			}
			if !d.IsDir() && isConfig(path) {
				found = true
				return open(path)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		if !found {
			return nil, diag.Hint(fmt.Errorf("%s: no .yaml, .yml or .json in it", p), "name the folder with the objects")
		}
	}
	var files []File
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		files = append(files, File{name, byName[name]})
	}
	if len(files) == 0 {
		return nil, diag.Hint(errors.New("nothing to read"), "-f FILE, -f FOLDER or -f -")
	}
	return files, nil
}

func isConfig(name string) bool {
	return slices.Contains([]string{".yaml", ".yml", ".json"}, strings.ToLower(filepath.Ext(name)))
}

// Inputs decodes files as a source of isthmusd would, with what is wrong with each object by itself.
func Inputs(files []File) (inputs map[string]mesh.Input, problems []mesh.Problem) {
	o := config.Options{Namespaces: map[string]map[string]string{}, Nodes: map[string]config.Node{}}
	byName := slices.SortedFunc(slices.Values(files), func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	for _, f := range slices.Backward(byName) { // of two files that declare the same one the first by name counts
		maps.Copy(o.Namespaces, config.Namespaces(f.Data))
		maps.Copy(o.Nodes, config.Nodes(f.Data))
	}
	inputs = make(map[string]mesh.Input, len(files))
	for _, f := range byName {
		in, p := config.Decode(f.Name, f.Data, o)
		inputs[f.Name], problems = in, append(problems, p...)
	}
	return inputs, problems
}

// Local is a cluster without peers and gateways, that files are looked at as.
func Local(name string) *mesh.Cluster {
	return &mesh.Cluster{ID: mesh.ClusterID(name), TrustDomain: mesh.TrustDomain("cluster.local"), Network: mesh.NetworkID("")}
}

// Check finds what is wrong with the objects of some files. It is pure.
func Check(files []File) Report {
	r := Report{Files: len(files), Findings: []Finding{}}
	inputs, problems := Inputs(files)
	for _, p := range problems {
		r.add(p, severityAlone(p.Reason))
	}
	cfg := store.DefaultConfig(Local("local"))
	cfg.Check, cfg.Derive = refs.Check, gatewayapi.Derive
	snap := store.Once(cfg, inputs)
	lines := map[string]*config.Locator{}
	for _, p := range slices.Concat(snap.Problems, lint.Routes(snap.VirtualServices)) {
		line := 0 // where the field is, better than where the object begins
		if i := strings.LastIndexByte(p.Object.Source, ':'); i > 0 {
			line = locate(lines, files, p.Object.Source[:i]).Line(p.Object, p.Field)
		}
		if r.add(p, severityTogether(p.Reason)); line > 0 {
			r.Findings[len(r.Findings)-1].Line = line
		}
	}
	slices.SortStableFunc(r.Findings, func(a, b Finding) int {
		return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), strings.Compare(a.String(), b.String()))
	})
	r.Findings = slices.Compact(r.Findings)
	for _, f := range r.Findings {
		if f.Severity == Error {
			r.Errors++
		} else {
			r.Warnings++
		}
	}
	return r
}

// locate reads a file's lines once.
func locate(lines map[string]*config.Locator, files []File, name string) *config.Locator {
	if lines[name] == nil {
		lines[name] = &config.Locator{}
		if i := slices.IndexFunc(files, func(f File) bool { return f.Name == name }); i >= 0 {
			lines[name] = config.NewLocator(name, files[i].Data)
		}
	}
	return lines[name]
}

// severityAlone: what is not honoured does no harm but to those who rely on it; all else leaves the object out.
func severityAlone(reason string) Severity {
	if reason == written.ReasonUnsupported {
		return Warning
	}
	return Error
}

// severityTogether: an object that is there twice is wrong for sure; what another names may yet come.
func severityTogether(reason string) Severity {
	if reason == written.ReasonDuplicate {
		return Error
	}
	return Warning
}

var atLine = regexp.MustCompile(`^line (\d+): `)

func (r *Report) add(p mesh.Problem, s Severity) {
	f := Finding{Severity: s, Field: p.Field, Reason: p.Reason, Message: p.Message, Remedy: p.Remedy}
	source := p.Object.Source
	if i := strings.LastIndexByte(source, ':'); i > 0 {
		if n, err := strconv.Atoi(source[i+1:]); err == nil {
			source, f.Line = source[:i], n
		}
	}
	f.File = source
	p.Object.Source = ""
	f.Object = p.Object.String()
	if m := atLine.FindStringSubmatch(f.Message); m != nil {
		f.Line, _ = strconv.Atoi(m[1])
		f.Message = f.Message[len(m[0]):]
	}
	r.Findings = append(r.Findings, f)
}
