package zone

import (
	"encoding/binary"
	"strings"

	"github.com/miekg/dns"
)

// The numbers of a SOA record that matter to secondaries, of which there are none.
const (
	soaRefresh = 7200
	soaRetry   = 1800
	soaExpire  = 86400
)

// appendName appends a name as it is sent, and reports whether it is one.
func appendName(b []byte, name string) ([]byte, bool) {
	if strings.IndexByte(name, '\\') >= 0 {
		var wire [256]byte
		n, err := dns.PackDomainName(dns.Fqdn(name), wire[:], 0, nil, false)
		if err != nil {
			return b, false
		}
		return append(b, wire[:n]...), true
	}
	from := len(b)
	for name != "" && name != "." {
		label, rest, _ := strings.Cut(name, ".")
		if label == "" || len(label) > 63 {
			return b, false
		}
		b = append(append(b, byte(len(label))), label...)
		name = rest
	}
	b = append(b, 0)
	return b, len(b)-from <= 255
}

// set appends records of one size that are ready, beginning with one of them.
func (r *reply) set(records string, size, first int) {
	if len(r.b)+len(records) <= r.limit {
		r.b = append(append(r.b, records[first*size:]...), records[:first*size]...)
		r.an += uint16(len(records) / size)
		return
	}
	n := len(records) / size
	for i := range n {
		at := (first + i) % n * size
		from := len(r.b)
		r.b = append(r.b, records[at:at+size]...)
		if !r.took(from) {
			return
		}
	}
}

// srv appends one SRV record and returns where its target stands, 0 when it did not fit.
func (r *reply) srv(number uint16, target string) int {
	from := len(r.b)
	r.b = appendHead(r.b, dns.TypeSRV, r.ttl, 0)
	r.b = append(r.b, 0, 0, 0, 100) // priority and weight: all alike
	r.b = binary.BigEndian.AppendUint16(r.b, number)
	at := len(r.b)
	return r.rest(from, at, target)
}

// rest appends a name that ends the record from an offset on, and returns where it stands, 0 when it did not fit.
func (r *reply) rest(from, at int, name string) int {
	var ok bool
	if r.b, ok = appendName(r.b, name); !ok {
		r.b = r.b[:from]
		return 0
	}
	binary.BigEndian.PutUint16(r.b[from+headLen-2:], uint16(len(r.b)-from-headLen))
	if !r.took(from) {
		return 0
	}
	return at
}

// name appends a record that is a name.
func (r *reply) name(rrtype uint16, name string) {
	from := len(r.b)
	r.b = appendHead(r.b, rrtype, r.ttl, 0)
	r.rest(from, len(r.b), name)
}

// more appends the addresses of a name that stands at an offset to the additional section, as far as they fit.
func (r *reply) more(e *entry, owner int) {
	if owner >= 1<<14 {
		return // a pointer does not reach it
	}
	for a := range e.addrs() {
		size, rrtype := aLen, dns.TypeA
		if a.Is6() {
			size, rrtype = aaaaLen, dns.TypeAAAA
		}
		if len(r.b)+size > r.limit {
			return
		}
		r.b = append(appendHeadAt(r.b, owner, rrtype, r.ttl, size-headLen), a.AsSlice()...)
		r.ar++
	}
}

// text appends a TXT record.
func (r *reply) text(s string) {
	from := len(r.b)
	r.b = append(append(appendHead(r.b, dns.TypeTXT, r.ttl, len(s)+1), byte(len(s))), s...)
	r.took(from)
}

// hinfo appends the least answer to a question for all types (RFC 8482, section 4.2).
func (r *reply) hinfo() {
	const cpu = "RFC8482"
	from := len(r.b)
	r.b = append(append(appendHead(r.b, dns.TypeHINFO, r.ttl, len(cpu)+2), byte(len(cpu))), cpu...)
	r.b = append(r.b, 0)
	r.took(from)
}

// below appends labels before the name of the zone, which ends the question's.
func (r *reply) below(a *apex, labels ...string) {
	for _, l := range labels {
		r.b = append(append(r.b, byte(len(l))), l...)
	}
	r.b = binary.BigEndian.AppendUint16(r.b, 0xc000|uint16(r.at(a)))
}

// at returns where the zone's name stands in the message.
func (r *reply) at(a *apex) int { return questionAt + r.nameLen - a.wire }

// soa appends the zone's SOA.
func (r *reply) soa(a *apex, serial uint32) {
	from := len(r.b)
	r.b = appendHeadAt(r.b, r.at(a), dns.TypeSOA, r.ttl, 0)
	r.below(a, "ns", "dns")
	r.below(a, "hostmaster")
	for _, n := range []uint32{serial, soaRefresh, soaRetry, soaExpire, r.ttl} {
		r.b = binary.BigEndian.AppendUint32(r.b, n)
	}
	binary.BigEndian.PutUint16(r.b[from+headLen-2:], uint16(len(r.b)-from-headLen))
	r.took(from)
}

// server appends the zone's NS.
func (r *reply) server(a *apex) {
	from := len(r.b)
	r.b = appendHeadAt(r.b, r.at(a), dns.TypeNS, r.ttl, 0)
	r.below(a, "ns", "dns")
	binary.BigEndian.PutUint16(r.b[from+headLen-2:], uint16(len(r.b)-from-headLen))
	r.took(from)
}
