package lab

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Names of our nftables tables: they never meet the one by which the agent captures.
const (
	tableFilter = "isthmus-lab"
	tableCut    = "isthmus-lab-cut"
)

// rules builds one table in one namespace.
type rules struct {
	conn  *nftables.Conn
	table *nftables.Table
}

func (n *Node) rules(name string, family nftables.TableFamily) (*rules, error) {
	conn, err := nftables.New(nftables.WithNetNSFd(n.fd))
	if err != nil {
		return nil, fmt.Errorf("nftables in %s: %w", n.Name, err)
	}
	return &rules{conn: conn, table: conn.AddTable(&nftables.Table{Name: name, Family: family})}, nil
}

func (r *rules) chain(name string, t nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority, policy nftables.ChainPolicy) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Table: r.table, Name: name, Type: t, Hooknum: hook, Priority: prio, Policy: &policy})
}

func (r *rules) add(c *nftables.Chain, parts ...[]expr.Any) {
	rule := &nftables.Rule{Table: r.table, Chain: c}
	for _, p := range parts {
		rule.Exprs = append(rule.Exprs, p...)
	}
	r.conn.AddRule(rule)
}

func ifname(key expr.MetaKey, name string) []expr.Any {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: b}}
}

func from(name string) []expr.Any { return ifname(expr.MetaKeyIIFNAME, name) }
func to(name string) []expr.Any   { return ifname(expr.MetaKeyOIFNAME, name) }

func established() []expr.Any {
	mask := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func tcpPort(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() []expr.Any   { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

// firewall makes the cluster's router let out TCP 15443 only and nothing in.
func (c *Cluster) firewall() error {
	r, err := c.Router.rules(tableFilter, nftables.TableFamilyINet)
	if err != nil {
		return err
	}
	forward := r.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	r.add(forward, established(), accept())
	inside := []string{linkPods}
	for _, m := range c.machines {
		inside = append(inside, m.bridge)
		if m.spec.WAN == "gateways" {
			r.add(forward, from(m.bridge), to(linkWAN), tcpPort(GatewayPort), accept())
		}
	}
	for _, in := range inside {
		r.add(forward, from(in), to(linkPods), accept())
		if in != linkPods {
			r.add(forward, from(linkPods), to(in), accept())
		}
	}
	r.add(forward, from(linkPods), to(linkWAN), tcpPort(GatewayPort), accept())
	input := r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	r.add(input, from(linkWAN), established(), accept())
	r.add(input, from(linkWAN), drop())

	r.table = r.conn.AddTable(&nftables.Table{Name: tableFilter, Family: nftables.TableFamilyIPv4})
	nat := r.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	r.add(nat, to(linkWAN), []expr.Any{&expr.Masq{}})
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("firewall of %s: %w; the kernel needs nf_tables with conntrack and masquerade", c.Router.Name, err)
	}
	return nil
}

// gatewayFirewall opens 15443 and nothing else on a gateway's WAN leg.
func (n *Node) gatewayFirewall() error {
	r, err := n.rules(tableFilter, nftables.TableFamilyINet)
	if err != nil {
		return err
	}
	input := r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	r.add(input, from(linkWAN), established(), accept())
	r.add(input, from(linkWAN), tcpPort(GatewayPort), accept())
	r.add(input, from(linkWAN), drop())
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("firewall of %s: %w; the kernel needs nf_tables with conntrack", n.Name, err)
	}
	return nil
}

// cut makes all packets on the WAN leg vanish in both directions, before connection tracking sees them; the link
// stays up, so nothing in the namespace is told.
func (n *Node) cut() error {
	r, err := n.rules(tableCut, nftables.TableFamilyINet)
	if err != nil {
		return err
	}
	r.conn.FlushTable(r.table)
	in := r.chain("in", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	r.add(in, from(linkWAN), drop())
	out := r.chain("out", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	r.add(out, to(linkWAN), drop())
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("cut the link of %s: %w", n.Name, err)
	}
	return nil
}

// restore undoes cut; it is no error when nothing is cut.
func (n *Node) restore() error {
	r, err := n.rules(tableCut, nftables.TableFamilyINet) // adding first makes deleting safe
	if err != nil {
		return err
	}
	r.conn.DelTable(r.table)
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("restore the link of %s: %w", n.Name, err)
	}
	return nil
}

// CutLink drops silently all packets between a cluster and the others, in both directions: its router's and its
// gateways' legs to the WAN. Cutting twice is cutting once.
func (l *Lab) CutLink(cluster string) error { return l.wanLegs(cluster, (*Node).cut) }

// RestoreLink undoes CutLink.
func (l *Lab) RestoreLink(cluster string) error { return l.wanLegs(cluster, (*Node).restore) }

func (l *Lab) wanLegs(cluster string, do func(*Node) error) error {
	c := l.Cluster(cluster)
	if c == nil || c.Router == nil {
		return fmt.Errorf("cluster %s is not up in this lab", cluster)
	}
	legs := []*Node{c.Router}
	for _, g := range c.gateways {
		legs = append(legs, g.node)
	}
	for _, n := range legs {
		if err := do(n); err != nil {
			return err
		}
	}
	return nil
}
