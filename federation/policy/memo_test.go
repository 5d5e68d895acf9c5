package policy

import (
	"fmt"
	"reflect"
	"testing"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// TestMemo: with what was read before, the answer is the same, and what is unchanged is the same value.
func TestMemo(t *testing.T) {
	local := &mesh.Cluster{ID: "amber", Network: "flat"}
	fresh := mesh.Fresh
	cluster := func(id, network, pods string) *federationv1.Record {
		return records(id, protocol.Statement{Kind: protocol.KindCluster, Body: encode(&federationv1.Cluster{TrustDomain: id + ".mesh", Network: network, PodRanges: []string{pods}})})[0]
	}
	service := func(id, name, address string) []*federationv1.Record {
		return records(id, protocol.Statement{Kind: protocol.KindService, Key: "default/" + name},
			protocol.Statement{Kind: protocol.KindEndpoints, Key: "default/" + name, Body: encode(&federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{{Workload: "w", Address: address, Ports: map[uint32]uint32{80: 80}}}})})
	}
	var memo Memo
	both := func(what string, rs []*federationv1.Record, o Options) []Origin {
		t.Helper()
		f := func(mesh.ClusterID) (mesh.Freshness, time.Time) { return fresh, time.Time{} }
		want, wantProblems := Imports(local, rs, f, o)
		o.Memo = &memo
		got, problems := Imports(local, rs, f, o)
		if !reflect.DeepEqual(got, want) || !reflect.DeepEqual(problems, wantProblems) {
			t.Errorf("%s: with a memo %+v, without %+v", what, got, want)
		}
		return got
	}
	rs := []*federationv1.Record{cluster("birch", "flat", "10.2.0.0/16"), cluster("cedar", "flat", "10.3.0.0/16")}
	for i := range 5 {
		rs = append(rs, service("birch", fmt.Sprintf("s%d", i), fmt.Sprintf("10.2.0.%d", i+1))...)
	}
	rs = append(rs, service("cedar", "thief", "10.2.0.9")...) // in the range of birch
	rs = append(rs, service("cedar", "bad", "127.0.0.1")...)
	first := both("first", rs, Options{})
	second := both("the same again", rs, Options{})
	for i, imp := range first[0].Input.Imports {
		if second[0].Input.Imports[i] != imp {
			t.Errorf("%s was read again", imp.Name)
		}
	}
	changed := append(append([]*federationv1.Record{}, rs[:2]...), rs[4:]...)
	changed = append(changed, service("birch", "s0", "10.2.0.77")...)
	third := both("one changed", changed, Options{})
	same := 0
	for i := range third[0].Input.Imports {
		if third[0].Input.Imports[i] == first[0].Input.Imports[i] {
			same++
		}
	}
	if same != 4 {
		t.Errorf("%d of 5 imports are the same", same)
	}
	both("birch gives up its range: the endpoint of cedar is its own affair", append([]*federationv1.Record{cluster("birch", "flat", "10.9.0.0/16")}, changed[1:]...), Options{})
	both("birch moves", append([]*federationv1.Record{cluster("birch", "far", "10.2.0.0/16")}, changed[1:]...), Options{})
	both("fewer endpoints are allowed", changed, Options{MaxEndpoints: 3})
	fresh = mesh.Late
	both("not heard", changed, Options{})
	local = &mesh.Cluster{ID: "amber", Network: "other"}
	both("we move", changed, Options{})
	both("gone", rs[:1], Options{})
	both("back", rs, Options{})
}
