package capture

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func TestFromAnnotations(t *testing.T) {
	base := Config{UIDs: []uint32{ProxyID}}
	got, err := FromAnnotations(base, map[string]string{
		AnnotationMode: "TPROXY", AnnotationIncludeOutboundCIDRs: "10.1.2.3/8, 192.0.2.7", AnnotationExcludeOutboundCIDRs: "fd00::1/64",
		AnnotationIncludeInboundPorts: "80,443", AnnotationExcludeInboundPorts: " 22 ,", AnnotationIncludeOutboundPorts: "", AnnotationExcludeOutboundPorts: "9000",
		AnnotationExcludeInterfaces: "eth1,eth2", AnnotationVirtualInterfaces: "net1", "other": "x",
	})
	must(t, err)
	want := Config{
		Mode: TPROXY, UIDs: []uint32{ProxyID}, IncludeInboundPorts: []uint16{80, 443}, ExcludeInboundPorts: []uint16{22}, IncludeOutboundPorts: []uint16{}, ExcludeOutboundPorts: []uint16{9000},
		IncludeOutboundCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.7/32")}, ExcludeOutboundCIDRs: []netip.Prefix{netip.MustParsePrefix("fd00::/64")},
		ExcludeInterfaces: []string{"eth1", "eth2"}, VirtualInterfaces: []string{"net1"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	all, err := FromAnnotations(base, map[string]string{AnnotationIncludeInboundPorts: "*", AnnotationIncludeOutboundCIDRs: "*"})
	must(t, err)
	if !reflect.DeepEqual(all, base) {
		t.Errorf(`"*": %+v`, all)
	}
	none, err := FromAnnotations(base, map[string]string{AnnotationIncludeInboundPorts: ""})
	must(t, err)
	if none.IncludeInboundPorts == nil || len(none.IncludeInboundPorts) != 0 {
		t.Errorf(`"": %+v, want an empty list, which captures nothing`, none)
	}
}

func TestBadAnnotations(t *testing.T) {
	for name, bad := range map[string][]string{
		AnnotationMode:                 {"", "redirect", "NONE?"},
		AnnotationIncludeInboundPorts:  {"0", "65536", "http", "80;81", "*,80", "-1"},
		AnnotationExcludeInboundPorts:  {"*", "80-90"},
		AnnotationIncludeOutboundPorts: {"*"},
		AnnotationExcludeOutboundPorts: {"70000", strings.Repeat("1,", 300)},
		AnnotationIncludeOutboundCIDRs: {"10.0.0.0/33", "example.com", "fe80::1%eth0", "*,10.0.0.0/8"},
		AnnotationExcludeOutboundCIDRs: {"*", "10/8"},
		AnnotationExcludeInterfaces:    {"averyveryverylongname", "a b", "../x"},
		AnnotationVirtualInterfaces:    {"a/b"},
	} {
		for _, v := range bad {
			if _, err := FromAnnotations(Config{}, map[string]string{name: v}); err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("%s: %q gave %v", name, v, err)
			}
		}
	}
}
