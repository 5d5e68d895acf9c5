// Package upstream reaches the control plane: it dials its addresses in turn over TLS and hands out gRPC connections
// that are already through the handshake, so that errors say what was wrong with which address.
package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/bootstrap"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// MaxMessage is the largest message taken from the control plane: a full state of tens of thousands of endpoints.
const MaxMessage = 128 << 20

// ClusterHeader is the header of Config.Cluster, Istio's.
const ClusterHeader = "clusterid"

// scheme keeps gRPC from resolving the address once more.
const scheme = "passthrough:///"

// Config is how the control plane is reached.
type Config struct {
	Addresses   []string // host:port, tried in turn
	ServerName  string   // SNI, and the name that the control plane's certificate must carry
	Roots       func() (*x509.CertPool, error)
	Certificate func() *tls.Certificate // nil or returning nil: none is presented
	Mark        bool                    // mark the sockets so that capture lets them through
	DialTimeout time.Duration           // for TCP and TLS together; default 5 s
	Cluster     string                  // said on each call in the header clusterid; empty: nothing is said
}

// Dialer dials the control plane. It is safe for concurrent use.
type Dialer struct{ c Config }

// New returns a Dialer; it opens nothing.
func New(c Config) *Dialer {
	if c.DialTimeout <= 0 {
		c.DialTimeout = 5 * time.Second
	}
	return &Dialer{c}
}

// Connect returns a connection to the first address that answers. Its one transport is not dialled again when it is
// lost: the caller connects anew, and so may reach another address.
func (d *Dialer) Connect(ctx context.Context, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	var errs []error
	for _, address := range d.c.Addresses {
		conn, err := d.dial(ctx, address)
		if err != nil {
			errs = append(errs, fmt.Errorf("control plane %s: %w", address, err))
			continue
		}
		return d.wrap(conn, address, opts)
	}
	return nil, errors.Join(errs...)
}

func (d *Dialer) dial(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.c.DialTimeout)
	defer cancel()
	roots, err := d.c.Roots()
	if err != nil {
		return nil, err
	}
	raw, err := NetDialer(d.c.Mark).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: d.c.ServerName, RootCAs: roots,
		NextProtos: []string{"h2"}, SessionTicketsDisabled: true,
	}
	if d.c.Certificate != nil {
		if cert := d.c.Certificate(); cert != nil {
			config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		}
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("TLS with %s: %w", d.c.ServerName, err)
	}
	return conn, nil
}

func (d *Dialer) wrap(conn net.Conn, address string, opts []grpc.DialOption) (*grpc.ClientConn, error) {
	var used atomic.Bool
	cc, err := grpc.NewClient(scheme+address, append(append(opts, d.header()...),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the connection is through TLS already
		grpc.WithAuthority(d.c.ServerName),
		grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if used.Swap(true) {
				return nil, errors.New("the connection to the control plane is lost")
			}
			return conn, nil
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
	)...)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("control plane %s: %w", address, err)
	}
	cc.Connect() // takes over conn, so that closing cc closes it
	return cc, nil
}

// header says from which cluster a call comes: the control plane may serve several, and has tokens reviewed by each.
func (d *Dialer) header() []grpc.DialOption {
	if d.c.Cluster == "" {
		return nil
	}
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, in, out any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return next(metadata.AppendToOutgoingContext(ctx, ClusterHeader, d.c.Cluster), method, in, out, cc, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return next(metadata.AppendToOutgoingContext(ctx, ClusterHeader, d.c.Cluster), desc, cc, method, opts...)
		}),
	}
}

// Address returns where a connection made here leads, host:port.
func Address(conn *grpc.ClientConn) string { return strings.TrimPrefix(conn.Target(), scheme) }

// NetDialer returns the dialer for everything the agent sends itself. A dead peer is noticed within about 25 s,
// whether or not data is waiting.
func NetDialer(mark bool) *net.Dialer {
	d := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3}}
	d.Control = func(network, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) {
			if network == "tcp4" || network == "tcp6" {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 20_000)
			}
			if mark && err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, bootstrap.Mark)
			}
		}); cerr != nil {
			return cerr
		}
		if errors.Is(err, unix.EPERM) {
			return diag.Hint(fmt.Errorf("mark socket: %w", err), "give the agent CAP_NET_ADMIN, or set capture.enabled: false")
		}
		return err
	}
	return d
}

// CanMark reports whether this process may mark its sockets.
func CanMark() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, bootstrap.Mark) == nil
}

// RootsFile returns a function that reads the PEM file each time, so that a new root needs no restart.
func RootsFile(path string) func() (*x509.CertPool, error) {
	return func() (*x509.CertPool, error) {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, diag.Hint(fmt.Errorf("read root certificate: %w", err), "set rootCert to the PEM file of the control plane's root")
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(data) {
			return nil, diag.Hint(fmt.Errorf("root certificate %s: no PEM certificate in it", path), "set rootCert to the PEM file of the control plane's root")
		}
		return pool, nil
	}
}

// Backoff returns how long to wait before attempt n (from 0), with full jitter: between half of base and the whole of
// base doubled n times, at most limit. random is in [0, 1).
func Backoff(n int, base, limit time.Duration, random float64) time.Duration {
	top := limit
	if n < 20 {
		top = min(limit, base<<n)
	}
	return base/2 + time.Duration(random*float64(max(0, top-base/2)))
}
