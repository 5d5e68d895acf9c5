package peering

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
	"runtime"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

func response() *discoveryv3.DeltaDiscoveryResponse {
	return &discoveryv3.DeltaDiscoveryResponse{
		TypeUrl: RecordType, Nonce: "7", RemovedResources: []string{"birch/service/default/old"},
		Resources: []*discoveryv3.Resource{
			{Name: "birch/cluster/", Version: "1a", Resource: &anypb.Any{TypeUrl: RecordType, Value: []byte("body")}},
			{Name: "birch/service/default/pay", Version: "2b", Resource: &anypb.Any{TypeUrl: RecordType}},
		},
	}
}

// TestResponse: the codec reads what protobuf reads.
func TestResponse(t *testing.T) {
	want := response()
	got := &discoveryv3.DeltaDiscoveryResponse{}
	if err := (codec{}).Unmarshal(mem.BufferSlice{mem.SliceBuffer(encode(want))}, got); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if err := (codec{}).Unmarshal(nil, &federationv1.Record{}); !errors.Is(err, errResponse) {
		t.Errorf("another message: %v", err)
	}
}

// TestResponseBombs: a few megabytes that would unfold to hundreds are refused, or passed over, before they do.
func TestResponseBombs(t *testing.T) {
	for name, c := range map[string]struct {
		in      []byte
		refused bool
	}{
		"two million resources":         {bytes.Repeat([]byte{0x12, 0}, 2<<20), true},
		"two million removed resources": {bytes.Repeat([]byte{0x32, 0}, 2<<20), true},
		"two million aliases":           {wrap(2, bytes.Repeat([]byte{0x22, 0}, 2<<20)), false},
		"two million structs":           {wrap(2, wrap(9, bytes.Repeat([]byte{0x0a, 0}, 2<<20))), false},
		"two million other names":       {bytes.Repeat([]byte{0x42, 0}, 2<<20), false},
		"six megabytes":                 {make([]byte, 6<<20), true},
		"a length that lies":            {[]byte{0x12, 0xff, 0xff, 0xff, 0x7f, 1}, true},
		"cut in a tag":                  {[]byte{0x80}, true},
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err := (codec{}).Unmarshal(mem.BufferSlice{mem.SliceBuffer(c.in)}, &discoveryv3.DeltaDiscoveryResponse{})
			runtime.ReadMemStats(&after)
			if errors.Is(err, errResponse) != c.refused {
				t.Errorf("got %v, refused is %v", err, c.refused)
			}
			if used := after.TotalAlloc - before.TotalAlloc; used > 32<<20 {
				t.Errorf("%d MiB were allocated for %d", used>>20, len(c.in)>>20)
			}
		})
	}
}

func wrap(field byte, b []byte) []byte {
	out := []byte{field<<3 | 2}
	n := len(b)
	for ; n >= 0x80; n >>= 7 {
		out = append(out, byte(n)|0x80)
	}
	return append(append(out, byte(n)), b...)
}

// FuzzResponse: whatever a peer sends, the codec reads no more than protobuf would, and fails where it must.
func FuzzResponse(f *testing.F) {
	f.Add(encode(response()))
	f.Add([]byte{})
	f.Add(wrap(2, wrap(2, []byte{0x12, 3, 'a', 'b', 'c'})))
	f.Add([]byte{0x12, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, in []byte) {
		got, want := &discoveryv3.DeltaDiscoveryResponse{}, &discoveryv3.DeltaDiscoveryResponse{}
		err := readResponse(in, got)
		if proto.Unmarshal(in, want) == nil && err != nil {
			t.Fatalf("protobuf reads it, we do not: %v", err)
		}
		for _, r := range got.Resources {
			if len(r.GetResource().GetValue()) > protocol.MaxRecordSize+1 {
				t.Fatal("too much is kept")
			}
			_, _ = protocol.Decode(r.GetResource().GetValue())
		}
	})
}

// TestHostileCertificates: whatever certificate a member's gateway shows but its own, its record stream does not come up,
// and it says why.
func TestHostileCertificates(t *testing.T) {
	w := besiege(t)
	other := newAuthority(t, "eve")
	id := func(host, path string) []*url.URL { return []*url.URL{{Scheme: "spiffe", Host: host, Path: path}} }
	san := func(names ...[]byte) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			var all []asn1.RawValue
			for _, n := range names {
				all = append(all, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: int(n[0]), Bytes: n[1:]})
			}
			der, err := asn1.Marshal(all)
			if err != nil {
				panic(err)
			}
			c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: der}}
		}
	}
	uri := func(s string) []byte { return append([]byte{6}, s...) }
	dns := func(s string) []byte { return append([]byte{2}, s...) }
	const right = "spiffe://eve.mesh/isthmus/peer"
	for _, c := range []struct {
		name   string
		ca     authority
		change func(*x509.Certificate)
	}{
		{"two URIs", w.eve.ca, func(c *x509.Certificate) { c.URIs = append(c.URIs, id("birch.mesh", "/isthmus/peer")...) }},
		{"two equal URIs", w.eve.ca, san(uri(right), uri(right))},
		{"a URI with NUL", w.eve.ca, san(uri("spiffe://eve.mesh/isthmus/peer\x00.birch.mesh"))},
		{"NUL in the trust domain", w.eve.ca, san(uri("spiffe://eve.mesh\x00birch.mesh/isthmus/peer"))},
		{"another member's trust domain", w.eve.ca, func(c *x509.Certificate) { c.URIs = id("birch.mesh", "/isthmus/peer") }},
		{"our trust domain", w.eve.ca, func(c *x509.Certificate) { c.URIs = id("amber.mesh", "/isthmus/peer") }},
		{"a trust domain nobody has", w.eve.ca, func(c *x509.Certificate) { c.URIs = id("mallory.mesh", "/isthmus/peer") }},
		{"a trust domain below its own", w.eve.ca, func(c *x509.Certificate) { c.URIs = id("sub.eve.mesh", "/isthmus/peer") }},
		{"another member's own certificate", w.birch.ca, func(c *x509.Certificate) { c.URIs = id("birch.mesh", "/isthmus/peer") }},
		{"a DNS name in place of a URI", w.eve.ca, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"eve.mesh"} }},
		{"the URI as a DNS name", w.eve.ca, san(dns(right))},
		{"no name at all", w.eve.ca, func(c *x509.Certificate) { c.URIs = nil }},
		{"a workload's name", w.eve.ca, func(c *x509.Certificate) { c.URIs = id("eve.mesh", "/ns/default/sa/peer") }},
		{"the name of the join endpoint", w.eve.ca, func(c *x509.Certificate) { c.URIs = id("eve.mesh", "/isthmus/join") }},
		{"a path that ends as it should", w.eve.ca, func(c *x509.Certificate) { c.URIs = id("eve.mesh", "/x/isthmus/peer") }},
		{"a path with a dot segment", w.eve.ca, san(uri("spiffe://eve.mesh/isthmus/./peer"))},
		{"a path in upper case", w.eve.ca, san(uri("spiffe://eve.mesh/isthmus/Peer"))},
		{"a query", w.eve.ca, san(uri(right + "?x=1"))},
		{"a port", w.eve.ca, san(uri("spiffe://eve.mesh:443/isthmus/peer"))},
		{"another scheme", w.eve.ca, san(uri("https://eve.mesh/isthmus/peer"))},
		{"no use", w.eve.ca, func(c *x509.Certificate) { c.ExtKeyUsage = nil }},
		{"for clients only", w.eve.ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }},
		{"for mail", w.eve.ca, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} }},
		{"a CA", w.eve.ca, func(c *x509.Certificate) { c.IsCA = true }},
		{"one that may sign certificates", w.eve.ca, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }},
		{"expired", w.eve.ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }},
		{"not yet valid", w.eve.ca, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }},
		{"signed by another CA of the same name", other, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, was := w.amber.peer("eve")
			w.eve.show(c.ca.leaf(t, "eve", c.change))
			eventually(t, "the handshake fails, and is counted", func() string {
				_, now := w.amber.peer("eve")
				if st := w.amber.Status(); now["HandshakeFailed"] <= was["HandshakeFailed"] || st.Down["eve"] == "" {
					return fmt.Sprintf("eve has %s; %s", reasons(now), st.Down["eve"])
				}
				return ""
			})
			if p, _ := w.amber.peer("eve"); p.Path != "" {
				t.Errorf("the stream is up: %s", p.Path)
			}
			if p, _ := w.amber.peer("birch"); p.Path == "" {
				t.Error("the stream of birch is down")
			}
		})
	}
	// Its own certificate is taken again.
	w.eve.show(w.eve.ca.leaf(t, "eve", nil))
	eventually(t, "the stream of eve is up again", func() string {
		if p, _ := w.amber.peer("eve"); p.Path == "" {
			return w.amber.Status().Down["eve"]
		}
		return ""
	})
	if len(w.amber.store.hurt) > 0 {
		t.Errorf("birch was hurt: %v", w.amber.store.hurt)
	}
}
