package operator

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/debug"
	"github.com/isthmus-mesh/isthmus/discovery/explain"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/peering"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/topologies"
)

func (s *Server) peers() []admin.Peer {
	st := s.cfg.Peering.Status()
	alive := s.cfg.Alive()
	endpoints := map[mesh.ClusterID]int{}
	if snap, _ := s.cfg.Snapshots.Latest(); snap != nil {
		for _, i := range snap.Imports {
			endpoints[i.Cluster] += len(i.Endpoints)
		}
	}
	out := []admin.Peer{}
	for _, p := range st.Peers {
		x := admin.Peer{
			Name: string(p.Name), TrustDomain: string(p.TrustDomain), State: string(p.State), Freshness: p.Freshness.String(),
			Path: cmp.Or(p.Path, "down"), Services: p.Services, Endpoints: endpoints[p.Name], Epoch: p.Epoch, Seq: p.Seq,
			Alive: cmp.Or(alive[string(p.Name)], "unknown"), Problem: p.LastProblem, StaleSince: st.Stale[p.Name], Gateways: []string{}, Refused: st.Refused[p.Name],
		}
		if now := time.Now(); !p.Drain.Begun.IsZero() {
			x.Drain = &admin.Drain{Begun: p.Drain.Begun, Over: p.Drain.Over.String(), Percent: int(p.Drain.Taken(now)) * 100 / mesh.DrainSteps}
		}
		if p.Heard {
			x.LastHeard = st.Start.Add(p.LastHeard)
		}
		switch {
		case p.State == protocol.Evicted, p.State == protocol.Gone:
			x.Freshness, x.StaleSince = "", time.Time{}
		case p.Path == "direct":
			x.Path = "direct " + st.Gateways[p.Name]
		case st.Down[p.Name] != "":
			x.Problem = st.Down[p.Name]
		}
		if st.Banned[p.Name] {
			x.Problem = "it has evicted this cluster"
		}
		if p.Cluster != nil {
			x.Gateways, x.Network = p.Cluster.Gateways, p.Cluster.Network
			x.Topology = string(topologies.Between(s.cfg.Local, &mesh.Cluster{TrustDomain: p.TrustDomain, Network: mesh.NetworkID(p.Cluster.Network)}))
		}
		out = append(out, x)
	}
	return out
}

// local is this cluster as the newest snapshot knows it.
func (s *Server) local() *mesh.Cluster {
	if snap, _ := s.cfg.Snapshots.Latest(); snap != nil {
		return snap.Local
	}
	return s.cfg.Local
}

func (s *Server) status(r *http.Request) (admin.Status, error) {
	l := s.cfg.Local
	out := admin.Status{
		Cluster: string(l.ID), TrustDomain: string(l.TrustDomain), Network: string(l.Network), Version: s.cfg.Version,
		Gateways: []string{}, Peers: s.peers(), Exports: []admin.Service{}, Imports: []admin.Service{}, Proxies: s.proxies(r), Machines: []admin.Machine{}, Problems: []admin.ProblemLine{},
	}
	for _, g := range s.local().Gateways {
		out.Gateways = append(out.Gateways, g.String())
	}
	for _, m := range s.cfg.Machines() {
		out.Machines = append(out.Machines, admin.Machine{Name: m.Name, Namespace: m.Namespace, Address: strings.Join(m.Addresses, ","), Connected: m.Connected, Since: m.Since})
	}
	if s.cfg.Sources != nil {
		out.Sources = s.cfg.Sources()
	}
	snap, _ := s.cfg.Snapshots.Latest()
	if snap == nil {
		return out, nil
	}
	out.Ready, out.Revision = true, snap.Revision
	imported := map[string]bool{}
	for _, i := range snap.Imports {
		imported[mesh.GlobalHost(i.Name, i.Namespace)] = true
	}
	for _, svc := range snap.Services {
		if svc.Exported {
			out.Exports = append(out.Exports, line(svc))
		}
		if imported[svc.Host] {
			out.Imports = append(out.Imports, line(svc))
		}
	}
	problems := slices.Concat(snap.Problems, s.cfg.Problems())
	slices.SortFunc(problems, func(a, b mesh.Problem) int { return strings.Compare(a.String(), b.String()) })
	type fact struct {
		object mesh.ObjectRef
		reason string
	}
	seen := map[fact]bool{} // a translation finds again what was found across objects
	for _, p := range snap.Problems {
		seen[fact{p.Object, p.Reason}] = true
	}
	for _, p := range slices.Compact(problems) {
		if seen[fact{p.Object, p.Reason}] && !slices.Contains(snap.Problems, p) {
			continue
		}
		out.Problems = append(out.Problems, admin.ProblemLine{Object: p.Object.String(), Source: p.Object.Source, Field: p.Field, Reason: p.Reason, Message: p.Message, Remedy: p.Remedy})
	}
	for _, p := range out.Peers { // a link that is down is shown there, a ban among the snapshot's problems
		if p.Problem != "" && p.State == string(protocol.Approved) && p.Path != "down" {
			out.Problems = append(out.Problems, admin.ProblemLine{Object: "Peer/" + p.Name, Reason: "RecordRejected", Message: p.Problem, Remedy: "isthmus peer show " + p.Name})
		}
	}
	return out, nil
}

func line(svc *mesh.Service) admin.Service {
	out := admin.Service{Host: svc.Host, Addresses: []string{}, Ports: []string{}, Endpoints: map[string]int{}}
	for _, a := range svc.VIPs {
		out.Addresses = append(out.Addresses, a.String())
	}
	for _, p := range svc.Ports {
		out.Ports = append(out.Ports, fmt.Sprintf("%d/%s", p.Number, p.Protocol))
	}
	for _, e := range svc.Endpoints {
		if e.Ready {
			out.Endpoints[string(e.Cluster)]++
		}
	}
	return out
}

var shortTypes = map[string]string{
	xds.ClusterType: "CDS", xds.EndpointType: "EDS", xds.ListenerType: "LDS", xds.RouteType: "RDS", xds.SecretType: "SDS",
}

// proxies lists those of this replica, and unless they alone are asked for those of the others.
func (s *Server) proxies(r *http.Request) []admin.Proxy {
	out := []admin.Proxy{}
	if s.cfg.Others != nil && r.URL.Query().Get(admin.LocalOnly) == "" {
		defer func() { slices.SortStableFunc(out, func(a, b admin.Proxy) int { return cmp.Compare(a.Node, b.Node) }) }()
		for _, body := range s.cfg.Others(r.Context(), "/v1/proxies") {
			var more []admin.Proxy
			if json.Unmarshal(body, &more) == nil {
				out = append(out, more...)
			}
		}
	}
	for _, c := range s.cfg.Proxies() {
		if id := c.Node.GetId(); strings.HasPrefix(id, "peer~") || strings.HasPrefix(id, peering.ReplicaNode) {
			continue // peers are listed as such; a replica is no proxy
		}
		p := admin.Proxy{Node: c.Node.GetId(), Identity: c.Identity, Address: c.Addr, Types: map[string]admin.ProxyState{}}
		for _, t := range c.Types {
			name := shortTypes[t.TypeURL]
			if name == "" {
				name = t.TypeURL[strings.LastIndexByte(t.TypeURL, '.')+1:]
			}
			state := admin.ProxyState{State: debug.StateOf(t), Nack: t.Nack, Sent: t.Sent, Acked: t.Acked, Held: t.Held, Pending: t.Pending}
			p.Types[name] = state
		}
		out = append(out, p)
	}
	return out
}

// probeTimeout bounds all handshakes of one explanation together.
const probeTimeout = 3 * time.Second

func (s *Server) explain(ctx context.Context, r admin.ExplainRequest) (admin.Explanation, error) {
	snap, _ := s.cfg.Snapshots.Latest()
	if snap == nil {
		return admin.Explanation{}, diag.Hint(fmt.Errorf("nothing is known yet: the first snapshot is still being built"), "isthmus status says what is missing")
	}
	headers := map[string]string{}
	for k, v := range r.Headers {
		headers[strings.ToLower(k)] = v
	}
	way, err := explain.Explain(snap, explain.Request{From: r.From, URL: r.URL, Method: r.Method, Headers: headers})
	if err != nil {
		return admin.Explanation{}, err
	}
	out := admin.Explanation{
		From: way.From.Object.String(), URL: r.URL, Host: way.Service.Host, Object: way.Service.Object.String(), Port: way.Port.Number,
		Protocol: string(way.Port.Protocol), Route: way.Route, Addresses: line(way.Service).Addresses, Targets: []admin.Destination{},
	}
	for _, t := range way.Targets {
		d := admin.Destination{
			Host: t.Service.Host, Subset: t.Subset, Labels: t.Labels, Weight: t.Weight, TLS: "mutual TLS where the endpoint has a proxy",
			Cluster: fmt.Sprintf("outbound|%d|%s|%s", t.Port.Number, t.Subset, t.Service.Host), Endpoints: []admin.ExplainedAddress{},
		}
		for _, h := range t.Hops {
			x := admin.ExplainedAddress{
				Workload: h.Endpoint.Workload, Cluster: string(h.Endpoint.Cluster), SNI: h.SNI, Chain: h.Chain, Identity: h.Endpoint.Identity,
				Freshness: h.Endpoint.Freshness.String(), Ready: h.Endpoint.Ready,
			}
			if h.Path.Direct {
				x.Address = h.Endpoint.Address
				if h.Address.IsValid() {
					x.Address = h.Address.String()
				}
			}
			for _, g := range h.Path.Via {
				x.Via = append(x.Via, g.String())
			}
			if h.Path.Network != nil { // gateways known by name, too
				x.Via = nil
				for _, g := range h.Path.Network.Gateways {
					x.Via = append(x.Via, net.JoinHostPort(g.Address, strconv.Itoa(int(g.Port))))
				}
			}
			if !h.Path.Reachable() {
				out.Problems = append(out.Problems, fmt.Sprintf("%s in %s cannot be reached: cluster %s has no gateway, or the workload no mutual TLS", x.Workload, x.Cluster, x.Cluster))
			}
			d.Endpoints = append(d.Endpoints, x)
		}
		out.Targets = append(out.Targets, d)
	}
	for _, p := range slices.Concat(snap.Problems, s.cfg.Problems()) {
		if strings.Contains(p.Message, way.Service.Host) || p.Object == way.Service.Object {
			out.Problems = append(out.Problems, p.String())
		}
	}
	if !r.NoProbe {
		s.probe(ctx, out.Targets)
	}
	return out, nil
}

// probe tries a handshake on every way at once.
func (s *Server) probe(ctx context.Context, targets []admin.Destination) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var wg sync.WaitGroup
	slots := make(chan struct{}, 16)
	for i := range targets {
		for j := range targets[i].Endpoints {
			x := &targets[i].Endpoints[j]
			addrs := x.Via
			if x.Address != "" {
				addrs = []string{x.Address}
			}
			if x.SNI == "" || len(addrs) == 0 {
				continue
			}
			wg.Go(func() {
				slots <- struct{}{}
				defer func() { <-slots }()
				p := s.cfg.Probe(ctx, addrs, x.SNI)
				x.Handshake = &p
			})
		}
	}
	wg.Wait()
}
