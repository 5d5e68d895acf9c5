package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// maxReply bounds what is read from isthmusd.
const maxReply = 64 << 20

// client speaks to one isthmusd.
type client struct {
	socket string
	http   *http.Client
}

func newClient(socket string) *client {
	return &client{socket: socket, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

// call sends in, when it is not nil, and reads the answer into out, when it is not nil.
func (c *client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://isthmusd"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return diag.Hint(fmt.Errorf("no isthmusd listens on %s", c.socket), "start it (isthmusd --config FILE), or name its socket with --socket or ISTHMUS_SOCKET")
	case errors.Is(err, fs.ErrPermission):
		return diag.Hint(fmt.Errorf("may not open %s", c.socket), "run as the user that isthmusd runs as")
	case err != nil:
		return fmt.Errorf("ask isthmusd on %s: %w", c.socket, err)
	}
	defer resp.Body.Close()
	return answer(resp, method+" "+path, out)
}

// answer reads what isthmusd said into out.
func answer(resp *http.Response, what string, out any) error {
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return fmt.Errorf("read the answer of isthmusd: %w", err)
	}
	if resp.StatusCode/100 != 2 {
		var e admin.Error
		if json.Unmarshal(data, &e) != nil || e.Message == "" {
			return fmt.Errorf("isthmusd answered %s to %s", resp.Status, what)
		}
		if e.Hint != "" {
			return diag.Hint(&e, "%s", e.Hint)
		}
		return &e
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("read the answer of isthmusd: %w", err)
	}
	return nil
}
