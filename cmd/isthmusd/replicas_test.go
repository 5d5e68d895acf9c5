package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/api/isthmus/v1alpha1"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

// kubeAPI is a real API server with our resources and a namespace for each cluster.
func kubeAPI(t *testing.T, clusters ...string) *kubetest.Server {
	t.Helper()
	s := kubetest.APIServer(t)
	s.CRDs("../../deploy/helm/isthmus/files/crds/isthmus.yaml")
	for _, c := range clusters {
		_, err := s.Client().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "system-" + c}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// replicaConfig is that of one replica of a cluster whose state is in the API. All replicas read the same objects.
func replicaConfig(t *testing.T, s *kubetest.Server, cluster, replica, objects string) Config {
	t.Helper()
	cfg := testConfig(t, cluster)
	if objects != "" {
		cfg.Source.Dir = objects
	}
	cfg.State.In, cfg.State.Kubeconfig, cfg.State.Namespace = inKubernetes, s.Kubeconfig(), "system-"+cluster
	cfg.State.Replica, cfg.State.Address = replica, cfg.Listen
	return cfg
}

// peerObject reads a Peer as kubectl does.
func peerObject(t *testing.T, s *kubetest.Server, cluster, name string) (*v1alpha1.Peer, error) {
	t.Helper()
	data, err := s.Client().Discovery().RESTClient().Get().AbsPath("/apis/isthmus.io/v1alpha1/namespaces/system-" + cluster + "/peers/" + name).DoRaw(t.Context())
	if err != nil {
		return nil, err
	}
	p := new(v1alpha1.Peer)
	return p, json.Unmarshal(data, p)
}

// leaderOf returns the replica that leads, once exactly one of them does.
func leaderOf(t *testing.T, replicas ...*daemonTest) (leader *daemonTest) {
	t.Helper()
	eventually(t, "one replica leads", func() error {
		leader = nil
		for _, d := range replicas {
			if bytes.Contains([]byte(d.log.String()), []byte("speaks for the cluster")) {
				if leader != nil {
					return errors.New("two lead")
				}
				leader = d
			}
		}
		if leader == nil {
			return errors.New("none leads")
		}
		return nil
	})
	return leader
}

// TestStateInKubernetes: what one isthmusd kept is there for another that shares no disk with it.
func TestStateInKubernetes(t *testing.T) {
	s := kubeAPI(t, "amber")
	one := start(t, replicaConfig(t, s, "amber", "one", ""))
	leaderOf(t, one)
	birch := testConfig(t, "birch")
	other := start(t, birch)

	var issued admin.TokenReply
	cfg := one.cfg
	if err := one.call("POST", "/v1/tokens", admin.TokenRequest{Kind: "cluster", Name: "birch", AutoApprove: true}, &issued); err == nil {
		t.Fatal("a token without a gateway address")
	}
	one.stop(t)
	cfg.Gateways = []string{cfg.Listen} // its own TLS port stands for the gateway
	cfg.DataDir += "-2"
	one = start(t, cfg)
	leaderOf(t, one)
	if err := one.call("POST", "/v1/tokens", admin.TokenRequest{Kind: "cluster", Name: "birch", AutoApprove: true}, &issued); err != nil {
		t.Fatal(err)
	}
	if err := other.call("POST", "/v1/join", admin.JoinRequest{Token: issued.Token}, nil); err != nil {
		t.Fatal(err)
	}
	p, err := peerObject(t, s, "amber", "amber")
	if err != nil || p.Status.State != v1alpha1.PeerSelf || p.Status.Epoch < 2 || len(p.Status.Records) == 0 {
		t.Fatalf("own Peer: %+v, %v", p, err)
	}
	epoch := p.Status.Epoch
	eventually(t, "Peer birch is written", func() error {
		p, err := peerObject(t, s, "amber", "birch")
		if err != nil || p.Status.State != v1alpha1.PeerApproved || p.Spec.TrustDomain != "birch.mesh" {
			return fmt.Errorf("%+v, %w", p, err)
		}
		return nil
	})
	one.stop(t)

	cfg.DataDir += "-3" // the Pod is gone with its disk
	one = start(t, cfg)
	leaderOf(t, one)
	eventually(t, "birch is a member still", func() error {
		for _, p := range one.status(t).Peers {
			if p.Name == "birch" && p.State == "approved" {
				return nil
			}
		}
		return errors.New("it is not")
	})
	var tokens []admin.Token
	if err := one.call("GET", "/v1/tokens", nil, &tokens); err != nil || len(tokens) != 1 || tokens[0].State != "redeemed" {
		t.Errorf("tokens: %+v, %v", tokens, err)
	}
	if err := one.call("POST", "/v1/peers/birch/evict", nil, nil); err != nil {
		t.Fatal(err)
	}
	one.stop(t)
	cfg.DataDir += "-4"
	one = start(t, cfg)
	leaderOf(t, one)
	for _, p := range one.status(t).Peers {
		if p.Name == "birch" && p.State != "evicted" {
			t.Errorf("the eviction is forgotten: %+v", p)
		}
	}
	if p, err := peerObject(t, s, "amber", "amber"); err != nil || p.Status.Epoch != epoch+2 {
		t.Errorf("epoch after two more leaders: %+v, %v", p, err)
	}
	for _, secret := range []string{"isthmus-keys", "istio-ca-secret"} {
		got, err := s.Client().CoreV1().Secrets("system-amber").Get(t.Context(), secret, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for name, data := range got.Data {
			if lines := bytes.Split(data, []byte("\n")); bytes.Contains(data, []byte("PRIVATE")) && bytes.Contains([]byte(one.log.String()), lines[1]) {
				t.Errorf("key %s of Secret %s is in the log", name, secret)
			}
		}
	}
}
