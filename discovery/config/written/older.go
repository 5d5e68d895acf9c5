package written

import "google.golang.org/protobuf/reflect/protoreflect"

// Fields that Istio's types no longer have, and objects still do.

const headersField = "headers"

// older turns such a field of a message into what says the same today; it reports whether there is one.
func older(md protoreflect.MessageDescriptor, fields map[string]any, key string) bool {
	value := fields[key]
	switch md.FullName() {
	case "istio.networking.v1alpha3.HTTPFaultInjection.Abort":
		if key != "percent" {
			return false
		}
		if fields["percentage"] == nil {
			fields["percentage"] = map[string]any{"value": value}
		}
	case "istio.networking.v1alpha3.HTTPRoute":
		switch key {
		case "websocketUpgrade", "websocket_upgrade": // WebSocket passes anyway
			if _, ok := value.(bool); !ok {
				return false
			}
		case "appendHeaders", "append_headers", "appendRequestHeaders", "append_request_headers":
			operation(fields, "request", "add", value)
		case "appendResponseHeaders", "append_response_headers":
			operation(fields, "response", "add", value)
		case "removeRequestHeaders", "remove_request_headers":
			operation(fields, "request", "remove", value)
		case "removeResponseHeaders", "remove_response_headers":
			operation(fields, "response", "remove", value)
		default:
			return false
		}
	default:
		return false
	}
	delete(fields, key)
	return true
}

// operation writes headers.WHICH.WHAT unless it stands there.
func operation(fields map[string]any, which, what string, value any) {
	at := fields
	for _, name := range []string{headersField, which} {
		next, ok := at[name].(map[string]any)
		if !ok {
			next = map[string]any{}
			at[name] = next
		}
		at = next
	}
	if at[what] == nil {
		at[what] = value
	}
}
