package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

// allow makes a service account in the namespace with these rights there.
func allow(t *testing.T, s *kubetest.Server, namespace, account string, rules ...rbacv1.PolicyRule) {
	t.Helper()
	ctx, rbac := t.Context(), s.Client().RbacV1()
	_, err := s.Client().CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: account}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = rbac.Roles(namespace).Create(ctx, &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: account}, Rules: rules}, metav1.CreateOptions{})
	if err == nil {
		_, err = rbac.RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: account}, RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "Role", Name: account},
			Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Name: account, Namespace: namespace}},
		}, metav1.CreateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// remote calls the admin API over TLS.
func (d *daemonTest) remote(method, path, token string, in, out any) (int, error) {
	ca := x509.NewCertPool()
	ca.AppendCertsFromPEM(d.ca)
	web := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: ca, ServerName: "xds." + d.cfg.TrustDomain}}}
	body, err := json.Marshal(in)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(context.Background(), method, "https://"+d.cfg.Admin.Listen+path, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	if token != "" {
		req.Header.Set(admin.TokenHeader, token)
	}
	resp, err := web.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		e := new(admin.Error)
		if err := json.NewDecoder(resp.Body).Decode(e); err != nil {
			return resp.StatusCode, err
		}
		return resp.StatusCode, e
	}
	if out == nil {
		return resp.StatusCode, nil
	}
	return resp.StatusCode, json.NewDecoder(resp.Body).Decode(out)
}

// TestAdminOverTLS: who may do what is the API server's word, and any replica takes the call.
func TestAdminOverTLS(t *testing.T) {
	s := kubeAPI(t, "amber")
	all := rbacv1.PolicyRule{APIGroups: []string{admin.AccessGroup}, Resources: []string{"*"}, Verbs: []string{"*"}}
	look := rbacv1.PolicyRule{APIGroups: []string{admin.AccessGroup}, Resources: []string{"*"}, Verbs: []string{"get", "list"}}
	allow(t, s, "system-amber", admin.OperatorAccount, all)
	allow(t, s, "system-amber", admin.ViewerAccount, look)
	allow(t, s, "default", "elsewhere", all) // rights in another namespace are none here
	var replicas []*daemonTest
	for _, name := range []string{"a", "b"} {
		cfg := replicaConfig(t, s, "amber", name, "")
		cfg.Gateways, cfg.Admin.Listen = []string{cfg.Listen}, freeAddr(t)
		if len(replicas) > 0 {
			cfg.Source.Dir = replicas[0].cfg.Source.Dir
		}
		replicas = append(replicas, start(t, cfg))
	}
	ca, err := s.Client().CoreV1().Secrets("system-amber").Get(t.Context(), authority.OwnSecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range replicas {
		d.ca = ca.Data["root-cert.pem"]
		if err := writeRoot(d); err != nil {
			t.Fatal(err)
		}
	}
	leader := leaderOf(t, replicas...)
	follower := replicas[0]
	if leader == follower {
		follower = replicas[1]
	}
	eventually(t, "the follower follows", func() error {
		if !strings.Contains(follower.log.String(), "follows the leader") {
			return errors.New("not yet")
		}
		return nil
	})
	operator, viewer := s.Token("system-amber", admin.OperatorAccount, admin.Audience), s.Token("system-amber", admin.ViewerAccount, admin.Audience)
	for name, c := range map[string]struct {
		method, path, token string
		in                  any
		want                int
	}{
		"nobody":                {"GET", "/v1/status", "", nil, 401},
		"noise":                 {"GET", "/v1/status", "noise", nil, 401},
		"too long":              {"GET", "/v1/status", strings.Repeat("x", 20<<10), nil, 401},
		"another audience":      {"GET", "/v1/status", s.Token("system-amber", admin.OperatorAccount), nil, 401},
		"a workload":            {"GET", "/v1/status", s.Token("system-amber", admin.OperatorAccount, "istio-ca"), nil, 401},
		"no rights":             {"GET", "/v1/status", s.Token("default", "elsewhere", admin.Audience), nil, 403},
		"viewer looks":          {"GET", "/v1/status", viewer, nil, 200},
		"viewer makes a token":  {"POST", "/v1/tokens", viewer, admin.TokenRequest{Kind: "cluster", Name: "birch"}, 403},
		"viewer evicts":         {"POST", "/v1/peers/birch/evict", viewer, nil, 403},
		"operator":              {"POST", "/v1/tokens", operator, admin.TokenRequest{Kind: "cluster", Name: "birch"}, 200},
		"operator looks":        {"GET", "/v1/tokens", operator, nil, 200},
		"what is not there":     {"GET", "/metrics", operator, nil, 404},
		"operator, bad request": {"POST", "/v1/tokens", operator, map[string]any{"unknown": 1}, 400},
	} {
		for _, d := range replicas {
			if got, err := d.remote(c.method, c.path, c.token, c.in, nil); got != c.want {
				t.Errorf("%s, replica %s: %d, %v; want %d", name, d.cfg.State.Replica, got, err, c.want)
			}
		}
	}
	// What only the leader can do works at any replica, and its refusal is said as there.
	if got, err := follower.remote("POST", "/v1/peers/nobody/evict", operator, nil, nil); got != 422 || !strings.Contains(fmt.Sprint(err), `no cluster "nobody"`) {
		t.Errorf("evict at a follower: %d, %v", got, err)
	}
	// The proxies of all replicas are listed at each, over TLS and on the socket.
	workload := leader.workloadToken(t, "default", "productpage", "productpage")
	connect(t, leader, sidecar(t, leader.cfg, "one", "default"), leader.dialOptions(t, workload), nil)
	connect(t, follower, sidecar(t, follower.cfg, "two", "default"), follower.dialOptions(t, workload), nil)
	for _, d := range replicas {
		eventually(t, "both proxies are listed at "+d.cfg.State.Replica, func() error {
			var remote, socket []admin.Proxy
			if _, err := d.remote("GET", "/v1/proxies", viewer, nil, &remote); err != nil {
				return err
			}
			if err := d.call("GET", "/v1/proxies", nil, &socket); err != nil {
				return err
			}
			if len(remote) != 2 || len(socket) != 2 || remote[0].Node == remote[1].Node {
				return fmt.Errorf("%+v, %+v", remote, socket)
			}
			return nil
		})
	}
	for _, d := range replicas {
		if strings.Contains(d.log.String(), operator) || strings.Contains(d.log.String(), viewer) {
			t.Error("a token is in the log")
		}
	}
}
