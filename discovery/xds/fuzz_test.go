package xds

import (
	"context"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// FuzzRequests reads its input as a sequence of requests, changes of the set and pushes on one stream. Nothing may
// crash, and when the stream has ended nothing of it is left.
func FuzzRequests(f *testing.F) {
	f.Add(true, []byte{0x00, 0x31, 0x80, 0x42, 0x93, 0x90, 0x24})
	f.Add(false, []byte{0x00, 0x31, 0x80, 0x42, 0x93, 0x90, 0x24})
	f.Add(true, []byte{0x47, 0x90, 0x27, 0x80, 0x90, 0xa0, 0x90})
	f.Add(false, []byte{0x57, 0x90, 0xb1, 0x67, 0x80, 0x90, 0x17, 0x90})
	names := []string{"a", "b", "x", "*"}
	types := []string{ClusterType, RouteType, "", EndpointType}
	sets := []Set{
		warming(things(typed{ClusterType: named{"a": "1", "b": "1"}, EndpointType: named{"a": "1"}, RouteType: named{"a": "1"}})),
		warming(things(typed{ClusterType: named{"a": "2", "b": "1"}, EndpointType: named{"a": "1", "b": "1"}})),
		{},
		things(typed{RouteType: named{"a": "1", "b": "2"}}),
	}
	f.Fuzz(func(t *testing.T, delta bool, input []byte) {
		s := New(Config{Feed: func(Client) (Feed, func(), error) { return newMemory(nil), nil, nil }})
		st, err := s.open(context.Background(), &corev3.Node{Id: "n"}, delta)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			s.close(st)
			if st.view.live != 0 || len(s.views) != 0 {
				t.Errorf("%d streams and %d views are left", st.view.live, len(s.views))
			}
		}()
		nonce := ""
		for _, b := range input {
			typ, name, other := types[b&3], names[b>>2&3], names[b>>1&3]
			switch b >> 4 {
			case 8:
				st.view.publish(sets[b&3])
			case 9:
				if err := st.push(func(b batch) error { nonce = b.flight.nonce; return nil }); err != nil {
					t.Fatal(err)
				}
			default:
				list := [][]string{nil, {name}, {name, other}, {other, other}}[b>>4&3]
				if delta {
					err = st.deltaRequest(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typ, ResponseNonce: nonce, ResourceNamesSubscribe: list,
						ResourceNamesUnsubscribe: [][]string{nil, {other}}[b>>6&1], InitialResourceVersions: map[string]string{name: "1", "z": ""}})
				} else {
					err = st.sotwRequest(&discoveryv3.DiscoveryRequest{TypeUrl: typ, ResponseNonce: nonce, ResourceNames: list, VersionInfo: name})
				}
				if (err != nil) != (typ == "") {
					t.Fatalf("type %q: %v", typ, err)
				}
			}
		}
	})
}
