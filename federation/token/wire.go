package token

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
)

// ALPN is the application protocol of the join exchange.
const ALPN = "isthmus-join"

// Limits of the join exchange.
const (
	MaxRequest = 64 << 10
	MaxReply   = 8 << 20
	Timeout    = 10 * time.Second // for each side, each step: handshake with request, admission, reply
)

const (
	exporterLabel = "EXPORTER-isthmus-join"
	requestLabel  = "isthmus join request v1\x00"
	replyLabel    = "isthmus join reply v1\x00"
)

var errFrame = errors.New("frame too large")

// Reasons for which an issuer refuses, in JoinResult.error_reason. Admit functions may add their own.
const (
	ReasonMalformed   = "TokenMalformed"   // what names the token does not parse
	ReasonForeign     = "TokenForeign"     // of another issuer
	ReasonUnknown     = "TokenUnknown"     // never issued here, or forgotten
	ReasonEdited      = "TokenEdited"      // not the token that was issued under this id
	ReasonExpired     = "TokenExpired"     // by the issuer's clock
	ReasonNotYetValid = "TokenNotYetValid" // by the issuer's clock
	ReasonRevoked     = "TokenRevoked"     //
	ReasonSpent       = "TokenSpent"       // redeemed by another key; the issuer is alarmed
	ReasonProof       = "ProofInvalid"     // the joiner does not hold the seed, or replays
	ReasonRequest     = "RequestMalformed" // the body is not what the token's kind wants
	ReasonTooLarge    = "RequestTooLarge"  //
	ReasonName        = "NameNotGranted"   // the token is for another name
	ReasonRecord      = "RecordInvalid"    // the cluster's own record is not signed by its key
	ReasonInternal    = "InternalError"    // nothing is known to be wrong with the token
)

// Refused is the issuer's answer to a join that it does not admit. Admit functions return it to refuse.
type Refused struct {
	Reason  string // CamelCase, stable
	Message string // one line: what is wrong and the remedy
}

// Error returns reason and message.
func (r *Refused) Error() string { return r.Reason + ": " + r.Message }

// clean makes text from another process fit for one line on a terminal.
func clean(s string) string {
	if len(s) > 1024 {
		s = s[:1024]
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

func refuse(reason, format string, args ...any) *Refused {
	return &Refused{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// bound returns what is signed so that it holds for one connection and one body only.
func bound(label string, exporter, body []byte) []byte {
	digest := sha256.Sum256(body)
	return bytes.Join([][]byte{[]byte(label), exporter, digest[:]}, nil)
}

func exporter(cs tls.ConnectionState) ([]byte, error) {
	if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != ALPN {
		return nil, fmt.Errorf("the other side speaks %s with ALPN %q, not TLS 1.3 with %s", tls.VersionName(cs.Version), cs.NegotiatedProtocol, ALPN)
	}
	return cs.ExportKeyingMaterial(exporterLabel, nil, 32)
}

func writeFrame(w io.Writer, body []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body))), body...))
	return err
}

// readFrame reads one frame of at most limit bytes. Memory grows with what arrives, not with what is announced.
func readFrame(r io.Reader, limit int) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if uint64(n) > uint64(limit) {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", errFrame, n, limit)
	}
	var buf bytes.Buffer
	if m, err := io.Copy(&buf, io.LimitReader(r, int64(n))); err != nil {
		return nil, err
	} else if m < int64(n) {
		return nil, io.ErrUnexpectedEOF
	}
	return buf.Bytes(), nil
}
