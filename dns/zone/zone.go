// Package zone answers DNS questions about the hosts of the mesh. It is pure: hosts and a question in, an answer out.
// The CoreDNS plugin and isthmus-agent both use it, so that pods and machines get the same answers.
package zone

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Options say what a Zone is responsible for.
type Options struct {
	// Zones are the suffixes it answers for, such as "global"; a name below one of them that has no host does not
	// exist. Hosts outside of them are answered, too, unless OnlyZones is set.
	Zones []string
	// OnlyZones leaves hosts outside Zones to others.
	OnlyZones bool
	// TTL of every record in seconds; 0 means DefaultTTL. Raising it saves questions and shows changes later.
	TTL uint32
}

// DefaultTTL is short because answers change with the mesh.
const DefaultTTL = 5

// Version answers TXT dns-version.ZONE (Kubernetes DNS specification, section 2.2); that of the names of multi-cluster
// services is their own.
const (
	Version           = "1.1.0"
	ClusterSetVersion = "1.0.0"
)

// Hosts returns what DNS servers of the local cluster answer for a Snapshot, sorted by name.
func Hosts(snap *mesh.Snapshot) []*dnsv1.Host { return HostsIn(snap, snap.Local.ID) }

// HostsIn returns what DNS servers answer clients in one of the clusters that the local control plane reads.
func HostsIn(snap *mesh.Snapshot, cluster mesh.ClusterID) []*dnsv1.Host {
	var out []*dnsv1.Host
	for _, s := range snap.Services {
		if asDialled(s) && len(s.VIPsIn(cluster)) == 0 {
			continue // its clients ask whoever knows the name
		}
		h := &dnsv1.Host{Name: s.Host, Headless: s.Headless}
		for _, a := range s.VIPsIn(cluster) {
			h.Addresses = append(h.Addresses, a.String())
		}
		if s.Headless {
			for _, e := range s.Endpoints {
				if a, err := netip.ParseAddr(e.Address); err == nil && e.Ready && e.Cluster == cluster {
					h.Addresses = append(h.Addresses, a.String())
				}
			}
			slices.Sort(h.Addresses)
			h.Addresses = slices.Compact(h.Addresses)
		}
		for _, p := range s.Ports {
			proto := "tcp"
			if p.Protocol == mesh.UDP {
				proto = "udp"
			}
			h.Ports = append(h.Ports, &dnsv1.Port{Name: p.Name, Number: p.Number, Protocol: proto})
		}
		out = append(out, h)
		out = append(out, clusterSet(snap, s)...)
	}
	slices.SortStableFunc(out, func(a, b *dnsv1.Host) int { return strings.Compare(a.Name, b.Name) })
	return slices.CompactFunc(out, func(a, b *dnsv1.Host) bool { return a.Name == b.Name }) // a pod's name may come from both its hosts
}

// asDialled reports whether connections go to the addresses that clients have from elsewhere: the service has none of its own.
func asDialled(s *mesh.Service) bool { return s.Resolution == mesh.None || len(s.Ranges) > 0 }

// Zone is an immutable index of hosts.
type Zone struct {
	opts  Options
	zones []string // fully qualified, lower case
	hosts map[string]*host
	names map[string]bool     // names that exist only because something below them does
	ptr   map[string]string   // reverse name -> host
	pods  map[string][]string // headless host -> the names of its pods, sorted
}

type host struct {
	v4, v6 []netip.Addr
	ports  []*dnsv1.Port
}

// New indexes hosts by name. What cannot be read in a host is left out.
func New(hosts map[string]*dnsv1.Host, o Options) *Zone {
	if o.TTL == 0 {
		o.TTL = DefaultTTL
	}
	z := &Zone{opts: o, hosts: make(map[string]*host, len(hosts)), names: map[string]bool{}, ptr: map[string]string{}, pods: podsOf(hosts)}
	for _, s := range o.Zones {
		z.zones = append(z.zones, dns.CanonicalName(s))
	}
	for key, h := range hosts {
		name := dns.CanonicalName(key)
		x := &host{ports: h.GetPorts()}
		for _, text := range h.GetAddresses() {
			a, err := netip.ParseAddr(text)
			if err != nil {
				continue
			}
			if a = a.Unmap(); a.Is4() {
				x.v4 = append(x.v4, a)
			} else {
				x.v6 = append(x.v6, a)
			}
			if rev, err := dns.ReverseAddr(a.String()); err == nil && !h.GetHeadless() && !strings.HasPrefix(name, "*") {
				if have, taken := z.ptr[rev]; !taken || name < have {
					z.ptr[rev] = name
				}
			}
		}
		z.hosts[name] = x
		for _, p := range x.ports {
			if p.GetName() != "" {
				z.exist("_" + p.GetName() + "._" + p.GetProtocol() + "." + name)
			}
		}
		z.exist(name)
	}
	return z
}

// exist marks every name above name.
func (z *Zone) exist(name string) {
	for {
		i := strings.IndexByte(name, '.')
		if i < 0 || i+1 >= len(name) {
			return
		}
		if name = name[i+1:]; z.names[name] {
			return
		}
		z.names[name] = true
	}
}

// Len returns how many hosts there are.
func (z *Zone) Len() int { return len(z.hosts) }

// Ours reports whether name, which may be in any case, is this Zone's to answer.
func (z *Zone) Ours(name string) bool {
	name = dns.CanonicalName(name)
	if _, known := z.ptr[name]; known || z.zoneOf(name) != "" {
		return true
	}
	return !z.opts.OnlyZones && z.find(name) != nil
}

// Answer returns the reply to q and whether the question was ours; when it was not, the reply is nil.
func (z *Zone) Answer(q *dns.Msg) (*dns.Msg, bool) {
	if len(q.Question) != 1 || q.Opcode != dns.OpcodeQuery {
		return nil, false
	}
	question := q.Question[0]
	if question.Qclass != dns.ClassINET && question.Qclass != dns.ClassANY || !z.Ours(question.Name) {
		return nil, false
	}
	m := new(dns.Msg)
	m.SetReply(q)
	m.Authoritative = true
	name := dns.CanonicalName(question.Name)
	exists := z.fill(m, question, name)
	if len(m.Answer) == 0 {
		if !exists {
			m.Rcode = dns.RcodeNameError
		}
		if apex := z.zoneOf(name); apex != "" {
			m.Ns = []dns.RR{z.soa(apex)}
		}
	}
	return m, true
}

// fill appends the records for the question and reports whether the name exists at all.
func (z *Zone) fill(m *dns.Msg, q dns.Question, name string) bool {
	header := func(t uint16) dns.RR_Header {
		return dns.RR_Header{Name: q.Name, Rrtype: t, Class: dns.ClassINET, Ttl: z.opts.TTL}
	}
	want := func(t uint16) bool { return q.Qtype == t || q.Qtype == dns.TypeANY }
	if target, ok := z.ptr[name]; ok {
		if want(dns.TypePTR) {
			m.Answer = append(m.Answer, &dns.PTR{Hdr: header(dns.TypePTR), Ptr: target})
		}
		return true
	}
	if apex := z.zoneOf(name); apex == name {
		if want(dns.TypeSOA) {
			m.Answer = append(m.Answer, z.soa(apex))
		}
		if want(dns.TypeNS) {
			m.Answer = append(m.Answer, &dns.NS{Hdr: header(dns.TypeNS), Ns: "ns.dns." + apex})
		}
		return true
	} else if apex != "" && name == "dns-version."+apex {
		if want(dns.TypeTXT) {
			m.Answer = append(m.Answer, &dns.TXT{Hdr: header(dns.TypeTXT), Txt: []string{versionOf(apex)}})
		}
		return true
	}
	if h, p := z.service(name); h != nil {
		if want(dns.TypeSRV) {
			target := name[strings.Index(name, "._")+2:]
			target = target[strings.IndexByte(target, '.')+1:]
			z.srv(m, header(dns.TypeSRV), target, h, []*dnsv1.Port{p})
		}
		return true
	}
	h := z.find(name)
	if h == nil {
		return z.names[name]
	}
	if want(dns.TypeA) {
		for _, a := range h.v4 {
			m.Answer = append(m.Answer, &dns.A{Hdr: header(dns.TypeA), A: a.AsSlice()})
		}
	}
	if want(dns.TypeAAAA) {
		for _, a := range h.v6 {
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header(dns.TypeAAAA), AAAA: a.AsSlice()})
		}
	}
	if q.Qtype == dns.TypeSRV {
		z.srv(m, header(dns.TypeSRV), name, h, h.ports)
	}
	return true
}

// addresses returns the A and AAAA records of a target, for the additional section.
func (z *Zone) addresses(name string, h *host) []dns.RR {
	var out []dns.RR
	for _, a := range h.v4 {
		out = append(out, &dns.A{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: z.opts.TTL}, A: a.AsSlice()})
	}
	for _, a := range h.v6 {
		out = append(out, &dns.AAAA{Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeAAAA, Class: dns.ClassINET, Ttl: z.opts.TTL}, AAAA: a.AsSlice()})
	}
	return out
}

// service reads _PORT._PROTOCOL.HOST.
func (z *Zone) service(name string) (*host, *dnsv1.Port) {
	port, rest, ok := strings.Cut(name, ".")
	proto, target, ok2 := strings.Cut(rest, ".")
	if !ok || !ok2 || !strings.HasPrefix(port, "_") || !strings.HasPrefix(proto, "_") {
		return nil, nil
	}
	h := z.find(target)
	if h == nil {
		return nil, nil
	}
	for _, p := range h.ports {
		if "_"+p.GetName() == port && "_"+p.GetProtocol() == proto {
			return h, p
		}
	}
	return nil, nil
}

// find returns the host of exactly that name, or the closest wildcard above it.
func (z *Zone) find(name string) *host {
	if h := z.hosts[name]; h != nil {
		return h
	}
	if z.names[name] {
		return nil // RFC 4592, section 2.2.2: an existing name is not synthesised
	}
	for rest := name; ; {
		i := strings.IndexByte(rest, '.')
		if i < 0 || i+1 >= len(rest) {
			return nil
		}
		rest = rest[i+1:]
		if h := z.hosts["*."+rest]; h != nil {
			return h
		}
	}
}

// zoneOf returns the longest of our zones that holds name, or "".
func (z *Zone) zoneOf(name string) string {
	best := ""
	for _, s := range z.zones {
		if len(s) > len(best) && dns.IsSubDomain(s, name) {
			best = s
		}
	}
	return best
}

func (z *Zone) soa(apex string) dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: apex, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: z.opts.TTL},
		Ns:  "ns.dns." + apex, Mbox: "hostmaster." + apex, Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: z.opts.TTL,
	}
}
