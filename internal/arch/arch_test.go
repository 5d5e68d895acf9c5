package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/isthmus-mesh/isthmus"
	root   = "../.."
)

// pkg is a package as go list describes it, and its parsed files if it is one of ours.
type pkg struct {
	ImportPath, Name          string
	Imports                   []string
	GoFiles, IgnoredGoFiles   []string
	TestGoFiles, XTestGoFiles []string
	TestImports, XTestImports []string
	path                      string // from the root of the module; "" for others' packages
	files                     []*source
}

// source is one Go file.
type source struct {
	path      string // from the root of the module
	lines     int
	test      bool
	generated bool
	*ast.File
}

type repo struct {
	all  map[string]*pkg
	ours []*pkg // sorted by path
	fset *token.FileSet
	used map[int]bool // exceptions
}

// reporter is a test, or what stands in for one.
type reporter interface {
	Errorf(format string, args ...any)
}

func (r *repo) checks() map[string]func(reporter) {
	return map[string]func(reporter){
		"imports": r.imports, "homes": r.homes, "reach": r.reach, "tests": r.tests, "pure": r.pure, "sizes": r.sizes,
		"docs": r.docs, "calls": r.calls, "comments": r.comments, "metrics": r.metrics,
	}
}

// TestRules holds the repository to all rules.
func TestRules(t *testing.T) {
	r, err := load()
	if err != nil {
		t.Fatal(err)
	}
	checks := r.checks()
	for _, name := range slices.Sorted(maps.Keys(checks)) {
		t.Run(name, func(t *testing.T) { checks[name](t) })
	}
	if t.Failed() {
		return
	}
	for i, e := range exceptions {
		if !r.used[i] {
			t.Errorf("rules_test.go: the exception of %s from %s (%s) is needed no longer: remove it", e.where, e.rule, e.what)
		}
	}
}

// load asks go list once for everything, and reads all files of ours: so go test knows what its result depends on.
func load() (*repo, error) {
	cmd := exec.Command("go", "list", "-deps",
		"-json=ImportPath,Name,Imports,GoFiles,IgnoredGoFiles,TestGoFiles,XTestGoFiles,TestImports,XTestImports", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, stderr.String())
	}
	r := &repo{all: map[string]*pkg{}, fset: token.NewFileSet(), used: map[int]bool{}}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		p := &pkg{}
		if err := d.Decode(p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		r.all[p.ImportPath] = p
		if p.path, _ = strings.CutPrefix(p.ImportPath, module+"/"); p.path == p.ImportPath {
			p.path = ""
			continue
		}
		r.ours = append(r.ours, p)
		if err := r.parse(p); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(r.ours, func(a, b *pkg) int { return strings.Compare(a.path, b.path) })
	return r, nil
}

func (r *repo) parse(p *pkg) error {
	for _, name := range slices.Concat(p.GoFiles, p.IgnoredGoFiles, p.TestGoFiles, p.XTestGoFiles) {
		file := path.Join(p.path, name)
		data, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(file)))
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(r.fset, file, data, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		p.files = append(p.files, &source{
			path: file, lines: bytes.Count(data, []byte("\n")), generated: ast.IsGenerated(f), File: f,
			test: strings.HasSuffix(name, "_test.go"),
		})
	}
	return nil
}

// excepted looks for an exception; where may be a package, a file or file:function.
func (r *repo) excepted(rule, where, what string) bool {
	for i, e := range exceptions {
		if e.rule == rule && e.where == where && (e.what == "" || matches([]string{e.what}, what)) {
			r.used[i] = true
			return true
		}
	}
	return false
}

// matches reports whether an import path is one of the patterns; p/... takes in p itself.
func matches(patterns []string, path string) bool {
	for _, p := range patterns {
		prefix, all := strings.CutSuffix(p, "...")
		if p == path || p == "..." || all && strings.HasPrefix(path+"/", prefix) {
			return true
		}
	}
	return false
}

// ruleOf returns the rule of a package. Helpers of tests come first: they stand inside folders with another rule.
func ruleOf(path string) *rule {
	for _, exact := range []bool{true, false} {
		for i := range rules {
			if exact && slices.Contains(rules[i].pkgs, path) || !exact && matches(rules[i].pkgs, path) {
				return &rules[i]
			}
		}
	}
	return nil
}

// chain returns the shortest way from one of the programs to the import, or only the import where none leads to it.
func (r *repo) chain(from, to string) string {
	var starts []string
	for _, p := range r.ours {
		if p.Name == "main" {
			starts = append(starts, p.ImportPath)
		}
	}
	way := r.way(starts, func(name string) bool { return name == from })
	if way == nil {
		way = []string{from}
	}
	return short(append(way, to))
}

func short(way []string) string {
	return strings.ReplaceAll(strings.Join(way, " -> "), module+"/", "")
}

// way returns the shortest chain of imports from one of the packages to one that is looked for, nil when there is none.
func (r *repo) way(from []string, found func(string) bool) []string {
	before := map[string]string{}
	queue := slices.Clone(from)
	for _, s := range from {
		before[s] = ""
	}
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		if found(at) {
			var way []string
			for ; at != ""; at = before[at] {
				way = append(way, at)
			}
			slices.Reverse(way)
			return way
		}
		if p := r.all[at]; p != nil {
			for _, next := range p.Imports {
				if _, seen := before[next]; !seen {
					before[next] = at
					queue = append(queue, next)
				}
			}
		}
	}
	return nil
}

func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// imports checks the table of STYLE: what each package may import.
func (r *repo) imports(t reporter) {
	for _, p := range r.ours {
		rule := ruleOf(p.path)
		if rule == nil {
			t.Errorf("%s: no rule says what it may import; add one to internal/arch/rules_test.go", p.path)
			continue
		}
		for _, imp := range p.Imports {
			mine, isOurs := strings.CutPrefix(imp, module+"/")
			switch {
			case isOurs && matches(rule.ours, mine), !isOurs && matches(rule.others, imp), standard(imp), r.excepted("import", p.path, mine):
			case isOurs && len(rule.ours) == 0:
				t.Errorf("%s imports %s: it may import nothing of ours\n\t%s", p.path, mine, r.chain(p.ImportPath, imp))
			case isOurs:
				t.Errorf("%s imports %s: of ours it may import only %s\n\t%s", p.path, mine, strings.Join(rule.ours, ", "), r.chain(p.ImportPath, imp))
			default:
				t.Errorf("%s imports %s: of other modules it may import only %s\n\t%s", p.path, imp, strings.Join(rule.others, ", "), r.chain(p.ImportPath, imp))
			}
			if matches(testHelpers, mine) && !matches(testHelpers, p.path) {
				t.Errorf("%s imports %s: only tests may\n\t%s", p.path, mine, r.chain(p.ImportPath, imp))
			}
		}
	}
}

func (r *repo) homes(t reporter) {
	for _, p := range r.ours {
		for _, imp := range p.Imports {
			for _, h := range homes {
				if matches([]string{h.module}, imp) && !matches(h.only, p.path) && !r.excepted("home", p.path, imp) {
					t.Errorf("%s imports %s: only %s may\n\t%s", p.path, imp, strings.Join(h.only, " and "), r.chain(p.ImportPath, imp))
				}
			}
		}
	}
}

func (r *repo) reach(t reporter) {
	for _, u := range unreachable {
		for _, p := range r.ours {
			if !matches(u.from, p.path) || matches(testHelpers, p.path) {
				continue
			}
			for _, never := range u.never { // one line for each pattern, with the shortest way
				way := r.way([]string{p.ImportPath}, func(name string) bool { return matches([]string{never}, name) })
				if len(way) > 0 && !r.excepted("reach", p.path, never) {
					t.Errorf("%s reaches %s: %s\n\t%s", p.path, way[len(way)-1], u.why, short(way))
				}
			}
		}
	}
}

// tests checks what tests import: they may use pure packages and helpers, and never the end-to-end tests; those of
// programs may put all parts together.
func (r *repo) tests(t reporter) {
	for _, p := range r.ours {
		rule := ruleOf(p.path)
		if rule == nil {
			continue
		}
		may := join(rule.ours, p.path)
		if p.path != "discovery/mesh" {
			may = join(may, append(append(purePackages, testHelpers...), "internal/...", "api/...", "discovery/config", "discovery/gatewayapi", "discovery/store", "discovery/xds")...)
		}
		for _, imp := range append(p.TestImports, p.XTestImports...) {
			if mine, isOurs := strings.CutPrefix(imp, module+"/"); isOurs && !matches(may, mine) && !r.excepted("import", p.path, mine) {
				t.Errorf("a test of %s imports %s: it may import what the package may, pure packages, test helpers, discovery/config, discovery/gatewayapi, discovery/store and discovery/xds", p.path, mine)
			}
		}
	}
}
