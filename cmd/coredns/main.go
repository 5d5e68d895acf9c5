// Command coredns is stock CoreDNS with the isthmus plugin compiled in, in front of kubernetes in plugin order.
package main

import (
	"slices"

	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/core/plugin" // the plugins of a stock CoreDNS
	"github.com/coredns/coredns/coremain"

	_ "github.com/isthmus-mesh/isthmus/dns/plugin"
)

func main() {
	dnsserver.Directives = ordered(dnsserver.Directives)
	coremain.Run()
}

// ordered returns CoreDNS's plugins with ours in its place.
func ordered(directives []string) []string {
	return slices.Insert(slices.Clone(directives), slices.Index(directives, "kubernetes"), "isthmus")
}
