package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/api/admin"
	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/token"
)

const ratingsYAML = `
apiVersion: v1
kind: Service
metadata: {name: ratings, namespace: default, labels: {isthmus.io/export: "true"}}
spec:
  clusterIP: 10.96.0.8
  selector: {app: ratings}
  ports: [{name: http, port: 9080}]
`

// machineNode is what the agent of a machine says of itself.
func machineNode(t *testing.T, m *federationv1.Machine, name string) *corev3.Node {
	t.Helper()
	meta, err := structpb.NewStruct(map[string]any{"CLUSTER_ID": m.GetCluster(), "NAMESPACE": m.GetNamespace(), "NETWORK": m.GetNetwork(), "ISTHMUS_MACHINE": "true"})
	if err != nil {
		t.Fatal(err)
	}
	return &corev3.Node{Id: "sidecar~192.0.2.77~" + name + "." + m.GetNamespace() + "~default.svc.cluster.local", Metadata: meta}
}

// TestMachine joins a machine by a token: a certificate, a registration while its agent is there, and endpoints in every cluster.
func TestMachine(t *testing.T) {
	amber, _ := member(t, "amber", nil)
	birch, gateway := member(t, "birch", func(c *Config) { c.MachineGrace = 100 * time.Millisecond })
	birch.write(t, "ratings.yaml", ratingsYAML)
	birch.mustJoin(t, amber)
	settled(t, amber, birch)

	tok := birch.tokenFor(t, admin.TokenRequest{Kind: "vm", Name: "ratings", Namespace: "default", ServiceAccount: "ratings"}).Token
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, new(x509.CertificateRequest), key)
	if err != nil {
		t.Fatal(err)
	}
	join := &federationv1.MachineJoin{CsrPem: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), Hostname: "dune", Addresses: []string{"192.0.2.77"}}
	result, err := token.Redeem(t.Context(), tok, token.RedeemConfig{Body: join})
	if err != nil {
		t.Fatal(err)
	}
	m := result.GetMachine()
	if m.GetCluster() != "birch" || m.GetName() != "ratings" || m.GetControlPlaneName() != "xds.birch.mesh" || len(m.GetControlPlane()) != 1 || m.GetControlPlane()[0] != gateway.addr() {
		t.Errorf("the machine is told %+v", m)
	}
	cert := tls.Certificate{PrivateKey: key}
	for rest := []byte(strings.Join(m.GetCertChainPem(), "\n")); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert.Certificate = append(cert.Certificate, block.Bytes)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(m.GetBundle())
	options := []grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: m.GetControlPlaneName(), Certificates: []tls.Certificate{cert}}))}
	through := &daemonTest{cfg: birch.cfg} // by way of the gateway, as a machine does
	through.cfg.Listen = m.GetControlPlane()[0]

	endpoints := func(want map[string]int) func() error {
		return func() error {
			for _, d := range []*daemonTest{amber, birch} {
				got := map[string]int{}
				for _, s := range d.status(t).Imports {
					if s.Host == "ratings.default.global" {
						got = s.Endpoints
					}
				}
				for _, s := range d.status(t).Exports {
					if s.Host == "ratings.default.svc.cluster.local" {
						got = s.Endpoints
					}
				}
				if !maps.Equal(got, want) {
					return fmt.Errorf("%s has endpoints %v, want %v", d.cfg.Cluster, got, want)
				}
			}
			return nil
		}
	}
	eventually(t, "no agent, no endpoint", endpoints(map[string]int{}))
	p := connect(t, through, machineNode(t, m, "ratings"), options, nil)
	p.waitFor(t, xds.ClusterType, reviewsAll, nil)
	eventually(t, "the machine is an endpoint in both clusters", endpoints(map[string]int{"birch": 1}))
	if got := birch.status(t).Machines; len(got) != 1 || !got[0].Connected || got[0].Name != "ratings" || got[0].Address != "192.0.2.77" {
		t.Errorf("machines %+v", got)
	}

	// Who is not the machine does not become it.
	impostor := birch.certificate(t, birch.workloadToken(t, "default", "mallory", "mallory"))
	q := connect(t, birch, machineNode(t, m, "ratings"), birch.dialOptions(t, "", impostor), nil)
	q.waitFor(t, xds.ClusterType, reviewsAll, nil)
	p.stop()
	eventually(t, "the agent is gone", endpoints(map[string]int{}))
	q.stop()

	// The agent comes back without a token, and over a restart of isthmusd.
	p = connect(t, through, machineNode(t, m, "ratings"), options, p.client.Versions())
	eventually(t, "the agent is back", endpoints(map[string]int{"birch": 1}))
	birch.stop(t)
	birch = start(t, birch.cfg)
	eventually(t, "isthmusd is back", func() error {
		if m := birch.status(t).Machines; len(m) == 0 || !m[0].Connected {
			return errors.New("no machine")
		}
		return nil
	})
	eventually(t, "the machine is an endpoint again", endpoints(map[string]int{"birch": 1}))
	p.stop()

	_, err = token.Redeem(t.Context(), tok, token.RedeemConfig{Body: join})
	if err != nil {
		t.Errorf("the machine runs the command again: %v", err)
	}
	if _, err := birch.join(tok); err == nil || !strings.Contains(err.Error(), "is for machine") {
		t.Errorf("a cluster joins by it: %v", err)
	}
}
