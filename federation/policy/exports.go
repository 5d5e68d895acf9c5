// Package policy says what a cluster tells its peers and what it believes of what they tell. It is pure: a Snapshot
// gives statements, records give inputs, and whatever is refused becomes a Problem. It does not know how records
// travel or who is a member.
package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/peerauth"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"google.golang.org/protobuf/proto"
)

// Exports returns what the local cluster says of the services it exports: for each a service and an endpoints
// statement, sorted by kind and key. Only local endpoints with mesh TLS and an identity that peers can derive (the
// cluster's trust domain, the service's namespace) are told, and only what takes mutual TLS by the PeerAuthentications
// here: gateways carry nothing else. Equal snapshots give equal bytes.
func Exports(snap *mesh.Snapshot) []protocol.Statement {
	if snap == nil || snap.Local == nil {
		return nil
	}
	var out []protocol.Statement
	seen := map[string]bool{}
	for _, svc := range snap.Services {
		key := svc.Namespace + "/" + svc.Name
		if !svc.Exported || svc.Global || seen[key] {
			continue
		}
		seen[key] = true
		out = append(out,
			protocol.Statement{Kind: protocol.KindService, Key: key, Body: encode(serviceBody(snap, svc))},
			protocol.Statement{Kind: protocol.KindEndpoints, Key: key, Body: encode(endpointsBody(snap, svc))})
	}
	slices.SortFunc(out, func(a, b protocol.Statement) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Key, b.Key))
	})
	return out
}

// ClusterStatement returns the local cluster's description of itself.
func ClusterStatement(local *mesh.Cluster, federationKey []byte, capabilities []string) protocol.Statement {
	gateways := make([]string, 0, len(local.Gateways))
	for _, g := range local.Gateways {
		gateways = append(gateways, g.String())
	}
	slices.Sort(gateways)
	capabilities = slices.Sorted(slices.Values(capabilities))
	return protocol.Statement{Kind: protocol.KindCluster, Body: encode(&federationv1.Cluster{
		TrustDomain: string(local.TrustDomain), Network: string(local.Network), Gateways: slices.Compact(gateways),
		FederationKey: federationKey, Bundle: local.Roots, Capabilities: slices.Compact(capabilities),
		PodRanges: texts(local.PodRanges), ServiceRanges: texts(local.ServiceRanges), Trusts: sums(local.Trusts),
	})}
}

func sums(trusts map[mesh.TrustDomain][]byte) map[string][]byte {
	out := make(map[string][]byte, len(trusts))
	for td, sum := range trusts {
		out[string(td)] = sum
	}
	return out
}

func texts(ranges []netip.Prefix) (out []string) {
	for _, p := range ranges[:min(len(ranges), maxRanges)] {
		out = append(out, p.String())
	}
	return out
}

func encode(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil { // a string that is not UTF-8: the core refuses a body that does not decode
		return []byte{0xff}
	}
	return b
}

func exportTo(svc *mesh.Service) []string {
	out := make([]string, 0, len(svc.ExportTo))
	for _, id := range svc.ExportTo {
		out = append(out, string(id))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func serviceBody(snap *mesh.Snapshot, svc *mesh.Service) *federationv1.Service {
	body := &federationv1.Service{ExportTo: exportTo(svc), Export: exportBody(svc.Facts)}
	for _, p := range svc.Ports {
		if offAtAll(snap, svc, p) {
			continue
		}
		body.Ports = append(body.Ports, &federationv1.Port{Name: p.Name, Number: p.Number, Protocol: string(p.Protocol)})
	}
	slices.SortFunc(body.Ports, func(a, b *federationv1.Port) int {
		return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Name, b.Name))
	})
	if global := snap.Service(mesh.GlobalHost(svc.Name, svc.Namespace)); global != nil {
		vips := slices.SortedFunc(slices.Values(global.VIPs), netip.Addr.Compare)
		for _, ip := range slices.Compact(vips) {
			body.Vips = append(body.Vips, ip.String())
		}
	}
	return body
}

// offAtAll reports whether PeerAuthentications turn mutual TLS off at a port of every endpoint.
func offAtAll(snap *mesh.Snapshot, svc *mesh.Service, p mesh.Port) bool {
	ends := svc.EndpointsIn(snap.Local.ID)
	return len(ends) > 0 && !slices.ContainsFunc(ends, func(e *mesh.Endpoint) bool { return !peerauth.Off(snap.PeerAuthentications, e, p) })
}

func endpointsBody(snap *mesh.Snapshot, svc *mesh.Service) *federationv1.Endpoints {
	local := snap.Local
	body := &federationv1.Endpoints{ExportTo: exportTo(svc)}
	for _, e := range svc.EndpointsIn(local.ID) {
		account, ok := accountOf(local.TrustDomain, svc.Namespace, e.Identity)
		if !e.TLS || !ok || peerauth.OffEverywhere(snap.PeerAuthentications, e, svc.Ports) {
			continue
		}
		body.Endpoints = append(body.Endpoints, &federationv1.Endpoint{
			Workload: e.Workload, Network: string(cmp.Or(e.Network, local.Network)), Address: e.Address, Ports: e.Ports,
			Labels: e.Labels, ServiceAccount: account, Locality: e.Locality, Weight: e.Weight, NotReady: !e.Ready,
		})
	}
	slices.SortFunc(body.Endpoints, func(a, b *federationv1.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Workload, b.Workload), cmp.Compare(a.Address, b.Address))
	})
	return body
}

// accountOf reads the service account out of spiffe://TD/ns/NS/sa/SA. A peer builds the identity from the trust
// domain, the service's namespace and the account, so any other identity cannot be told. Unknown is empty.
func accountOf(td mesh.TrustDomain, namespace, identity string) (string, bool) {
	if identity == "" {
		return "", true
	}
	account, ok := strings.CutPrefix(identity, mesh.SPIFFE(td, namespace, ""))
	return account, ok && protocol.IsDomain(account)
}
