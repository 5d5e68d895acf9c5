package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/anypb"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
)

const hostType = "type.googleapis.com/isthmus.dns.v1.Host"

// plane serves names to DNS servers as isthmusd does, and nothing else, so that what is measured is the plugin.
type plane struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	address, root, token string
	names                int
	server               *grpc.Server
	changes              chan *discoveryv3.Resource
}

func newPlane(dir string, names int) (*plane, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"isthmusd.bench"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	p := &plane{names: names, root: filepath.Join(dir, fmt.Sprint("root", names)), token: filepath.Join(dir, "token"), changes: make(chan *discoveryv3.Resource)}
	pemRoot := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := errors.Join(os.WriteFile(p.root, pemRoot, 0o600), os.WriteFile(p.token, []byte("bench"), 0o600)); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p.address = l.Addr().String()
	p.server = grpc.NewServer(grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second}), grpc.Creds(credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(p.server, p)
	go func() { _ = p.server.Serve(l) }()
	return p, nil
}

func (p *plane) stop() { p.server.Stop() }

func resource(i, address int) (*discoveryv3.Resource, error) {
	body, err := anypb.New(&dnsv1.Host{Name: hostName(i), Addresses: []string{v4(address), v6(address)}, Ports: []*dnsv1.Port{{Name: "http", Number: 80, Protocol: "tcp"}}})
	return &discoveryv3.Resource{Name: hostName(i), Version: fmt.Sprint(address), Resource: body}, err
}

// DeltaAggregatedResources sends all names, then the changes.
func (p *plane) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	all := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: hostType, Nonce: "0"}
	for i := range p.names {
		r, err := resource(i, i)
		if err != nil {
			return err
		}
		all.Resources = append(all.Resources, r)
	}
	if err := s.Send(all); err != nil {
		return err
	}
	for {
		select {
		case r := <-p.changes:
			if err := s.Send(&discoveryv3.DeltaDiscoveryResponse{TypeUrl: hostType, Nonce: r.GetVersion(), Resources: []*discoveryv3.Resource{r}}); err != nil {
				return err
			}
		case <-s.Context().Done():
			return nil
		}
	}
}

// change gives names other addresses, so many in a second, until ctx ends.
func (p *plane) change(ctx context.Context, perSecond int) {
	tick := time.NewTicker(time.Second / time.Duration(perSecond))
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		r, err := resource(i*7919%p.names, p.names+i)
		if err != nil {
			return
		}
		select {
		case p.changes <- r:
		case <-ctx.Done():
			return
		}
	}
}
