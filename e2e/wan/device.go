package wan

import (
	"fmt"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// openDevice makes a TUN device in the port's namespace and sets it up. Closing the file removes it.
func openDevice(p Port) (f *os.File, err error) {
	err = p.Enter(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w; it needs root and the module tun", err)
		}
		req, err := unix.NewIfreq(p.Device)
		if err == nil {
			req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("make device %s: %w", p.Device, err)
		}
		f = os.NewFile(uintptr(fd), p.Device)
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return setUp(h, p)
	})
	if err != nil && f != nil {
		f.Close()
		return nil, err
	}
	return f, err
}

func setUp(h *netlink.Handle, p Port) error {
	link, err := h.LinkByName(p.Device)
	if err != nil {
		return fmt.Errorf("device %s: %w", p.Device, err)
	}
	if err := h.LinkSetMTU(link, DefaultMTU); err != nil {
		return fmt.Errorf("device %s: set mtu: %w", p.Device, err)
	}
	// The kernel drops what is not read in time; on a busy machine the emulator is late by more than the default of 500.
	if err := h.LinkSetTxQLen(link, 10_000); err != nil {
		return fmt.Errorf("device %s: set queue: %w", p.Device, err)
	}
	for _, a := range p.Addresses {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // usable at once
		}
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("device %s: address %v: %w", p.Device, a, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("device %s: set up: %w", p.Device, err)
	}
	return nil
}
