package kubeconfig

import (
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

const goodKubeconfig = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://192.0.2.1:6443", certificate-authority-data: Y2E=}}]
users: [{name: u, user: {token: c2VjcmV0}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`

// FuzzRemote reads whatever a remote secret may hold. What is taken names no file, runs nothing and checks the
// server; what is refused says what to do and shows no credential.
func FuzzRemote(f *testing.F) {
	f.Add([]byte(goodKubeconfig))
	for _, s := range []string{"token: c2VjcmV0|exec: {command: x}", "token: c2VjcmV0|tokenFile: /x", "c2VjcmV0}|c2VjcmV0, client-key: /x}", "https:|http:", "certificate-authority-data: Y2E=|insecure-skip-tls-verify: true", "current-context: x|current-context: y", "kind: Config|kind: Pod", "Y2E=|?", "[|{"} {
		old, now, _ := strings.Cut(s, "|")
		f.Add([]byte(strings.Replace(goodKubeconfig, old, now, 1)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := Remote(data)
		if err != nil {
			if diag.HintOf(err) == "" {
				t.Errorf("%v says no remedy", err)
			}
			if strings.Contains(err.Error(), "c2VjcmV0") {
				t.Errorf("%v shows the token", err)
			}
			return
		}
		if cfg.ExecProvider != nil || cfg.AuthProvider != nil || cfg.BearerTokenFile != "" || cfg.CAFile != "" || cfg.CertFile != "" || cfg.KeyFile != "" || cfg.Insecure || !strings.HasPrefix(cfg.Host, "https://") {
			t.Errorf("taken: %+v", cfg)
		}
	})
}

func TestRemoteTaken(t *testing.T) {
	cfg, err := Remote([]byte(goodKubeconfig))
	if err != nil || cfg.BearerToken != "c2VjcmV0" || cfg.Host != "https://192.0.2.1:6443" {
		t.Errorf("%+v, %v", cfg, err)
	}
}
