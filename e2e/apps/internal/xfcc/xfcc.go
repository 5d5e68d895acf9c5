// Package xfcc reads the header by which an application behind Envoy learns who calls.
package xfcc

import "strings"

// Header is X-Forwarded-Client-Cert.
const Header = "X-Forwarded-Client-Cert"

// Caller returns the URI of the last element, the peer that connected to us; empty when there is none.
func Caller(header string) string {
	uri := ""
	for _, part := range strings.FieldsFunc(header, func(r rune) bool { return r == ';' || r == ',' }) {
		if key, value, ok := strings.Cut(strings.TrimSpace(part), "="); ok && strings.EqualFold(key, "URI") {
			uri = strings.Trim(value, `"`)
		}
	}
	return uri
}
