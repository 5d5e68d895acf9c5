package main

import (
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/dns"
	"github.com/isthmus-mesh/isthmus/internal/capture"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// initFlags are those of Istio's istio-iptables, as far as they say anything here.
type initFlags struct {
	outbound, inbound           uint16
	uids, gids, mode            string
	includeIPs, excludeIPs      string
	includeIn, excludeIn        string
	includeOut, excludeOut      string
	virtual, excludeInterfaces  string
	dns, dryRun, skip, validate bool
	output                      string
	ignoredPort, ignoredMark    string
	ignoredBool1, ignoredBool2  bool
}

func initCommand(level *slog.LevelVar) *cobra.Command {
	var f initFlags
	cmd := &cobra.Command{
		Use: "init", Short: "Lead the traffic of this Pod through its proxy, and end", Args: cobra.NoArgs,
		Long: `Install the nftables rules that lead the traffic of this network namespace through
the proxy: what the container istio-init does. What the proxy itself sends is known by
its user and group. The flags are those of Istio's init container.`,
		Example: "  isthmus-agent init -p 15001 -z 15006 -u 1337 -m REDIRECT -i '*' -x '' -b '*' -d 15090,15021,15020 --dry-run",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := setLevel(level, f.output); err != nil {
				return err
			}
			c, err := f.config()
			if err != nil {
				return diag.Hint(err, "the annotations traffic.sidecar.istio.io/* of the pod become these flags")
			}
			if f.dryRun {
				_, err := fmt.Fprint(cmd.OutOrStdout(), capture.Text(capture.Plan(c)))
				return err
			}
			if !f.skip {
				if err := capture.Apply(c); err != nil {
					return err
				}
			}
			if f.validate {
				return capture.Validate(cmd.Context())
			}
			return nil
		},
	}
	fs := cmd.Flags()
	fs.Uint16VarP(&f.outbound, "envoy-port", "p", capture.OutboundPort, "port that outbound connections are led to")
	fs.Uint16VarP(&f.inbound, "inbound-capture-port", "z", capture.InboundPort, "port that inbound connections are led to")
	fs.StringVarP(&f.uids, "proxy-uid", "u", strconv.Itoa(capture.ProxyID), "users whose connections are let through")
	fs.StringVarP(&f.gids, "proxy-gid", "g", "", "groups whose connections are let through (default: the users' numbers)")
	fs.StringVarP(&f.mode, "istio-inbound-interception-mode", "m", "REDIRECT", "REDIRECT or TPROXY")
	fs.StringVarP(&f.includeIPs, "istio-service-cidr", "i", "*", "ranges to capture, * for all")
	fs.StringVarP(&f.excludeIPs, "istio-service-exclude-cidr", "x", "", "ranges not to capture")
	fs.StringVarP(&f.includeIn, "istio-inbound-ports", "b", "*", "inbound ports to capture, * for all")
	fs.StringVarP(&f.excludeIn, "istio-local-exclude-ports", "d", "", "inbound ports not to capture")
	fs.StringVarP(&f.includeOut, "istio-outbound-ports", "q", "", "outbound ports to capture whatever the ranges say")
	fs.StringVarP(&f.excludeOut, "istio-local-outbound-ports-exclude", "o", "", "outbound ports not to capture")
	fs.StringVarP(&f.virtual, "kube-virt-interfaces", "k", "", "interfaces of guests, whose traffic counts as outbound")
	fs.StringVarP(&f.excludeInterfaces, "istio-exclude-interfaces", "c", "", "interfaces not to capture")
	fs.BoolVar(&f.dns, "redirect-dns", os.Getenv("ISTIO_META_DNS_CAPTURE") == "true", "capture DNS questions (environment: ISTIO_META_DNS_CAPTURE)")
	fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "print the rules, install nothing")
	fs.BoolVar(&f.skip, "skip-rule-apply", false, "install nothing")
	fs.BoolVar(&f.validate, "run-validation", false, "check that connections are captured; not as the proxy's user")
	fs.StringVar(&f.output, "log_output_level", "", "log level, default:LEVEL")
	fs.StringVarP(&f.ignoredPort, "iptables-probe-port", "t", "", "taken and not used")
	fs.StringVar(&f.ignoredMark, "iptables-trace-logging", "", "taken and not used")
	fs.BoolVar(&f.ignoredBool1, "reconcile", false, "taken and not used: rules are replaced as a whole")
	fs.BoolVar(&f.ignoredBool2, "force-apply", false, "taken and not used: rules are replaced as a whole")
	return cmd
}

func (f *initFlags) config() (c capture.Config, err error) {
	fail := func(flag string, e error) {
		if e != nil && err == nil {
			err = fmt.Errorf("-%s: %w", flag, e)
		}
	}
	c.OutboundTo, c.InboundTo = f.outbound, f.inbound
	var e error
	c.Mode, e = capture.ParseMode(f.mode)
	fail("m", e)
	if f.gids == "" {
		f.gids = f.uids
	}
	c.UIDs, e = ids(f.uids)
	fail("u", e)
	c.GIDs, e = ids(f.gids)
	fail("g", e)
	c.IncludeOutboundCIDRs, e = capture.ParseCIDRs(f.includeIPs, true)
	fail("i", e)
	c.ExcludeOutboundCIDRs, e = capture.ParseCIDRs(f.excludeIPs, false)
	fail("x", e)
	for _, p := range []struct {
		flag, value string
		star        bool
		to          *[]uint16
	}{
		{"b", f.includeIn, true, &c.IncludeInboundPorts}, {"d", f.excludeIn, false, &c.ExcludeInboundPorts},
		{"q", f.includeOut, false, &c.IncludeOutboundPorts}, {"o", f.excludeOut, false, &c.ExcludeOutboundPorts},
	} {
		*p.to, e = capture.ParsePorts(p.value, p.star)
		fail(p.flag, e)
	}
	c.VirtualInterfaces, e = capture.ParseInterfaces(f.virtual)
	fail("k", e)
	c.ExcludeInterfaces, e = capture.ParseInterfaces(f.excludeInterfaces)
	fail("c", e)
	if f.dns {
		c.DNSPort = capture.DNSPort
		servers, e := dns.Resolvers("/etc/resolv.conf")
		fail("-redirect-dns", e)
		c.DNSServers = dns.CaptureOnly(servers)
	}
	return c, err
}

func ids(text string) ([]uint32, error) {
	var out []uint32
	for s := range strings.SplitSeq(text, ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%.40q is not the number of a user or group", s)
		}
		out = append(out, uint32(n))
	}
	return out, nil
}
