package httprule

import corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

// Versions lets clients speak HTTP/1.0 where the proxy's metadata says so (HTTP10: "1", Istio's switch), else it is nil:
// Envoy answers them 426.
func Versions(metadata map[string]string) *corev3.Http1ProtocolOptions {
	if metadata["HTTP10"] != "1" {
		return nil
	}
	return &corev3.Http1ProtocolOptions{AcceptHttp_10: true}
}
