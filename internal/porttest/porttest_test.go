package porttest

import (
	"net"
	"strconv"
	"testing"
)

func TestTake(t *testing.T) {
	seen := map[int]bool{}
	for range 200 {
		port := Take(t)
		if seen[port] {
			t.Fatalf("port %d is given twice", port)
		}
		seen[port] = true
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if free(port) {
			t.Fatalf("port %d is in use and counts as free", port)
		}
	}
}
