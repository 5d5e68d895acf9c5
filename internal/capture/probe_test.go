package capture

import (
	"strings"
	"testing"

	"github.com/google/nftables"
)

// TestProbe: a probe leaves no table, and the rules in place as they are.
func TestProbe(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	c := Config{Mark: 1337, DNSPort: 15053, ExcludeInboundPorts: []uint16{22}}
	if err := Apply(c); err != nil {
		t.Skip("no nftables: ", err)
	}
	before, err := Installed()
	must(t, err)
	must(t, Probe(c))
	after, err := Installed()
	must(t, err)
	if len(before) == 0 || Text(after) != Text(before) {
		t.Errorf("rules in place were changed:\n%s\nwere\n%s", Text(after), Text(before))
	}
	must(t, Clean())
	must(t, Probe(c))
	conn, err := nftables.New()
	must(t, err)
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	must(t, err)
	for _, table := range tables {
		if strings.HasPrefix(table.Name, Table) {
			t.Errorf("table %s is left", table.Name)
		}
	}
}
