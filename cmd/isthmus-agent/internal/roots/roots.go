// Package roots keeps the root certificates by which an agent knows its control plane: those it was set up with, until the
// control plane tells newer ones over the stream that passes to Envoy. So a root may be rotated while no file changes.
package roots

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

const (
	// secretName is the secret with the trusted roots, as the control plane names it.
	secretName = "ROOTCA"
	// keptFile holds what was told, in Config.Dir.
	keptFile = "told-roots.pem"
	maxRoots = 1 << 20
)

// Config says where roots are.
type Config struct {
	File        string // PEM, given
	Dir         string // where what was told is kept
	TrustDomain string // the own one; roots of others do not matter here
}

// Roots are the roots of the own control plane. It is safe for concurrent use.
type Roots struct {
	c       Config
	mu      sync.Mutex
	told    []byte // PEM; empty: nothing was told
	changed chan struct{}
}

// New reads what was told before. An error says that there are no roots at all.
func New(c Config) (*Roots, error) {
	r := &Roots{c: c, changed: make(chan struct{})}
	kept, err := os.ReadFile(filepath.Join(c.Dir, keptFile))
	if err == nil && x509.NewCertPool().AppendCertsFromPEM(kept) {
		r.told = kept
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("roots told before: %w", err)
	}
	_, err = r.Pool()
	return r, err
}

// Pool returns the roots: those that were told, and those of the file, which may be newer, or those of the file alone. It
// reads the file each time, so that a new root needs no restart.
func (r *Roots) Pool() (*x509.CertPool, error) {
	r.mu.Lock()
	told := r.told
	r.mu.Unlock()
	pool := x509.NewCertPool()
	if pool.AppendCertsFromPEM(told) && !r.fileIsNewer() {
		return pool, nil
	}
	data, err := os.ReadFile(r.c.File)
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("read root certificate: %w", err), "set rootCert to the PEM file of the control plane's root")
	}
	if !pool.AppendCertsFromPEM(data) {
		return nil, diag.Hint(fmt.Errorf("root certificate %s: no PEM certificate in it", r.c.File), "set rootCert to the PEM file of the control plane's root")
	}
	return pool, nil
}

// fileIsNewer reports whether somebody wrote the file after the last roots were told: the control plane may be another.
func (r *Roots) fileIsNewer() bool {
	file, err := os.Stat(r.c.File)
	if err != nil {
		return false
	}
	kept, err := os.Stat(filepath.Join(r.c.Dir, keptFile))
	return err == nil && file.ModTime().After(kept.ModTime())
}

// Signer returns the root that signs now, nil while nothing was told, and a channel that is closed when that may change.
func (r *Roots) Signer() (*x509.Certificate, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	block, _ := pem.Decode(r.told)
	if block == nil {
		return nil, r.changed
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, r.changed
	}
	return c, r.changed
}

// Peek looks for roots in a response of the control plane on its way to Envoy. What it cannot read it leaves alone.
func (r *Roots) Peek(delta bool, response []byte) {
	if !bytes.Contains(response, []byte(secretName)) || !bytes.Contains(response, []byte("BEGIN CERTIFICATE")) {
		return
	}
	var bodies []*anypb.Any
	if delta {
		m := new(discoveryv3.DeltaDiscoveryResponse)
		if proto.Unmarshal(response, m) != nil {
			return
		}
		for _, x := range m.GetResources() {
			bodies = append(bodies, x.GetResource())
		}
	} else {
		m := new(discoveryv3.DiscoveryResponse)
		if proto.Unmarshal(response, m) != nil {
			return
		}
		bodies = m.GetResources()
	}
	for _, b := range bodies {
		s, v := new(tlsv3.Secret), new(tlsv3.SPIFFECertValidatorConfig)
		if !b.MessageIs(s) || b.UnmarshalTo(s) != nil || s.GetName() != secretName ||
			s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(v) != nil {
			continue
		}
		for _, td := range v.GetTrustDomains() {
			if td.GetName() == r.c.TrustDomain {
				r.tell([]byte(td.GetTrustBundle().GetInlineString()))
			}
		}
	}
}

// tell takes the roots of the own trust domain.
func (r *Roots) tell(pems []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(pems) > maxRoots || bytes.Equal(pems, r.told) || !x509.NewCertPool().AppendCertsFromPEM(pems) {
		return
	}
	r.told = bytes.Clone(pems)
	close(r.changed)
	r.changed = make(chan struct{})
	_ = ca.WriteFile(filepath.Join(r.c.Dir, keptFile), r.told, 0o600) // a restart without it begins with the file
}

// Under reports whether the chain ends under the root.
func Under(root *x509.Certificate, c *ca.Certificate) bool {
	if root == nil || c == nil {
		return true // nothing to tell apart
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	between.AppendCertsFromPEM(c.Chain)
	_, err := c.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	var invalid x509.CertificateInvalidError
	return err == nil || errors.As(err, &invalid) && invalid.Reason == x509.Expired
}
