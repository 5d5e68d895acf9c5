package config_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config"
)

// TestSecrets reads the Secrets of the translation's golden cases, and what is wrong with some.
func TestSecrets(t *testing.T) {
	text, err := os.ReadFile("../translate/testdata/api/gateway-mutual.txtar")
	if err != nil {
		t.Fatal(err)
	}
	_, input, _ := strings.Cut(string(text), "-- input.yaml --\n")
	input, _, _ = strings.Cut(input, "\n-- ")
	in, problems := config.Decode("x", []byte(input), config.Options{})
	if len(problems) > 0 {
		t.Error(problems)
	}
	var got []string
	for _, c := range in.Credentials {
		got = append(got, fmt.Sprintf("%s %v %v %v", c.Object.Name, len(c.Certificate) > 0, len(c.Key) > 0, len(c.Roots) > 0))
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if all := string(text) + fmt.Sprintf("%v %+v %#v", c.Key, c, c.Key); strings.Contains(all, "PRIVATE KEY") || len(c.Key) > 0 && !strings.Contains(all, "[redacted]") {
			t.Errorf("%s shows its key", c.Object.Name)
		}
	}
	if want := "cert-a true true true, cert-b true true false, cert-b-cacert false false true"; strings.Join(got, ", ") != want {
		t.Errorf("got %s, want %s", strings.Join(got, ", "), want)
	}
	a, b := in.Credentials[0], in.Credentials[1]
	for name, c := range map[string]struct {
		kind corev1.SecretType
		data map[string][]byte
		want string
	}{
		"another's key":      {corev1.SecretTypeTLS, map[string][]byte{"tls.crt": a.Certificate, "tls.key": b.Key}, "do not belong together"},
		"no key":             {corev1.SecretTypeTLS, map[string][]byte{"tls.crt": a.Certificate}, "missing"},
		"no certificates":    {corev1.SecretTypeOpaque, map[string][]byte{"ca.crt": []byte("no PEM")}, "no list of certificates"},
		"no revocation list": {corev1.SecretTypeOpaque, map[string][]byte{"ca.crt": a.Roots, "ca.crl": a.Roots}, "no revocation list"},
		"a password":         {corev1.SecretTypeOpaque, map[string][]byte{"password": []byte("hunter2")}, ""},
		"a token":            {corev1.SecretTypeServiceAccountToken, map[string][]byte{"ca.crt": a.Roots}, ""},
	} {
		s := &corev1.Secret{Type: c.kind, Data: c.data}
		s.Name, s.Namespace = "s", "n"
		in, problems := config.DecodeObject("api", s, config.Options{})
		if len(in.Credentials) > 0 {
			t.Errorf("%s: is a credential", name)
		}
		if (len(problems) > 0) != (c.want != "") || len(problems) > 0 && !strings.Contains(problems[0].Message, c.want) {
			t.Errorf("%s: problems %v, want %q", name, problems, c.want)
		}
	}
}
