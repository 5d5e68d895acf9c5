package kubelet

import (
	"io"
	"strings"
	"testing"
)

func TestSeekTail(t *testing.T) {
	long := strings.Repeat("x", 70<<10)
	for _, c := range []struct {
		text string
		n    int64
		want string
	}{
		{"a\nb\nc\n", 2, "b\nc\n"},
		{"a\nb\nc", 2, "b\nc"},
		{"a\nb\n", 5, "a\nb\n"},
		{"", 3, ""},
		{"one", 1, "one"},
		{"a\n" + long + "\nb\n", 2, long + "\nb\n"},
		{"a\nb\n", 1, "b\n"},
	} {
		r := strings.NewReader(c.text)
		if err := seekTail(r, c.n); err != nil {
			t.Fatal(err)
		}
		if got, _ := io.ReadAll(r); string(got) != c.want {
			t.Errorf("last %d lines of %.10q...: %.20q, want %.20q", c.n, c.text, got, c.want)
		}
	}
}
