package capture

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Addresses of documentation (RFC 5737, RFC 3849): nobody answers there but the capture rules.
var nowhere = []string{"192.0.2.1", "2001:db8::1"}

// ErrNotCaptured: what this process sends is not led to the proxy's port.
var ErrNotCaptured = errors.New("outbound connections are not captured")

// Validate finds out, without any capability, whether outbound connections of this process are captured: it dials an
// address where nobody is and waits at the proxy's port. The proxy must not run yet, and this process must not be one
// that the rules let through. It takes a second at most where the rules are missing.
func Validate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	token := []byte(rand.Text())
	var listeners []net.Listener
	for _, host := range []string{"127.0.0.1", "::1"} {
		l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(OutboundPort)))
		if err != nil {
			if host == "::1" && len(listeners) > 0 {
				continue // no IPv6 here
			}
			return fmt.Errorf("validate the capture rules: %w", err)
		}
		defer l.Close()
		listeners = append(listeners, l)
		go answer(l, token)
	}
	for _, host := range nowhere {
		if reaches(ctx, net.JoinHostPort(host, strconv.Itoa(OutboundPort+1)), token) {
			return nil
		}
	}
	return diag.Hint(ErrNotCaptured, "the Pod was started before isthmus-cni was ready on this node: delete the Pod, and it is made anew with the rules")
}

func answer(l net.Listener, token []byte) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = c.Write(token)
		c.Close()
	}
}

func reaches(ctx context.Context, address string, token []byte) bool {
	var d net.Dialer
	dial, cancel := context.WithTimeout(ctx, 400*time.Millisecond)
	defer cancel()
	c, err := d.DialContext(dial, "tcp", address)
	if err != nil {
		return false
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(400 * time.Millisecond))
	got := make([]byte, len(token))
	n, _ := c.Read(got)
	return string(got[:n]) == string(token)
}
