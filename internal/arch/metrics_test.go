package arch

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"regexp"
	"slices"
	"strings"
)

// metric is one metric as the source spells it.
type metric struct {
	at, kind, name, help string
	labels               []string
}

var (
	snake      = regexp.MustCompile(`^[a-z][a-z0-9]*(_[a-z0-9]+)*$`)
	otherUnits = regexp.MustCompile(`_(ms|millis|milliseconds|us|micros|nanos|minutes|hours|kb|mb|kilobytes|megabytes|percent)(_|$)`)
	// growing are labels whose values users make, without a limit.
	growing = []string{
		"pod", "service", "host", "hostname", "namespace", "workload", "endpoint", "address", "ip", "sni", "uri", "url", "path",
		"identity", "proxy", "node", "node_id", "name", "domain", "question", "qname", "error", "err", "token", "resource", "revision",
	}
)

// metrics lints the names of all metrics: a prometheus Opts literal is read where it stands, and where its name is an
// argument of a function or closure, at each call of that.
func (r *repo) metrics(t reporter) {
	found := map[string]string{}
	for _, p := range r.ours {
		var files []*source
		for _, s := range p.files {
			if !s.test && !s.generated {
				files = append(files, s)
			}
		}
		reader := &metricReader{complain: t.Errorf, r: r, p: p, makers: map[string]maker{}, constants: constantsOf(files), seen: map[token.Pos]bool{}}
		reader.read(files)
		for _, m := range reader.found {
			for _, wrong := range m.lint() {
				t.Errorf("%s", wrong)
			}
			key := p.path + " " + m.name
			if other := found[key]; other != "" {
				t.Errorf("%s: metric %s is also made at %s", m.at, m.name, other)
			}
			found[key] = m.at
		}
	}
	if len(found) < 20 {
		t.Errorf("only %d metrics were found: the lint no longer sees how they are made", len(found))
	}
}

// lint returns what is wrong with a metric.
func (m metric) lint() (wrong []string) {
	complain := func(format string, args ...any) {
		wrong = append(wrong, fmt.Sprintf("%s: %s %s: ", m.at, cmp.Or(strings.ToLower(m.kind), "metric"), m.name)+fmt.Sprintf(format, args...))
	}
	total := strings.HasSuffix(m.name, "_total")
	if !snake.MatchString(m.name) {
		complain("write it in snake_case")
	}
	if m.kind == "Counter" && !total {
		complain("its name ends in _total")
	}
	if m.kind != "Counter" && total {
		complain("it is no counter, so its name does not end in _total")
	}
	if m.kind == "Histogram" && !strings.HasSuffix(m.name, "_seconds") && !strings.HasSuffix(m.name, "_bytes") {
		complain("its name ends in its unit, _seconds or _bytes")
	}
	if unit := otherUnits.FindString(m.name); unit != "" {
		complain("use base units, seconds and bytes, not %s", strings.Trim(unit, "_"))
	}
	if m.kind == "" {
		complain("it cannot be seen whether it is a counter, a gauge or a histogram")
	}
	if !strings.HasSuffix(m.help, ".") {
		complain("its help is a sentence with a full stop")
	}
	for _, l := range m.labels {
		if slices.Contains(growing, l) {
			complain("label %s grows with users' objects", l)
		}
		if !snake.MatchString(l) {
			complain("label %s: write it in snake_case", l)
		}
	}
	return wrong
}

// maker is a function or closure that makes options out of arguments.
type maker struct {
	name, help int // which arguments
	kind       string
}

type metricReader struct {
	complain  func(format string, args ...any)
	r         *repo
	p         *pkg
	makers    map[string]maker // by name of the function
	constants map[string]ast.Expr
	seen      map[token.Pos]bool
	found     []metric
}

// read goes over the files until no more makers turn up: one may call another.
func (m *metricReader) read(files []*source) {
	for before := -1; before != len(m.makers); {
		before = len(m.makers)
		for _, s := range files {
			var stack []ast.Node
			ast.Inspect(s.File, func(n ast.Node) bool {
				if n == nil {
					stack = stack[:len(stack)-1]
					return false
				}
				m.visit(n, stack)
				stack = append(stack, n)
				return true
			})
		}
	}
}

func (m *metricReader) visit(n ast.Node, stack []ast.Node) {
	switch n := n.(type) {
	case *ast.CompositeLit:
		if on, kind := selector(n.Type); on == "prometheus" && strings.HasSuffix(kind, "Opts") {
			m.literal(n, stack)
		}
	case *ast.CallExpr:
		on, name := selector(n.Fun)
		if on == "prometheus" && name == "NewDesc" && !m.seen[n.Pos()] && !m.r.excepted("metric", m.p.path, name) {
			m.seen[n.Pos()] = true
			m.complain("%s: the name of a metric made by NewDesc cannot be checked: use an Opts literal", m.r.line(n))
		}
		switch f := n.Fun.(type) {
		case *ast.Ident:
			name = f.Name
		case *ast.SelectorExpr:
			name = f.Sel.Name
		}
		if mk, ok := m.makers[name]; ok && len(n.Args) > max(mk.name, mk.help) {
			m.add(n, stack, n.Args[mk.name], n.Args[mk.help], mk.kind)
		}
	}
}

// literal checks the parts of a name that stand in the literal itself.
func (m *metricReader) literal(n *ast.CompositeLit, stack []ast.Node) {
	fields := map[string]ast.Expr{}
	for _, e := range n.Elts {
		if kv, ok := e.(*ast.KeyValueExpr); ok {
			if k, ok := kv.Key.(*ast.Ident); ok {
				fields[k.Name] = kv.Value
			}
		}
	}
	if !m.seen[n.Pos()] {
		namespace, _ := text(fields["Namespace"], m.constants)
		on, sel := selector(fields["Namespace"])
		subsystem, _ := text(fields["Subsystem"], m.constants)
		if inPlugin := m.p.path == "dns/plugin"; inPlugin {
			if on != "plugin" || sel != "Namespace" || subsystem != "isthmus" {
				m.complain("%s: metrics of the CoreDNS plugin have plugin.Namespace and its name as subsystem", m.r.line(n))
			}
		} else if namespace != "isthmus" || subsystem != m.p.Name {
			m.complain("%s: metrics of %s are named isthmus_%s_..., not %s_%s_...", m.r.line(n), m.p.path, m.p.Name, namespace, subsystem)
		}
	}
	m.add(n, stack, fields["Name"], fields["Help"], "")
}

// add takes down a metric when its name is known, else makes the function around it a maker.
func (m *metricReader) add(n ast.Node, stack []ast.Node, name, help ast.Expr, kind string) {
	if kind == "" {
		kind = kindOf(append(slices.Clone(stack), n))
	}
	if value, ok := text(name, m.constants); ok {
		if m.seen[n.Pos()] {
			return
		}
		m.seen[n.Pos()] = true
		helpText, _ := text(help, m.constants)
		m.found = append(m.found, metric{m.r.line(n), kind, value, helpText, labelsOf(append(slices.Clone(stack), n), m.constants)})
		return
	}
	function, params := enclosing(stack)
	i, j := indexOf(params, name), indexOf(params, help)
	if function == "" || i < 0 || j < 0 {
		if !m.seen[n.Pos()] && !m.r.excepted("metric", m.p.path, "") {
			m.complain("%s: the name and help of this metric cannot be read: write them as literals or as arguments of a function", m.r.line(n))
		}
		m.seen[n.Pos()] = true
		return
	}
	m.seen[n.Pos()] = true
	m.makers[function] = maker{i, j, kind}
}

// kindOf looks outward for the type of the metric.
func kindOf(stack []ast.Node) string {
	for i := len(stack) - 1; i >= 0; i-- {
		var name string
		switch n := stack[i].(type) {
		case *ast.CompositeLit:
			_, name = selector(n.Type)
		case *ast.CallExpr:
			switch f := n.Fun.(type) {
			case *ast.SelectorExpr:
				name = strings.TrimPrefix(f.Sel.Name, "New")
			case *ast.Ident:
				name = f.Name
			}
		case *ast.FuncLit, *ast.FuncDecl:
			return ""
		}
		for _, kind := range []string{"Counter", "Gauge", "Histogram", "Summary"} {
			if strings.HasPrefix(name, kind) {
				return kind
			}
		}
	}
	return ""
}

// labelsOf reads the label names of the innermost call that takes some.
func labelsOf(stack []ast.Node, constants map[string]ast.Expr) []string {
	for i := len(stack) - 1; i >= 0; i-- {
		call, ok := stack[i].(*ast.CallExpr)
		if !ok {
			continue
		}
		_, method := selector(call.Fun)
		function, _ := call.Fun.(*ast.Ident)
		if !strings.HasSuffix(method, "Vec") && (function == nil || len(call.Args) <= 2) {
			continue
		}
		var out []string
		for j, a := range call.Args {
			list, isList := a.(*ast.CompositeLit)
			if isList {
				if _, isSlice := list.Type.(*ast.ArrayType); isSlice {
					for _, e := range list.Elts {
						if l, ok := text(e, constants); ok {
							out = append(out, l)
						}
					}
				}
			} else if l, ok := text(a, constants); ok && j >= 2 { // maker(name, help, labels...)
				out = append(out, l)
			}
		}
		return out
	}
	return nil
}

// enclosing returns the name of the function around a node, or of the variable that holds it, and its parameters.
func enclosing(stack []ast.Node) (string, []string) {
	for i := len(stack) - 1; i >= 0; i-- {
		switch f := stack[i].(type) {
		case *ast.FuncDecl:
			return f.Name.Name, paramsOf(f.Type)
		case *ast.FuncLit:
			if a, ok := stack[i-1].(*ast.AssignStmt); ok && len(a.Lhs) == 1 {
				if name, ok := a.Lhs[0].(*ast.Ident); ok {
					return name.Name, paramsOf(f.Type)
				}
			}
			return "", nil
		}
	}
	return "", nil
}

func paramsOf(f *ast.FuncType) []string {
	var out []string
	for _, p := range f.Params.List {
		for _, n := range p.Names {
			out = append(out, n.Name)
		}
	}
	return out
}

func indexOf(params []string, e ast.Expr) int {
	if i, ok := e.(*ast.Ident); ok {
		return slices.Index(params, i.Name)
	}
	return -1
}

func constantsOf(files []*source) map[string]ast.Expr {
	out := map[string]ast.Expr{}
	for _, s := range files {
		for _, d := range s.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.CONST {
				continue
			}
			for _, spec := range g.Specs {
				if v, ok := spec.(*ast.ValueSpec); ok && len(v.Values) == len(v.Names) {
					for i, n := range v.Names {
						out[n.Name] = v.Values[i]
					}
				}
			}
		}
	}
	return out
}
