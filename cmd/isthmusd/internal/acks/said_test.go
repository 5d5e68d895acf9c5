package acks

import (
	"testing"

	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

func TestSaid(t *testing.T) {
	body, err := proto.Marshal(&federationv1.Cluster{Trusts: map[string][]byte{"birch.mesh": Sum([]byte("roots"))}})
	if err != nil {
		t.Fatal(err)
	}
	record := func(origin, kind string, body []byte) *federationv1.Record {
		return &federationv1.Record{Origin: origin, Kind: kind, Body: body}
	}
	for name, c := range map[string]struct {
		records []*federationv1.Record
		want    int
	}{
		"ours":       {[]*federationv1.Record{record("birch", protocol.KindCluster, nil), record("amber", protocol.KindCluster, body)}, 1},
		"a peer's":   {[]*federationv1.Record{record("birch", protocol.KindCluster, body)}, 0},
		"a service":  {[]*federationv1.Record{record("amber", protocol.KindService, body)}, 0},
		"damaged":    {[]*federationv1.Record{record("amber", protocol.KindCluster, []byte{0xff})}, 0},
		"says none":  {[]*federationv1.Record{record("amber", protocol.KindCluster, nil)}, 0},
		"no records": {},
	} {
		if got := Said(c.records, "amber"); len(got) != c.want || c.want == 1 && string(got["birch.mesh"]) != string(Sum([]byte("roots"))) {
			t.Errorf("%s: got %x", name, got)
		}
	}
}
