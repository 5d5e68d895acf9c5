package arch

import (
	"go/ast"
	"go/token"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// each calls f for every file of ours that a person wrote, tests included.
func (r *repo) each(f func(p *pkg, s *source)) {
	for _, p := range r.ours {
		for _, s := range p.files {
			if !s.generated {
				f(p, s)
			}
		}
	}
}

func (r *repo) line(n ast.Node) string {
	at := r.fset.Position(n.Pos())
	return at.Filename + ":" + strconv.Itoa(at.Line)
}

// pure checks that packages that are meant to be pure are.
func (r *repo) pure(t reporter) {
	r.each(func(p *pkg, s *source) {
		if rule := ruleOf(p.path); s.test || rule == nil || !rule.pure {
			return
		}
		for _, imp := range s.Imports {
			name, _ := strconv.Unquote(imp.Path.Value)
			if matches(impureImports, name) && !r.excepted("pure", p.path, name) {
				t.Errorf("%s: %s is pure, so it may not import %s: what it needs comes in as an argument", r.line(imp), p.path, name)
			}
		}
		ast.Inspect(s.File, func(n ast.Node) bool {
			if g, ok := n.(*ast.GoStmt); ok && !r.excepted("pure", p.path, "go") {
				t.Errorf("%s: %s is pure, so it starts no goroutine", r.line(g), p.path)
			}
			if on, name := selector(n); slices.Contains(impureCalls[on], name) && !r.excepted("pure", p.path, on+"."+name) {
				t.Errorf("%s: %s is pure, so it may not use %s.%s: time and seed come in as arguments", r.line(n), p.path, on, name)
			}
			return true
		})
	})
}

// selector splits X.Sel where X is a plain name, such as that of a package.
func selector(n ast.Node) (on, name string) {
	if s, ok := n.(*ast.SelectorExpr); ok {
		if x, ok := s.X.(*ast.Ident); ok {
			return x.Name, s.Sel.Name
		}
	}
	return "", ""
}

func (r *repo) sizes(t reporter) {
	total := map[string]int{}
	r.each(func(p *pkg, s *source) {
		if s.test {
			return
		}
		total[p.path] += s.lines
		if s.lines > maxFileLines && !r.excepted("size", s.path, "") {
			t.Errorf("%s has %d lines: split it by what it knows, %d is the most", s.path, s.lines, maxFileLines)
		}
	})
	for _, p := range r.ours {
		if total[p.path] > maxPackageLines && !r.excepted("size", p.path, "") {
			t.Errorf("%s has %d lines: %d is the most for a package", p.path, total[p.path], maxPackageLines)
		}
		if slices.Contains(badNames, path.Base(p.path)) && !r.excepted("name", p.path, "") {
			t.Errorf("%s: the name says nothing about what the package knows", p.path)
		}
	}
}

// docs wants a comment on each package and each exported identifier.
func (r *repo) docs(t reporter) {
	described := map[*pkg]bool{}
	r.each(func(p *pkg, s *source) {
		if s.test {
			described[p] = described[p] || s.Doc != nil && len(p.GoFiles) == 0 // a package of tests only
			return
		}
		described[p] = described[p] || s.Doc != nil
		for _, d := range s.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && exportedReceiver(d) && d.Doc == nil && !r.excepted("doc", s.path, d.Name.Name) {
					t.Errorf("%s: %s has no comment", r.line(d), d.Name.Name)
				}
			case *ast.GenDecl:
				r.docsOf(t, s, d)
			}
		}
	})
	for _, p := range r.ours {
		generated := !slices.ContainsFunc(p.files, func(s *source) bool { return !s.generated })
		if !described[p] && !generated && !r.excepted("doc", p.path, "") {
			t.Errorf("%s: no comment says what the package knows and does", p.path)
		}
	}
}

func (r *repo) docsOf(t reporter, s *source, d *ast.GenDecl) {
	for _, spec := range d.Specs {
		switch spec := spec.(type) {
		case *ast.TypeSpec:
			if spec.Name.IsExported() && d.Doc == nil && spec.Doc == nil && spec.Comment == nil && !r.excepted("doc", s.path, spec.Name.Name) {
				t.Errorf("%s: %s has no comment", r.line(spec), spec.Name.Name)
			}
		case *ast.ValueSpec:
			for _, name := range spec.Names {
				if name.IsExported() && d.Doc == nil && spec.Doc == nil && spec.Comment == nil && !r.excepted("doc", s.path, name.Name) {
					t.Errorf("%s: %s has no comment", r.line(spec), name.Name)
				}
			}
		}
	}
}

// exportedReceiver is true for functions and for methods of exported types that are not made to satisfy a well-known
// interface, whose contract is written there.
func exportedReceiver(d *ast.FuncDecl) bool {
	if d.Recv == nil {
		return true
	}
	if slices.Contains([]string{"Error", "String", "Unwrap", "Len", "Less", "Swap"}, d.Name.Name) {
		return false
	}
	receiver := d.Recv.List[0].Type
	for {
		switch x := receiver.(type) {
		case *ast.StarExpr:
			receiver = x.X
		case *ast.IndexExpr:
			receiver = x.X
		case *ast.IndexListExpr:
			receiver = x.X
		case *ast.Ident:
			return x.IsExported()
		default:
			return true
		}
	}
}

// calls looks for printing and for ending the process where neither belongs.
func (r *repo) calls(t reporter) {
	r.each(func(p *pkg, s *source) {
		if s.test || matches(testHelpers, p.path) {
			return
		}
		for _, d := range s.Decls {
			where := s.path
			if f, ok := d.(*ast.FuncDecl); ok {
				where += ":" + f.Name.Name
			}
			ast.Inspect(d, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok {
					return true
				}
				on, name := selector(call.Fun)
				builtin, _ := call.Fun.(*ast.Ident)
				switch {
				case on == "fmt" && strings.HasPrefix(name, "Print") && !matches([]string{"cmd/...", "e2e/...", "bench/..."}, p.path) && !r.excepted("print", where, name):
					t.Errorf("%s: fmt.%s outside cmd, e2e and bench: return it, log it, or take an io.Writer", r.line(call), name)
				case on == "log" && (strings.HasPrefix(name, "Fatal") || strings.HasPrefix(name, "Panic")), on == "os" && name == "Exit",
					builtin != nil && builtin.Name == "panic":
					if what := on + "." + name; p.Name != "main" && !r.excepted("exit", where, strings.TrimSuffix(what, ".")+builtinName(builtin)) {
						t.Errorf("%s: only main ends the process: return an error", r.line(call))
					}
				}
				return true
			})
		}
	})
}

func builtinName(i *ast.Ident) string {
	if i == nil {
		return ""
	}
	return i.Name
}

var unfinished = regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b`)

// comments looks for work put off: what is left to do is an issue, not a comment.
func (r *repo) comments(t reporter) {
	r.each(func(p *pkg, s *source) {
		for _, g := range s.Comments {
			for _, c := range g.List {
				if word := unfinished.FindString(c.Text); word != "" && !r.excepted("todo", s.path, "") {
					t.Errorf("%s: %s: do it or open an issue", r.line(c), word)
				}
			}
		}
	})
}

// text evaluates a string literal, a sum of such, or a constant of the package.
func text(e ast.Expr, constants map[string]ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		s, err := strconv.Unquote(e.Value)
		return s, err == nil && e.Kind == token.STRING
	case *ast.BinaryExpr:
		x, okX := text(e.X, constants)
		y, okY := text(e.Y, constants)
		return x + y, okX && okY && e.Op == token.ADD
	case *ast.Ident:
		if c := constants[e.Name]; c != nil {
			return text(c, nil)
		}
	}
	return "", false
}
