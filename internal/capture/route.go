package capture

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What leads packets with TPROXYMark to this host's own sockets: a rule and a table, numbered as Istio does.
const (
	TPROXYMark  = 1337
	tproxyTable = 133
	tproxyRule  = 32_000 // priority
)

// routeToSelf sends marked packets to lo, in both families: so the kernel hands them to a transparent socket, whatever
// their destination. A family that the kernel does not have is left out.
func routeToSelf() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return refused("route", err)
	}
	for family, all := range map[int]string{unix.AF_INET: "0.0.0.0/0", unix.AF_INET6: "::/0"} {
		_, dst, err := net.ParseCIDR(all)
		if err != nil {
			return err
		}
		route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: dst, Table: tproxyTable, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Family: family}
		err = netlink.RouteReplace(route)
		if err == nil {
			err = netlink.RuleAdd(tproxyPolicy(family))
		}
		switch {
		case err == nil || errors.Is(err, unix.EEXIST):
		case family == unix.AF_INET6 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES)):
		default:
			return refused("route", fmt.Errorf("marked packets of family %d: %w", family, err))
		}
	}
	return nil
}

// routeAsUsual removes what routeToSelf made; without any it does nothing.
func routeAsUsual() error {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			continue // the family is not there
		}
		for _, r := range rules {
			if r.Table != tproxyTable || r.Mark != TPROXYMark {
				continue
			}
			if err := netlink.RuleDel(tproxyPolicy(family)); err != nil && !errors.Is(err, unix.ENOENT) {
				return refused("route", err)
			}
			routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: tproxyTable}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return refused("route", err)
			}
			for _, route := range routes {
				if err := netlink.RouteDel(&route); err != nil && !errors.Is(err, unix.ESRCH) {
					return refused("route", err)
				}
			}
		}
	}
	return nil
}

func tproxyPolicy(family int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Mark, r.Table, r.Priority = family, TPROXYMark, tproxyTable, tproxyRule
	return r
}
