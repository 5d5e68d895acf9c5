package wan

import (
	"encoding/binary"
	"net/netip"
)

// Protocol numbers and sizes (RFC 791, RFC 8200, RFC 792, RFC 4443).
const (
	header4       = 20
	header6       = 40
	protocolICMP4 = 1
	protocolICMP6 = 58
	icmpHeader    = 8
	min6          = 1280 // the least MTU of an IPv6 link
)

// addresses returns a packet's source and destination; ok is false for what is no IP packet.
func addresses(p []byte) (src, dst netip.Addr, ok bool) {
	if len(p) == 0 {
		return src, dst, false
	}
	switch p[0] >> 4 {
	case 4:
		if len(p) < header4 {
			return src, dst, false
		}
		return netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), true
	case 6:
		if len(p) < header6 {
			return src, dst, false
		}
		return netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), true
	}
	return src, dst, false
}

// tooBigReply is the router's answer to a packet that does not fit: ICMP "fragmentation needed" (RFC 1191) or ICMPv6
// "packet too big" (RFC 4443). It is nil for an IPv4 packet that may be fragmented (it is lost here: no fragments are
// made) and for ICMP errors, which are never answered.
func tooBigReply(p []byte, mtu int) []byte {
	src, dst, ok := addresses(p)
	if !ok {
		return nil
	}
	if p[0]>>4 == 4 {
		if p[6]&0x40 == 0 || p[9] == protocolICMP4 {
			return nil
		}
		quoted := p[:min(len(p), header4+8)]
		r := make([]byte, header4+icmpHeader+len(quoted))
		r[0], r[8], r[9] = 0x45, 64, protocolICMP4
		binary.BigEndian.PutUint16(r[2:], uint16(len(r)))
		copy(r[12:], dst.AsSlice()) // from the destination: the emulator has no address of its own
		copy(r[16:], src.AsSlice())
		binary.BigEndian.PutUint16(r[10:], checksum(0, r[:header4]))
		icmp := r[header4:]
		icmp[0], icmp[1] = 3, 4
		binary.BigEndian.PutUint16(icmp[6:], uint16(mtu))
		copy(icmp[icmpHeader:], quoted)
		binary.BigEndian.PutUint16(icmp[2:], checksum(0, icmp))
		return r
	}
	if p[6] == protocolICMP6 {
		return nil
	}
	quoted := p[:min(len(p), min6-header6-icmpHeader)]
	r := make([]byte, header6+icmpHeader+len(quoted))
	r[0], r[6], r[7] = 0x60, protocolICMP6, 64
	binary.BigEndian.PutUint16(r[4:], uint16(len(r)-header6))
	copy(r[8:], dst.AsSlice())
	copy(r[24:], src.AsSlice())
	icmp := r[header6:]
	icmp[0] = 2
	binary.BigEndian.PutUint32(icmp[4:], uint32(max(mtu, min6)))
	copy(icmp[icmpHeader:], quoted)
	var pseudo [40]byte
	copy(pseudo[:], r[8:40])
	binary.BigEndian.PutUint32(pseudo[32:], uint32(len(icmp)))
	pseudo[39] = protocolICMP6
	binary.BigEndian.PutUint16(icmp[2:], checksum(sum(0, pseudo[:]), icmp))
	return r
}

// sum adds 16-bit words (RFC 1071).
func sum(s uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	return s
}

func checksum(s uint32, b []byte) uint16 {
	s = sum(s, b)
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}
