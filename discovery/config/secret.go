package config

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"maps"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// maxCredential bounds each part of a Secret; the API server has the same limit for all of one.
const maxCredential = 1 << 20

// The keys in which Secrets hold the parts of credentials: those of type kubernetes.io/tls, and those of Istio's generic ones.
var (
	certificateKeys = []string{corev1.TLSCertKey, "cert"}
	privateKeys     = []string{corev1.TLSPrivateKeyKey, "key"}
	rootKeys        = []string{"ca.crt", "cacert"}
	crlKeys         = []string{"ca.crl", "crl"}
)

// CutSecret keeps of a Secret what may be a credential for gateways. It is nil when nothing is.
func CutSecret(s *corev1.Secret) *corev1.Secret {
	switch s.Type {
	case corev1.SecretTypeTLS, corev1.SecretTypeOpaque, "":
	default:
		return nil
	}
	data := maps.Clone(s.Data)
	for k, v := range s.StringData {
		if data == nil {
			data = map[string][]byte{}
		}
		data[k] = []byte(v)
	}
	part := func(keys []string) []byte {
		for _, k := range keys {
			if v := data[k]; len(v) > 0 && len(v) <= maxCredential {
				return v
			}
		}
		return nil
	}
	out := &corev1.Secret{Type: corev1.SecretTypeTLS, Data: map[string][]byte{}}
	out.Name, out.Namespace = s.Name, s.Namespace
	for name, keys := range map[string][]string{corev1.TLSCertKey: certificateKeys, corev1.TLSPrivateKeyKey: privateKeys, "ca.crt": rootKeys, "ca.crl": crlKeys} {
		if v := part(keys); v != nil {
			out.Data[name] = v
		}
	}
	if out.Data["ca.crt"] == nil && (out.Data[corev1.TLSCertKey] == nil || out.Data[corev1.TLSPrivateKeyKey] == nil) && s.Type != corev1.SecretTypeTLS {
		return nil
	}
	return out
}

// secret reads a credential. Other Secrets say nothing to the mesh. No message repeats what is in one.
func (o *object) secret() {
	var s corev1.Secret
	if !o.Into(&s) {
		return
	}
	s.Name, s.Namespace = o.Ref.Name, o.Ref.Namespace
	cut := CutSecret(&s)
	if cut == nil {
		return
	}
	c := &mesh.Credential{
		Object: o.Ref, Certificate: cut.Data[corev1.TLSCertKey], Key: cut.Data[corev1.TLSPrivateKeyKey], Roots: cut.Data["ca.crt"], CRL: cut.Data["ca.crl"],
	}
	const remedy = "write the whole chain and its key in PEM"
	switch {
	case len(c.Certificate) > 0 && len(c.Key) > 0:
		if _, err := tls.X509KeyPair(c.Certificate, c.Key); err != nil {
			o.Invalid("data", "the certificate and the key do not parse, or do not belong together", remedy)
		}
	case len(c.Certificate)+len(c.Key) > 0 || len(c.Roots) == 0:
		o.Reject("data", written.ReasonMissing, "the certificate or its key is missing", remedy)
	}
	if len(c.Roots) > 0 && !allPEM(c.Roots, "CERTIFICATE", func(der []byte) error { _, err := x509.ParseCertificate(der); return err }) {
		o.Invalid("data[ca.crt]", "this is no list of certificates", "write certificates in PEM")
	}
	if len(c.CRL) > 0 && !allPEM(c.CRL, "X509 CRL", func(der []byte) error { _, err := x509.ParseRevocationList(der); return err }) {
		o.Invalid("data[ca.crl]", "this is no revocation list", "write one in PEM")
	}
	if !o.Failed {
		o.d.in.Credentials = append(o.d.in.Credentials, c)
	}
}

// allPEM reports whether every block is of that type and parses, and there is one.
func allPEM(text []byte, kind string, parse func(der []byte) error) bool {
	n := 0
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != kind || parse(block.Bytes) != nil {
			return false
		}
		n++
	}
	return n > 0
}
