package kubelab

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/kubelet"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// Names of our nftables tables; service NAT and the agents have theirs.
const (
	tableFilter = "kubelab"
	tableCut    = "kubelab-cut"
)

// ruleset builds one table of one node.
type ruleset struct {
	conn  *nftables.Conn
	table *nftables.Table
}

func rulesIn(n *lab.Node, table string) (*ruleset, error) {
	conn, err := n.NFTables()
	if err != nil {
		return nil, fmt.Errorf("nftables in %s: %w", n.Name, err)
	}
	return &ruleset{conn: conn, table: conn.AddTable(&nftables.Table{Name: table, Family: nftables.TableFamilyINet})}, nil
}

func (r *ruleset) chain(name string, t nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority, policy nftables.ChainPolicy) *nftables.Chain {
	return r.conn.AddChain(&nftables.Chain{Table: r.table, Name: name, Type: t, Hooknum: hook, Priority: prio, Policy: &policy})
}

func (r *ruleset) add(c *nftables.Chain, parts ...[]expr.Any) {
	rule := &nftables.Rule{Table: r.table, Chain: c}
	for _, p := range parts {
		rule.Exprs = append(rule.Exprs, p...)
	}
	r.conn.AddRule(rule)
}

func (r *ruleset) flush(where string) error {
	if err := r.conn.Flush(); err != nil {
		return fmt.Errorf("packet filter of %s: %w; the kernel needs nf_tables with conntrack and NAT", where, err)
	}
	return nil
}

func link(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: b}}
}

func from(name string) []expr.Any    { return link(expr.MetaKeyIIFNAME, expr.CmpOpEq, name) }
func notFrom(name string) []expr.Any { return link(expr.MetaKeyIIFNAME, expr.CmpOpNeq, name) }
func to(name string) []expr.Any      { return link(expr.MetaKeyOIFNAME, expr.CmpOpEq, name) }

// ctBits matches when one of the bits of a key of connection tracking is set.
func ctBits(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func established() []expr.Any {
	return ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}

// redirected matches connections whose destination NAT changed (IPS_DST_NAT of the kernel).
func redirected() []expr.Any { return ctBits(expr.CtKeySTATUS, 1<<5) }

func protocol(p byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{p}}}
}

func tcpPort(port uint16) []expr.Any {
	return append(protocol(unix.IPPROTO_TCP),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)})
}

// source and destination match packets by a prefix.
func source(p netip.Prefix) []expr.Any      { return address(p, 12, 8) }
func destination(p netip.Prefix) []expr.Any { return address(p, 16, 24) }

func address(p netip.Prefix, offset4, offset6 uint32) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), offset4
	if p.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, offset6
	}
	a := p.Masked().Addr().AsSlice()
	mask := make([]byte, len(a))
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	size := uint32(len(a))
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: size, Mask: mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a},
	}
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() []expr.Any   { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

// firewall fills the packet filters of a cluster, as the package comment says. peers are the clusters on its flat network.
func (c *Cluster) firewall(peers []*Cluster) error {
	r, err := rulesIn(c.Router, tableFilter)
	if err != nil {
		return err
	}
	forward := r.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	r.add(forward, established(), accept())
	r.add(forward, notFrom(lab.LinkWAN), accept())
	r.add(forward, redirected(), accept())
	input := r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	r.add(input, from(lab.LinkWAN), established(), accept())
	for _, icmp := range []byte{unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6} { // neighbour discovery, too
		r.add(input, from(lab.LinkWAN), protocol(icmp), accept())
	}
	r.add(input, from(lab.LinkWAN), source(single(c.Spec.APIServer)), tcpPort(kubelet.Port), accept())
	nat := r.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	for _, p := range peers {
		for _, inside := range p.Spec.inside() {
			r.add(nat, to(lab.LinkWAN), destination(inside), accept())
		}
		for _, theirs := range append(p.Spec.inside(), p.Spec.nodeAddresses()...) {
			r.add(forward, source(theirs), accept())
			r.add(input, from(lab.LinkWAN), source(theirs), accept())
		}
	}
	r.add(input, from(lab.LinkWAN), drop())
	r.add(nat, to(lab.LinkWAN), []expr.Any{&expr.Masq{}})
	if err := r.flush(c.Router.Name); err != nil {
		return err
	}

	if r, err = rulesIn(c.Control, tableFilter); err != nil {
		return err
	}
	input = r.chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	r.add(input, from(lab.LinkWAN), established(), accept())
	if !c.Spec.HideAPIServer {
		r.add(input, from(lab.LinkWAN), tcpPort(apiPort), accept())
	}
	r.add(input, from(lab.LinkWAN), protocol(unix.IPPROTO_ICMP), accept())
	r.add(input, from(lab.LinkWAN), drop())
	// What a Service led from here to an address on the wire still has the source for the router's side.
	nat = r.chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	for _, p := range peers {
		for _, inside := range p.Spec.inside() {
			r.add(nat, to(lab.LinkWAN), destination(inside), accept())
		}
	}
	r.add(nat, to(lab.LinkWAN), source(single(c.Spec.control())), []expr.Any{&expr.Masq{}})
	return r.flush(c.Control.Name)
}

// place is what Cut and Heal work on: where packets to it arrive, and the addresses that those from it carry.
type place struct {
	nodes    []*lab.Node
	prefixes []netip.Prefix
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// place finds a cluster, its API server (NAME/apiserver) or a machine.
func (l *Lab) place(name string) (place, error) {
	for _, c := range l.clusters {
		s := c.Spec
		switch name {
		case s.Name:
			p := place{nodes: []*lab.Node{c.Router, c.Control}, prefixes: append(s.nodeAddresses(), s.LoadBalancer, single(s.APIServer))}
			if s.Flat != "" {
				p.prefixes = append(p.prefixes, s.inside()...)
			}
			return p, nil
		case s.Name + "/apiserver":
			return place{nodes: []*lab.Node{c.Control}, prefixes: []netip.Prefix{single(s.APIServer), single(s.control())}}, nil
		}
	}
	for _, m := range l.topology.Machines {
		if m.Name == name {
			return place{nodes: []*lab.Node{l.net.Node(name)}, prefixes: []netip.Prefix{single(m.Address)}}, nil
		}
	}
	return place{}, fmt.Errorf("no cluster, machine or CLUSTER/apiserver %q in this lab; its clusters are %v", name, l.topology.names())
}

// Cut makes packets from one place to another vanish, in this direction alone. A place is a cluster, a machine or
// CLUSTER/apiserver. Connections stay, and nobody is told.
func (l *Lab) Cut(fromPlace, toPlace string) error { return l.cutting(fromPlace, toPlace, true) }

// Heal undoes Cut for the same pair. It is no error when nothing is cut.
func (l *Lab) Heal(fromPlace, toPlace string) error { return l.cutting(fromPlace, toPlace, false) }

func (l *Lab) cutting(fromPlace, toPlace string, cut bool) error {
	src, err := l.place(fromPlace)
	if err != nil {
		return err
	}
	dst, err := l.place(toPlace)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range dst.nodes {
		r, err := rulesIn(n, tableCut)
		if err != nil {
			return err
		}
		name := "from-" + strings.ReplaceAll(fromPlace, "/", "-")
		c := r.chain(name, nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
		r.conn.FlushChain(c) // adding it first makes that safe
		for _, p := range src.prefixes {
			if cut {
				r.add(c, notFrom("lo"), source(p), drop())
			}
		}
		if err := r.flush(n.Name); err != nil {
			return err
		}
	}
	return nil
}
