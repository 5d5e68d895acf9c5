// Package redact takes private keys and other secrets out of Envoy's configuration before it is shown. It knows them by the
// names of Envoy's fields. It is pure.
package redact

import "slices"

// Mark stands for what is not shown.
const Mark = "[redacted]"

// fields carry what nobody may see, wherever they stand. Objects of users have them in the other spelling, too.
var fields = []string{
	"private_key", "password", "session_ticket_keys", "generic_secret", "inline_secret", "hmac_secret", "token_secret", "client_secret",
	"privateKey", "sessionTicketKeys", "genericSecret", "inlineSecret", "hmacSecret", "tokenSecret", "clientSecret",
}

// JSON replaces what stands in secret fields of a JSON value.
func JSON(v any) {
	switch v := v.(type) {
	case []any:
		for _, x := range v {
			JSON(x)
		}
	case map[string]any:
		for k, x := range v {
			if slices.Contains(fields, k) {
				hide(v, k, x)
			} else {
				JSON(x)
			}
		}
	}
}

// hide keeps where a secret is read from, and not what it says.
func hide(in map[string]any, key string, x any) {
	if m, ok := x.(map[string]any); ok {
		for _, inline := range []string{"inline_bytes", "inline_string", "inlineBytes", "inlineString"} {
			if _, ok := m[inline]; ok {
				m[inline] = Mark
			}
		}
		if key == "private_key" || key == "privateKey" || key == "password" {
			return // a data source: what is left is the name of a file or of a variable
		}
		if m["sds_config"] != nil || m["sdsConfig"] != nil || m["name"] != nil && len(m) == 1 {
			return // a reference
		}
	}
	if _, file := x.(string); file && key == "privateKey" {
		return // of a DestinationRule or a Gateway: where the key is
	}
	in[key] = Mark
}
