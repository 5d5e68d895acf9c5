package written

import (
	"regexp"
	"slices"
	"strings"
)

// command is how Envoy writes a value of the request in text: %NAME%, %NAME(ARGUMENT)%, %NAME(ARGUMENT):LENGTH%.
var command = regexp.MustCompile(`^%([A-Z0-9_]+)(\([^)]*\))?(:[0-9]+)?%`)

// CheckFormat refuses a header value with a command that Envoy would not take: it would refuse the whole route table.
func (o *Object) CheckFormat(field, value string) {
	for i := strings.IndexByte(value, '%'); i >= 0; i = strings.IndexByte(value, '%') {
		value = value[i:]
		if strings.HasPrefix(value, "%%") {
			value = value[2:]
			continue
		}
		m := command.FindStringSubmatch(value)
		if m == nil {
			o.Invalid(field, "the percent sign begins no command of Envoy's", `write "%%" for a percent sign`)
			return
		}
		name, argument, length := m[1], m[2], m[3]
		ok := false
		switch {
		case slices.Contains(withArgument, name):
			ok = len(argument) > 2
		case slices.Contains(withFormat, name):
			ok = length == ""
		default:
			ok = (slices.Contains(plainCommands, name) || tlsCommand.MatchString(name)) && argument == "" && length == ""
		}
		if !ok {
			o.Invalid(field, Show(m[0])+" is not a command of Envoy's", `correct it, or write "%%" for a percent sign`)
			return
		}
		value = value[len(m[0]):]
	}
}

var (
	withArgument = []string{
		"REQ", "RESP", "TRAILER", "QUERY_PARAM", "ENVIRONMENT", "DYNAMIC_METADATA", "CLUSTER_METADATA", "UPSTREAM_METADATA", "FILTER_STATE", "UPSTREAM_FILTER_STATE", "PER_REQUEST_STATE",
	}
	withFormat    = []string{"START_TIME", "START_TIME_LOCAL", "EMIT_TIME", "EMIT_TIME_LOCAL", "DOWNSTREAM_PEER_CERT_V_START", "DOWNSTREAM_PEER_CERT_V_END", "UPSTREAM_PEER_CERT_V_START", "UPSTREAM_PEER_CERT_V_END"}
	plainCommands = []string{
		"REQUEST_DURATION", "REQUEST_TX_DURATION", "RESPONSE_DURATION", "RESPONSE_TX_DURATION", "ROUNDTRIP_DURATION", "DURATION", "BYTES_RECEIVED", "BYTES_SENT", "PROTOCOL", "UPSTREAM_PROTOCOL",
		"RESPONSE_CODE", "RESPONSE_CODE_DETAILS", "CONNECTION_TERMINATION_DETAILS", "RESPONSE_FLAGS", "RESPONSE_FLAGS_LONG", "CUSTOM_FLAGS", "HOSTNAME", "ROUTE_NAME", "VIRTUAL_CLUSTER_NAME", "CONNECTION_ID",
		"STREAM_ID", "UNIQUE_ID", "REQUESTED_SERVER_NAME", "TLS_JA3_FINGERPRINT", "TLS_JA4_FINGERPRINT", "FILTER_CHAIN_NAME", "TRACE_ID", "SPAN_ID", "GRPC_STATUS", "GRPC_STATUS_NUMBER", "PATH", "QUERY_PARAMS",
		"UPSTREAM_HOST", "UPSTREAM_HOST_NAME", "UPSTREAM_HOST_NAME_WITHOUT_PORT", "UPSTREAM_CLUSTER", "UPSTREAM_CLUSTER_RAW", "UPSTREAM_CONNECTION_ID", "UPSTREAM_REQUEST_ATTEMPT_COUNT", "UPSTREAM_TRANSPORT_FAILURE_REASON",
		"DOWNSTREAM_TRANSPORT_FAILURE_REASON", "DOWNSTREAM_HANDSHAKE_DURATION",
	}
	// tlsCommand are the addresses and certificates of both ends.
	tlsCommand = regexp.MustCompile(`^(DOWNSTREAM|UPSTREAM)_(LOCAL_ADDRESS|LOCAL_ADDRESS_WITHOUT_PORT|LOCAL_PORT|REMOTE_ADDRESS|REMOTE_ADDRESS_WITHOUT_PORT|REMOTE_PORT|` +
		`TLS_SESSION_ID|TLS_CIPHER|TLS_VERSION|PEER_SUBJECT|PEER_ISSUER|PEER_CERT|PEER_URI_SAN|PEER_DNS_SAN|PEER_IP_SAN|LOCAL_URI_SAN|LOCAL_DNS_SAN|LOCAL_IP_SAN)$|` +
		`^DOWNSTREAM_(DIRECT_(LOCAL|REMOTE)_(ADDRESS|ADDRESS_WITHOUT_PORT|PORT)|LOCAL_SUBJECT|PEER_FINGERPRINT_256|PEER_FINGERPRINT_1|PEER_SERIAL|PEER_EMAIL_SAN)$`)
)
