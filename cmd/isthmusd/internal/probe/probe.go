// Package probe tries whether an endpoint can be reached by mutual TLS.
package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/federation/trust"
)

// verdictTime is how long a server is given to refuse our certificate: in TLS 1.3 a client is done before the server has judged it.
const verdictTime = 150 * time.Millisecond

// accepted waits for a refusal; silence is consent.
func accepted(conn net.Conn) error {
	_ = conn.SetReadDeadline(time.Now().Add(verdictTime))
	_, err := conn.Read(make([]byte, 1))
	var timeout net.Error
	if err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		return nil
	}
	return err
}

// TLS tries a handshake with an endpoint, by the first of the addresses that takes it. local and bundles are those of the
// control plane.
func TLS(ctx context.Context, local trust.Local, bundles *trust.Bundles, addrs []string, serverName string) admin.Probe {
	started := time.Now()
	out := admin.Probe{At: started}
	cfg := trust.ClientConfig(trust.Config{Local: local, Bundles: bundles, Authorize: func(spiffeid.ID) error { return nil }})
	cfg.ServerName, cfg.NextProtos = serverName, slices.Concat(sni.ALPN, []string{"http/1.1"})
	dialer := tls.Dialer{Config: cfg}
	var failed []string
	for _, addr := range addrs {
		conn, err := dialer.DialContext(ctx, "tcp", addr)
		if err != nil {
			failed = append(failed, addr+": "+err.Error())
			continue
		}
		out.Took = time.Since(started).Round(100 * time.Microsecond).String() // the verdict below is waited for, it is not the handshake
		state := conn.(*tls.Conn).ConnectionState()
		err = accepted(conn)
		conn.Close()
		if err != nil {
			failed = append(failed, addr+": the far side refuses us: "+err.Error())
			continue
		}
		out.Gateway, out.Version = addr, tls.VersionName(state.Version)
		if id, err := trust.PeerID(state); err == nil {
			out.Identity = id.String()
		}
		break
	}
	if out.Version == "" {
		out.Error = strings.Join(failed, "; ")
		out.Took = time.Since(started).Round(100 * time.Microsecond).String()
	}
	return out
}
