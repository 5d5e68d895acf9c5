package appstatus

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
)

const (
	maxProbeBody    = 10 << 10 // read of an answer, as the kubelet does
	maxProbeTimeout = 5 * time.Minute
)

// probe runs the probe of the path, and of no other: the port must not be a way to the rest of the application.
func (s *Server) probe(w http.ResponseWriter, r *http.Request) {
	p, ok := s.c.Probes[r.URL.Path]
	if !ok {
		http.Error(w, "no such probe", http.StatusNotFound)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), min(time.Duration(max(1, p.TimeoutSeconds))*time.Second, maxProbeTimeout))
	defer cancel()
	code, err := s.run(ctx, p, r)
	if err != nil {
		s.c.Log.Debug("probe failed", "path", r.URL.Path, "err", err)
		http.Error(w, err.Error(), code)
		return
	}
	w.WriteHeader(code)
}

func (s *Server) run(ctx context.Context, p config.Probe, r *http.Request) (int, error) {
	switch {
	case p.HTTPGet != nil:
		return s.probeHTTP(ctx, p, r)
	case p.TCPSocket != nil:
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", s.at(p.TCPSocket.Port))
		if err != nil {
			return http.StatusInternalServerError, err
		}
		return http.StatusOK, conn.Close()
	}
	return s.probeGRPC(ctx, p)
}

func (s *Server) at(port uint16) string {
	return net.JoinHostPort(s.c.Address, strconv.Itoa(int(port)))
}

// hop are headers that belong to the kubelet's connection, not to the application's.
var hop = map[string]bool{"Connection": true, "Keep-Alive": true, "Proxy-Connection": true, "Te": true, "Trailer": true, "Transfer-Encoding": true, "Upgrade": true, "Accept-Encoding": true}

func (s *Server) probeHTTP(ctx context.Context, p config.Probe, r *http.Request) (int, error) {
	h := p.HTTPGet
	path, query, _ := strings.Cut(h.Path, "?")
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	u := url.URL{Scheme: "http", Host: s.at(h.Port), Path: path, RawQuery: query}
	if strings.EqualFold(h.Scheme, "HTTPS") {
		u.Scheme = "https"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return http.StatusInternalServerError, err
	}
	for k, v := range r.Header {
		if !hop[k] {
			req.Header[k] = v
		}
	}
	for _, x := range h.HTTPHeaders {
		if strings.EqualFold(x.Name, "host") {
			req.Host = x.Value
			continue
		}
		req.Header.Set(x.Name, x.Value)
	}
	resp, err := probeClient.Do(req)
	if err != nil {
		return http.StatusInternalServerError, withoutURL(err)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxProbeBody))
	return resp.StatusCode, nil
}

// withoutURL leaves the address out: probes are the kubelet's, and it says where itself.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// probeClient asks as the kubelet does: it takes any certificate, and follows redirects on the same host alone; one to
// another host is an answer by itself.
var probeClient = &http.Client{
	Transport: &http.Transport{
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10}, // #nosec G402 -- a probe asks whether it lives, not who it is
	},
	CheckRedirect: func(r *http.Request, via []*http.Request) error {
		if len(via) > 10 || r.URL.Hostname() != via[0].URL.Hostname() {
			return http.ErrUseLastResponse
		}
		return nil
	},
}

func (s *Server) probeGRPC(ctx context.Context, p config.Probe) (int, error) {
	conn, err := grpc.NewClient("passthrough:///"+s.at(p.GRPC.Port), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUserAgent("kube-probe/isthmus"), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<10)))
	if err != nil {
		return http.StatusInternalServerError, err
	}
	defer conn.Close()
	reply, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: p.GRPC.Service}, grpc.WaitForReady(false))
	if err != nil {
		if status.Code(err) == codes.Unimplemented {
			return http.StatusInternalServerError, errors.New("the application has no grpc.health.v1.Health")
		}
		return http.StatusInternalServerError, errors.New(status.Convert(err).Message())
	}
	if reply.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return http.StatusServiceUnavailable, fmt.Errorf("the application says %s", reply.GetStatus())
	}
	return http.StatusOK, nil
}

// Listening returns a check that each port is listened on.
func Listening(address string, ports []uint16) func(context.Context) error {
	return func(ctx context.Context) error {
		for _, port := range ports {
			d := net.Dialer{Timeout: time.Second}
			conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(address, strconv.Itoa(int(port))))
			if err != nil {
				return fmt.Errorf("the application does not listen on port %d yet", port)
			}
			conn.Close()
		}
		return nil
	}
}
