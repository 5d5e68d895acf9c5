package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/api/admin"
	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/api/isthmus/v1alpha1"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/token"
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

// replicaEnv names the configuration of a replica in a process of its own.
const replicaEnv = "ISTHMUSD_REPLICA"

func runReplica(path string) {
	cfg, err := loadConfig(path)
	if err == nil {
		cfg.allowLoopback = true
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		err = run(ctx, cfg, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})), prometheus.NewRegistry())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// spawn runs a replica in a process of its own, which kill ends at once.
func spawn(t *testing.T, cfg Config) (d *daemonTest, kill func()) {
	t.Helper()
	data, err := yaml.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(filepath.Dir(cfg.Admin.Socket), "isthmusd.yaml")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	d = &daemonTest{cfg: cfg, log: &logBuffer{}, done: make(chan struct{})}
	cmd := exec.Command(os.Args[0])
	cmd.Env, cmd.Stderr = append(os.Environ(), replicaEnv+"="+path), d.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.done)
		d.err = cmd.Wait()
	}()
	kill = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		<-d.done
	})
	t.Cleanup(func() {
		kill()
		if t.Failed() {
			t.Logf("log of %s, replica %s:\n%s", cfg.Cluster, cfg.State.Replica, d.log)
		}
	})
	eventually(t, "replica "+cfg.State.Replica+" is ready", func() error {
		var s admin.Status
		if err := d.call("GET", "/v1/status", nil, &s); err != nil {
			return err
		}
		if !s.Ready {
			return errors.New("no snapshot yet")
		}
		return nil
	})
	return d, kill
}

// held returns all that a proxy was given, for comparison.
func (p *proxy) all() map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string]string{}
	for typ, held := range p.held {
		for name, body := range held {
			out[typ+" "+name] = string(body)
		}
	}
	return out
}

// TestReplicas runs two replicas of one cluster beside another cluster: they make one set of keys, serve the same bytes,
// let one of many redeem a token, and when the leader is killed the other takes its place without a loss.
func TestReplicas(t *testing.T) {
	s := kubeAPI(t, "amber")
	gateway := newGateway(t, "")
	objects := ""
	var replicas []*daemonTest
	var kills []func()
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b"} {
		cfg := replicaConfig(t, s, "amber", name, objects)
		cfg.Gateways, cfg.Federation.AutoApprove = []string{gateway.addr()}, true
		if objects == "" {
			objects = cfg.Source.Dir
			writeObjects(t, cfg, "namespace.yaml", namespaceYAML)
			writeObjects(t, cfg, "reviews.yaml", exportedYAML("amber"))
		}
		replicas, kills = append(replicas, nil), append(kills, nil)
		i := len(replicas) - 1
		wg.Go(func() { replicas[i], kills[i] = spawn(t, cfg) }) // both race to make the keys
	}
	wg.Wait()
	leader := leaderOf(t, replicas...)
	follower, killLeader := replicas[1], kills[0]
	if leader == replicas[1] {
		follower, killLeader = replicas[0], kills[1]
	}
	gateway.lead(follower.cfg.Listen) // what is for the leader gets there by way of the follower
	birch, _ := member(t, "birch", nil)
	tok := leader.tokenFor(t, admin.TokenRequest{Name: "birch"}).Token
	eventually(t, "birch joins", func() error { // once the follower has learnt who leads
		_, err := birch.join(tok)
		return err
	})
	eventually(t, "birch and the leader are one mesh", func() error {
		return errors.Join(birch.knows(t, "amber"), leader.knows(t, "birch"), birch.serves(t, "amber", "birch"), leader.serves(t, "amber", "birch"))
	})
	eventually(t, "the follower serves what the leader imports", func() error { return follower.serves(t, "amber", "birch") })

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
	node := sidecar(t, leader.cfg, "productpage", "default")
	token := follower.workloadToken(t, "default", "productpage", "productpage") // of one is good at both
	one, two := connect(t, leader, node, leader.dialOptions(t, token), nil), connect(t, follower, node, follower.dialOptions(t, token), nil)
	same := func() error {
		x, y := one.all(), two.all()
		if !maps.Equal(x, y) || len(x) == 0 {
			return fmt.Errorf("the replicas serve %d and %d resources, not all the same", len(x), len(y))
		}
		if one.resource(xds.EndpointType, "outbound|9080||"+globalHost) == nil {
			return errors.New("the shared service is not served")
		}
		return nil
	}
	eventually(t, "both replicas serve the same bytes", same)
	if x, y := one.client.Versions(), two.client.Versions(); fmt.Sprint(x) != fmt.Sprint(y) {
		t.Errorf("versions differ: %v, %v", x, y)
	}

	t.Run("redeem", func(t *testing.T) { raceToRedeem(t, leader, follower) })
	birch.quiet(t)

	if err := follower.call("POST", "/v1/peers/birch/drain", admin.DrainRequest{Over: "24h"}, nil); err != nil { // the leader does it
		t.Error(err)
	}
	before := birch.peers(t)["amber"]
	resume := one.client.Versions()
	one.stop()
	two.forget()
	started := time.Now()
	killLeader()
	again := connect(t, follower, node, follower.dialOptions(t, token), resume)
	lost, watched := false, make(chan struct{})
	stop := make(chan struct{})
	go func() { // birch keeps the endpoints all the time
		defer close(watched)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				if birch.serves(t, "amber", "birch") != nil {
					lost = true
				}
			}
		}
	}()
	eventually(t, "the other replica leads", func() error {
		if !strings.Contains(follower.log.String(), "speaks for the cluster") {
			return errors.New("not yet")
		}
		return nil
	})
	if took := time.Since(started); took > 10*time.Second {
		t.Errorf("failover took %s", took)
	}
	eventually(t, "birch hears the new leader", func() error { return errors.Join(birch.knows(t, "amber"), follower.knows(t, "birch")) })
	t.Logf("the peer hears the new leader after %s", time.Since(started).Round(10*time.Millisecond))
	close(stop)
	<-watched
	if lost {
		t.Error("endpoints of the cluster were lost while the leader changed")
	}
	if x := follower.peers(t)["birch"].Drain; x == nil || x.Over != "24h0m0s" {
		t.Errorf("the new leader knows of the drain %+v", x)
	}
	after := birch.peers(t)["amber"]
	if after.Epoch <= before.Epoch || after.Services != before.Services {
		t.Errorf("before %+v, after %+v: the epoch must be higher, and nothing else changed", before, after)
	}
	if got := again.forget(); len(got) > 0 {
		t.Errorf("a client that resumes at the other replica was sent %q", got)
	}
	if got := two.forget(); len(got) > 0 {
		t.Errorf("a client of the surviving replica was sent %q", got)
	}
	birch.quiet(t)
}

// writeRoot puts the root where that of a stand-alone isthmusd is.
func writeRoot(d *daemonTest) error {
	return os.WriteFile(d.cfg.data("root-cert.pem"), d.ca, 0o600)
}

// raceToRedeem lets 64 joiners redeem one token at two replicas at the same time, many times.
func raceToRedeem(t *testing.T, replicas ...*daemonTest) {
	for round := range 12 {
		name := fmt.Sprintf("racer-%d", round)
		issued := replicas[round%2].tokenFor(t, admin.TokenRequest{Name: name})
		var wg sync.WaitGroup
		var won, spent atomic.Int32
		for i := range 64 {
			public, private, err := ed25519.GenerateKey(nil)
			if err != nil {
				t.Fatal(err)
			}
			to := replicas[i%2].cfg.Listen
			wg.Go(func() {
				body, _ := proto.Marshal(&federationv1.Cluster{TrustDomain: name + ".mesh", FederationKey: public})
				r := &federationv1.Record{Origin: name, Kind: protocol.KindCluster, Epoch: 1, Seq: 1, Body: body}
				protocol.Sign(r, func(msg []byte) []byte { return ed25519.Sign(private, msg) })
				_, err := token.Redeem(t.Context(), issued.Token, token.RedeemConfig{
					Body: &federationv1.ClusterJoin{Name: name, Cluster: r}, Timeout: patience,
					Dial: func(ctx context.Context, _ string) (net.Conn, error) {
						return new(net.Dialer).DialContext(ctx, "tcp", to)
					},
				})
				var refused *token.Refused
				switch {
				case err == nil:
					won.Add(1)
				case errors.As(err, &refused) && refused.Reason == token.ReasonSpent:
					spent.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won.Load() != 1 || spent.Load() != 63 {
			t.Fatalf("round %d: %d winners, %d told that it is spent", round, won.Load(), spent.Load())
		}
		if err := replicas[0].call("POST", "/v1/peers/"+name+"/evict", nil, nil); err != nil {
			t.Fatal(err)
		}
	}
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

// TestGivenCA: a CA that is given while isthmusd runs is told to everybody, then signs; what was signed before stays
// good, also at another isthmusd, after a restart and with another cluster; one that does not fit changes nothing.
func TestGivenCA(t *testing.T) {
	s := kubeAPI(t, "amber")
	cfg := replicaConfig(t, s, "amber", "one", "")
	gateway := newGateway(t, cfg.Listen)
	cfg.Gateways, cfg.Federation.AutoApprove, cfg.CA.Settle = []string{gateway.addr()}, true, 2*time.Second
	writeObjects(t, cfg, "namespace.yaml", namespaceYAML)
	writeObjects(t, cfg, "reviews.yaml", exportedYAML("amber"))
	d := start(t, cfg)
	leaderOf(t, d)
	birch, _ := member(t, "birch", nil)
	birch.mustJoin(t, d)
	settled(t, d, birch)

	secrets := s.Client().CoreV1().Secrets("system-amber")
	first, err := secrets.Get(t.Context(), authority.OwnSecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d.ca = first.Data["root-cert.pem"]
	if err := writeRoot(d); err != nil {
		t.Fatal(err)
	}
	workload := d.workloadToken(t, "default", "productpage", "productpage")
	p := connect(t, d, sidecar(t, cfg, "productpage", "default"), d.dialOptions(t, workload), nil)
	trusts := func(roots ...[]byte) func([]byte) error {
		return func(body []byte) error {
			for _, r := range roots {
				if !bytes.Contains(body, bytes.TrimSpace(r)) {
					return errors.New("a root is missing")
				}
			}
			if n := bytes.Count(body, []byte("BEGIN CERTIFICATE")); n != len(roots)+1 { // that of birch, too
				return fmt.Errorf("%d roots, want %d and that of the peer", n, len(roots))
			}
			return nil
		}
	}
	p.waitFor(t, xds.SecretType, "ROOTCA", trusts(d.ca))
	old := d.certificate(t, workload)

	given, err := identity.MakeRoot(identity.Config{TrustDomain: "amber.mesh"})
	if err != nil {
		t.Fatal(err)
	}
	bad := given.Data()
	bad["ca-key.pem"] = first.Data["ca-key.pem"]
	o, err := secrets.Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: authority.GivenSecret}, Data: bad}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "what is wrong is said", func() error {
		for _, x := range d.status(t).Problems {
			if x.Reason == identity.ReasonKeyMismatch && x.Object == "Secret/system-amber/cacerts" && x.Remedy != "" {
				return nil
			}
		}
		return fmt.Errorf("problems: %+v", d.status(t).Problems)
	})
	o.Data = given.Data()
	if _, err := secrets.Update(t.Context(), o, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	p.waitFor(t, xds.SecretType, "ROOTCA", trusts(d.ca, given.Root))
	under := func(d *daemonTest, root []byte) error {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(root)
		_, err := d.certificate(t, workload).Leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		return err
	}
	if err := os.WriteFile(d.cfg.data("root-cert.pem"), slices.Concat(d.ca, given.Root), 0o600); err != nil { // as a workload's file would hold both
		t.Fatal(err)
	}
	eventually(t, "certificates are under the new root", func() error { return under(d, given.Root) })
	proveOld := func(d *daemonTest) {
		t.Helper()
		connect(t, d, sidecar(t, cfg, "productpage", "default"), d.dialOptions(t, "", old), nil).waitFor(t, xds.SecretType, "ROOTCA", trusts(d.ca, given.Root))
	}
	proveOld(d)
	d.quiet(t)
	eventually(t, "the clusters are one mesh still", func() error {
		return errors.Join(d.knows(t, "birch"), birch.knows(t, "amber"), birch.serves(t, "amber", "birch"))
	})
	d.stop(t)
	next := cfg
	next.DataDir += "-2"
	again := start(t, next)
	leaderOf(t, again)
	again.ca = d.ca
	if err := os.WriteFile(again.cfg.data("root-cert.pem"), slices.Concat(d.ca, given.Root), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := under(again, given.Root); err != nil {
		t.Error(err)
	}
	proveOld(again)
	eventually(t, "the clusters are one mesh after the restart", func() error {
		return errors.Join(again.knows(t, "birch"), birch.knows(t, "amber"), birch.serves(t, "amber", "birch"))
	})
	if log := d.log.String() + again.log.String(); strings.Contains(log, string(bytes.Split(given.Key, []byte("\n"))[1])) {
		t.Error("the key is in the log")
	}
}
