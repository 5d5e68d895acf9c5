package relay

import (
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"sync"

	"github.com/isthmus-mesh/isthmus/eastwest/sni"
)

const (
	maxHello      = 16 << 10 // octets of the ClientHello message
	maxPeek       = 32 << 10 // octets read to have it, record headers included
	maxRecord     = 16 << 10 // octets of one plaintext record (RFC 8446, section 5.1)
	maxExtensions = 128
	firstPeek     = 4 << 10 // enough for nearly every ClientHello, post-quantum key shares included
)

var (
	errMalformed = errors.New("not a well-formed ClientHello")
	errTooLong   = errors.New("the ClientHello is too long")
	errEmpty     = errors.New("closed before the first octet")
)

// hello is what routing needs of a ClientHello.
type hello struct {
	name string   // server name in lower case, empty when there is none
	alpn []string // application protocols in the client's order
}

// assembler puts the ClientHello together from records, which may cut it anywhere (RFC 8446, section 5.1).
type assembler struct {
	raw  []byte // all that was read, to be sent on
	next int    // start of the first record in raw that is not yet taken
	msg  []byte // the handshake message so far, its header included
	own  bool   // msg is memory of its own, not a part of raw
}

// done takes the records that have arrived whole and reports whether the message is complete.
func (a *assembler) done() (bool, error) {
	for len(a.raw)-a.next >= 5 {
		header := a.raw[a.next:]
		size := int(binary.BigEndian.Uint16(header[3:]))
		switch {
		case header[0] != 22 || header[1] != 3: // handshake, of any version since SSL 3.0
			return false, errMalformed
		case size == 0 || size > maxRecord:
			return false, errMalformed
		}
		if len(header) < 5+size {
			return false, nil
		}
		a.take(header[5 : 5+size])
		a.next += 5 + size
		if len(a.msg) >= 4 {
			want := 4 + (int(a.msg[1])<<16 | int(a.msg[2])<<8 | int(a.msg[3]))
			switch {
			case a.msg[0] != 1: // client_hello
				return false, errMalformed
			case want > maxHello:
				return false, errTooLong
			case len(a.msg) > want: // nothing may follow before the server answers
				return false, errMalformed
			case len(a.msg) == want:
				return true, nil
			}
		}
	}
	if len(a.raw) > a.next && a.raw[a.next] != 22 { // tell at the first octet
		return false, errMalformed
	}
	return false, nil
}

// take adds one record's octets; the usual single record is not copied.
func (a *assembler) take(fragment []byte) {
	if a.msg == nil {
		a.msg = fragment[:len(fragment):len(fragment)]
		return
	}
	if !a.own {
		a.msg, a.own = slices.Clone(a.msg), true
	}
	a.msg = append(a.msg, fragment...)
}

// peekBuffers holds pointers to buffers of firstPeek octets.
type peekBuffers struct{ pool sync.Pool }

func (p *peekBuffers) get() *[]byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, firstPeek)
	return &b
}

func (p *peekBuffers) put(b *[]byte) { p.pool.Put(b) }

// peek reads from r until it has the ClientHello. It returns what the hello says and all that was read, which is in buf
// or, when that is too small, in memory of its own.
func peek(r io.Reader, buf []byte) (hello, []byte, error) {
	var a assembler
	n := 0
	for {
		if n == len(buf) {
			if n >= maxPeek {
				return hello{}, nil, errTooLong
			}
			grown := make([]byte, min(2*n, maxPeek))
			copy(grown, buf)
			buf = grown // a.msg may go on to refer to the old one, which nobody writes to
		}
		m, err := r.Read(buf[n:])
		n += m
		a.raw = buf[:n]
		if m > 0 {
			done, bad := a.done()
			if bad != nil {
				return hello{}, nil, bad
			}
			if done {
				h, bad := parseHello(a.msg[4:])
				return h, a.raw, bad
			}
		}
		switch {
		case err == io.EOF && n == 0:
			return hello{}, nil, errEmpty
		case err == io.EOF:
			return hello{}, nil, errMalformed
		case err != nil:
			return hello{}, nil, err
		}
	}
}

// parseHello reads the body of a ClientHello (RFC 8446, section 4.1.2; RFC 5246, section 7.4.1.2). It is strict: each
// length must fit, lists must not be empty where the standards say so, and no extension may come twice.
func parseHello(body []byte) (hello, error) {
	p := parser(body)
	version, ok1 := p.take(2)
	_, ok2 := p.take(32) // random
	session, ok3 := p.vector(1)
	suites, ok4 := p.vector(2)
	compressions, ok5 := p.vector(1)
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || version[0] != 3 || len(session) > 32 ||
		len(suites) < 2 || len(suites)%2 != 0 || len(compressions) == 0 {
		return hello{}, errMalformed
	}
	if len(p) == 0 {
		return hello{}, nil // TLS 1.2 without extensions
	}
	extensions, ok := p.vector(2)
	if !ok || len(p) != 0 {
		return hello{}, errMalformed
	}
	var h hello
	var seen [maxExtensions]uint16
	for count := 0; len(extensions) > 0; count++ {
		kind, ok1 := extensions.take(2)
		data, ok2 := extensions.vector(2)
		if !ok1 || !ok2 || count == maxExtensions {
			return hello{}, errMalformed
		}
		id := binary.BigEndian.Uint16(kind)
		if slices.Contains(seen[:count], id) {
			return hello{}, errMalformed
		}
		seen[count] = id
		var good bool
		switch id {
		case 0:
			h.name, good = serverName(data)
		case 16:
			h.alpn, good = protocols(data)
		default:
			good = true
		}
		if !good {
			return hello{}, errMalformed
		}
	}
	return h, nil
}

// serverName reads the extension of RFC 6066, section 3. There is one type of name, so the list has one entry.
func serverName(p parser) (string, bool) {
	list, ok := p.vector(2)
	if !ok || len(p) != 0 {
		return "", false
	}
	kind, ok1 := list.take(1)
	name, ok2 := list.vector(2)
	if !ok1 || !ok2 || len(list) != 0 || kind[0] != 0 || len(name) == 0 || len(name) > sni.MaxLen {
		return "", false
	}
	lower := make([]byte, len(name))
	for i, c := range name {
		switch {
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '.', c == '_':
		default:
			return "", false
		}
		lower[i] = c
	}
	return string(lower), true
}

// protocols reads the extension of RFC 7301, section 3.1.
func protocols(p parser) ([]string, bool) {
	list, ok := p.vector(2)
	if !ok || len(p) != 0 || len(list) == 0 {
		return nil, false
	}
	var out []string
	for len(list) > 0 {
		name, ok := list.vector(1)
		if !ok || len(name) == 0 {
			return nil, false
		}
		out = append(out, string(name))
	}
	return out, true
}

// parser is what is left to read.
type parser []byte

func (p *parser) take(n int) (parser, bool) {
	if len(*p) < n {
		return nil, false
	}
	out := (*p)[:n]
	*p = (*p)[n:]
	return out, true
}

// vector reads a length of size octets (1 or 2) and that many octets.
func (p *parser) vector(size int) (parser, bool) {
	length, ok := p.take(size)
	if !ok {
		return nil, false
	}
	n := 0
	for _, b := range length {
		n = n<<8 | int(b)
	}
	return p.take(n)
}
