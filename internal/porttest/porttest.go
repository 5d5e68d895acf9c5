// Package porttest finds ports of the loopback interface for tests whose servers cannot take one from the system.
package porttest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
)

// span is how many ports are drawn from. They are below those that the system gives to outgoing connections, which may
// take a port between the moment it is found free and the moment the server listens.
const span = 12000

var (
	mu    sync.Mutex
	taken = map[int]bool{}
)

// Take returns a port of 127.0.0.1 that is free for TCP and UDP. It returns none twice in one process.
func Take(t testing.TB) int {
	t.Helper()
	mu.Lock()
	defer mu.Unlock()
	top := 32768
	if data, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		_, _ = fmt.Sscan(string(data), &top)
	}
	top = max(top, 1024+span)
	for range 1000 {
		port := top - 1 - rand.IntN(span)
		if !taken[port] && free(port) {
			taken[port] = true
			return port
		}
	}
	t.Fatalf("none of the ports from %d to %d is free", top-span, top-1)
	return 0
}

func free(port int) bool {
	at := fmt.Sprintf("127.0.0.1:%d", port)
	l, err := net.Listen("tcp", at)
	if err != nil {
		return false
	}
	defer l.Close()
	p, err := net.ListenPacket("udp", at)
	if err != nil {
		return false
	}
	return p.Close() == nil
}
