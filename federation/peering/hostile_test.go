package peering

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// attack is one lie of a member.
type attack struct {
	name   string
	reason string // by which it is counted; empty: it is no news, and only must do no harm
	lie    func(w *siege) []*federationv1.Record
	raw    func(w *siege) []*xds.Resource // what is no record
}

// siege is amber, its member birch, and its member eve, who lies.
type siege struct {
	amber      *listener
	birch, eve *said
	pay        *federationv1.Record // a genuine record of birch
}

func (w *siege) of(kind, key string, m proto.Message) []*federationv1.Record {
	return []*federationv1.Record{w.eve.record(kind, key, m)}
}

// forged is a record of somebody else, signed by eve.
func forged(origin, kind, key string, m proto.Message) func(*siege) []*federationv1.Record {
	return func(*siege) []*federationv1.Record {
		var body []byte
		if m != nil {
			body = encode(m)
		}
		return []*federationv1.Record{signed("eve", origin, kind, key, 1, 1<<30, body)}
	}
}

// altered is a genuine record of birch, changed.
func altered(change func(*federationv1.Record)) func(*siege) []*federationv1.Record {
	return func(w *siege) []*federationv1.Record {
		r := proto.Clone(w.pay).(*federationv1.Record)
		change(r)
		return []*federationv1.Record{r}
	}
}

// named is a service of eve's under a bad name.
func named(key string) func(*siege) []*federationv1.Record {
	return func(w *siege) []*federationv1.Record {
		return w.of(protocol.KindService, key, &federationv1.Service{})
	}
}

// numbered is a service of eve's under a bad number.
func numbered(epoch, seq uint64) func(*siege) []*federationv1.Record {
	return func(*siege) []*federationv1.Record {
		return []*federationv1.Record{signed("eve", "eve", protocol.KindService, "default/numbered", epoch, seq, nil)}
	}
}

// vouched is a member record of eve's.
func vouched(name, td, key string) func(*siege) []*federationv1.Record {
	return func(w *siege) []*federationv1.Record {
		return w.of(protocol.KindMember, name, &federationv1.Member{Name: name, TrustDomain: td, FederationKey: public(key)})
	}
}

// described is eve's cluster record, changed.
func described(change func(w *siege, c *federationv1.Cluster)) func(*siege) []*federationv1.Record {
	return func(w *siege) []*federationv1.Record {
		c := w.eve.cluster()
		c.Network = "eve-net"
		change(w, c)
		return w.of(protocol.KindCluster, "", c)
	}
}

// serving is a service of eve's with one endpoint, both changed.
func serving(change func(s *federationv1.Service, e *federationv1.Endpoint)) func(*siege) []*federationv1.Record {
	return func(w *siege) []*federationv1.Record {
		s := &federationv1.Service{Ports: []*federationv1.Port{{Name: "http", Number: 80, Protocol: "HTTP"}}, Vips: []string{"240.0.0.5"}}
		e := &federationv1.Endpoint{Workload: "liar-1", Address: "10.9.0.7", Ports: map[uint32]uint32{80: 8080}, ServiceAccount: "liar"}
		change(s, e)
		return append(w.of(protocol.KindService, "default/liar", s), w.of(protocol.KindEndpoints, "default/liar", &federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{e}})...)
	}
}

// at is an endpoint at an address that is not eve's to name.
func at(address string) func(*siege) []*federationv1.Record {
	return serving(func(_ *federationv1.Service, e *federationv1.Endpoint) { e.Address = address })
}

// raw is bytes in place of a record.
func raw(name string, b []byte) []*xds.Resource {
	return []*xds.Resource{{Name: name, Version: fmt.Sprint(len(b), time.Now().UnixNano()), Body: &anypb.Any{TypeUrl: RecordType, Value: b}}}
}

func attacks() []attack {
	out := []attack{
		{name: "another's service", reason: "BadSignature", lie: forged("birch", protocol.KindService, "default/pay", &federationv1.Service{Vips: []string{"240.6.6.6"}})},
		{name: "another's endpoints", reason: "BadSignature", lie: forged("birch", protocol.KindEndpoints, "default/pay", &federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{{Workload: "x", Address: "10.66.0.1"}}})},
		{name: "another's gateways", reason: "BadSignature", lie: forged("birch", protocol.KindCluster, "", &federationv1.Cluster{TrustDomain: "birch.mesh", FederationKey: public("birch"), Gateways: []string{"203.0.113.66:15443"}})},
		{name: "another's bundle", reason: "BadSignature", lie: func(w *siege) []*federationv1.Record {
			c := w.birch.cluster()
			c.Bundle = w.eve.ca.pem
			return forged("birch", protocol.KindCluster, "", c)(w)
		}},
		{name: "a tombstone for another's service", reason: "BadSignature", lie: forged("birch", protocol.KindTombstone, "service/default/pay", nil)},
		{name: "a tombstone for another's endpoints", reason: "BadSignature", lie: forged("birch", protocol.KindTombstone, "endpoints/default/pay", nil)},
		{name: "another leaves", reason: "BadSignature", lie: forged("birch", protocol.KindTombstone, "member/birch", nil)},
		{name: "we put another out", reason: "BadSignature", lie: forged("amber", protocol.KindTombstone, "member/birch", nil)},
		{name: "another vouches for a stranger", reason: "BadSignature", lie: forged("birch", protocol.KindMember, "mallory", &federationv1.Member{Name: "mallory", TrustDomain: "mallory.mesh", FederationKey: public("mallory")})},
		{name: "our own service", reason: "BadSignature", lie: forged("amber", protocol.KindService, "default/own", &federationv1.Service{})},
		{name: "our own description", reason: "BadSignature", lie: forged("amber", protocol.KindCluster, "", &federationv1.Cluster{TrustDomain: "amber.mesh", FederationKey: public("amber"), Gateways: []string{"203.0.113.66:15443"}})},
		{name: "a record of another with another body", reason: "BadSignature", lie: altered(func(r *federationv1.Record) { r.Body = encode(&federationv1.Service{Vips: []string{"240.6.6.6"}}) })},
		{name: "a record of another with a higher number", reason: "BadSignature", lie: altered(func(r *federationv1.Record) { r.Seq += 1000 })},
		{name: "a record of another with another TTL", reason: "BadSignature", lie: altered(func(r *federationv1.Record) { r.TtlSeconds = 1 })},
		{name: "a record of another under another key", reason: "BadSignature", lie: altered(func(r *federationv1.Record) { r.Key = "default/other" })},
		{name: "a record of another as its own", reason: "BadSignature", lie: altered(func(r *federationv1.Record) { r.Origin, r.Seq = "eve", 1<<30 })},
		{name: "no signature", reason: "BadSignature", lie: altered(func(r *federationv1.Record) { r.Signature = nil })},
		{name: "a short signature", reason: "BadSignature", lie: altered(func(r *federationv1.Record) { r.Signature = r.Signature[:63] })},
		{name: "an old record of another", lie: func(*siege) []*federationv1.Record {
			return []*federationv1.Record{signed("birch", "birch", protocol.KindService, "default/pay", 1, 3, encode(&federationv1.Service{Vips: []string{"240.0.0.66"}}))}
		}},
		{name: "an old tombstone of another", lie: func(*siege) []*federationv1.Record {
			return []*federationv1.Record{signed("birch", "birch", protocol.KindTombstone, "service/default/pay", 1, 4, nil)}
		}},
		{name: "a cluster nobody vouches for", reason: "UnknownOrigin", lie: func(*siege) []*federationv1.Record {
			return []*federationv1.Record{signed("mallory", "mallory", protocol.KindService, "default/pay", 1, 1, nil)}
		}},
		{name: "a stranger vouches for itself", reason: "UnknownOrigin", lie: func(*siege) []*federationv1.Record {
			return []*federationv1.Record{signed("mallory", "mallory", protocol.KindMember, "mallory", 1, 1, encode(&federationv1.Member{Name: "mallory", TrustDomain: "mallory.mesh", FederationKey: public("mallory")}))}
		}},
		{name: "another key for a member", reason: "KeyChanged", lie: vouched("birch", "birch.mesh", "eve")},
		{name: "another trust domain for a member", reason: "KeyChanged", lie: vouched("birch", "eve.mesh", "birch")},
		{name: "another key for us", reason: "KeyChanged", lie: vouched("amber", "amber.mesh", "eve")},
		{name: "a member in our trust domain", reason: "TrustDomainTaken", lie: vouched("twin", "amber.mesh", "twin")},
		{name: "a member in another's trust domain", reason: "TrustDomainTaken", lie: vouched("twin", "birch.mesh", "twin")},
		{name: "a trust domain that looks like ours", reason: "BadName", lie: vouched("twin", "аmber.mesh", "twin")},
		{name: "a member name that looks like another's", reason: "BadName", lie: vouched("bіrch", "b.mesh", "twin")},
		{name: "a member under the name of another record", reason: "BadName", lie: func(w *siege) []*federationv1.Record {
			return w.of(protocol.KindMember, "one", &federationv1.Member{Name: "two", TrustDomain: "two.mesh", FederationKey: public("two")})
		}},
		{name: "a member without a key", reason: "Malformed", lie: func(w *siege) []*federationv1.Record {
			return w.of(protocol.KindMember, "keyless", &federationv1.Member{Name: "keyless", TrustDomain: "keyless.mesh"})
		}},
		{name: "our trust domain", reason: "ClusterMismatch", lie: described(func(_ *siege, c *federationv1.Cluster) { c.TrustDomain = "amber.mesh" })},
		{name: "another's trust domain", reason: "ClusterMismatch", lie: described(func(_ *siege, c *federationv1.Cluster) { c.TrustDomain = "birch.mesh" })},
		{name: "another's federation key", reason: "ClusterMismatch", lie: described(func(_ *siege, c *federationv1.Cluster) { c.FederationKey = public("birch") })},
		{name: "a thousand gateways", reason: "TooLarge", lie: described(func(_ *siege, c *federationv1.Cluster) { c.Gateways = slices.Repeat(c.Gateways, 1000) })},
		{name: "ten thousand ranges", reason: "TooLarge", lie: described(func(_ *siege, c *federationv1.Cluster) { c.PodRanges = slices.Repeat([]string{"10.1.0.0/16"}, 10_000) })},
		{name: "a million empty ranges", reason: "TooLarge", lie: described(func(_ *siege, c *federationv1.Cluster) { c.PodRanges = make([]string, 500_000) })},
		{name: "a wildcard", reason: "BadName", lie: named("default/*")},
		{name: "a name of two labels", reason: "BadName", lie: named("default/pay.shop")},
		{name: "a name that looks like another", reason: "BadName", lie: named("default/раy")},
		{name: "a name in upper case", reason: "BadName", lie: named("Default/Pay")},
		{name: "a name with NUL", reason: "BadName", lie: named("default/pay\x00")},
		{name: "a name with a space", reason: "BadName", lie: named("default/pay now")},
		{name: "a name with a path", reason: "BadName", lie: named("default/../pay")},
		{name: "a name with a line feed", reason: "BadName", lie: named("default/pay\nx")},
		{name: "no name", reason: "BadName", lie: named("default/")},
		{name: "no namespace", reason: "BadName", lie: named("pay")},
		{name: "a label of 64 bytes", reason: "BadName", lie: named("default/" + strings.Repeat("a", 64))},
		{name: "a key of 10,000 bytes", reason: "BadName", lie: named("default/" + strings.Repeat("a", 10_000))},
		{name: "a name that begins with a dash", reason: "BadName", lie: named("default/-pay")},
		{name: "an unknown kind", reason: "UnknownKind", lie: func(w *siege) []*federationv1.Record { return w.of("gift", "default/x", nil) }},
		{name: "a cluster that waits", reason: "UnknownKind", lie: func(w *siege) []*federationv1.Record { return w.of(protocol.KindPending, "mallory", nil) }},
		{name: "a tombstone for its description", reason: "BadName", lie: func(w *siege) []*federationv1.Record { return w.of(protocol.KindTombstone, "cluster/", nil) }},
		{name: "a tombstone for a tombstone", reason: "BadName", lie: func(w *siege) []*federationv1.Record {
			return w.of(protocol.KindTombstone, "tombstone/service/default/pay", nil)
		}},
		{name: "an origin of two labels", reason: "BadName", lie: altered(func(r *federationv1.Record) { r.Origin = "birch.mesh" })},
		{name: "an origin with NUL", reason: "BadName", lie: altered(func(r *federationv1.Record) { r.Origin = "birch\x00" })},
		{name: "epoch 0", reason: "BadSequence", lie: numbered(0, 5000)},
		{name: "number 0", reason: "BadSequence", lie: numbered(1, 0)},
		{name: "number 2^64-1", reason: "BadSequence", lie: numbered(1, math.MaxUint64)},
		{name: "epoch 2^64-1", reason: "BadSequence", lie: numbered(math.MaxUint64, 1)},
		{name: "a jump of the number", reason: "SequenceJump", lie: numbered(1, 1<<47)},
		{name: "a jump of the epoch", reason: "SequenceJump", lie: numbered(1<<31, 1)},
		{name: "two things under one number", reason: "Equivocation", lie: func(w *siege) []*federationv1.Record {
			r := w.eve.record(protocol.KindService, "default/good", &federationv1.Service{Vips: []string{"240.0.0.77"}})
			_, held := w.eve.find(protocol.ResourceName(r))
			return []*federationv1.Record{signed("eve", "eve", r.Kind, r.Key, held.Epoch, held.Seq, r.Body)}
		}},
		{name: "a body over the cap", reason: "TooLarge", lie: func(w *siege) []*federationv1.Record {
			return w.of(protocol.KindService, "default/large", &federationv1.Service{Labels: map[string]string{"a": strings.Repeat("a", protocol.MaxBody)}})
		}},
		{name: "a record of three megabytes", reason: "TooLarge", lie: func(w *siege) []*federationv1.Record {
			return w.of(protocol.KindService, "default/huge", &federationv1.Service{Labels: map[string]string{"a": strings.Repeat("a", 3<<20)}})
		}},
		{name: "half a million endpoints in one record", reason: "TooLarge", lie: func(w *siege) []*federationv1.Record {
			return []*federationv1.Record{signed("eve", "eve", protocol.KindEndpoints, "default/many", 1, 1<<20, slices.Repeat([]byte{0x0a, 0}, 500_000))}
		}},
		{name: "half a million ports in one record", reason: "TooLarge", lie: func(w *siege) []*federationv1.Record {
			return []*federationv1.Record{signed("eve", "eve", protocol.KindService, "default/many", 1, 1<<20, slices.Repeat([]byte{0x0a, 0}, 500_000))}
		}},
		{name: "for ten thousand clusters", reason: "Malformed", lie: func(w *siege) []*federationv1.Record {
			return w.of(protocol.KindService, "default/crowd", &federationv1.Service{ExportTo: slices.Repeat([]string{"amber"}, 10_000)})
		}},
		{name: "not for us", reason: "NotExported", lie: func(w *siege) []*federationv1.Record {
			return w.of(protocol.KindService, "default/secret", &federationv1.Service{ExportTo: []string{"birch"}})
		}},
		{name: "a body that is no message", reason: "Malformed", lie: func(w *siege) []*federationv1.Record {
			return []*federationv1.Record{signed("eve", "eve", protocol.KindService, "default/broken", 1, 1<<21, []byte{0xff, 0xff})}
		}},
		{name: "bytes that are no record", reason: "Malformed", raw: func(*siege) []*xds.Resource { return raw("eve/service/default/noise", []byte{0xff, 1, 2, 3}) }},
		{name: "an empty record", reason: "BadName", raw: func(*siege) []*xds.Resource { return raw("eve/service/default/empty", nil) }},
		{name: "names that are not UTF-8", reason: "Malformed", raw: func(*siege) []*xds.Resource {
			return raw("eve/service/default/latin", []byte{0x0a, 4, 'e', 'v', 0xe9, 0xff})
		}},
		{name: "too many endpoints", reason: "TooManyEndpoints", lie: func(w *siege) []*federationv1.Record {
			ends := &federationv1.Endpoints{}
			for i := range 5000 {
				ends.Endpoints = append(ends.Endpoints, &federationv1.Endpoint{Workload: fmt.Sprintf("w%d", i), Address: "10.9.0.1", Ports: map[uint32]uint32{80: 80}})
			}
			return append(w.of(protocol.KindService, "default/liar", &federationv1.Service{}), w.of(protocol.KindEndpoints, "default/liar", ends)...)
		}},
		{name: "our network for its endpoint", reason: "ForeignNetwork", lie: func(w *siege) []*federationv1.Record {
			return append(described(func(*siege, *federationv1.Cluster) {})(w), serving(func(_ *federationv1.Service, e *federationv1.Endpoint) { e.Network = "amber" })(w)...)
		}},
		{name: "its own network again", lie: func(w *siege) []*federationv1.Record { return w.of(protocol.KindCluster, "", w.eve.cluster()) }},
		{name: "an endpoint in another's pod range", reason: "ForeignAddress", lie: at("10.2.0.9")},
		{name: "an endpoint at another's service address", reason: "ForeignAddress", lie: at("10.97.0.1")},
		{name: "port 0", reason: "BadPort", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) { e.Ports = map[uint32]uint32{80: 0} })},
		{name: "port 70000", reason: "BadPort", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) { e.Ports = map[uint32]uint32{80: 70000} })},
		{name: "all the weight", reason: "BadWeight", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) { e.Weight = math.MaxUint32 })},
		{name: "a workload of any name", reason: "BadName", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) { e.Workload = "*" })},
		{name: "a workload that looks like another", reason: "BadName", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) { e.Workload = "lіar-1" })},
		{name: "a workload whose server name is too long", reason: "NameTooLong", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) {
			e.Workload = strings.Repeat("a", 63) + "." + strings.Repeat("b", 63) + "." + strings.Repeat("c", 63) + "." + strings.Repeat("d", 50)
		})},
		{name: "a service account with a path", reason: "BadName", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) { e.ServiceAccount = "a/../../sa/admin" })},
		{name: "a service account of another trust domain", reason: "BadName", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) {
			e.ServiceAccount = "spiffe://amber.mesh/ns/default/sa/pay"
		})},
		{name: "a thousand labels", reason: "TooManyLabels", lie: serving(func(_ *federationv1.Service, e *federationv1.Endpoint) {
			e.Labels = map[string]string{}
			for i := range 1000 {
				e.Labels[fmt.Sprint("l", i)] = ""
			}
		})},
		{name: "one workload twice", reason: "DuplicateWorkload", lie: func(w *siege) []*federationv1.Record {
			e := &federationv1.Endpoint{Workload: "twice", Address: "10.9.0.1", Ports: map[uint32]uint32{80: 80}}
			return append(w.of(protocol.KindService, "default/liar", &federationv1.Service{}), w.of(protocol.KindEndpoints, "default/liar", &federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{e, e}})...)
		}},
		{name: "a virtual address on the Internet", reason: "BadVIP", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) { s.Vips = []string{"8.8.8.8"} })},
		{name: "the address of our API server", reason: "BadVIP", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) { s.Vips = []string{"10.96.0.1"} })},
		{name: "a virtual address of the metadata service", reason: "BadVIP", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) { s.Vips = []string{"fd00:ec2::254"} })},
		{name: "the broadcast address", reason: "BadVIP", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) { s.Vips = []string{"255.255.255.255"} })},
		{name: "a hundred virtual addresses", reason: "TooManyVIPs", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) {
			s.Vips = slices.Repeat([]string{"240.0.0.5"}, 100)
		})},
		{name: "a service port of 0", reason: "BadPort", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) { s.Ports[0].Number = 0 })},
		{name: "a service port twice", reason: "BadPort", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) { s.Ports = append(s.Ports, s.Ports[0]) })},
		{name: "ten thousand ports", reason: "TooManyPorts", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) {
			for i := range uint32(10_000) {
				s.Ports = append(s.Ports, &federationv1.Port{Number: i + 1000})
			}
		})},
		{name: "a port with a bad name", reason: "BadName", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) { s.Ports[0].Name = "*" })},
		{name: "an export that compares as nothing can", reason: "BadValue", lie: serving(func(s *federationv1.Service, _ *federationv1.Endpoint) {
			s.Export = &federationv1.Export{SessionAffinity: "Everybody"}
		})},
	}
	for name, address := range map[string]string{
		"loopback": "127.0.0.1", "IPv6 loopback": "::1", "the metadata service": "169.254.169.254", "the IPv6 metadata service": "fd00:ec2::254",
		"a link-local address": "169.254.3.3", "an IPv6 link-local address": "fe80::1", "an address with a zone": "fe80::1%eth0",
		"our pod in IPv6 form": "::ffff:10.1.0.5", "loopback in IPv6 form": "::ffff:127.0.0.1", "no address": "0.0.0.0", "no IPv6 address": "::",
		"a multicast address": "224.0.0.1", "an IPv6 multicast address": "ff02::1", "a virtual address": "240.0.0.9", "everybody": "255.255.255.255",
		"our pod": "10.1.2.3", "our API server": "10.96.0.1", "a name": "birch.example", "an address with NUL": "10.9.0.1\x00", "an address in octal": "0127.0.0.1",
	} {
		out = append(out, attack{name: "an endpoint at " + name, reason: "BadAddress", lie: at(address)})
	}
	for name, gateway := range map[string]string{
		"loopback": "127.0.0.1:15443", "the metadata service": "169.254.169.254:80", "in IPv6 form": "[::ffff:127.0.0.1]:15443", "ours": "192.0.2.1:15443",
		"without a port": "203.0.113.5", "on port 0": "203.0.113.5:0", "by name": "metadata.internal:80", "anywhere": "0.0.0.0:15443",
	} {
		out = append(out, attack{name: "a gateway " + name, reason: "BadGateway", lie: described(func(_ *siege, c *federationv1.Cluster) { c.Gateways = append(c.Gateways, gateway) })})
	}
	out = append(out,
		attack{name: "another's gateway", reason: "GatewayConflict", lie: described(func(w *siege, c *federationv1.Cluster) { c.Gateways = append(c.Gateways, w.birch.gateway) })},
		attack{name: "a range that is none", reason: "BadRange", lie: described(func(_ *siege, c *federationv1.Cluster) { c.PodRanges = []string{"everywhere"} })},
	)
	return append(out, []attack{ // these leave no room for others
		{name: "too many bytes", reason: "OriginOverCap", lie: func(w *siege) (out []*federationv1.Record) {
			for i := range 12 {
				out = append(out, w.of(protocol.KindService, fmt.Sprintf("default/fat%d", i%9), &federationv1.Service{Labels: map[string]string{"a": strings.Repeat("a", 1_000_000-i)}})...)
			}
			return out
		}},
		{name: "less again", lie: func(w *siege) (out []*federationv1.Record) {
			for i := range 12 {
				out = append(out, w.of(protocol.KindTombstone, fmt.Sprintf("service/default/fat%d", i), nil)...)
			}
			return out
		}},
		{name: "too many records", reason: "OriginOverCap", lie: func(w *siege) (out []*federationv1.Record) {
			for i := range 500 {
				out = append(out, w.of(protocol.KindService, fmt.Sprintf("many/s%d", i), &federationv1.Service{})...)
			}
			return out
		}},
		{name: "too many services", reason: "TooManyServices", lie: func(*siege) []*federationv1.Record { return nil }},
		{name: "bytes in place of its roots", reason: "HandshakeFailed", lie: described(func(_ *siege, c *federationv1.Cluster) { c.Bundle = []byte("-----BEGIN CERTIFICATE-----") })},
	}...)
}

// find returns what is served under a name.
func (s *said) find(name string) (*xds.Resource, *federationv1.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x, r := s.set[name], &federationv1.Record{}
	if x == nil || x.Body.UnmarshalTo(r) != nil {
		return nil, nil
	}
	return x, r
}

// besiege starts the three, with a service each of the two others.
func besiege(t *testing.T) *siege {
	t.Helper()
	w := &siege{birch: speak(t, "birch", "192.0.2.2:15443"), eve: speak(t, "eve", "192.0.2.3:15443")}
	w.amber = listen(t, w.birch, w.eve)
	w.amber.store.victim = "birch"
	for _, s := range []*said{w.birch, w.eve} {
		w.amber.admit(t, s)
	}
	cluster := w.birch.cluster()
	cluster.Network, cluster.PodRanges, cluster.ServiceRanges = "amber", []string{"10.2.0.0/16"}, []string{"10.97.0.0/16"}
	w.pay = w.birch.record(protocol.KindService, "default/pay", &federationv1.Service{Ports: []*federationv1.Port{{Name: "http", Number: 80, Protocol: "HTTP"}}, Vips: []string{"240.0.0.1"}})
	w.birch.say(w.birch.record(protocol.KindCluster, "", cluster), w.pay, w.birch.record(protocol.KindEndpoints, "default/pay", &federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{
		{Workload: "pay-1", Address: "10.2.0.1", Ports: map[uint32]uint32{80: 8080}, ServiceAccount: "pay"},
		{Workload: "pay-2", Address: "10.2.0.2", Ports: map[uint32]uint32{80: 8080}, ServiceAccount: "pay"},
	}}))
	w.eve.say(append(w.of(protocol.KindService, "default/good", &federationv1.Service{Vips: []string{"240.0.0.2"}}),
		w.of(protocol.KindEndpoints, "default/good", &federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{{Workload: "good-1", Address: "10.9.0.1", Ports: map[uint32]uint32{80: 80}}}})...)...)
	eventually(t, "both members are heard", func() string {
		if b, e := count(w.amber.store.input("birch")), count(w.amber.store.input("eve")); b != 2 || e != 1 {
			return fmt.Sprintf("%d endpoints of birch, %d of eve", b, e)
		}
		return ""
	})
	return w
}

// believed checks that nothing is believed of eve that is not hers to say.
func (w *siege) believed() string {
	in := w.amber.store.input("eve")
	for _, i := range in.Imports {
		if i.Cluster != "eve" || !mesh.IsLabel(i.Name) || !mesh.IsLabel(i.Namespace) {
			return fmt.Sprintf("import %+v", i)
		}
		for _, e := range i.Endpoints {
			ip, _ := netip.ParseAddr(e.Address)
			if e.Cluster != "eve" || e.Identity != "" && !strings.HasPrefix(e.Identity, "spiffe://eve.mesh/ns/") || e.Address != "" && !netip.MustParsePrefix("10.9.0.0/16").Contains(ip) {
				return fmt.Sprintf("endpoint %+v", e)
			}
		}
	}
	for _, c := range in.Clusters {
		for _, g := range c.Gateways {
			if g.String() != w.eve.gateway && g.String() != w.birch.gateway {
				return fmt.Sprintf("gateway %s", g)
			}
		}
	}
	for _, p := range w.amber.Status().Peers {
		if key := public(string(p.Name)); (p.Name != "birch" && p.Name != "eve") || !slices.Equal(p.FederationKey, key) || p.State != protocol.Approved {
			return fmt.Sprintf("peer %+v", p)
		}
	}
	if birch, _ := w.amber.peer("birch"); birch.Freshness != mesh.Fresh {
		return fmt.Sprintf("birch is %s", birch.Freshness)
	}
	return ""
}

// TestHostilePeer tells a hundred lies over a real record stream. Each is left out, counted by its reason under the name
// of the liar, and costs the honest member nothing; all of them together cost little memory.
func TestHostilePeer(t *testing.T) {
	w := besiege(t)
	defer debug.SetGCPercent(debug.SetGCPercent(20)) // what is in use counts, not what waits to be collected
	before := heap()
	peak := watch(t, before)

	// All the while eve says in gossip that birch is dead, and far ahead.
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			w.amber.OnMember("birch", false)
			w.amber.OnGossipState(append([]byte{2}, 0x0a, 0)) // a digest of nobody
			select {
			case <-ctx.Done():
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	defer wg.Wait()
	defer cancel()

	all := attacks()
	if len(all) < 60 {
		t.Fatalf("%d lies", len(all))
	}
	for _, a := range all {
		t.Run(a.name, func(t *testing.T) {
			_, was := w.amber.peer("eve")
			base, last := w.eve.all(), uint64(math.MaxUint64)
			if a.raw != nil {
				w.eve.serve(a.raw(w)...)
			} else if told := a.lie(w); len(told) > 0 {
				w.eve.say(told...)
				last = told[len(told)-1].Seq
			}
			if a.reason != "" {
				eventually(t, "it is counted as "+a.reason, func() string {
					p, now := w.amber.peer("eve")
					if now[a.reason] > was[a.reason] || now[a.reason] > 0 && (p.Seq >= last || a.name == "too many services") {
						return "" // what is wrong in records that were taken counts as long as they are in use
					}
					return fmt.Sprintf("eve is at %d, not at %d, and has %s", p.Seq, last, reasons(now))
				})
			} else { // what comes after it was taken, so it was read
				mark := w.eve.record(protocol.KindService, "default/mark", &federationv1.Service{})
				w.eve.say(mark)
				eventually(t, "what follows is taken", func() string {
					if p, _ := w.amber.peer("eve"); p.Seq < mark.Seq {
						return fmt.Sprintf("eve is at %d, not at %d", p.Seq, mark.Seq)
					}
					return ""
				})
			}
			if wrong := w.believed(); wrong != "" {
				t.Error(wrong)
			}
			w.eve.keep(base)
		})
	}
	w.amber.store.mu.Lock()
	for _, h := range w.amber.store.hurt {
		t.Errorf("the honest member was hurt: %s", h)
	}
	w.amber.store.mu.Unlock()
	if _, counted := w.amber.peer("birch"); counted["GatewayConflict"] == 0 && len(counted) > 0 || len(counted) > 1 {
		t.Errorf("birch is blamed for %s", reasons(counted))
	}
	cancel()
	wg.Wait()
	if grown := int64(heap()) - int64(before); grown > 64<<20 {
		t.Errorf("%d MiB are kept", grown>>20)
	}
	t.Logf("%d lies; heap %d MiB before, at most %d MiB more", len(all), before>>20, peak()>>20)
	if p := peak(); p > 64<<20 {
		t.Errorf("at the worst %d MiB more were in use", p>>20)
	}
}

// all returns what is served.
func (s *said) all() map[string]*xds.Resource {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]*xds.Resource{}
	for n, x := range s.set {
		out[n] = x
	}
	return out
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// watch samples the heap until the test ends; the result is how far it went over base.
func watch(t *testing.T, base uint64) func() int64 {
	var mu sync.Mutex
	var most int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			mu.Lock()
			most = max(most, int64(m.HeapAlloc)-int64(base))
			mu.Unlock()
		}
	}()
	t.Cleanup(func() { close(stop); <-done })
	return func() int64 { mu.Lock(); defer mu.Unlock(); return most }
}
