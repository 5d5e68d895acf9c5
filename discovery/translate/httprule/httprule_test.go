package httprule_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
)

// compact returns m as JSON with keys in order and no white space.
func compact(t *testing.T, m proto.Message) string {
	t.Helper()
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	text, err = json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func read[T proto.Message](t *testing.T, text string, into T) T {
	t.Helper()
	if err := protojson.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return into
}

func TestMatch(t *testing.T) {
	for in, want := range map[string]string{
		`{}`:                       `{"prefix":"/"}`,
		`{"uri":{"exact":"/a"}}`:   `{"path":"/a"}`,
		`{"uri":{"regex":"/a.*"}}`: `{"safe_regex":{"regex":"/a.*"}}`,
		`{"uri":{"prefix":"/a"},"ignoreUriCase":true}`: `{"case_sensitive":false,"prefix":"/a"}`,
		`{"method":{"exact":"GET"}}`:                   `{"headers":[{"name":":method","string_match":{"exact":"GET"}}],"prefix":"/"}`,
		`{"authority":{"prefix":"a."}}`:                `{"headers":[{"name":":authority","string_match":{"prefix":"a."}}],"prefix":"/"}`,
		`{"scheme":{"exact":"http"}}`:                  `{"headers":[{"name":":scheme","string_match":{"exact":"http"}}],"prefix":"/"}`,
		`{"headers":{"b":{"exact":"1"},"a":{}}}`:       `{"headers":[{"name":"a","present_match":true},{"name":"b","string_match":{"exact":"1"}}],"prefix":"/"}`,
		`{"withoutHeaders":{"a":{}}}`:                  `{"headers":[{"invert_match":true,"name":"a","present_match":true}],"prefix":"/"}`,
		`{"withoutHeaders":{"a":{"regex":"x"}}}`:       `{"headers":[{"invert_match":true,"name":"a","string_match":{"safe_regex":{"regex":"x"}},"treat_missing_header_as_empty":true}],"prefix":"/"}`,
		`{"queryParams":{"q":{"exact":"1"},"p":{}}}`:   `{"prefix":"/","query_parameters":[{"name":"p","present_match":true},{"name":"q","string_match":{"exact":"1"}}]}`,
		`{"queryParams":{"q":{"regex":"[0-9]+"}}}`:     `{"prefix":"/","query_parameters":[{"name":"q","string_match":{"safe_regex":{"regex":"[0-9]+"}}}]}`,
	} {
		m := httprule.Match(read(t, in, &networking.HTTPMatchRequest{}))
		if got := compact(t, m); got != want {
			t.Errorf("%s\n got %s\nwant %s", in, got, want)
		}
		if err := httprule.CheckMatch(m); err != nil {
			t.Errorf("%s: %v", in, err)
		}
	}
	if err := httprule.CheckMatch(httprule.Match(read(t, `{"headers":{"a":{"regex":"("}}}`, &networking.HTTPMatchRequest{}))); err == nil {
		t.Error("a bad expression passes")
	}
}

func TestRewrite(t *testing.T) {
	for _, c := range [][3]string{
		{`{"uri":{"prefix":"/api"}}`, `{"uri":"/"}`, `{"regex_rewrite":{"pattern":{"regex":"^/api(/?)(.*)"},"substitution":"/\\2"}}`},
		{`{"uri":{"prefix":"/api/"}}`, `{"uri":"/"}`, `{"prefix_rewrite":"/"}`},
		{`{"uri":{"prefix":"/api"}}`, `{"uri":"/v2","authority":"b"}`, `{"host_rewrite_literal":"b","prefix_rewrite":"/v2"}`},
		{`{}`, `{"uriRegexRewrite":{"match":"^/(.*)","rewrite":"/x/\\1"}}`, `{"regex_rewrite":{"pattern":{"regex":"^/(.*)"},"substitution":"/x/\\1"}}`},
	} {
		a := &routev3.RouteAction{}
		httprule.Rewrite(a, read(t, c[1], &networking.HTTPRewrite{}), read(t, c[0], &networking.HTTPMatchRequest{}))
		if got := compact(t, a); got != c[2] {
			t.Errorf("%s %s\n got %s\nwant %s", c[0], c[1], got, c[2])
		}
	}
}

func TestRetry(t *testing.T) {
	if p := httprule.Retry(nil); p.NumRetries.GetValue() != 2 || len(p.RetryHostPredicate) != 1 {
		t.Errorf("default: %v", p)
	}
	// A request that went out on a connection is not sent again when that ends: the server may have worked on it.
	if on := strings.Split(httprule.Retry(nil).RetryOn, ","); !slices.Contains(on, "reset-before-request") || slices.Contains(on, "reset") {
		t.Errorf("by default tried again on %v", on)
	}
	if p := httprule.Retry(&networking.HTTPRetry{}); p != nil {
		t.Errorf("attempts 0: %v", p)
	}
	p := httprule.Retry(read(t, `{"attempts":3,"retryOn":"5xx, 404","perTryTimeout":"2s","retryIgnorePreviousHosts":false}`, &networking.HTTPRetry{}))
	want := `{"num_retries":3,"per_try_timeout":"2s","retriable_status_codes":[404],"retry_on":"5xx,retriable-status-codes"}`
	if got := compact(t, p); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestHeadersAndAnswers(t *testing.T) {
	ops := read(t, `{"set":{"b":"1","Host":"x.test"},"add":{"a":"2"},"remove":["c","host"]}`, &networking.Headers_HeaderOperations{})
	add, remove := httprule.HeaderOps(ops)
	if len(add) != 2 || add[0].Header.Key != "b" || add[1].Header.Key != "a" || len(remove) != 1 || httprule.HostHeader(ops) != "x.test" {
		t.Errorf("add %v, remove %v, host %q", add, remove, httprule.HostHeader(ops))
	}
	r := httprule.Redirect(read(t, `{"uri":"/n","authority":"h","scheme":"https","redirectCode":307,"derivePort":"FROM_REQUEST_PORT"}`, &networking.HTTPRedirect{}), 81)
	if got, want := compact(t, r), `{"host_redirect":"h","path_redirect":"/n","port_redirect":81,"response_code":"TEMPORARY_REDIRECT","scheme_redirect":"https"}`; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	d := httprule.DirectResponse(read(t, `{"status":418,"body":{"string":"tea"}}`, &networking.HTTPDirectResponse{}))
	if got, want := compact(t, d), `{"body":{"inline_string":"tea"},"status":418}`; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestPerRoute(t *testing.T) {
	if got := httprule.PerRoute(&networking.HTTPRoute{}); got != nil {
		t.Errorf("nothing asked for, got %v", got)
	}
	got := httprule.PerRoute(read(t, `{"fault":{"abort":{"httpStatus":500,"percentage":{"value":10}}},"corsPolicy":{"allowOrigins":[{"exact":"*"}],"maxAge":"60s"}}`, &networking.HTTPRoute{}))
	if len(got) != 2 || got[httprule.FaultFilter] == nil || got[httprule.CorsFilter] == nil {
		t.Errorf("got %v", got)
	}
}
