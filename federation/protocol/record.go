package protocol

import (
	"cmp"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"google.golang.org/protobuf/proto"
)

// The kinds of records.
const (
	KindMember    = "member"    // key: cluster name; the origin vouches for it
	KindCluster   = "cluster"   // key: empty; the origin describes itself
	KindService   = "service"   // key: NAMESPACE/NAME
	KindEndpoints = "endpoints" // key: NAMESPACE/NAME
	KindTombstone = "tombstone" // key: KIND/KEY of what is gone; body: a Service with nothing but export_to
	// KindPending is a member that waits for approval. It is kept on disk and never sent, nor signed.
	KindPending = "pending"
	// KindDrain is how the traffic to a member is taken away. It is kept as KindPending is.
	KindDrain = "drain"
)

// Caps on one record.
const (
	MaxBody       = 1 << 20        // bytes of body
	MaxKey        = 253            // bytes of key
	MaxRecordSize = MaxBody + 1024 // bytes on the wire
	MaxBroadcast  = 1024           // bytes of a record that rides on gossip
	MaxEpoch      = 1 << 32
	MaxSeq        = 1 << 48
)

const signLabel = "isthmus-record-v1"

// ErrSignature is wrapped by Verify when the signature is not the key's.
var ErrSignature = errors.New("signature does not verify")

// Refusal is why a record is not taken.
type Refusal struct {
	Reason  string // one of the Reason constants
	Message string
}

// Error returns "REASON: MESSAGE".
func (r *Refusal) Error() string { return r.Reason + ": " + r.Message }

func refuse(reason, format string, args ...any) *Refusal {
	return &Refusal{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// SignedBytes are what the signature covers: the label, then every field with its length in front (32 bits, big
// endian), numbers as big-endian bytes.
func SignedBytes(r *federationv1.Record) []byte {
	b := make([]byte, 0, len(signLabel)+len(r.Origin)+len(r.Kind)+len(r.Key)+len(r.Body)+64)
	b = append(b, signLabel...)
	for _, s := range []string{r.Origin, r.Kind, r.Key} {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(b, 8), r.Epoch)
	b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(b, 8), r.Seq)
	b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, 4), r.TtlSeconds)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(r.Body))), r.Body...)
}

// Sign sets the signature of r with an Ed25519 private key's sign function.
func Sign(r *federationv1.Record, sign func(msg []byte) []byte) { r.Signature = sign(SignedBytes(r)) }

// Verify reports whether r is signed by the key; the error wraps ErrSignature.
func Verify(r *federationv1.Record, pub ed25519.PublicKey) error {
	if len(pub) != ed25519.PublicKeySize || !ed25519.Verify(pub, SignedBytes(r), r.Signature) {
		return fmt.Errorf("record %s %s: %w", ResourceName(r), Version(r), ErrSignature)
	}
	return nil
}

// Compare orders two records of one key by (epoch, seq).
func Compare(a, b *federationv1.Record) int {
	return cmp.Or(cmp.Compare(a.Epoch, b.Epoch), cmp.Compare(a.Seq, b.Seq))
}

// ResourceName returns ORIGIN/KIND/KEY.
func ResourceName(r *federationv1.Record) string {
	return r.GetOrigin() + "/" + r.GetKind() + "/" + r.GetKey()
}

// ParseResourceName reads what ResourceName wrote.
func ParseResourceName(name string) (origin mesh.ClusterID, kind, key string, err error) {
	parts := strings.SplitN(name, "/", 3)
	if len(parts) != 3 || !mesh.IsLabel(parts[0]) {
		return "", "", "", fmt.Errorf("%q is not the name of a record: want ORIGIN/KIND/KEY", name)
	}
	if ref := checkKey(parts[1], parts[2]); ref != nil && !private(parts[1]) {
		return "", "", "", fmt.Errorf("name of record %q: %w", name, ref)
	}
	return mesh.ClusterID(parts[0]), parts[1], parts[2], nil
}

// Version returns EPOCH.SEQ.
func Version(r *federationv1.Record) string {
	return strconv.FormatUint(r.Epoch, 10) + "." + strconv.FormatUint(r.Seq, 10)
}

// Decode reads a record from the wire, capped before anything is allocated, and checks its form. The signature is
// not checked: that needs the origin's key.
func Decode(data []byte) (*federationv1.Record, error) {
	if len(data) > MaxRecordSize {
		return nil, refuse(ReasonTooLarge, "record has %d bytes, %d are allowed", len(data), MaxRecordSize)
	}
	r := &federationv1.Record{}
	if err := proto.Unmarshal(data, r); err != nil {
		return nil, refuse(ReasonMalformed, "record does not decode: %v", err)
	}
	if err := Validate(r); err != nil {
		return nil, err
	}
	return r, nil
}

// Validate checks the form of a record as it may come from a peer: caps, names and numbers. The error is a *Refusal.
func Validate(r *federationv1.Record) error {
	if ref := validate(r); ref != nil {
		return ref
	}
	return nil
}

func validate(r *federationv1.Record) *Refusal {
	switch {
	case r == nil:
		return refuse(ReasonMalformed, "record is missing")
	case !mesh.IsLabel(r.Origin):
		return refuse(ReasonBadName, "origin %s is not a DNS label", quote(r.Origin))
	case len(r.Body) > MaxBody:
		return refuse(ReasonTooLarge, "body has %d bytes, %d are allowed", len(r.Body), MaxBody)
	case len(r.Signature) != ed25519.SignatureSize:
		return refuse(ReasonBadSignature, "signature has %d bytes, want %d", len(r.Signature), ed25519.SignatureSize)
	case r.Epoch == 0 || r.Seq == 0 || r.Epoch > MaxEpoch || r.Seq > MaxSeq:
		return refuse(ReasonBadSequence, "version %s is out of range", Version(r))
	}
	return checkKey(r.Kind, r.Key)
}

// checkKey checks that kind is known and key has the form of the kind.
func checkKey(kind, key string) *Refusal {
	if len(key) > MaxKey {
		return refuse(ReasonBadName, "key has %d bytes, %d are allowed", len(key), MaxKey)
	}
	ok := false
	switch kind {
	case KindMember:
		ok = mesh.IsLabel(key)
	case KindCluster:
		ok = key == ""
	case KindService, KindEndpoints:
		namespace, name, found := strings.Cut(key, "/")
		ok = found && mesh.IsLabel(namespace) && mesh.IsLabel(name)
	case KindTombstone:
		of, rest, _ := strings.Cut(key, "/")
		if of != KindMember && of != KindService && of != KindEndpoints {
			return refuse(ReasonBadName, "a tombstone cannot cover %s", quote(key))
		}
		return checkKey(of, rest)
	default:
		return refuse(ReasonUnknownKind, "kind %s is not known to this version", quote(kind))
	}
	if !ok {
		return refuse(ReasonBadName, "key %s is not a key of kind %s", quote(key), kind)
	}
	return nil
}

// quote prints foreign text in bounded length.
func quote(s string) string {
	if len(s) > 80 {
		return strconv.QuoteToASCII(s[:80]) + "..."
	}
	return strconv.QuoteToASCII(s)
}

// IsDomain reports whether s is one or more DNS labels with dots between, at most 253 bytes.
func IsDomain(s string) bool {
	if len(s) > MaxKey {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !mesh.IsLabel(label) {
			return false
		}
	}
	return true
}

// Digest says how far the records of one origin have come. Only what every member may see counts, since every member
// compares; tombstones do not, since each member forgets them at its own time. The hash is SHA-256 over (kind, key,
// epoch, seq) in order of kind and key, strings with their length in front (32 bits, big endian), numbers as 64 bits.
func Digest(origin mesh.ClusterID, records []*federationv1.Record) *federationv1.Digest {
	var public []*federationv1.Record
	d := &federationv1.Digest{Origin: string(origin)}
	for _, r := range records {
		if r.Origin != string(origin) || private(r.Kind) {
			continue
		}
		if aud, err := audienceOf(r.Kind, r.Body); err != nil || !aud.Everyone() {
			continue
		}
		d.Epoch, d.Seq = laterOf(d.Epoch, d.Seq, r)
		if r.Kind != KindTombstone {
			public = append(public, r)
		}
	}
	d.Hash = hashOf(public)
	return d
}

func laterOf(epoch, seq uint64, r *federationv1.Record) (uint64, uint64) {
	if (Mark{epoch, seq}).Less(Mark{r.Epoch, r.Seq}) {
		return r.Epoch, r.Seq
	}
	return epoch, seq
}

// hashOf sorts records.
func hashOf(records []*federationv1.Record) []byte {
	slices.SortFunc(records, func(a, b *federationv1.Record) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Key, b.Key))
	})
	h := sha256.New()
	var b []byte
	for _, r := range records {
		b = append(binary.BigEndian.AppendUint32(b[:0], uint32(len(r.Kind))), r.Kind...)
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(r.Key))), r.Key...)
		b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, r.Epoch), r.Seq)
		h.Write(b)
	}
	return h.Sum(nil)
}

// Visible reports whether the record may be sent to the cluster: its origin always may have it back, members and
// cluster records are for everybody, the rest is for whom its export_to names. It reads no more than that field.
func Visible(r *federationv1.Record, to mesh.ClusterID) bool {
	if private(r.Kind) {
		return false
	}
	if r.Origin == string(to) {
		return true
	}
	aud, err := audienceOf(r.Kind, r.Body)
	return err == nil && aud.Has(to)
}
