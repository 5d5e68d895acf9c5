package capture

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Annotations of Pods that say what is captured (Istio's names).
const (
	AnnotationMode                 = "sidecar.istio.io/interceptionMode"
	AnnotationIncludeOutboundCIDRs = "traffic.sidecar.istio.io/includeOutboundIPRanges"
	AnnotationExcludeOutboundCIDRs = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
	AnnotationIncludeInboundPorts  = "traffic.sidecar.istio.io/includeInboundPorts"
	AnnotationExcludeInboundPorts  = "traffic.sidecar.istio.io/excludeInboundPorts"
	AnnotationIncludeOutboundPorts = "traffic.sidecar.istio.io/includeOutboundPorts"
	AnnotationExcludeOutboundPorts = "traffic.sidecar.istio.io/excludeOutboundPorts"
	AnnotationExcludeInterfaces    = "traffic.sidecar.istio.io/excludeInterfaces"
	AnnotationVirtualInterfaces    = "traffic.sidecar.istio.io/kubevirtInterfaces"
)

// ProxyID is the user and the group that the proxy runs as in a Pod (Istio's 1337).
const ProxyID = 1337

// DNSPort is where an agent in a Pod answers captured questions.
const DNSPort = 15053

const maxEntries = 256 // of one list in an annotation

// FromAnnotations lays what a Pod's annotations say over base. An error names the annotation and the value.
func FromAnnotations(base Config, annotations map[string]string) (Config, error) {
	c := base
	if v, ok := annotations[AnnotationMode]; ok {
		mode, err := ParseMode(v)
		if err != nil {
			return base, fmt.Errorf("annotation %s: %w", AnnotationMode, err)
		}
		c.Mode = mode
	}
	for _, f := range []struct {
		name    string
		include bool
		to      *[]uint16
	}{
		{AnnotationIncludeInboundPorts, true, &c.IncludeInboundPorts}, {AnnotationExcludeInboundPorts, false, &c.ExcludeInboundPorts},
		{AnnotationIncludeOutboundPorts, false, &c.IncludeOutboundPorts}, {AnnotationExcludeOutboundPorts, false, &c.ExcludeOutboundPorts},
	} {
		v, ok := annotations[f.name]
		if !ok {
			continue
		}
		ports, err := ParsePorts(v, f.include)
		if err != nil {
			return base, fmt.Errorf("annotation %s: %w", f.name, err)
		}
		*f.to = ports
	}
	for _, f := range []struct {
		name    string
		include bool
		to      *[]netip.Prefix
	}{{AnnotationIncludeOutboundCIDRs, true, &c.IncludeOutboundCIDRs}, {AnnotationExcludeOutboundCIDRs, false, &c.ExcludeOutboundCIDRs}} {
		v, ok := annotations[f.name]
		if !ok {
			continue
		}
		cidrs, err := ParseCIDRs(v, f.include)
		if err != nil {
			return base, fmt.Errorf("annotation %s: %w", f.name, err)
		}
		*f.to = cidrs
	}
	for name, to := range map[string]*[]string{AnnotationExcludeInterfaces: &c.ExcludeInterfaces, AnnotationVirtualInterfaces: &c.VirtualInterfaces} {
		if v, ok := annotations[name]; ok {
			names, err := ParseInterfaces(v)
			if err != nil {
				return base, fmt.Errorf("annotation %s: %w", name, err)
			}
			*to = names
		}
	}
	return c, nil
}

// ParseMode reads REDIRECT or TPROXY; NONE is for others: nothing is captured then.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Redirect, TPROXY:
		return m, nil
	}
	return "", fmt.Errorf("%.40q is not a mode; want REDIRECT or TPROXY", s)
}

// ParsePorts reads "80,443". Where star is allowed "*" means all, which is nil; an empty text is an empty list.
func ParsePorts(s string, star bool) ([]uint16, error) {
	if star && strings.TrimSpace(s) == "*" {
		return nil, nil
	}
	out := []uint16{}
	for _, f := range list(s) {
		n, err := strconv.ParseUint(f, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("%.40q is not a port; want 1 to 65535, divided by commas", f)
		}
		out = append(out, uint16(n))
	}
	return out, limit(len(out))
}

// ParseCIDRs reads "10.0.0.0/8,fd00::/8"; an address alone stands for itself. "*" and empty texts are as in ParsePorts.
func ParseCIDRs(s string, star bool) ([]netip.Prefix, error) {
	if star && strings.TrimSpace(s) == "*" {
		return nil, nil
	}
	out := []netip.Prefix{}
	for _, f := range list(s) {
		p, err := netip.ParsePrefix(f)
		if err != nil {
			a, addrErr := netip.ParseAddr(f)
			if addrErr != nil || a.Zone() != "" {
				return nil, fmt.Errorf("%.60q is not an address range; want for example 10.0.0.0/8, divided by commas", f)
			}
			p = netip.PrefixFrom(a, a.BitLen())
		}
		out = append(out, p.Masked())
	}
	return out, limit(len(out))
}

// ParseInterfaces reads "eth1,eth2".
func ParseInterfaces(s string) ([]string, error) {
	out := list(s)
	for _, f := range out {
		if len(f) > 15 || strings.ContainsAny(f, "/ \t") {
			return nil, fmt.Errorf("%.40q is not the name of an interface", f)
		}
	}
	return out, limit(len(out))
}

func list(s string) []string {
	var out []string
	for f := range strings.SplitSeq(s, ",") {
		if f = strings.TrimSpace(f); f != "" {
			out = append(out, f)
		}
	}
	return out
}

func limit(n int) error {
	if n > maxEntries {
		return fmt.Errorf("%d entries; at most %d are allowed", n, maxEntries)
	}
	return nil
}
