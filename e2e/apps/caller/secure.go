package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
)

// secure is what the flags say about TLS; nothing said: the roots of the system, and no certificate.
type secure struct {
	authority, cert, key string // PEM files
}

// config reads the files. It is nil when nothing is said.
func (s secure) config() (*tls.Config, error) {
	if s == (secure{}) {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if s.authority != "" {
		pem, err := os.ReadFile(s.authority)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate", s.authority)
		}
	}
	if (s.cert == "") != (s.key == "") {
		return nil, errors.New("--cert and --key go together")
	}
	if s.cert != "" {
		pair, err := tls.LoadX509KeyPair(s.cert, s.key)
		if err != nil {
			return nil, err
		}
		// Shown whatever authorities the server names: that it refuses a stranger's is to be seen.
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return c, nil
}

// transport makes connections as o says, and keeps up to limit of them.
func (o options) transport(limit int) *http.Transport {
	t := &http.Transport{MaxIdleConnsPerHost: limit, DisableKeepAlives: !o.keepAlive, TLSClientConfig: o.tls}
	if o.connect != "" {
		t.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, o.connect)
		}
	}
	return t
}

// shown is the common name of the certificate that the server showed, or the first host that it is for; "" without TLS.
func shown(state *tls.ConnectionState) string {
	if state == nil || len(state.PeerCertificates) == 0 {
		return ""
	}
	cert := state.PeerCertificates[0]
	if cert.Subject.CommonName == "" && len(cert.DNSNames) > 0 {
		return cert.DNSNames[0]
	}
	return cert.Subject.CommonName
}
