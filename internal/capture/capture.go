// Package capture leads the workload's traffic through Envoy with nftables, in a table of its own. Connections of Envoy
// and of the agent are told by a mark, by user or by group, and are let through.
package capture

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
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
	Mode Mode // empty: Redirect
	// Mark lets connections with it through; 0: none. Setting a mark needs CAP_NET_ADMIN.
	Mark uint32
	// UIDs and GIDs are users and groups whose connections are let through: the proxy's own.
	UIDs, GIDs []uint32

	IncludeInboundPorts  []uint16 // capture these only; nil: all. Not nil and empty: none
	ExcludeInboundPorts  []uint16
	IncludeOutboundPorts []uint16 // captured whatever IncludeOutboundCIDRs says
	ExcludeOutboundPorts []uint16
	IncludeOutboundCIDRs []netip.Prefix // capture what goes there only; nil: all. Not nil and empty: none
	ExcludeOutboundCIDRs []netip.Prefix
	ExcludeInterfaces    []string // nothing that comes or goes there is captured
	VirtualInterfaces    []string // what comes in there is a guest's: captured as if the workload sent it

	DNSPort    uint16       // questions to port 53 go here on loopback; 0: they are not captured
	DNSServers []netip.Addr // capture questions to these only; empty: to any. Needed where a name server on loopback asks on

	OutboundTo, InboundTo uint16 // the proxy's ports; 0: OutboundPort, InboundPort
}

// Mode is how inbound connections reach Envoy.
type Mode string

// The modes. TPROXY keeps the destination address on the packet; Envoy then needs CAP_NET_ADMIN and a transparent
// listener. Outbound connections are redirected in both.
const (
	Redirect Mode = "REDIRECT"
	TPROXY   Mode = "TPROXY"
)

// Rule is one rule: what it says in nft's words, and what the kernel is told.
type Rule struct {
	Text  string
	Exprs []expr.Any
}

// Chain is one chain of the table. One without a Hook is jumped to.
type Chain struct {
	Name     string
	Type     nftables.ChainType
	Hook     *nftables.ChainHook
	Priority *nftables.ChainPriority
	Rules    []Rule
}

// Names of chains that rules jump to, as Istio's users know them.
const (
	chainOutput     = "ISTIO_OUTPUT"
	chainInbound    = "ISTIO_INBOUND"
	chainRedirect   = "ISTIO_REDIRECT"
	chainInRedirect = "ISTIO_IN_REDIRECT"
	chainTPROXY     = "ISTIO_TPROXY"
)

// Plan returns the chains for a configuration. It is pure.
func Plan(c Config) []Chain {
	c.OutboundTo, c.InboundTo = cmp.Or(c.OutboundTo, OutboundPort), cmp.Or(c.InboundTo, InboundPort)
	// Dialled from outside by its own number, a capture port would make Envoy call itself for ever.
	var guard []Rule
	for _, port := range []uint16{c.OutboundTo, c.InboundTo} {
		guard = append(guard, rule(fmt.Sprintf("iifname != lo tcp dport %d drop", port),
			ifname(expr.MetaKeyIIFNAME, expr.CmpOpNeq, "lo"), proto(unix.IPPROTO_TCP), dport(port), verdict(expr.VerdictDrop)))
	}
	into, take := chainInRedirect, Chain{Name: chainInRedirect, Rules: []Rule{redirectTCP(c.InboundTo)}}
	if c.Mode == TPROXY {
		into, take = chainTPROXY, Chain{Name: chainTPROXY, Rules: []Rule{
			rule(fmt.Sprintf("meta l4proto tcp socket transparent 1 meta mark set %d accept", TPROXYMark), proto(unix.IPPROTO_TCP), transparent(), setMark(TPROXYMark), verdict(expr.VerdictAccept)),
			rule(fmt.Sprintf("meta l4proto tcp meta mark set %d tproxy to :%d accept", TPROXYMark, c.InboundTo), proto(unix.IPPROTO_TCP), setMark(TPROXYMark), tproxy(c.InboundTo), verdict(expr.VerdictAccept)),
		}}
	}
	chains := []Chain{
		{"guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle, guard},
		{Name: chainRedirect, Rules: []Rule{redirectTCP(c.OutboundTo)}},
		take,
		{Name: chainOutput, Rules: c.outbound()},
		{Name: chainInbound, Rules: c.inbound(into)},
		{"output", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest, []Rule{rule("jump "+chainOutput, jump(chainOutput))}},
	}
	var guests []Rule
	for _, name := range c.VirtualInterfaces {
		guests = append(guests, interfaceRule(expr.MetaKeyIIFNAME, name, "jump "+chainRedirect, jump(chainRedirect)))
	}
	in := []Rule{rule("jump "+chainInbound, jump(chainInbound))}
	if c.Mode != TPROXY {
		return append(chains, Chain{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, append(guests, in...)})
	}
	chains = append(chains, Chain{"prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle, in})
	if guests != nil {
		chains = append(chains, Chain{"guests", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, guests})
	}
	return chains
}

func redirectTCP(port uint16) Rule {
	return rule(fmt.Sprintf("meta l4proto tcp redirect to :%d", port), proto(unix.IPPROTO_TCP), redirect(port))
}

func portRule(port uint16, then string, parts ...[]expr.Any) Rule {
	return rule(fmt.Sprintf("tcp dport %d %s", port, then), append([][]expr.Any{proto(unix.IPPROTO_TCP), dport(port)}, parts...)...)
}

// outbound says what of that which the workload sends is captured.
func (c Config) outbound() []Rule {
	ret, capture := verdict(expr.VerdictReturn), jump(chainRedirect)
	var out []Rule
	if c.Mark != 0 {
		out = append(out, rule(fmt.Sprintf("meta mark %d return", c.Mark), mark(c.Mark), ret))
	}
	for _, id := range c.UIDs {
		out = append(out, rule(fmt.Sprintf("meta skuid %d return", id), owner(expr.MetaKeySKUID, id), ret))
	}
	for _, id := range c.GIDs {
		out = append(out, rule(fmt.Sprintf("meta skgid %d return", id), owner(expr.MetaKeySKGID, id), ret))
	}
	for _, name := range c.ExcludeInterfaces {
		out = append(out, interfaceRule(expr.MetaKeyOIFNAME, name, "return", ret))
	}
	out = append(out, c.questions()...)
	for _, p := range c.ExcludeOutboundCIDRs {
		out = append(out, rule(daddrText(p)+" return", daddr(p), ret))
	}
	for _, port := range c.ExcludeOutboundPorts {
		out = append(out, portRule(port, "return", ret))
	}
	out = append(out,
		rule(daddrText(serviceLoopback)+" jump "+chainRedirect, daddr(serviceLoopback), capture),
		rule("oifname lo return", ifname(expr.MetaKeyOIFNAME, expr.CmpOpEq, "lo"), ret))
	for _, p := range []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")} {
		out = append(out, rule(daddrText(p)+" return", daddr(p), ret))
	}
	for _, port := range c.IncludeOutboundPorts {
		out = append(out, portRule(port, "jump "+chainRedirect, capture))
	}
	if c.IncludeOutboundCIDRs == nil {
		return append(out, rule("jump "+chainRedirect, capture))
	}
	for _, p := range c.IncludeOutboundCIDRs {
		out = append(out, rule(daddrText(p)+" jump "+chainRedirect, daddr(p), capture))
	}
	return out
}

// questions says which DNS questions are captured.
func (c Config) questions() []Rule {
	if c.DNSPort == 0 {
		return nil
	}
	var out []Rule
	for _, l4 := range []uint8{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		to := fmt.Sprintf("%s dport 53 redirect to :%d", protoName(l4), c.DNSPort)
		if len(c.DNSServers) == 0 {
			out = append(out, rule(to, proto(l4), dport(53), redirect(c.DNSPort)))
		}
		for _, a := range c.DNSServers {
			p := netip.PrefixFrom(a, a.BitLen())
			out = append(out, rule(daddrText(p)+" "+to, daddr(p), proto(l4), dport(53), redirect(c.DNSPort)))
		}
	}
	return out
}

// inbound says what of that which comes to the workload is captured.
func (c Config) inbound(take string) []Rule {
	ret := verdict(expr.VerdictReturn)
	notLocal := []expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)}}
	in := []Rule{
		rule("iifname lo return", ifname(expr.MetaKeyIIFNAME, expr.CmpOpEq, "lo"), ret),
		rule("fib daddr type != local return", notLocal, ret),
	}
	for _, name := range c.ExcludeInterfaces {
		in = append(in, interfaceRule(expr.MetaKeyIIFNAME, name, "return", ret))
	}
	for _, port := range slices.Concat(ownPorts, c.ExcludeInboundPorts) {
		in = append(in, portRule(port, "return", ret))
	}
	if c.IncludeInboundPorts == nil {
		return append(in, rule("jump "+take, jump(take)))
	}
	for _, port := range c.IncludeInboundPorts {
		in = append(in, portRule(port, "jump "+take, jump(take)))
	}
	return in
}
