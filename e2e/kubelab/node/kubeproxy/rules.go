package kubeproxy

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// tableName is that of our tables, one of each family.
const tableName = "isthmus-node"

// markMasquerade is the bit of a packet's mark that asks for the router's source address.
const markMasquerade = 0x4000

// family says where things are in packets of one IP version.
type family struct {
	table        nftables.TableFamily
	v6           bool
	saddr, daddr uint32 // offsets
	size         uint32 // of an address
	pair         nftables.SetDatatype
	key          nftables.SetDatatype
}

var families = []family{
	{table: nftables.TableFamilyIPv4, saddr: 12, daddr: 16, size: 4, key: nftables.TypeIPAddr},
	{table: nftables.TableFamilyIPv6, v6: true, saddr: 8, daddr: 24, size: 16, key: nftables.TypeIP6Addr},
}

// builder makes one table.
type builder struct {
	family
	conn   *nftables.Conn
	t      *nftables.Table
	nodes  []Node
	ranges []netip.Prefix // of Services
	chains int
	sets   uint32
}

// apply replaces the rules of a network namespace, all at once.
func apply(fd int, in []frontend, nodes []Node, ranges []netip.Prefix) error {
	conn, err := nftables.New(nftables.WithNetNSFd(fd), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(16<<20), c.SetReadBuffer(64<<20)) // every message is acknowledged
	}))
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, f := range families {
		b := &builder{family: f, conn: conn, nodes: nodes, ranges: ranges}
		old := conn.AddTable(&nftables.Table{Name: tableName, Family: f.table}) // adding first makes deleting safe
		conn.DelTable(old)
		b.t = conn.AddTable(&nftables.Table{Name: tableName, Family: f.table})
		if err := b.build(in); err != nil {
			return err
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("replace the rules of services: %w; the kernel needs nf_tables with NAT and connection tracking", err)
	}
	return nil
}

func (b *builder) build(in []frontend) error {
	services := b.conn.AddChain(&nftables.Chain{Table: b.t, Name: "services"})
	external := b.markExternal()
	ports := &nftables.Set{
		Table: b.t, Name: "ports", IsMap: true, DataType: nftables.TypeVerdict, Concatenation: true,
		KeyType: nftables.MustConcatSetType(b.key, nftables.TypeInetProto, nftables.TypeInetService),
	}
	var elements []nftables.SetElement
	pairs := map[netip.Addr]bool{}
	for i := range in {
		f := &in[i]
		if f.addr.Is6() != b.v6 || len(f.backends) == 0 && f.byNode == nil {
			continue
		}
		for _, e := range f.backends {
			pairs[e.Addr()] = true
		}
		chain, err := b.frontend(f, external)
		if err != nil {
			return err
		}
		key := append(f.addr.AsSlice(), f.proto, 0, 0, 0)
		key = append(key, byte(f.port>>8), byte(f.port), 0, 0)
		elements = append(elements, nftables.SetElement{Key: key, VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain.Name}})
	}
	if err := b.set(ports, elements); err != nil {
		return err
	}
	proto, port := uint32(unix.NFT_REG32_00)+b.size/4, uint32(unix.NFT_REG32_00)+b.size/4+1
	b.rule(services,
		&expr.Payload{DestRegister: unix.NFT_REG32_00, Base: expr.PayloadBaseNetworkHeader, Offset: b.daddr, Len: b.size},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: proto},
		&expr.Payload{DestRegister: port, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: unix.NFT_REG32_00, DestRegister: 0, IsDestRegSet: true, SetName: ports.Name, SetID: ports.ID},
	)
	for name, hook := range map[string]*nftables.ChainHook{"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput} {
		c := b.conn.AddChain(&nftables.Chain{Table: b.t, Name: name, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: nftables.ChainPriorityNATDest})
		b.rule(c, &expr.Verdict{Kind: expr.VerdictJump, Chain: services.Name})
	}
	b.refuse()
	return b.postrouting(pairs)
}

func (b *builder) rule(c *nftables.Chain, exprs ...expr.Any) {
	b.conn.AddRule(&nftables.Rule{Table: b.t, Chain: c, Exprs: exprs})
}

// set adds a set with its elements, a few at a time: a netlink attribute holds 64 KiB.
func (b *builder) set(s *nftables.Set, elements []nftables.SetElement) error {
	// An id of our own, unlike in the other family: those that the library gives are from a counter that is not safe
	// for several clusters in one process.
	b.sets++
	s.ID = 2*b.sets + uint32(b.size/16)
	if err := b.conn.AddSet(s, nil); err != nil {
		return fmt.Errorf("set %s: %w", s.Name, err)
	}
	for len(elements) > 0 {
		n := min(len(elements), 200)
		if err := b.conn.SetAddElements(s, elements[:n]); err != nil {
			return fmt.Errorf("set %s: %w", s.Name, err)
		}
		elements = elements[n:]
	}
	return nil
}

func (b *builder) chain() *nftables.Chain {
	b.chains++
	return b.conn.AddChain(&nftables.Chain{Table: b.t, Name: fmt.Sprintf("f%d", b.chains)})
}

// from matches packets whose source is in a prefix; to, whose destination is.
func (b *builder) from(p netip.Prefix) []expr.Any { return b.in(b.saddr, p) }
func (b *builder) to(p netip.Prefix) []expr.Any   { return b.in(b.daddr, p) }

func (b *builder) in(offset uint32, p netip.Prefix) []expr.Any {
	mask := make([]byte, b.size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: b.size},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: b.size, Mask: mask, Xor: make([]byte, b.size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

// markExternal makes the chain that marks what comes from elsewhere than a pod.
func (b *builder) markExternal() *nftables.Chain {
	c := b.conn.AddChain(&nftables.Chain{Table: b.t, Name: "mark-external"})
	for _, n := range b.nodes {
		for _, p := range n.PodCIDRs {
			if p.Addr().Is6() == b.v6 {
				b.rule(c, append(b.from(p), &expr.Verdict{Kind: expr.VerdictReturn})...)
			}
		}
	}
	bit, rest := binaryutil.NativeEndian.PutUint32(markMasquerade), binaryutil.NativeEndian.PutUint32(^uint32(markMasquerade))
	b.rule(c,
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: rest, Xor: bit},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	)
	return c
}

// frontend makes the chain of one frontend.
func (b *builder) frontend(f *frontend, external *nftables.Chain) (*nftables.Chain, error) {
	c := b.chain()
	if f.masquerade {
		b.rule(c, &expr.Verdict{Kind: expr.VerdictJump, Chain: external.Name})
	}
	if f.byNode == nil {
		b.balance(c, f.backends)
		return c, nil
	}
	for _, n := range b.nodes {
		list := f.byNode[n.Name]
		if len(list) == 0 {
			continue
		}
		sub := b.chain()
		b.balance(sub, list)
		for _, p := range append(append([]netip.Prefix{}, n.PodCIDRs...), singles(n.Addresses)...) {
			if p.Addr().Is6() == b.v6 {
				b.rule(c, append(b.from(p), &expr.Verdict{Kind: expr.VerdictGoto, Chain: sub.Name})...)
			}
		}
	}
	return c, nil
}

func singles(addrs []netip.Addr) []netip.Prefix {
	var out []netip.Prefix
	for _, a := range addrs {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	return out
}

// balance sends a connection to any of the backends with the same chance.
func (b *builder) balance(c *nftables.Chain, backends []netip.AddrPort) {
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2, Specified: true}
	if b.v6 {
		nat.Family = unix.NFPROTO_IPV6
	}
	for i, e := range backends {
		var exprs []expr.Any
		if left := len(backends) - i; left > 1 {
			exprs = append(exprs,
				&expr.Numgen{Register: 1, Modulus: uint32(left), Type: unix.NFT_NG_RANDOM},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)})
		}
		exprs = append(exprs,
			&expr.Immediate{Register: 1, Data: e.Addr().AsSlice()},
			&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(e.Port())}, nat)
		b.rule(c, exprs...)
	}
}

// refuse answers for cluster addresses that lead nowhere: those that no rule translated.
func (b *builder) refuse() {
	priority := nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 10)
	unreachable := &expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3} // port unreachable
	if b.v6 {
		unreachable.Code = 4
	}
	for name, hook := range map[string]*nftables.ChainHook{"refuse-prerouting": nftables.ChainHookPrerouting, "refuse-output": nftables.ChainHookOutput} {
		c := b.conn.AddChain(&nftables.Chain{Table: b.t, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: priority})
		for _, p := range b.ranges {
			if p.Addr().Is6() != b.v6 {
				continue
			}
			tcp := []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}}}
			b.rule(c, append(append(b.to(p), tcp...), &expr.Reject{Type: unix.NFT_REJECT_TCP_RST})...)
			b.rule(c, append(b.to(p), unreachable)...)
		}
	}
}

// postrouting gives the router's source address to what is marked, and to what a pod sent to itself.
func (b *builder) postrouting(pods map[netip.Addr]bool) error {
	c := b.conn.AddChain(&nftables.Chain{
		Table: b.t, Name: "postrouting", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	b.rule(c,
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(markMasquerade), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		&expr.Masq{},
	)
	// Source and destination stand side by side in the header: one key.
	itself := &nftables.Set{Table: b.t, Name: "itself", Concatenation: true, KeyType: nftables.MustConcatSetType(b.key, b.key)}
	var elements []nftables.SetElement
	for a := range pods {
		elements = append(elements, nftables.SetElement{Key: append(a.AsSlice(), a.AsSlice()...)})
	}
	if err := b.set(itself, elements); err != nil {
		return err
	}
	b.rule(c,
		&expr.Payload{DestRegister: unix.NFT_REG32_00, Base: expr.PayloadBaseNetworkHeader, Offset: b.saddr, Len: 2 * b.size},
		&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: itself.Name, SetID: itself.ID},
		&expr.Masq{},
	)
	return nil
}
