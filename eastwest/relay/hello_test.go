package relay

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// recorder is a connection that keeps what is written and gives what is in in.
type recorder struct {
	net.Conn
	in  io.Reader
	out bytes.Buffer
}

func (r *recorder) Read(b []byte) (int, error)       { return r.in.Read(b) }
func (r *recorder) Write(b []byte) (int, error)      { return r.out.Write(b) }
func (r *recorder) Close() error                     { return nil }
func (r *recorder) SetDeadline(time.Time) error      { return nil }
func (r *recorder) SetReadDeadline(time.Time) error  { return nil }
func (r *recorder) SetWriteDeadline(time.Time) error { return nil }

// clientHello returns the record that a client with that configuration sends first.
func clientHello(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	c = c.Clone()
	c.InsecureSkipVerify = true //nolint:gosec // there is no server
	r := &recorder{in: strings.NewReader("")}
	_ = tls.Client(r, c).Handshake()
	if r.out.Len() == 0 {
		t.Fatal("the client sent nothing")
	}
	return r.out.Bytes()
}

// byCryptoTLS reads a ClientHello with the standard library; ok is false when it refuses it.
func byCryptoTLS(record []byte) (name string, alpn []string, ok bool) {
	config := &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		name, alpn, ok = h.ServerName, h.SupportedProtos, true
		return nil, errStop
	}}
	_ = tls.Server(&recorder{in: bytes.NewReader(record)}, config).Handshake()
	return name, alpn, ok
}

// inRecords cuts a record's content into records of size octets.
func inRecords(record []byte, size int) []byte {
	var out []byte
	for part := range slices.Chunk(record[5:], size) {
		out = append(out, record[:3]...)
		out = binary.BigEndian.AppendUint16(out, uint16(len(part)))
		out = append(out, part...)
	}
	return out
}

func TestPeek(t *testing.T) {
	record := clientHello(t, &tls.Config{ServerName: "Pod.P80.birch.web.shop.global", NextProtos: []string{"istio", "h2"}})
	check := func(t *testing.T, r io.Reader, sent []byte) {
		t.Helper()
		h, raw, err := peek(r, make([]byte, 512))
		if err != nil || h.name != "pod.p80.birch.web.shop.global" || !slices.Equal(h.alpn, []string{"istio", "h2"}) {
			t.Fatalf("got %+v, %v", h, err)
		}
		if !bytes.HasPrefix(sent, raw) {
			t.Error("what is to be sent on is not what was read")
		}
	}
	t.Run("one read", func(t *testing.T) { check(t, bytes.NewReader(record), record) })
	t.Run("octet by octet", func(t *testing.T) { check(t, iotest.OneByteReader(bytes.NewReader(record)), record) })
	t.Run("early data behind it", func(t *testing.T) {
		sent := append(slices.Clone(record), 0x14, 3, 3, 0, 1, 1)
		check(t, bytes.NewReader(sent), sent)
	})
	for _, size := range []int{1, 2, 3, 5, 100, len(record) - 6} {
		sent := inRecords(record, size)
		check(t, bytes.NewReader(sent), sent)
		check(t, iotest.HalfReader(bytes.NewReader(sent)), sent)
	}
	for n := range len(record) {
		want := errMalformed
		if n == 0 {
			want = errEmpty
		}
		if _, _, err := peek(bytes.NewReader(record[:n]), make([]byte, firstPeek)); err != want {
			t.Errorf("cut after %d octets: %v, want %v", n, err, want)
		}
	}
}

func TestPeekLimits(t *testing.T) {
	long := slices.Repeat([]string{strings.Repeat("p", 250)}, 60) // 15,060 octets
	fits := clientHello(t, &tls.Config{ServerName: "a.b", NextProtos: long, MaxVersion: tls.VersionTLS12})
	if _, _, err := peek(bytes.NewReader(fits), make([]byte, firstPeek)); err != nil {
		t.Errorf("a ClientHello of %d octets: %v", len(fits), err)
	}
	over := clientHello(t, &tls.Config{ServerName: "a.b", NextProtos: slices.Repeat(long, 2)})
	for _, sent := range [][]byte{over, inRecords(over, 1000), inRecords(fits, 1)} {
		r := bytes.NewReader(sent)
		if _, _, err := peek(r, make([]byte, firstPeek)); err != errTooLong {
			t.Errorf("%d octets: %v, want %v", len(sent), err, errTooLong)
		}
		if read := len(sent) - r.Len(); read > maxPeek {
			t.Errorf("read %d octets, %d are allowed", read, maxPeek)
		}
	}
	broken := errors.New("broken")
	if _, _, err := peek(iotest.ErrReader(broken), make([]byte, firstPeek)); err != broken {
		t.Errorf("got %v, want the error of the connection", err)
	}
}

// body builds the body of a ClientHello with these extensions; each has its type and length in front.
func body(extensions ...string) []byte {
	b := append([]byte{3, 3}, make([]byte, 32)...)
	b = append(b, 0, 0, 2, 0x13, 1, 1, 0) // no session, one cipher suite, no compression
	all := strings.Join(extensions, "")
	return append(binary.BigEndian.AppendUint16(b, uint16(len(all))), all...)
}

func TestParseHello(t *testing.T) {
	name := "\x00\x00\x00\x08\x00\x06\x00\x00\x03a.b"
	alpn := "\x00\x10\x00\x05\x00\x03\x02h2"
	for _, c := range []struct {
		what string
		body []byte
		name string
		alpn []string
		bad  bool
	}{
		{what: "name and protocol", body: body(name, alpn), name: "a.b", alpn: []string{"h2"}},
		{what: "protocol first", body: body(alpn, name), name: "a.b", alpn: []string{"h2"}},
		{what: "neither", body: body()},
		{what: "no extensions", body: body()[:41]},
		{what: "name twice", body: body(name, name), bad: true},
		{what: "unknown extension twice", body: body("\x33\x33\x00\x00", "\x33\x33\x00\x00"), bad: true},
		{what: "two names in one list", body: body("\x00\x00\x00\x0c\x00\x0a\x00\x00\x02ab\x00\x00\x02cd"), bad: true},
		{what: "other type of name", body: body("\x00\x00\x00\x08\x00\x06\x01\x00\x03a.b"), bad: true},
		{what: "empty name", body: body("\x00\x00\x00\x05\x00\x03\x00\x00\x00"), bad: true},
		{what: "name with a NUL", body: body("\x00\x00\x00\x08\x00\x06\x00\x00\x03a\x00b"), bad: true},
		{what: "name with a bar", body: body("\x00\x00\x00\x08\x00\x06\x00\x00\x03a|b"), bad: true},
		{what: "name longer than its list", body: body("\x00\x00\x00\x08\x00\x06\x00\x00\x04a.b"), bad: true},
		{what: "octets behind the name", body: body("\x00\x00\x00\x09\x00\x06\x00\x00\x03a.b!"), bad: true},
		{what: "no protocol in the list", body: body("\x00\x10\x00\x02\x00\x00"), bad: true},
		{what: "empty protocol", body: body("\x00\x10\x00\x03\x00\x01\x00"), bad: true},
		{what: "extension cut short", body: body("\x00\x10\x00\x05\x00\x03"), bad: true},
		{what: "octets behind the extensions", body: append(body(name), 0), bad: true},
		{what: "too many extensions", body: body(many(maxExtensions + 1)...), bad: true},
		{what: "many extensions", body: body(many(maxExtensions)...)},
		{what: "empty", bad: true},
		{what: "SSL 2.0", body: append([]byte{2, 0}, body()[2:]...), bad: true},
	} {
		got, err := parseHello(c.body)
		if (err != nil) != c.bad || got.name != c.name || !slices.Equal(got.alpn, c.alpn) {
			t.Errorf("%s: got %+v, %v", c.what, got, err)
		}
	}
}

func many(n int) []string {
	var out []string
	for i := range n {
		out = append(out, string([]byte{0x40, byte(i), 0, 0}))
	}
	return out
}

// TestLikeCryptoTLS checks that what is accepted of damaged messages means the same to the standard library.
func TestLikeCryptoTLS(t *testing.T) {
	record := clientHello(t, &tls.Config{ServerName: "web-1.p80.birch.web.shop.global", NextProtos: []string{"istio", "istio-h2"}})
	r := rand.New(rand.NewPCG(1, 2))
	both := 0
	for range 5000 {
		data := slices.Clone(record)
		for range r.IntN(4) {
			data[r.IntN(len(data))] = byte(r.IntN(256))
		}
		h, _, err := peek(bytes.NewReader(data), make([]byte, firstPeek))
		name, alpn, ok := byCryptoTLS(data)
		if err != nil || !ok {
			continue
		}
		both++
		if strings.ToLower(name) != h.name || !slices.Equal(alpn, h.alpn) {
			t.Fatalf("got %+v, crypto/tls reads %q %q from\n%x", h, name, alpn, data)
		}
	}
	if both < 500 {
		t.Errorf("only %d messages were accepted by both", both)
	}
}

// FuzzPeek checks that no input crashes or makes the relay read without limit, and that it does not matter how the
// input arrives.
func FuzzPeek(f *testing.F) {
	record := clientHello(f, &tls.Config{ServerName: "web-1.p80.birch.web.shop.global", NextProtos: []string{"istio", "istio-h2"}})
	f.Add(record)
	f.Add(inRecords(record, 7))
	f.Add(clientHello(f, &tls.Config{ServerName: "A_.b", MaxVersion: tls.VersionTLS12}))
	f.Add(clientHello(f, &tls.Config{}))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, raw, err := peek(bytes.NewReader(data), make([]byte, 64))
		h2, raw2, err2 := peek(iotest.OneByteReader(bytes.NewReader(data)), make([]byte, firstPeek))
		if (err == nil) != (err2 == nil) || h.name != h2.name || !slices.Equal(h.alpn, h2.alpn) {
			t.Fatalf("read at once: %+v, %v; octet by octet: %+v, %v", h, err, h2, err2)
		}
		if len(raw) > maxPeek || !bytes.HasPrefix(data, raw) || !bytes.HasPrefix(raw, raw2) {
			t.Fatal("what is to be sent on is not what was read")
		}
	})
}
