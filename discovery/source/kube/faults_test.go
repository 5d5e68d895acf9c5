package kube_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
)

const namespaceShop = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n"

func podYAML(name, ip string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: shop, labels: {app: reviews, security.istio.io/tlsMode: istio}}
spec: {nodeName: n1, containers: [{name: app, image: app}]}
status: {phase: Running, podIP: %s, podIPs: [{ip: %s}], conditions: [{type: Ready, status: "True"}]}
`, name, ip, ip)
}

const byhand = `
apiVersion: v1
kind: Service
metadata: {name: byhand, namespace: shop}
spec: {ports: [{name: http, port: 80, targetPort: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: byhand-1, namespace: shop, labels: {kubernetes.io/service-name: byhand}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [192.0.2.80]}]
`

// link is a port that leads to an API server and can be cut.
type link struct {
	l      net.Listener
	target string

	mu    sync.Mutex
	cut   bool
	conns map[net.Conn]bool
	wg    sync.WaitGroup
}

// through returns the client configuration by way of a link that the test may cut.
func through(t *testing.T, c *rest.Config) (*link, *rest.Config) {
	t.Helper()
	u, err := url.Parse(c.Host)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	x := &link{l: l, target: u.Host, conns: map[net.Conn]bool{}}
	x.wg.Go(x.serve)
	t.Cleanup(func() { l.Close(); x.set(true); x.wg.Wait() })
	c = rest.CopyConfig(c)
	c.Host = "https://" + l.Addr().String()
	c.TLSClientConfig.ServerName = "127.0.0.1"
	return x, c
}

func (x *link) serve() {
	for {
		a, err := x.l.Accept()
		if err != nil {
			return
		}
		b, err := net.Dial("tcp", x.target)
		x.mu.Lock()
		if x.cut || err != nil {
			x.mu.Unlock()
			a.Close()
			if b != nil {
				b.Close()
			}
			continue
		}
		x.conns[a], x.conns[b] = true, true
		x.mu.Unlock()
		copyAll := func(to, from net.Conn) {
			_, _ = io.Copy(to, from)
			to.Close()
			from.Close()
		}
		x.wg.Go(func() { copyAll(a, b) })
		x.wg.Go(func() { copyAll(b, a) })
	}
}

func (x *link) set(cut bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.cut = cut
	if cut {
		for c := range x.conns {
			c.Close()
			delete(x.conns, c)
		}
	}
}

// TestForbidden lacks one right: the rest works, the Problem says which, and granting it is enough.
func TestForbidden(t *testing.T) {
	c := newCluster(t)
	c.apply(crd(t, istioCRDs(t), "virtualservices.networking.istio.io"))
	c.apply(namespaceShop + "---\n" + byhand + "---\n" + podYAML("one", "10.1.0.1"))
	var some []string
	for _, r := range coreResources {
		if r != "discovery.k8s.io/endpointslices" {
			some = append(some, r)
		}
	}
	c.allow("reader", "some", some...)
	sink := newRecorder()
	s, _ := run(t, "amber", c.User("reader"), sink)
	sink.wait(t, 30*second, sink.isSynced)
	sink.wait(t, 5*second, sink.complains("Cluster/amber", "endpointslices.discovery.k8s.io", "Forbidden", "may not", "isthmus install"))
	sink.wait(t, 5*second, sink.complains("virtualservices.networking.istio.io", "Forbidden"))
	sink.wait(t, 5*second, sink.has("amber/pods/shop/one"))
	sink.wait(t, 5*second, sink.has("amber/services/shop/byhand"))
	for _, p := range sink.problems() {
		if strings.Contains(p, "sidecars") {
			t.Errorf("a kind that is not installed is said to be forbidden: %s", p)
		}
	}
	if st := kindState(s, "endpointslices.discovery.k8s.io"); st.State != kube.StateForbidden || st.Remedy == "" {
		t.Errorf("status says %+v", st)
	}
	c.allow("reader", "more", "discovery.k8s.io/endpointslices", "networking.istio.io/virtualservices")
	sink.wait(t, 10*second, sink.has("amber/endpointslices.discovery.k8s.io/shop/byhand-1"))
	sink.wait(t, 10*second, sink.content("Forbidden"))

	// A right that is taken away takes nothing with it. Watches go on until their end, so a new connection is made.
	if err := c.Client().RbacV1().ClusterRoleBindings().Delete(context.Background(), "more", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.Stop()
	c.Start()
	sink.wait(t, 20*second, sink.complains("endpointslices.discovery.k8s.io", "Forbidden", "stays in use"))
	if err := sink.has("amber/endpointslices.discovery.k8s.io/shop/byhand-1")(); err != nil {
		t.Error(err)
	}
}

func kindState(s *kube.Source, kind string) kube.KindState {
	for _, k := range s.Status()[0].Kinds {
		if k.Kind == kind {
			return k
		}
	}
	return kube.KindState{}
}

const routeYAML = `
apiVersion: networking.istio.io/VERSION
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]}
`

// TestLateCRDs installs a kind while the source runs, has it served at other versions, and removes it.
func TestLateCRDs(t *testing.T) {
	c := newCluster(t)
	c.apply(namespaceShop)
	sink := newRecorder()
	s, _ := run(t, "amber", c.REST(), sink)
	sink.wait(t, 30*second, sink.isSynced)
	const name, key = "virtualservices.networking.istio.io", "amber/virtualservices.networking.istio.io/shop/reviews"
	sink.wait(t, 5*second, func() error {
		if st := kindState(s, name); st.State != kube.StateAbsent {
			return fmt.Errorf("status says %+v", st)
		}
		return nil
	})
	if p := sink.problems(); len(p) > 0 {
		t.Errorf("what is not installed is no problem: %v", p)
	}
	def := crd(t, istioCRDs(t), name)
	c.apply(def)
	c.apply(strings.ReplaceAll(routeYAML, "VERSION", "v1"))
	t.Logf("a new kind is read after %s", sink.wait(t, 10*second, sink.has(key)))

	serve := func(versions ...string) {
		t.Helper()
		u := documents(t, def)[0]
		list := u.Object["spec"].(map[string]any)["versions"].([]any)
		var kept []any
		for _, v := range list {
			v := v.(map[string]any)
			v["served"] = false
			for _, want := range versions {
				if v["name"] == want {
					v["served"] = true
				}
			}
			kept = append(kept, v)
		}
		if versions[0] == "v9" {
			nine := map[string]any{}
			for k, v := range kept[0].(map[string]any) {
				nine[k] = v
			}
			nine["name"], nine["served"], nine["storage"] = "v9", true, false
			kept = append(kept, nine)
		}
		u.Object["spec"].(map[string]any)["versions"] = kept
		b, err := u.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		c.apply(string(b))
	}
	serve("v1alpha3")
	sink.wait(t, 15*second, func() error {
		if st := kindState(s, name); st.Version != "v1alpha3" || st.State != kube.StateSynced {
			return fmt.Errorf("status says %+v", st)
		}
		return nil
	})
	if _, forgot := sink.counts(); forgot[key] > 0 {
		t.Error("the change of version took the object away")
	}
	serve("v9")
	sink.wait(t, 15*second, sink.complains("UnknownVersion", name, "v9", "have the CustomResourceDefinition serve"))
	if err := sink.has(key)(); err != nil {
		t.Error(err)
	}
	serve("v1", "v1beta1")
	sink.wait(t, 15*second, sink.content("UnknownVersion"))
	c.remove(def)
	t.Logf("a removed kind is forgotten after %s", sink.wait(t, 15*second, sink.lacks(key)))
	sink.wait(t, 15*second, func() error {
		if st := kindState(s, name); st.State != kube.StateAbsent {
			return fmt.Errorf("status says %+v", st)
		}
		return nil
	})
	sink.wait(t, 15*second, func() error {
		if p := sink.problems(); len(p) > 0 {
			return fmt.Errorf("problems %v", p)
		}
		return nil
	})
}

// TestLost cuts the way to the API server: nothing is lost, and what changed meanwhile is seen afterwards.
func TestLost(t *testing.T) {
	c := newCluster(t)
	c.apply(namespaceShop + "---\n" + podYAML("stays", "10.1.0.1") + "---\n" + podYAML("goes", "10.1.0.2"))
	way, api := through(t, c.REST())
	sink := newRecorder()
	s, _ := run(t, "amber", api, sink)
	sink.wait(t, 30*second, sink.isSynced)
	way.set(true)
	took := sink.wait(t, 15*second, sink.complains("Cluster/amber", "SourceLost", "lost since", "stays in use"))
	t.Logf("the loss is reported after %s", took)
	if st := s.Status()[0]; st.Connected || st.Since.IsZero() || st.Error == "" {
		t.Errorf("status says %+v", st)
	}
	c.remove(podYAML("goes", "10.1.0.2"))
	c.apply(podYAML("comes", "10.1.0.3"))
	for _, key := range []string{"amber/pods/shop/stays", "amber/pods/shop/goes"} {
		if err := sink.has(key)(); err != nil {
			t.Error(err)
		}
	}
	way.set(false)
	t.Logf("the change is seen %s after the way is back", sink.wait(t, 15*second, sink.has("amber/pods/shop/comes")))
	sink.wait(t, 15*second, sink.lacks("amber/pods/shop/goes"))
	sink.wait(t, 15*second, sink.content("SourceLost"))
	reports, forgot := sink.counts()
	if forgot["amber/pods/shop/stays"] > 0 || reports["amber/pods/shop/stays"] != 1 {
		t.Errorf("a Pod that did not change was reported %d times and forgotten %d times", reports["amber/pods/shop/stays"], forgot["amber/pods/shop/stays"])
	}
}

// TestFrozen stops the API server without closing anything, and lets it go on.
func TestFrozen(t *testing.T) {
	c := newCluster(t)
	c.apply(namespaceShop + "---\n" + podYAML("one", "10.1.0.1"))
	sink := newRecorder()
	run(t, "amber", c.REST(), sink)
	sink.wait(t, 30*second, sink.isSynced)
	c.Freeze()
	sink.wait(t, 20*second, sink.complains("SourceLost"))
	if err := sink.has("amber/pods/shop/one")(); err != nil {
		t.Error(err)
	}
	c.Thaw()
	sink.wait(t, 20*second, sink.content("SourceLost"))
	c.apply(podYAML("two", "10.1.0.2"))
	sink.wait(t, 20*second, sink.has("amber/pods/shop/two"))
}

// TestBrokenEdit gives an object a value that the schema allows and the mesh does not: what was valid stays.
func TestBrokenEdit(t *testing.T) {
	c := newCluster(t)
	c.apply(crd(t, istioCRDs(t), "virtualservices.networking.istio.io"))
	good := strings.ReplaceAll(routeYAML, "VERSION", "v1")
	c.apply(namespaceShop + "---\n" + good)
	sink := newRecorder()
	run(t, "amber", c.REST(), sink)
	const key = "amber/virtualservices.networking.istio.io/shop/reviews"
	sink.wait(t, 30*second, sink.has(key))
	c.apply(strings.ReplaceAll(good, "http: [{route", `http: [{match: [{uri: {regex: "("}}], route`))
	sink.wait(t, 10*second, sink.complains("VirtualService/shop/reviews", "cluster amber", "InvalidValue", "what was valid before stays in use"))
	if in, _ := sink.get(key); len(in.VirtualServices) != 1 || len(in.VirtualServices[0].Spec.Http[0].Match) != 0 {
		t.Errorf("the sink has %+v", in)
	}
	c.apply(good)
	sink.wait(t, 10*second, sink.content("InvalidValue"))
}
