// Package stub edits the configuration of a cluster's own DNS so that questions about the mesh's names go to Isthmus,
// and takes that out again. It knows texts: CoreDNS's Corefile and kube-dns's stubDomains; no API server.
package stub

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// The lines that what is ours stands between. The second form of the first one says that the line break before it is ours, too.
const (
	begin      = "# isthmus: begin. `isthmus dns stub --remove` takes these lines out."
	beginBreak = "# isthmus: begin, on a line of its own. `isthmus dns stub --remove` takes these lines out."
	end        = "# isthmus: end."
)

// Add returns the Corefile with one server block for each zone that forwards to the address of Isthmus's DNS, at its
// end. What is there already is replaced, all else stays byte for byte. It is an error when another block serves one
// of the zones, and when the file is one of a CoreDNS too old for it.
func Add(corefile string, zones []string, to netip.Addr) (string, error) {
	rest, err := Remove(corefile)
	if err != nil {
		return "", err
	}
	blocks, err := scan(rest)
	if err != nil {
		return "", err
	}
	for _, b := range blocks {
		for _, z := range zones {
			if slices.ContainsFunc(b.keys, func(k string) bool { return zoneOf(k) == zoneOf(z) }) {
				return "", diag.Hint(fmt.Errorf("corefile line %d: zone %s has a server block already", b.line, z),
					"remove that block, or leave the zone to it: install --skip-dns")
			}
		}
		if line := b.plugins["proxy"]; line > 0 {
			return "", diag.Hint(fmt.Errorf("corefile line %d: plugin proxy is gone since CoreDNS 1.5, so this CoreDNS is older or cannot start", line),
				"upgrade CoreDNS and write forward in place of proxy, then run isthmus dns stub --add")
		}
	}
	var out strings.Builder
	out.WriteString(rest)
	first := begin
	if rest != "" && !strings.HasSuffix(rest, "\n") {
		out.WriteString("\n")
		first = beginBreak
	}
	out.WriteString(first + "\n")
	for _, z := range zones {
		fmt.Fprintf(&out, "%s:53 {\n    errors\n    cache 1\n    forward . %s\n}\n", z, to)
	}
	out.WriteString(end + "\n")
	return out.String(), nil
}

// Remove returns the Corefile without what Add put there. It is an error when only one of the two lines that enclose
// it is left.
func Remove(corefile string) (string, error) {
	for {
		from, length, broken := find(corefile)
		if from < 0 {
			if strings.Contains(corefile, "\n"+end) || strings.HasPrefix(corefile, end) {
				return "", cut(end, begin)
			}
			return corefile, nil
		}
		rest := corefile[from+length:]
		stop := lineAt(rest, end)
		if stop < 0 {
			return "", cut(begin, end)
		}
		after := strings.TrimPrefix(rest[stop+len(end):], "\n")
		before := corefile[:from]
		if broken && after == "" {
			before = strings.TrimSuffix(before, "\n")
		}
		corefile = before + after
	}
}

func cut(there, missing string) error {
	return diag.Hint(fmt.Errorf("corefile: the line %q is there, the line %q is not", there, missing),
		"someone has edited between them: remove what is left of these blocks by hand")
}

// find returns where the first line that begins our part starts and how long it is.
func find(text string) (from, length int, broken bool) {
	a, b := lineAt(text, begin), lineAt(text, beginBreak)
	if b >= 0 && (a < 0 || b < a) {
		return b, len(beginBreak), true
	}
	return a, len(begin), false
}

// lineAt returns where the line stands in the text, whole, or -1.
func lineAt(text, line string) int {
	for at := 0; ; {
		i := strings.Index(text[at:], line)
		if i < 0 {
			return -1
		}
		i += at
		after := text[i+len(line):]
		if (i == 0 || text[i-1] == '\n') && (after == "" || after[0] == '\n') {
			return i
		}
		at = i + 1
	}
}

// Has reports whether the Corefile has what Add puts there.
func Has(corefile string) bool {
	from, _, _ := find(corefile)
	return from >= 0
}

// Reloads reports whether CoreDNS takes a changed Corefile by itself.
func Reloads(corefile string) bool {
	blocks, err := scan(corefile)
	return err == nil && slices.ContainsFunc(blocks, func(b block) bool { return b.plugins["reload"] > 0 })
}

// zoneOf returns the zone of a server block's key, [SCHEME://]ZONE[:PORT], "" where it listens beside DNS's port.
func zoneOf(key string) string {
	if scheme, rest, ok := strings.Cut(key, "://"); ok {
		if scheme != "dns" {
			return ""
		}
		key = rest
	}
	if zone, port, ok := strings.Cut(key, ":"); ok {
		if port != "53" {
			return ""
		}
		key = zone
	}
	return strings.ToLower(strings.TrimSuffix(key, "."))
}

// block is one server block: its keys, the line it begins at, and the lines of its plugins.
type block struct {
	keys    []string
	line    int
	plugins map[string]int
}

var errOpen = errors.New("corefile: a block is not closed")

// scan reads the outline of a Corefile. Snippets, in round brackets, count as blocks.
func scan(text string) ([]block, error) {
	var out []block
	depth, line, first := 0, 0, true
	var keys []string
	for raw := range strings.Lines(text) {
		line++
		words, err := split(raw)
		if err != nil {
			return nil, fmt.Errorf("corefile line %d: %w", line, err)
		}
		for i, w := range words {
			switch {
			case w == "{":
				if depth == 0 {
					out = append(out, block{keys: keys, line: line, plugins: map[string]int{}})
					keys = nil
				}
				depth++
				first = true
				continue
			case w == "}":
				if depth == 0 {
					return nil, fmt.Errorf("corefile line %d: a block is closed that was not opened", line)
				}
				depth--
			case depth == 0:
				keys = append(keys, strings.TrimSuffix(w, ","))
			case depth == 1 && (i == 0 || first):
				out[len(out)-1].plugins[w] = line
			}
			first = false
		}
		first = true
		if depth == 0 && len(keys) > 0 && keys[0] == "import" {
			keys = nil
		}
	}
	if depth > 0 {
		return nil, errOpen
	}
	return out, nil
}

// split returns the words of a line without its comment; a quoted one is a word whatever is in it.
func split(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	quoted, inWord := false, false
	flush := func() {
		if inWord {
			words = append(words, word.String())
		}
		word.Reset()
		inWord = false
	}
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case quoted && c == '\\' && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, inWord = !quoted, true
		case quoted:
			word.WriteByte(c)
		case c == '#' && !inWord:
			return words, nil
		case c == ' ' || c == '\t' || c == '\n' || c == '\r':
			flush()
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if quoted {
		return nil, errors.New("a quoted word is not closed")
	}
	flush()
	return words, nil
}
