package written

import (
	"fmt"
	"strings"
	"testing"
)

// TestValues: JSON values in a row are documents of their own, at their lines.
func TestValues(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"{}", "1"},
		{"{}\n{}\n", "1 2"},
		{"{\n\"a\": 1\n}\n\n  {\"b\": 2} {}", "1 5 5"},
		{"# c\n{}\n---\n{}\n{}", "2 4 5"},
		{"{a: b}\n", "1"},
		{"{\"a\": 1}\n{\"b\":", "1"},
		{"a: 1\n", "1"},
	} {
		var got []string
		for _, d := range Split([]byte(c.text)) {
			got = append(got, fmt.Sprint(d.Line))
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%q: lines %v, want %s", c.text, got, c.want)
		}
	}
	broken := Split([]byte("{\"a\": 1}\n{\"b\":"))
	if _, _, err := broken[0].JSON(); err == nil {
		t.Error("what follows a value is dropped in silence")
	}
}
