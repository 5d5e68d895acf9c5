package capture

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

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
	add(conn, table, Plan(c))
	if err := conn.Flush(); err != nil {
		return refused("install", err)
	}
	if c.Mode == TPROXY {
		return routeToSelf()
	}
	return routeAsUsual()
}

// add puts the chains of a plan into table with the next Flush.
func add(conn *nftables.Conn, table *nftables.Table, plan []Chain) {
	chains := make([]*nftables.Chain, len(plan))
	for i, p := range plan { // all of them first: rules jump from one to another
		chains[i] = conn.AddChain(&nftables.Chain{Name: p.Name, Table: table, Type: p.Type, Hooknum: p.Hook, Priority: p.Priority})
	}
	for i, p := range plan {
		for _, r := range p.Rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chains[i], Exprs: r.Exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, cut(r.Text))})
		}
	}
}

// probeTable is the table of Probe, which no packet ever meets.
const probeTable = Table + "-probe"

// Probe reports whether Apply could install these rules: the kernel takes them in a table of another name and drops them
// again in one transaction, so that nothing is captured meanwhile and nothing stays. Rules in place are not touched.
func Probe(c Config) error {
	conn, err := nftables.New()
	if err != nil {
		return refused("try", err)
	}
	table := &nftables.Table{Name: probeTable, Family: nftables.TableFamilyINet}
	conn.AddTable(table)
	add(conn, table, Plan(c))
	conn.DelTable(table)
	if err := conn.Flush(); err != nil {
		return refused("try", err)
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
	return routeAsUsual()
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
