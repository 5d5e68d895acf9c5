package written

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	yamlv3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"
)

// Document is one YAML document of a file.
type Document struct {
	Text  []byte
	first int // line of the file at which text begins
	Line  int // line of the file at which its content begins

	trailing bool // a reader of YAML would take a part for the whole

	root   *yamlv3.Node // parsed when a line is asked for
	parsed bool
}

// Split cuts a file at its document markers, which YAML allows nowhere else at the begin of a line (YAML 1.2.2,
// section 9.1.2). Documents without content are left out.
func Split(data []byte) []*Document {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	var out []*Document
	begin, first, content := 0, 1, 0
	flush := func(end int) {
		if content > 0 {
			out = append(out, &Document{Text: data[begin:end], first: first, Line: content})
		}
	}
	for pos, line := 0, 1; pos < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[pos:], '\n'); i >= 0 {
			end = pos + i + 1
		}
		text := data[pos:end]
		if isMarker(text, "---") || isMarker(text, "...") {
			flush(pos)
			begin, first, content = pos, line, 0
			if text[0] == '.' {
				begin, first = end, line+1
			}
			text = text[3:]
		}
		if t := bytes.TrimSpace(text); content == 0 && len(t) > 0 && t[0] != '#' && text[0] != '%' {
			content = line
		}
		pos = end
	}
	flush(len(data))
	return slices.Concat(apply(out, (*Document).values)...)
}

// values cuts a document that is several JSON values in a row, as programs print them, into one for each: a reader of
// YAML would take the first and drop the others in silence.
func (d *Document) values() []*Document {
	body := d.Text
	if isMarker(body, "---") {
		body = body[3:]
	}
	if t := bytes.TrimLeft(body, " \t\r\n"); len(t) == 0 || t[0] != '{' {
		return []*Document{d}
	}
	var out []*Document
	dec := json.NewDecoder(bytes.NewReader(body))
	for at, line := int64(0), d.first; ; {
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			if err != io.EOF || len(out) < 2 {
				d.trailing = err != io.EOF && len(out) > 0
				return []*Document{d} // YAML in braces, or broken: said as such
			}
			return out
		}
		end := dec.InputOffset()
		text := body[at:end]
		skipped := bytes.Count(text[:len(text)-len(bytes.TrimLeft(text, " \t\r\n"))], []byte("\n"))
		out = append(out, &Document{Text: text, first: line, Line: line + skipped})
		at, line = end, line+bytes.Count(text, []byte("\n"))
	}
}

func apply[T, U any](list []T, f func(T) U) []U {
	out := make([]U, len(list))
	for i, x := range list {
		out[i] = f(x)
	}
	return out
}

func isMarker(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || strings.IndexByte(" \t\r\n", rest[0]) >= 0)
}

// JSON returns the document as JSON. If it does not parse, line is where.
func (d *Document) JSON() (raw []byte, line int, err error) {
	raw, err = yaml.YAMLToJSONStrict(d.Text)
	if err == nil && d.trailing {
		return nil, d.Line, errors.New("something that is not JSON follows a JSON value")
	}
	if err == nil {
		return raw, d.Line, nil
	}
	text, line := d.absolute(err.Error())
	return nil, line, errors.New(text)
}

// absolute rewrites the line numbers in a parser's message to lines of the file, and returns the first of them.
func (d *Document) absolute(message string) (string, int) {
	message = strings.TrimPrefix(message, "error converting YAML to JSON: ")
	message = strings.TrimPrefix(message, "yaml: ")
	message = strings.TrimPrefix(message, "unmarshal errors:\n")
	at := 0
	message = regexp.MustCompile(`line \d+`).ReplaceAllStringFunc(message, func(s string) string {
		n, _ := strconv.Atoi(s[len("line "):])
		n += d.first - 1
		if at == 0 {
			at = n
		}
		return "line " + strconv.Itoa(n)
	})
	if at == 0 {
		at = d.Line
	}
	return Clip(strings.Join(strings.Fields(message), " "), 300), at
}

// LineOf returns the line of the file at which the value with that path begins, or the deepest part of the path that
// the document has; 0 if there is none.
func (d *Document) LineOf(path string) int {
	if !d.parsed {
		d.parsed = true
		var n yamlv3.Node
		if yamlv3.Unmarshal(d.Text, &n) == nil && len(n.Content) > 0 {
			d.root = n.Content[0]
		}
	}
	node, line := d.root, 0
	for _, step := range steps(path) {
		if node != nil && node.Kind == yamlv3.AliasNode {
			node = node.Alias
		}
		child, at := child(node, step)
		if child == nil {
			break
		}
		node, line = child, at
	}
	if line == 0 {
		return 0
	}
	return line + d.first - 1
}

// child returns the value under a key or index, and the line of the key or of the value.
func child(n *yamlv3.Node, step string) (*yamlv3.Node, int) {
	switch {
	case n == nil:
	case n.Kind == yamlv3.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == step {
				return n.Content[i+1], n.Content[i].Line
			}
		}
	case n.Kind == yamlv3.SequenceNode:
		if i, err := strconv.Atoi(step); err == nil && i >= 0 && i < len(n.Content) {
			return n.Content[i], n.Content[i].Line
		}
	}
	return nil, 0
}

// steps cuts a path, spec.http[0].match[1].headers[end-user], into its keys and indexes.
func steps(path string) []string {
	var out []string
	for path != "" {
		if path[0] == '[' {
			key, rest, ok := strings.Cut(path[1:], "]")
			if !ok {
				return out
			}
			out, path = append(out, strings.Trim(key, `"`)), rest
			continue
		}
		path = strings.TrimPrefix(path, ".")
		end := strings.IndexAny(path, ".[")
		if end < 0 {
			end = len(path)
		}
		if end > 0 {
			out = append(out, path[:end])
		} else if path != "" && path[0] == '.' {
			path = path[1:]
		}
		path = path[end:]
	}
	return out
}

// OneLine makes a name fit to be printed: a wrong one may hold anything.
func OneLine(s string) string {
	return Clip(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s), 300)
}

// Clip shortens what is said about users' text.
func Clip(s string, n int) string {
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "") + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
