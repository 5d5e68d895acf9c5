package zone

import (
	"encoding/binary"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"unique"

	"github.com/miekg/dns"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
)

// Sizes of records whose owner is a pointer to the question (RFC 1035, section 4.1.4).
const (
	headLen = 12 // owner, type, class, TTL, length
	aLen    = headLen + 4
	aaaaLen = headLen + 16
	// maxAddresses of one family is what fits in a message over TCP, and more.
	maxAddresses = 4096
	// maxPorts of one host.
	maxPorts = 1024
	maxLabel = 62 // with the underscore that stands before it
	// maxName is how long a name is as text, without escapes (RFC 1035, section 2.3.4).
	maxName = 254
)

// entry is a name that exists. It is not changed after it was made.
type entry struct {
	name   string   // canonical: lower case, with the dot at the end
	rr     string   // of a host: its A records, then its AAAA records, as they are sent
	ports  portSet  // zero: none
	srv    []string // targets of SRV in place of the host itself, canonical
	kids   int32    // how many names exist one label below
	n4, n6 uint16
	host   bool // false: it exists because of what is below it
	apart  bool // headless: PTR is not answered
}

// portSet is the ports of a host, one after another: length and name, length and protocol, number. Hosts with equal
// ports share one, which keeps a name small.
type portSet = unique.Handle[string]

type port struct {
	name, proto string
	number      uint16
}

// newEntry reads a host; nil when its name cannot be one. What else cannot be read in it is left out.
func newEntry(name string, h *dnsv1.Host, ttl uint32) *entry {
	name = dns.CanonicalName(name)
	if _, ok := dns.IsDomainName(name); !ok || name == "." || len(name) > maxName || strings.ContainsRune(name, '\\') {
		return nil
	}
	var v4, v6 []netip.Addr
	for _, text := range h.GetAddresses() {
		a, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		if a = a.Unmap().WithZone(""); a.Is4() {
			v4 = append(v4, a)
		} else {
			v6 = append(v6, a)
		}
	}
	v4, v6 = cut(v4), cut(v6)
	text := make([]byte, 0, len(name)+len(v4)*aLen+len(v6)*aaaaLen)
	text = append(text, name...)
	for _, a := range v4 {
		text = append(appendHead(text, dns.TypeA, ttl, 4), a.AsSlice()...)
	}
	for _, a := range v6 {
		text = append(appendHead(text, dns.TypeAAAA, ttl, 16), a.AsSlice()...)
	}
	all := string(text)
	return &entry{
		name: all[:len(name)], rr: all[len(name):], n4: uint16(len(v4)), n6: uint16(len(v6)),
		ports: newPortSet(h.GetPorts()), srv: newTargets(h.GetTargets()), host: true, apart: h.GetHeadless(),
	}
}

// cut drops addresses that come twice and those that are too many, and keeps the order.
func cut(addrs []netip.Addr) []netip.Addr {
	seen := make(map[netip.Addr]bool, len(addrs))
	addrs = slices.DeleteFunc(addrs, func(a netip.Addr) bool {
		twice := seen[a]
		seen[a] = true
		return twice
	})
	return addrs[:min(len(addrs), maxAddresses)]
}

// appendHead appends the head of a record whose owner is the name in the question.
func appendHead(b []byte, rrtype uint16, ttl uint32, length int) []byte {
	return appendHeadAt(b, questionAt, rrtype, ttl, length)
}

// appendHeadAt appends the head of a record whose owner stands at an offset of the message.
func appendHeadAt(b []byte, owner int, rrtype uint16, ttl uint32, length int) []byte {
	b = binary.BigEndian.AppendUint16(b, 0xc000|uint16(owner))
	b = binary.BigEndian.AppendUint16(b, rrtype)
	b = binary.BigEndian.AppendUint16(b, dns.ClassINET)
	b = binary.BigEndian.AppendUint32(b, ttl)
	return binary.BigEndian.AppendUint16(b, uint16(length))
}

// wildcard reports whether the entry stands for names below.
func (e *entry) wildcard() bool { return e.host && strings.HasPrefix(e.name, "*.") }

func (e *entry) a() string    { return e.rr[:int(e.n4)*aLen] }
func (e *entry) aaaa() string { return e.rr[int(e.n4)*aLen:] }

// reversible gives the addresses that PTR is answered for.
func (e *entry) reversible() iter.Seq[netip.Addr] {
	if !e.host || e.apart || e.wildcard() {
		return func(func(netip.Addr) bool) {}
	}
	return e.addrs()
}

// addrs gives every address.
func (e *entry) addrs() iter.Seq[netip.Addr] {
	return func(yield func(netip.Addr) bool) {
		for s := e.a(); s != ""; s = s[aLen:] {
			if !yield(netip.AddrFrom4([4]byte([]byte(s[headLen:aLen])))) {
				return
			}
		}
		for s := e.aaaa(); s != ""; s = s[aaaaLen:] {
			if !yield(netip.AddrFrom16([16]byte([]byte(s[headLen:aaaaLen])))) {
				return
			}
		}
	}
}

func (e *entry) hasAddr(a netip.Addr) bool {
	for b := range e.reversible() {
		if a == b {
			return true
		}
	}
	return false
}

// proto returns the entry as a host again.
func (e *entry) proto() *dnsv1.Host {
	h := &dnsv1.Host{Name: strings.TrimSuffix(e.name, "."), Headless: e.apart}
	for a := range e.addrs() {
		h.Addresses = append(h.Addresses, a.String())
	}
	for p := range e.each() {
		h.Ports = append(h.Ports, &dnsv1.Port{Name: p.name, Number: uint32(p.number), Protocol: p.proto})
	}
	for _, t := range e.srv {
		h.Targets = append(h.Targets, strings.TrimSuffix(t, "."))
	}
	return h
}

// newPortSet packs ports; names and protocols that no question can have are left out.
func newPortSet(list []*dnsv1.Port) portSet {
	var b []byte
	for _, x := range list[:min(len(list), maxPorts)] {
		name, proto := strings.ToLower(x.GetName()), strings.ToLower(x.GetProtocol())
		if x.GetNumber() == 0 || x.GetNumber() > 65535 || len(name) > maxLabel || len(proto) > maxLabel {
			continue
		}
		b = append(append(b, byte(len(name))), name...)
		b = append(append(b, byte(len(proto))), proto...)
		b = binary.BigEndian.AppendUint16(b, uint16(x.GetNumber()))
	}
	if b == nil {
		return portSet{}
	}
	return unique.Make(string(b))
}

// each gives the ports in their order.
func (e *entry) each() iter.Seq[port] {
	return func(yield func(port) bool) {
		if e.ports == (portSet{}) {
			return
		}
		for s := e.ports.Value(); s != ""; {
			var p port
			p.name, s = s[1:1+s[0]], s[1+s[0]:]
			p.proto, s = s[1:1+s[0]], s[1+s[0]:]
			p.number, s = uint16(s[0])<<8|uint16(s[1]), s[2:]
			if !yield(p) {
				return
			}
		}
	}
}

func newTargets(list []string) []string {
	var out []string
	for _, t := range list[:min(len(list), maxAddresses)] {
		if t = dns.CanonicalName(t); len(t) <= maxName && !strings.ContainsRune(t, '\\') {
			out = append(out, t)
		}
	}
	return out
}
