package diag

import "testing"

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"hosts", "hosts", 0}, {"host", "hosts", 1}, {"hosts", "hsot", 3}, {"gatway", "gateway", 1}, {"port", "part", 1}, {"a", "abcd", 3}, {"abcdefgh", "a", 3}} {
		if got := Distance(c.a, c.b); got != c.want {
			t.Errorf("from %q to %q: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
