// Package capture leads the workload's traffic through Envoy with nftables, in a table of its own. Connections of Envoy
// and of the agent carry a mark and are let through.
package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Table is the name of the table, family inet.
const Table = "isthmus"

// Ports that traffic is led to.
const (
	OutboundPort = 15001
	InboundPort  = 15006
)

// ownPorts of the mesh are reached directly.
var ownPorts = []uint16{15020, 15021, 15090, 15443}

// serviceLoopback are the loopback addresses that hand-written ServiceEntries give to services of other clusters, as
// Istio's guides had it (127.255.0.2). All other loopback is the machine's own: its name server at 127.0.0.53, its host
// name at 127.0.1.1, and what its programs say to each other.
var serviceLoopback = netip.MustParsePrefix("127.255.0.0/16")

// Config is what is captured.
type Config struct {
	Mark                 uint32 // connections with it are let through
	ExcludeInboundPorts  []uint16
	ExcludeOutboundPorts []uint16
	ExcludeOutboundCIDRs []netip.Prefix
	DNSPort              uint16       // questions to port 53 go here on loopback; 0: they are not captured
	DNSServers           []netip.Addr // capture questions to these only; empty: to any. Needed where a name server on loopback asks on
}

// Rule is one rule: what it says in nft's words, and what the kernel is told.
type Rule struct {
	Text  string
	Exprs []expr.Any
}

// Chain is one chain of the table.
type Chain struct {
	Name     string
	Type     nftables.ChainType
	Hook     *nftables.ChainHook
	Priority *nftables.ChainPriority
	Rules    []Rule
}

// Plan returns the chains for a configuration. It is pure.
func Plan(c Config) []Chain {
	output := []Rule{rule(fmt.Sprintf("meta mark %d return", c.Mark), mark(c.Mark), verdict(expr.VerdictReturn))}
	if c.DNSPort != 0 {
		for _, l4 := range []uint8{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			to := fmt.Sprintf("%s dport 53 redirect to :%d", protoName(l4), c.DNSPort)
			if len(c.DNSServers) == 0 {
				output = append(output, rule(to, proto(l4), dport(53), redirect(c.DNSPort)))
			}
			for _, a := range c.DNSServers {
				p := netip.PrefixFrom(a, a.BitLen())
				output = append(output, rule(daddrText(p)+" "+to, daddr(p), proto(l4), dport(53), redirect(c.DNSPort)))
			}
		}
	}
	for _, p := range c.ExcludeOutboundCIDRs {
		output = append(output, rule(daddrText(p)+" return", daddr(p), verdict(expr.VerdictReturn)))
	}
	for _, port := range c.ExcludeOutboundPorts {
		output = append(output, rule(fmt.Sprintf("tcp dport %d return", port), proto(unix.IPPROTO_TCP), dport(port), verdict(expr.VerdictReturn)))
	}
	output = append(output,
		rule(fmt.Sprintf("%s meta l4proto tcp redirect to :%d", daddrText(serviceLoopback), OutboundPort), daddr(serviceLoopback), proto(unix.IPPROTO_TCP), redirect(OutboundPort)),
		rule("oifname lo return", ifname(expr.MetaKeyOIFNAME, expr.CmpOpEq, "lo"), verdict(expr.VerdictReturn)))
	for _, p := range []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")} {
		output = append(output, rule(daddrText(p)+" return", daddr(p), verdict(expr.VerdictReturn)))
	}
	output = append(output, rule(fmt.Sprintf("meta l4proto tcp redirect to :%d", OutboundPort), proto(unix.IPPROTO_TCP), redirect(OutboundPort)))

	notLocal := []expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)}}
	inbound := []Rule{
		rule("iifname lo return", ifname(expr.MetaKeyIIFNAME, expr.CmpOpEq, "lo"), verdict(expr.VerdictReturn)),
		rule("fib daddr type != local return", notLocal, verdict(expr.VerdictReturn)),
	}
	for _, port := range append(append([]uint16{}, ownPorts...), c.ExcludeInboundPorts...) {
		inbound = append(inbound, rule(fmt.Sprintf("tcp dport %d return", port), proto(unix.IPPROTO_TCP), dport(port), verdict(expr.VerdictReturn)))
	}
	inbound = append(inbound, rule(fmt.Sprintf("meta l4proto tcp redirect to :%d", InboundPort), proto(unix.IPPROTO_TCP), redirect(InboundPort)))

	// Dialled from outside by its own number, a capture port would make Envoy call itself for ever.
	var guard []Rule
	for _, port := range []uint16{OutboundPort, InboundPort} {
		guard = append(guard, rule(fmt.Sprintf("iifname != lo tcp dport %d drop", port),
			ifname(expr.MetaKeyIIFNAME, expr.CmpOpNeq, "lo"), proto(unix.IPPROTO_TCP), dport(port), verdict(expr.VerdictDrop)))
	}
	return []Chain{
		{"guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle, guard},
		{"inbound", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, inbound},
		{"outbound", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest, output},
	}
}

// Text writes chains as nft would list them, near enough to read.
func Text(chains []Chain) string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", Table)
	for _, c := range chains {
		fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
		for _, r := range c.Rules {
			fmt.Fprintf(&b, "\t\t%s\n", r.Text)
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

// Apply puts the rules in place of those of an earlier call, all at once.
func Apply(c Config) error {
	conn, err := nftables.New()
	if err != nil {
		return refused("install", err)
	}
	table := &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
	// Adding a table that exists is no error, deleting one that does not exist is: so add, delete, add.
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	for _, plan := range Plan(c) {
		chain := conn.AddChain(&nftables.Chain{Name: plan.Name, Table: table, Type: plan.Type, Hooknum: plan.Hook, Priority: plan.Priority})
		for _, r := range plan.Rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: r.Exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, cut(r.Text))})
		}
	}
	if err := conn.Flush(); err != nil {
		return refused("install", err)
	}
	return nil
}

// Clean removes the rules; without any it does nothing.
func Clean() error {
	conn, err := nftables.New()
	if err != nil {
		return refused("remove", err)
	}
	table := &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}
	conn.AddTable(table)
	conn.DelTable(table)
	if err := conn.Flush(); err != nil {
		return refused("remove", err)
	}
	return nil
}

// Installed reads the rules in place back from the kernel, by the text that Apply left with each; nil means none.
func Installed() ([]Chain, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, refused("read", err)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, refused("read", err)
	}
	var out []Chain
	for _, c := range chains {
		if c.Table.Name != Table {
			continue
		}
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return nil, refused("read", err)
		}
		chain := Chain{Name: c.Name, Type: c.Type}
		for _, r := range rules {
			text, ok := userdata.GetString(r.UserData, userdata.TypeComment)
			if !ok {
				text = "(a rule of another program)"
			}
			chain.Rules = append(chain.Rules, Rule{Text: text, Exprs: r.Exprs})
		}
		out = append(out, chain)
	}
	return out, nil
}

func refused(verb string, err error) error {
	err = fmt.Errorf("%s capture rules: %w", verb, err)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return diag.Hint(err, "give the agent CAP_NET_ADMIN in its network namespace, or set capture.enabled: false")
	}
	return diag.Hint(err, "the kernel needs nf_tables with NAT for family inet (Linux 5.2 or newer)")
}

// cut keeps a comment within what the kernel's tools accept.
func cut(s string) string { return s[:min(len(s), 120)] }

func rule(text string, parts ...[]expr.Any) Rule {
	r := Rule{Text: text}
	for _, p := range parts {
		r.Exprs = append(r.Exprs, p...)
	}
	return r
}

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

func mark(m uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(m)},
	}
}

func ifname(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: data}}
}

func proto(l4 uint8) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{l4}},
	}
}

func protoName(l4 uint8) string {
	if l4 == unix.IPPROTO_UDP {
		return "udp"
	}
	return "tcp"
}

func dport(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
	}
}

func daddrText(p netip.Prefix) string {
	text := p.String()
	if p.IsSingleIP() {
		text = p.Addr().String()
	}
	if p.Addr().Is4() {
		return "ip daddr " + text
	}
	return "ip6 daddr " + text
}

func daddr(p netip.Prefix) []expr.Any {
	p = p.Masked()
	family, offset := byte(unix.NFPROTO_IPV4), uint32(16)
	if p.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, 24
	}
	address := p.Addr().AsSlice()
	mask := make([]byte, len(address))
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	n := uint32(len(address))
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: address},
	}
}

func redirect(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.Redir{RegisterProtoMin: 1},
	}
}
