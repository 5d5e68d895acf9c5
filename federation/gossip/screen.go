package gossip

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// memberlist believes the lengths that a message announces: thirty bytes make it allocate a hundred megabytes, and its
// compression more. So nothing reaches it before it was read here to its end, within these limits.
const (
	maxMembers = 4096    // in one exchange of states
	maxState   = 1 << 20 // bytes of ours that such an exchange carries
	maxEntries = 16      // of a map or list
	maxRaw     = 4096    // bytes of a string
	maxParts   = 255     // of a compound packet
)

// memberlist's message types.
const (
	pingMsg = iota
	indirectPingMsg
	ackRespMsg
	suspectMsg
	aliveMsg
	deadMsg
	pushPullMsg
	compoundMsg
	userMsg
	compressMsg
	encryptMsg
	nackRespMsg
	hasCrcMsg
	errMsg
)

var errScreen = errors.New("not a gossip message that members send")

// screenPacket checks one packet: no compression, no encryption, no nesting but one compound, and lengths that hold.
func screenPacket(b []byte) error {
	if len(b) > 5 && b[0] == hasCrcMsg {
		b = b[5:]
	}
	if len(b) < 2 || b[0] != compoundMsg {
		return screenMessage(b)
	}
	n := int(b[1])
	if b = b[2:]; n > maxParts || len(b) < 2*n {
		return fmt.Errorf("%w: compound of %d parts", errScreen, n)
	}
	lengths, rest := b[:2*n], b[2*n:]
	for i := range n {
		size := int(binary.BigEndian.Uint16(lengths[2*i:]))
		if size > len(rest) {
			return fmt.Errorf("%w: a part is cut", errScreen)
		}
		if err := screenMessage(rest[:size]); err != nil {
			return err
		}
		rest = rest[size:]
	}
	return nil
}

func screenMessage(b []byte) error {
	if len(b) == 0 {
		return fmt.Errorf("%w: empty", errScreen)
	}
	switch b[0] {
	case userMsg:
		if len(b) > 2*MaxPacket {
			return fmt.Errorf("%w: a broadcast of %d bytes", errScreen, len(b))
		}
		return nil
	case pingMsg, indirectPingMsg, ackRespMsg, suspectMsg, aliveMsg, deadMsg, nackRespMsg:
		w := walker{r: bufio.NewReaderSize(bytes.NewReader(b[1:]), 256)}
		return w.value(0, nil)
	}
	return fmt.Errorf("%w: type %d", errScreen, b[0])
}

// screenStream reads the one message of a stream to its end and returns it. Two kinds are known: an exchange of states,
// and an error.
func screenStream(r io.Reader) ([]byte, error) {
	w := walker{r: bufio.NewReaderSize(r, 4096)}
	kind, err := w.byte()
	if err != nil {
		return nil, err
	}
	switch kind {
	case errMsg:
		return w.buf, w.value(0, nil)
	case pushPullMsg:
	default:
		return nil, fmt.Errorf("%w: stream of type %d", errScreen, kind)
	}
	head := map[string]uint64{}
	if err := w.value(0, head); err != nil {
		return nil, err
	}
	if head["Nodes"] > maxMembers || head["UserStateLen"] > maxState {
		return nil, fmt.Errorf("%w: %d members, %d bytes of state", errScreen, head["Nodes"], head["UserStateLen"])
	}
	for range head["Nodes"] {
		if err := w.value(0, nil); err != nil {
			return nil, err
		}
	}
	return w.buf, w.copy(int(head["UserStateLen"]))
}

// walker reads MessagePack and keeps what it read.
type walker struct {
	r   *bufio.Reader
	buf []byte
}

func (w *walker) byte() (byte, error) {
	b, err := w.r.ReadByte()
	if err == nil {
		w.buf = append(w.buf, b)
	}
	return b, err
}

func (w *walker) number(size int) (uint64, error) {
	var n uint64
	for range size {
		b, err := w.byte()
		if err != nil {
			return 0, err
		}
		n = n<<8 | uint64(b)
	}
	return n, nil
}

// copy reads n bytes as they come: memory grows with what arrives.
func (w *walker) copy(n int) error {
	for n > 0 {
		step := min(n, 4096)
		at := len(w.buf)
		w.buf = append(w.buf, make([]byte, step)...)
		if _, err := io.ReadFull(w.r, w.buf[at:]); err != nil {
			return err
		}
		n -= step
	}
	return nil
}

// value reads a map of strings to plain values (depth 0), or a plain value or a list of such. Numbers of the map go to
// fields, unless it is nil; a negative one is refused there.
func (w *walker) value(depth int, fields map[string]uint64) error {
	b, err := w.byte()
	if err != nil {
		return err
	}
	entries := -1
	switch {
	case b&0xf0 == 0x80:
		entries = int(b & 0x0f)
	case b == 0xde:
		n, err := w.number(2)
		if err != nil {
			return err
		}
		entries = int(n)
	}
	if depth == 0 {
		if entries < 0 || entries > maxEntries {
			return fmt.Errorf("%w: not a map of at most %d entries", errScreen, maxEntries)
		}
		for range entries {
			if err := w.entry(fields); err != nil {
				return err
			}
		}
		return nil
	}
	if entries >= 0 {
		return fmt.Errorf("%w: a map within a map", errScreen)
	}
	_, err = w.plain(b, depth)
	return err
}

// entry reads a key and its value.
func (w *walker) entry(fields map[string]uint64) error {
	b, err := w.byte()
	if err != nil {
		return err
	}
	at, err := w.raw(b)
	if err != nil {
		return err
	}
	key := string(w.buf[at:])
	if fields == nil {
		return w.value(1, nil)
	}
	if _, twice := fields[key]; twice {
		return fmt.Errorf("%w: a field twice", errScreen)
	}
	if b, err = w.byte(); err != nil {
		return err
	}
	fields[key], err = w.plain(b, 1)
	return err
}

// raw reads a string whose first byte is b, and returns where it begins.
func (w *walker) raw(b byte) (int, error) {
	var n uint64
	var err error
	switch {
	case b&0xe0 == 0xa0:
		n = uint64(b & 0x1f)
	case b == 0xd9 || b == 0xc4:
		n, err = w.number(1)
	case b == 0xda || b == 0xc5:
		n, err = w.number(2)
	case b == 0xdb || b == 0xc6:
		n, err = w.number(4)
	default:
		return 0, fmt.Errorf("%w: byte %#x where a string is due", errScreen, b)
	}
	if err != nil {
		return 0, err
	}
	if n > maxRaw {
		return 0, fmt.Errorf("%w: a string of %d bytes", errScreen, n)
	}
	at := len(w.buf)
	return at, w.copy(int(n))
}

// plain reads a number, a truth value, nil, a string or a list of numbers, whose first byte is b. Of numbers it returns the
// value.
func (w *walker) plain(b byte, depth int) (uint64, error) {
	switch {
	case b < 0x80: // small number
		return uint64(b), nil
	case b == 0xc0 || b == 0xc2 || b == 0xc3: // nil, false, true
		return 0, nil
	case b >= 0xcc && b <= 0xcf:
		return w.number(1 << (b - 0xcc))
	case b >= 0xd0 && b <= 0xd3:
		n, err := w.number(1 << (b - 0xd0))
		if bits := 8 << (b - 0xd0); err == nil && n>>(bits-1) != 0 {
			err = fmt.Errorf("%w: a negative number", errScreen)
		}
		return n, err
	case b&0xf0 == 0x90 && depth == 1:
		for range b & 0x0f {
			next, err := w.byte()
			if err != nil {
				return 0, err
			}
			if _, err := w.plain(next, depth+1); err != nil {
				return 0, err
			}
		}
		return 0, nil
	}
	_, err := w.raw(b)
	return 0, err
}

// screened is a stream of which memberlist reads nothing that was not screened: one message, then the end.
type screened struct {
	net.Conn
	once sync.Once
	left []byte
	err  error
}

// Read implements net.Conn.
func (s *screened) Read(p []byte) (int, error) {
	s.once.Do(func() {
		if s.left, s.err = screenStream(s.Conn); s.err != nil {
			s.left = nil
		}
	})
	if len(s.left) > 0 || len(p) == 0 && s.err == nil {
		n := copy(p, s.left)
		s.left = s.left[n:]
		return n, nil
	}
	if s.err == nil {
		return 0, io.EOF
	}
	return 0, s.err
}
