package mesh

// Credential is a Kubernetes Secret that holds a certificate with its key, certificate authorities, or both. What its
// type or keys do not say is empty.
type Credential struct {
	Object      ObjectRef
	Certificate []byte     // PEM, the leaf first (tls.crt, or cert)
	Key         PrivateKey // of the leaf (tls.key, or key)
	Roots       []byte     // PEM (ca.crt, or cacert)
	CRL         []byte     // PEM (ca.crl, or crl)
}

// String names the Secret and says nothing of what is in it.
func (c *Credential) String() string { return c.Object.String() }

// PrivateKey is a private key in PEM. It prints as [redacted].
type PrivateKey []byte

const redacted = "[redacted]"

// String returns [redacted].
func (PrivateKey) String() string { return redacted }

// GoString returns [redacted].
func (PrivateKey) GoString() string { return redacted }

// MarshalText returns [redacted]; loggers use it, too.
func (PrivateKey) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Credential returns the Secret of that namespace and name, or nil.
func (s *Snapshot) Credential(namespace, name string) *Credential {
	for _, c := range s.Credentials {
		if c.Object.Namespace == namespace && c.Object.Name == name {
			return c
		}
	}
	return nil
}
