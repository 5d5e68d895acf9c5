package guard

import "testing"

func TestAction(t *testing.T) {
	for call, want := range map[[2]string]Action{
		{"GET", "/v1/status"}:                 {"get", "status", ""},
		{"GET", "/v1/peers"}:                  {"list", "peers", ""},
		{"GET", "/v1/proxies"}:                {"list", "proxies", ""},
		{"GET", "/v1/tokens"}:                 {"list", "tokens", ""},
		{"POST", "/v1/tokens"}:                {"create", "tokens", ""},
		{"DELETE", "/v1/tokens/abc"}:          {"delete", "tokens", "abc"},
		{"POST", "/v1/peers/birch/approve"}:   {"approve", "peers", "birch"},
		{"POST", "/v1/peers/birch/evict"}:     {"evict", "peers", "birch"},
		{"POST", "/v1/join"}:                  {"create", "join", ""},
		{"POST", "/v1/leave"}:                 {"create", "leave", ""},
		{"POST", "/v1/workload-tokens"}:       {"create", "workload-tokens", ""},
		{"POST", "/v1/explain"}:               {"create", "explain", ""},
		{"GET", "/v1/trust"}:                  {"get", "trust", ""},
		{"POST", "/v1/trust"}:                 {"rotate", "trust", ""},
		{"GET", "/v1/trust/behind"}:           {},
		{"GET", "/v1/tokens/abc"}:             {},
		{"DELETE", "/v1/tokens"}:              {},
		{"DELETE", "/v1/tokens/"}:             {},
		{"POST", "/v1/peers/birch"}:           {},
		{"POST", "/v1/peers/birch/rename"}:    {},
		{"POST", "/v1/peers//evict"}:          {},
		{"POST", "/v1/peers/../tokens"}:       {},
		{"POST", "/v1/peers/a/evict/b"}:       {},
		{"GET", "/v1/"}:                       {},
		{"GET", "/"}:                          {},
		{"GET", "/debug/pprof"}:               {},
		{"GET", "/debug/adsz"}:                {"get", "debug", ""},
		{"GET", "/debug/config_dump"}:         {"get", "debug", ""},
		{"POST", "/debug/adsz"}:               {},
		{"GET", "/debug/adsz/x"}:              {},
		{"PUT", "/v1/status"}:                 {},
		{"GET", "/v2/status"}:                 {},
		{"GET", "//v1/status"}:                {},
		{"GET approve", "/v1/peers"}:          {},
		{"POST", "/v1/peers approve/x/evict"}: {},
	} {
		got, ok := action(call[0], call[1])
		if got != want || ok != (want != Action{}) {
			t.Errorf("%s %s: %+v, %v; want %+v", call[0], call[1], got, ok, want)
		}
	}
}
