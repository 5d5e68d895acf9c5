// Package zone answers DNS questions about the hosts of the mesh. It is pure: hosts and a question in, an answer out.
// The CoreDNS plugin and isthmus-agent both use it, so that pods and machines get the same answers.
//
// The records of a name are kept as they are sent, so that an answer is one look-up and a copy. A Zone is immutable; the
// next one shares all with it but what has changed.
package zone

import (
	"cmp"
	"iter"
	"slices"
	"strings"

	"github.com/miekg/dns"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
)

// Options say what a Zone is responsible for.
type Options struct {
	// Zones are the suffixes it answers for, such as "global"; a name below one of them that has no host does not
	// exist. Hosts outside of them are answered, too, unless OnlyZones is set.
	Zones []string
	// OnlyZones leaves hosts outside Zones to others.
	OnlyZones bool
	// Recursive says in answers that other names are answered, too (RFC 1035, section 4.1.1: RA).
	Recursive bool
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

// Zone is an immutable index of hosts.
type Zone struct {
	opts   Options
	zones  []apex // the longest first
	names  *table // by name
	addrs  *table // by address, of those that PTR is answered for
	hosts  int
	wild   int    // how many hosts are wildcards
	serial uint32 // of the SOA: counts changes
}

// apex is a zone's own name.
type apex struct {
	name    string // canonical
	wire    int    // its length in a message
	version string
}

// New indexes hosts by name. What cannot be read in a host is left out.
func New(hosts map[string]*dnsv1.Host, o Options) *Zone {
	if o.TTL == 0 {
		o.TTL = DefaultTTL
	}
	z := &Zone{opts: o, names: newTable(len(hosts)), addrs: newTable(2 * len(hosts))}
	for _, s := range o.Zones {
		a := apex{name: dns.CanonicalName(s), version: Version}
		if a.wire = len(a.name) + 1; a.name == "." {
			a.wire = 1
		}
		if dns.IsSubDomain("clusterset.local.", a.name) {
			a.version = ClusterSetVersion
		}
		z.zones = append(z.zones, a)
	}
	slices.SortStableFunc(z.zones, func(a, b apex) int { return cmp.Compare(len(b.name), len(a.name)) })
	return z.With(hosts, nil)
}

// With returns the Zone after some hosts have changed, by name, and others are gone. It costs about as much as they are.
func (z *Zone) With(changed map[string]*dnsv1.Host, gone []string) *Zone {
	next := *z
	next.serial++
	w := writer{zone: &next, names: z.names.edit(), addrs: z.addrs.edit()}
	for _, name := range gone {
		w.remove(dns.CanonicalName(name))
	}
	for name, h := range changed {
		e := newEntry(name, h, z.opts.TTL)
		if e == nil {
			w.remove(dns.CanonicalName(name))
			continue
		}
		w.put(e)
	}
	next.names, next.addrs = w.names.done(), w.addrs.done()
	return &next
}

// Len returns how many hosts there are.
func (z *Zone) Len() int { return z.hosts }

// All gives every host, in no order.
func (z *Zone) All() iter.Seq[*dnsv1.Host] {
	return func(yield func(*dnsv1.Host) bool) {
		for s := range z.names.all() {
			if s.e.host && !yield(s.e.proto()) {
				return
			}
		}
	}
}

// writer makes the names of the next Zone.
type writer struct {
	zone         *Zone
	names, addrs *editor
}

func (w *writer) put(e *entry) {
	old := w.names.t.byName([]byte(e.name))
	if old != nil {
		e.kids = old.kids
	}
	w.set(old, e)
	if old == nil {
		w.born(e.name)
	}
}

func (w *writer) remove(name string) {
	old := w.names.t.byName([]byte(name))
	switch {
	case old == nil || !old.host:
	case old.kids > 0:
		w.set(old, &entry{name: old.name, kids: old.kids})
	default:
		w.set(old, nil)
		w.died(name)
	}
}

// born makes every name above exist (RFC 8020: what is above an existing name exists).
func (w *writer) born(name string) {
	for {
		above := parent(name)
		if above == "" {
			return
		}
		if e := w.names.t.byName([]byte(above)); e != nil {
			c := *e
			c.kids++
			w.set(e, &c)
			return
		}
		w.set(nil, &entry{name: above, kids: 1})
		name = above
	}
}

// died takes away the names above that existed because of it alone.
func (w *writer) died(name string) {
	for {
		above := parent(name)
		e := w.names.t.byName([]byte(above))
		if e == nil {
			return
		}
		c := *e
		if c.kids--; c.kids > 0 || c.host {
			w.set(e, &c)
			return
		}
		w.set(e, nil)
		name = above
	}
}

// set puts next in the place of old under all its keys; one of them may be nil.
func (w *writer) set(old, next *entry) {
	name := ""
	if old != nil {
		w.count(old, -1)
		name = old.name
		for a := range old.reversible() {
			w.addrs.swap(w.addrs.t.hashAddr(a), old, nil)
		}
	}
	if next != nil {
		w.count(next, 1)
		name = next.name
		for a := range next.reversible() {
			w.addrs.swap(w.addrs.t.hashAddr(a), nil, next)
		}
	}
	w.names.swap(w.names.t.hashName(name), old, next)
}

func (w *writer) count(e *entry, d int) {
	if e.host {
		w.zone.hosts += d
	}
	if e.wildcard() {
		w.zone.wild += d
	}
}

// parent returns the name one label up, "" at the top.
func parent(name string) string {
	i := strings.IndexByte(name, '.')
	if i < 0 || i+1 >= len(name) {
		return ""
	}
	return name[i+1:]
}

// zoneOf returns the longest of our zones that holds a canonical name, or nil.
func (z *Zone) zoneOf(name []byte) *apex {
	for i := range z.zones {
		a := &z.zones[i]
		switch at := len(name) - len(a.name); {
		case a.name == ".":
			return a
		case at < 0 || string(name[at:]) != a.name:
		case at == 0, name[at-1] == '.' && !escaped(name[:at-1]):
			return a
		}
	}
	return nil
}

// escaped reports whether what follows is a character of a label, not a border: an odd number of backslashes stands before it.
func escaped(before []byte) bool {
	n := 0
	for n < len(before) && before[len(before)-1-n] == '\\' {
		n++
	}
	return n%2 == 1
}

// closest returns the wildcard for a canonical name that does not exist: the one right below the closest name above that
// does (RFC 4592, section 3.3.1), or nil.
func (z *Zone) closest(name []byte) *entry {
	if z.wild == 0 || len(name) > maxName {
		return nil
	}
	var buf [maxName + 2]byte
	for {
		i := slices.Index(name, '.')
		if i < 0 || i+1 >= len(name) {
			return nil
		}
		name = name[i+1:]
		if e := z.names.byName(append(append(buf[:0], "*."...), name...)); e != nil {
			return e
		}
		if z.names.byName(name) != nil {
			return nil
		}
	}
}
