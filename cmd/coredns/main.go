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
	at := slices.Index(dnsserver.Directives, "kubernetes")
	dnsserver.Directives = slices.Insert(dnsserver.Directives, at, "isthmus")
	coremain.Run()
}
