package zone

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// Result says what came of a question.
type Result uint8

// The results of Reply.
const (
	NotOurs  Result = iota // no reply was made: the question is for others
	Answered               // there are records
	NoData                 // the name exists, records of the type do not
	NoName                 // the name does not exist
	Refused                // class, opcode or EDNS version is none that is answered
)

// String returns the result in one word, as metrics show it.
func (r Result) String() string {
	return [...]string{"not_ours", "answer", "nodata", "nxdomain", "refused"}[r]
}

const (
	questionAt = 12 // where the question stands in a message
	optLen     = 11 // of an OPT record without options
	// ownSize is the largest message over UDP that we ask others to send: what passes without fragments.
	ownSize = 1232
)

// Size returns the largest reply to q over the transport: over UDP what the client says it takes (RFC 6891, section 6.2.3), most at most.
func Size(q *dns.Msg, tcp bool, most int) int {
	if tcp {
		return dns.MaxMsgSize
	}
	if opt := optOf(q); opt != nil {
		return max(dns.MinMsgSize, min(int(opt.UDPSize()), most))
	}
	return dns.MinMsgSize
}

func optOf(q *dns.Msg) *dns.OPT {
	for _, rr := range q.Extra {
		if opt, ok := rr.(*dns.OPT); ok {
			return opt
		}
	}
	return nil
}

// Answer returns the reply to q, however large, and whether the question was ours; when it was not, the reply is nil.
func (z *Zone) Answer(q *dns.Msg) (*dns.Msg, bool) {
	wire, result := z.Reply(nil, q, dns.MaxMsgSize)
	if result == NotOurs {
		return nil, false
	}
	m := new(dns.Msg)
	if m.Unpack(wire) != nil { // cannot be: the tests unpack every reply to any question
		return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure), true
	}
	m.Compress = true
	return m, true
}

// Reply makes the reply to q, of size octets at most, in buf, which it may replace by a larger one. When the question is
// not ours there is none. What does not fit is left out, and TC is set if that is an answer.
func (z *Zone) Reply(buf []byte, q *dns.Msg, size int) ([]byte, Result) {
	if len(q.Question) != 1 || q.Response {
		return buf, NotOurs
	}
	var keep [maxName + 2]byte
	question := &q.Question[0]
	name := lower(keep[:0], question.Name)
	r := reply{b: buf[:0], limit: size, opt: optOf(q), ttl: z.opts.TTL}
	if !r.begin(q) {
		return buf, NotOurs
	}
	result := r.refusal(q)
	if result == Refused {
		if !z.ours(name) {
			return buf, NotOurs
		}
	} else if result = z.fill(&r, question.Qtype, q.Id, name); result == NotOurs {
		return buf, NotOurs
	}
	return r.end(q, result, z.opts.Recursive), result
}

// lower appends the canonical form of a name.
func lower(b []byte, name string) []byte {
	for i := range len(name) {
		c := name[i]
		if c >= 'A' && c <= 'Z' {
			c |= 0x20
		}
		b = append(b, c)
	}
	if len(name) == 0 || name[len(name)-1] != '.' {
		b = append(b, '.')
	}
	return b
}

// ours reports whether a canonical name is this Zone's to answer.
func (z *Zone) ours(name []byte) bool {
	if z.zoneOf(name) != nil {
		return true
	}
	e := z.names.byName(name)
	return e != nil && e.host && !z.opts.OnlyZones
}

// fill appends the records for the question and says what they come to.
func (z *Zone) fill(r *reply, qtype, id uint16, name []byte) Result {
	e, p, exists := z.find(name)
	if e != nil && !(z.opts.OnlyZones && z.zoneOf(name) == nil) {
		if z.records(r, e, p, qtype, id, name) {
			return Answered
		}
		if a := z.zoneOf(name); a != nil {
			return z.negative(r, a, qtype, name, NoData)
		}
		switch qtype {
		case dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeSRV:
			return NoData
		}
		return NotOurs // mail and the like go on as they did: the host in the mesh is about connections to it
	}
	a := z.zoneOf(name)
	if addr, ok := reverse(name); ok {
		if e := z.addrs.byAddr(addr); e != nil {
			if qtype == dns.TypePTR {
				r.name(dns.TypePTR, e.name)
				return Answered
			}
			return z.negative(r, a, qtype, name, NoData)
		}
	}
	switch {
	case a == nil:
		return NotOurs
	case exists:
		return z.negative(r, a, qtype, name, NoData)
	}
	return z.negative(r, a, qtype, name, NoName)
}

// find returns the host of a canonical name, with the port when it is that of a service, and whether the name exists.
func (z *Zone) find(name []byte) (*entry, *port, bool) {
	if e := z.names.byName(name); e != nil {
		if e.host {
			return e, nil, true
		}
		return nil, nil, true // RFC 4592, section 2.2.2: an existing name is not synthesised
	}
	if name[0] == '_' {
		return z.service(name)
	}
	if e := z.closest(name); e != nil {
		return e, nil, true
	}
	return nil, nil, false
}

// service reads _PORT._PROTOCOL.HOST, and _PROTOCOL.HOST, which exists where the former does.
func (z *Zone) service(name []byte) (*entry, *port, bool) {
	i := slices.Index(name, '.')
	first, rest := name[1:i], name[i+1:]
	proto := ""
	if len(rest) > 0 && rest[0] == '_' {
		i = slices.Index(rest, '.')
		proto, rest = string(rest[1:i]), rest[i+1:]
	}
	e := z.names.byName(rest)
	if e == nil {
		e = z.closest(rest)
	}
	if e == nil || !e.host {
		return nil, nil, false
	}
	for p := range e.each() {
		switch {
		case p.name == "":
		case proto == "" && p.proto == string(first):
			return nil, nil, true
		case p.proto == proto && p.name == string(first):
			return e, &p, true
		}
	}
	return nil, nil, false
}

// records appends the records of a host, or of one of its ports, and reports whether there are any.
func (z *Zone) records(r *reply, e *entry, p *port, qtype, id uint16, name []byte) bool {
	switch {
	case qtype == dns.TypeANY:
		r.hinfo()
	case p != nil && qtype == dns.TypeSRV:
		_, target, _ := strings.Cut(string(name), ".")
		_, target, _ = strings.Cut(target, ".")
		z.srv(r, e, p, target)
	case p != nil:
	case qtype == dns.TypeA:
		r.set(e.a(), aLen, e.turn(id, int(e.n4)))
	case qtype == dns.TypeAAAA:
		r.set(e.aaaa(), aaaaLen, e.turn(id, int(e.n6)))
	case qtype == dns.TypeSRV:
		z.srv(r, e, nil, string(name))
	}
	return r.an > 0 || r.cut
}

// turn says with which record an answer begins: those of pods take turns, as clients prefer the first.
func (e *entry) turn(id uint16, n int) int {
	if n < 2 || !e.apart {
		return 0
	}
	return int(id) % n
}

// srv appends one record for each port number and target, the host itself or the pods of a headless one, and in the
// additional section the addresses of the targets.
func (z *Zone) srv(r *reply, e *entry, only *port, host string) {
	targets := e.srv
	if len(targets) == 0 {
		targets = []string{host}
	}
	offsets := make([]int, len(targets))
	for i, target := range targets {
		var seen []uint16
		for p := range e.each() {
			if only != nil && p != *only || slices.Contains(seen, p.number) {
				continue
			}
			seen = append(seen, p.number)
			offsets[i] = r.srv(p.number, target)
		}
	}
	for i, target := range targets {
		t := e
		if target != host {
			t = z.names.byName([]byte(target))
		}
		if t != nil && offsets[i] > 0 && !r.cut {
			r.more(t, offsets[i])
		}
	}
}

// negative answers for the zone itself, and for what exists in every zone, else appends the SOA that says how long to
// remember that there is nothing (RFC 2308). a may be nil.
func (z *Zone) negative(r *reply, a *apex, qtype uint16, name []byte, result Result) Result {
	if a == nil {
		return result
	}
	switch below := name[:len(name)-len(a.name)]; string(below) {
	case "":
		result = NoData
		switch qtype {
		case dns.TypeSOA:
			r.soa(a, z.serial)
			return Answered
		case dns.TypeNS:
			r.server(a)
			return Answered
		case dns.TypeANY:
			r.hinfo()
			return Answered
		}
	case "dns-version.":
		result = NoData
		if qtype == dns.TypeTXT {
			r.text(a.version)
			return Answered
		}
	case "ns.dns.", "dns.":
		result = NoData
	}
	r.authority = true
	r.soa(a, z.serial)
	return result
}

// reverse reads the name of an address below in-addr.arpa or ip6.arpa.
func reverse(name []byte) (netip.Addr, bool) {
	const v4, v6 = ".in-addr.arpa.", ".ip6.arpa."
	switch at4, at6 := len(name)-len(v4), len(name)-len(v6); {
	case at4 > 0 && at4 <= 15 && string(name[at4:]) == v4:
		parts := strings.Split(string(name[:at4]), ".")
		slices.Reverse(parts)
		a, err := netip.ParseAddr(strings.Join(parts, "."))
		return a, err == nil && a.Is4()
	case at6 == 63 && string(name[at6:]) == v6:
		var b [16]byte
		for i := range 32 {
			nibble := strings.IndexByte("0123456789abcdef", name[62-2*i])
			if nibble < 0 || i < 31 && name[61-2*i] != '.' {
				return netip.Addr{}, false
			}
			b[i/2] = b[i/2]<<4 | byte(nibble)
		}
		return netip.AddrFrom16(b), true
	}
	return netip.Addr{}, false
}

// reply is a message being written.
type reply struct {
	b         []byte
	limit     int // octets
	opt       *dns.OPT
	ttl       uint32
	nameLen   int // of the question's name
	an, ns    uint16
	ar        uint16
	badVers   bool
	notImp    bool
	cut       bool // an answer did not fit
	authority bool // what follows goes there
}

// begin writes the question and leaves room for the head; false when the name cannot be written.
func (r *reply) begin(q *dns.Msg) bool {
	if r.opt != nil {
		r.limit -= optLen
	}
	if cap(r.b) < 512 {
		r.b = make([]byte, 0, 512)
	}
	var ok bool
	if r.b, ok = appendName(append(r.b, make([]byte, questionAt)...), q.Question[0].Name); !ok {
		return false
	}
	r.nameLen = len(r.b) - questionAt
	r.b = binary.BigEndian.AppendUint16(r.b, q.Question[0].Qtype)
	r.b = binary.BigEndian.AppendUint16(r.b, q.Question[0].Qclass)
	return true
}

// refusal returns Refused when the question is of a kind that nobody here answers.
func (r *reply) refusal(q *dns.Msg) Result {
	r.notImp = q.Opcode != dns.OpcodeQuery
	r.badVers = r.opt != nil && r.opt.Version() != 0
	if class := q.Question[0].Qclass; r.notImp || r.badVers || class != dns.ClassINET && class != dns.ClassANY {
		return Refused
	}
	return NotOurs
}

// end writes the head and the OPT record.
func (r *reply) end(q *dns.Msg, result Result, recursive bool) []byte {
	rcode := 0
	switch {
	case result == NoName:
		rcode = dns.RcodeNameError
	case r.badVers:
		rcode = dns.RcodeBadVers
	case r.notImp:
		rcode = dns.RcodeNotImplemented
	case result == Refused:
		rcode = dns.RcodeRefused
	}
	if r.opt != nil {
		var flags uint16
		if r.opt.Do() {
			flags = 0x8000
		}
		r.b = append(r.b, 0)
		r.b = binary.BigEndian.AppendUint16(r.b, dns.TypeOPT)
		r.b = binary.BigEndian.AppendUint16(r.b, ownSize)
		r.b = append(r.b, byte(rcode>>4), 0)
		r.b = binary.BigEndian.AppendUint16(r.b, flags)
		r.b = append(r.b, 0, 0)
		r.ar++
	}
	bit := func(on bool, b byte) byte {
		if on {
			return b
		}
		return 0
	}
	h := r.b[:questionAt]
	binary.BigEndian.PutUint16(h, q.Id)
	h[2] = 0x80 | byte(q.Opcode&15)<<3 | bit(result != Refused, 4) | bit(r.cut, 2) | bit(q.RecursionDesired, 1)
	h[3] = bit(recursive, 0x80) | bit(q.CheckingDisabled, 0x10) | byte(rcode&15)
	binary.BigEndian.PutUint16(h[4:], 1)
	binary.BigEndian.PutUint16(h[6:], r.an)
	binary.BigEndian.PutUint16(h[8:], r.ns)
	binary.BigEndian.PutUint16(h[10:], r.ar)
	return r.b
}

// took counts the record that was just written from offset on, or takes it back when it does not fit.
func (r *reply) took(from int) bool {
	if len(r.b) > r.limit {
		r.b = r.b[:from]
		r.cut = r.cut || !r.authority
		return false
	}
	if r.authority {
		r.ns++
	} else {
		r.an++
	}
	return true
}
