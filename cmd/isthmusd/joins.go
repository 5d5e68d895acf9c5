package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api/admin"
	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/operator"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/workload"
	"github.com/isthmus-mesh/isthmus/discovery/translate/nodeid"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/federation/policy"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// gateways are the addresses by which others reach this cluster: those of the configuration, else what its objects tell.
func (d *daemon) gateways() []netip.AddrPort {
	if snap, _ := d.snapshots.Latest(); snap != nil {
		return snap.Local.Gateways
	}
	return d.local.Gateways
}

// issueToken makes a join token for a cluster or a machine.
func (d *daemon) issueToken(ctx context.Context, r admin.TokenRequest) (admin.TokenReply, error) {
	ttl, err := lifetime(r.TTL, 15*time.Minute)
	if err != nil {
		return admin.TokenReply{}, err
	}
	var endpoints []string
	for _, g := range d.gateways() {
		if len(endpoints) < 4 {
			endpoints = append(endpoints, g.String())
		}
	}
	c := token.IssueConfig{
		Kind: token.Kind(r.Kind), TrustDomain: d.local.TrustDomain, Key: ed25519Signer{d.key}, Pins: []token.Pin{token.PinOf(d.ca.Root())},
		Endpoints: endpoints, Lifetime: ttl, Uses: r.Uses, AutoApprove: r.AutoApprove || d.cfg.Federation.AutoApprove, CreatedBy: operator.Who(ctx),
	}
	switch c.Kind {
	case token.Cluster:
		if r.Name == d.cfg.Cluster {
			return admin.TokenReply{}, diag.Hint(fmt.Errorf("cluster %s is this cluster", r.Name), "name the cluster that is to join")
		}
		for _, p := range d.peering.Status().Peers {
			if string(p.Name) == r.Name && p.State == protocol.Approved {
				return admin.TokenReply{}, diag.Hint(fmt.Errorf("the name %s is taken: a cluster of that name is a member", r.Name), "choose another name, or put that cluster out first: isthmus peer evict %s", r.Name)
			}
		}
		c.Subject = r.Name
	case token.VM:
		labels := maps.Clone(r.Labels)
		if len(labels) == 0 {
			labels = map[string]string{"app": r.Name}
		}
		c.Machine = &token.Machine{Name: r.Name, Namespace: r.Namespace, ServiceAccount: r.ServiceAccount, Labels: labels, Ports: r.Ports, Network: d.local.Network}
	}
	text, grant, err := token.Issue(c)
	if err != nil {
		return admin.TokenReply{}, err
	}
	if err := d.grants.Put(grant); err != nil {
		return admin.TokenReply{}, err
	}
	d.log.Info("token issued", "token", grant.ID, "kind", grant.Kind, "name", grant.Subject, "expires", grant.Expires)
	return admin.TokenReply{Token: text, ID: grant.ID, Expires: grant.Expires}, nil
}

func lifetime(s string, otherwise time.Duration) (time.Duration, error) {
	if s == "" {
		return otherwise, nil
	}
	ttl, err := time.ParseDuration(s)
	if err != nil || ttl <= 0 {
		return 0, diag.Hint(fmt.Errorf("ttl %q is not a duration", s), "for example 15m or 2h")
	}
	return ttl, nil
}

// mintWorkload stands in for a kubelet.
func (d *daemon) mintWorkload(r admin.WorkloadTokenRequest) (admin.TokenReply, error) {
	ttl, err := lifetime(r.TTL, time.Hour)
	if err != nil {
		return admin.TokenReply{}, err
	}
	text, err := d.ca.Mint(identity.Workload{Namespace: r.Namespace, ServiceAccount: r.ServiceAccount, Pod: r.Pod}, ttl)
	return admin.TokenReply{Token: text, Expires: time.Now().Add(ttl)}, err
}

// join redeems a token that another cluster issued for us.
func (d *daemon) join(ctx context.Context, r admin.JoinRequest) (admin.JoinReply, error) {
	p, err := token.Parse(r.Token)
	if err != nil {
		return admin.JoinReply{}, err // it says what to do
	}
	switch {
	case p.Kind != token.Cluster:
		return admin.JoinReply{}, diag.Hint(fmt.Errorf("token %s is for machine %s, not for a cluster", p.ID, p.Subject), "run on the machine: isthmus-agent join TOKEN")
	case p.Issuer == d.local.TrustDomain && !bytes.Equal(p.IssuerKey, d.key.Public()):
		return admin.JoinReply{}, diag.Hint(fmt.Errorf("token %s was issued by another cluster with our trust domain, %s", p.ID, p.Issuer), "give one of the two another trustDomain before they meet")
	case p.Issuer == d.local.TrustDomain:
		return admin.JoinReply{}, diag.Hint(fmt.Errorf("token %s was issued by this very cluster", p.ID), "run isthmus join in cluster %s", p.Subject)
	case p.Subject != d.cfg.Cluster:
		return admin.JoinReply{}, diag.Hint(fmt.Errorf("token %s is for cluster %s, this cluster is %s", p.ID, p.Subject, d.cfg.Cluster), "make one for this cluster: isthmus token create --for %s", d.cfg.Cluster)
	}
	for _, peer := range d.peering.Status().Peers { // seen after redemption, it would leave us a member there and not here
		if peer.TrustDomain == p.Issuer && peer.State == protocol.Approved && !bytes.Equal(peer.FederationKey, p.IssuerKey) {
			return admin.JoinReply{}, diag.Hint(fmt.Errorf("token %s was issued by another %s than cluster %s, a member here: their keys differ", p.ID, p.Issuer, peer.Name),
				"if %s was set up anew, put its old self out first: isthmus peer evict %s", peer.Name, peer.Name)
		}
	}
	reply := admin.JoinReply{Cluster: d.cfg.Cluster, Issuer: string(p.Issuer), DryRun: r.DryRun}
	if r.DryRun {
		return reply, p.CheckTime(time.Now())
	}
	own, err := d.peering.OwnRecord(ctx)
	if err != nil {
		return reply, err
	}
	result, err := token.Redeem(ctx, r.Token, token.RedeemConfig{Body: &federationv1.ClusterJoin{Name: d.cfg.Cluster, Cluster: own, AllowOverlap: r.AllowOverlap}, Log: d.log})
	if err != nil {
		var refused *token.Refused
		if errors.As(err, &refused) {
			return reply, fmt.Errorf("%s refuses the token: %w", p.Issuer, err)
		}
		return reply, fmt.Errorf("join %s: %w", p.Issuer, err)
	}
	if err := d.peering.Joined(ctx, result.Records); err != nil {
		return reply, diag.Hint(fmt.Errorf("join %s: its answer is not taken, nothing changed here: %w", p.Issuer, err), "have the issuer put this cluster out again: isthmus peer evict %s", d.cfg.Cluster)
	}
	reply.Pending = result.Pending
	reply.Members = []string{d.cfg.Cluster}
	for _, r := range result.Records {
		if r.Kind == protocol.KindCluster && !slices.Contains(reply.Members, r.Origin) {
			reply.Members = append(reply.Members, r.Origin)
		}
		c := new(federationv1.Cluster)
		if r.Kind == protocol.KindCluster && proto.Unmarshal(r.Body, c) == nil && c.TrustDomain == string(p.Issuer) {
			reply.Issuer = r.Origin
		}
	}
	slices.Sort(reply.Members)
	d.log.Info("joined", "peer", reply.Issuer, "members", reply.Members, "pending", reply.Pending)
	return reply, nil
}

// admitCluster answers a cluster that holds a token of ours.
func (d *daemon) admitCluster(ctx context.Context, g token.Grant, j *federationv1.ClusterJoin) (*federationv1.JoinResult, error) {
	c := new(federationv1.Cluster)
	if err := proto.Unmarshal(j.GetCluster().GetBody(), c); err != nil {
		return nil, &token.Refused{Reason: token.ReasonRecord, Message: "the cluster record of " + j.GetName() + " does not decode"}
	}
	if !j.GetAllowOverlap() {
		if what := d.overlap(policy.Described(mesh.ClusterID(j.GetName()), c)); what != "" {
			return nil, &token.Refused{Reason: "RangeOverlap", Message: fmt.Sprintf("%s share addresses on network %s; give cluster %s other ranges, or a network of its own; if what its nodes say is not so, set podRanges in its configuration, or join with --allow-overlap", what, c.Network, j.GetName())}
		}
	}
	member := &federationv1.Member{Name: j.GetName(), TrustDomain: c.TrustDomain, FederationKey: c.FederationKey, TokenId: g.ID}
	records, pending, err := d.peering.Admit(ctx, member, j.GetCluster(), !g.AutoApprove)
	var refusal *protocol.Refusal
	if errors.As(err, &refusal) {
		return nil, &token.Refused{Reason: refusal.Reason, Message: refusal.Message + "; " + d.remedy(refusal.Reason, member)}
	}
	if err != nil {
		return nil, err
	}
	d.log.Info("cluster admitted", "peer", j.GetName(), "trustdomain", c.TrustDomain, "token", g.ID, "pending", pending)
	return &federationv1.JoinResult{Pending: pending, Records: records}, nil
}

// overlap says which ranges of a cluster that joins are taken on its network, if any are.
func (d *daemon) overlap(joiner *mesh.Cluster) string {
	known := []*mesh.Cluster{d.local}
	if snap, _ := d.snapshots.Latest(); snap != nil {
		known = snap.Clusters
	}
	for _, c := range known {
		if c.ID == joiner.ID || c.Network != joiner.Network {
			continue
		}
		if what := topologies.Overlap(c, joiner); what != "" {
			return what
		}
	}
	return ""
}

// remedy says what the operator of a cluster that was not admitted can do.
func (d *daemon) remedy(reason string, m *federationv1.Member) string {
	switch reason {
	case protocol.ReasonNameTaken:
		return fmt.Sprintf("give the cluster another name and ask for a token for that, or have %s put the other one out first: isthmus peer evict %s", d.local.TrustDomain, m.Name)
	case protocol.ReasonTrustDomain:
		return "set another trustDomain in the configuration of cluster " + m.Name + ", with a new dataDir"
	}
	return "use an isthmus of the issuer's version, then run the same command again"
}

// admitMachine gives a machine its first certificate and all that it needs to find us again.
func (d *daemon) admitMachine(_ context.Context, g token.Grant, j *federationv1.MachineJoin) (*federationv1.JoinResult, error) {
	m := g.Machine
	if m == nil {
		return nil, &token.Refused{Reason: token.ReasonInternal, Message: "token " + g.ID + " carries no machine; ask for a new one"}
	}
	id := mesh.SPIFFE(d.local.TrustDomain, m.Namespace, m.ServiceAccount)
	chain, err := d.ca.Sign([]byte(j.GetCsrPem()), id, 0)
	if err != nil {
		return nil, &token.Refused{Reason: token.ReasonRequest, Message: err.Error()}
	}
	if err := d.machines.Admit(workload.Machine{Name: m.Name, Namespace: m.Namespace, ServiceAccount: m.ServiceAccount, Network: m.Network, Labels: m.Labels, Ports: m.Ports, Addresses: j.GetAddresses()}); err != nil {
		return nil, err
	}
	out := &federationv1.Machine{
		CertChainPem: chain, Bundle: d.ca.Roots(), Cluster: d.cfg.Cluster, TrustDomain: string(d.local.TrustDomain), Network: string(m.Network),
		Name: m.Name, Namespace: m.Namespace, ServiceAccount: m.ServiceAccount, Labels: m.Labels, Ports: m.Ports,
		ControlPlaneName: sni.XDS.Name(d.local.TrustDomain),
	}
	for _, gw := range d.gateways() {
		out.ControlPlane = append(out.ControlPlane, gw.String())
		out.Gateways = append(out.Gateways, gw.String())
	}
	d.log.Info("machine admitted", "machine", m.Namespace+"/"+m.Name, "identity", id, "token", g.ID)
	return &federationv1.JoinResult{Machine: out}, nil
}

// connected registers machines while their agents are there.
func (d *daemon) connected(c xds.Client) func(clean bool) {
	fields := c.Node.GetMetadata().GetFields()
	if fields["ISTHMUS_MACHINE"].GetStringValue() != "true" {
		return nil
	}
	p, err := nodeid.Parse(c.Node, c.Identity)
	if err != nil {
		return nil
	}
	var addresses []string
	for _, a := range p.Addresses {
		addresses = append(addresses, a.String())
	}
	account := c.Identity[strings.LastIndexByte(c.Identity, '/')+1:]
	gone, err := d.machines.Connect(p.Namespace, p.Name, account, addresses)
	if err != nil {
		d.log.Warn("machine not registered", "node", p.ID, "identity", c.Identity, "err", err)
		return nil
	}
	return gone
}
