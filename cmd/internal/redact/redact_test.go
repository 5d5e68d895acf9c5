package redact_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/cmd/internal/redact"
)

func TestJSON(t *testing.T) {
	const in = `{"a":[{"private_key":{"inline_bytes":"KEY"},"certificate_chain":{"inline_string":"cert"}},{"privateKey":{"inlineString":"KEY"}},
{"private_key":{"filename":"/etc/key.pem"}},{"privateKey":"/etc/path.pem"},{"private_key":"KEY"},{"password":{"environment_variable":"PASS"}},
{"session_ticket_keys":{"keys":[{"inline_bytes":"KEY"}]}},{"generic_secret":{"secret":{"inline_string":"KEY"}}},{"client_secret":"KEY"},
{"hmac_secret":{"name":"reference"}},{"token_secret":{"name":"x","sds_config":{"path":"ref"}}},{"deep":[[{"password":{"inline_string":"KEY"}}]]}]}`
	var v any
	if err := json.Unmarshal([]byte(in), &v); err != nil {
		t.Fatal(err)
	}
	redact.JSON(v)
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	got := string(data)
	if strings.Contains(got, "KEY") {
		t.Errorf("a key is shown: %s", got)
	}
	for _, kept := range []string{"cert", "/etc/key.pem", "/etc/path.pem", "PASS", "reference", `"path":"ref"`} {
		if !strings.Contains(got, kept) {
			t.Errorf("%s is gone: %s", kept, got)
		}
	}
}
