package node_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const outsideYAML = `
apiVersion: v1
kind: Pod
metadata: {name: one, labels: {app: out}}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [&c {name: app, image: app, readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Pod
metadata: {name: two, labels: {app: out}}
spec:
  nodeName: n2
  terminationGracePeriodSeconds: 0
  containers: [{name: app, image: app, readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Service
metadata: {name: public}
spec:
  type: LoadBalancer
  ipFamilyPolicy: PreferDualStack
  selector: {app: out}
  externalIPs: [172.30.1.77]
  ports: [{name: web, port: 80, targetPort: 8080, nodePort: 30080}, {name: udp, protocol: UDP, port: 81, targetPort: 8081}]
---
apiVersion: v1
kind: Service
metadata: {name: named, annotations: {lab.isthmus.io/hostname: gw.example}}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {app: out}
  ports: [{name: web, port: 80, targetPort: 8080, nodePort: 30081}]
`

// answers collects who answers at a URL until all of want have, and checks what the callee took for the source.
func (w *world) answers(from, url string, source func(string) bool, want ...string) {
	w.t.Helper()
	seen := map[string]bool{}
	w.within(30*time.Second, fmt.Sprintf("%v answer at %s", want, url), func() error {
		body, err := w.get(from, url)
		if err != nil {
			return err
		}
		name, src, _ := strings.Cut(body, " ")
		if src = strings.TrimPrefix(src, "::ffff:"); source != nil && !source(src) {
			w.t.Errorf("%s at %s was called from %s", name, url, src)
		}
		seen[name] = true
		for _, n := range want {
			if !seen[n] {
				return fmt.Errorf("only %v", seen)
			}
		}
		return nil
	})
	for name := range seen {
		if !strings.Contains(strings.Join(want, " "), name) {
			w.t.Errorf("%s answered at %s", name, url)
		}
	}
}

func outside(w *world) {
	w.apply(outsideYAML)
	w.pod("one", "is ready", ready)
	w.pod("two", "is ready", ready)
	var public *corev1.Service
	w.within(20*time.Second, "the service has an address", func() (err error) {
		public, err = w.client.CoreV1().Services("default").Get(w.t.Context(), "public", metav1.GetOptions{})
		if err == nil && len(public.Status.LoadBalancer.Ingress) == 0 {
			err = errors.New("pending")
		}
		return err
	})
	ip := netip.MustParseAddr(public.Status.LoadBalancer.Ingress[0].IP)
	if !w.c.Spec.LoadBalancer.Contains(ip) {
		w.t.Errorf("address %v", ip)
	}
	const machine = "172.30.200.5"
	hidden := func(src string) bool { return src != machine }
	kept := func(src string) bool { return src == machine }
	n1, n2 := w.c.Spec.Nodes[0].Address.String(), w.c.Spec.Nodes[1].Address.String()
	w.answers("outside", "http://"+ip.String(), hidden, "one", "two")
	w.answers("outside", "http://"+n1+":30080", hidden, "one", "two")
	w.answers("outside", "http://"+n2+":30080", hidden, "one", "two")
	w.answers("one", "http://"+ip.String(), nil, "one", "two")   // a pod, itself included
	w.answers("", "http://[fd30::1:2]:30080", nil, "one", "two") // IPv6
	w.answers("one", "http://"+n2+":30080", nil, "one", "two")   // a pod by a node's port
	w.answers("two", "http://172.30.1.77", nil, "one", "two")    // an external IP
	w.answers("outside", "http://"+n1+":30081", kept, "one")     // Local: the node's own pods,
	w.answers("outside", "http://"+n2+":30081", kept, "two")     // who see the caller
	named := w.addressOf("named")
	w.answers("outside", "http://"+named.String(), kept, "one", "two")
	svc, err := w.client.CoreV1().Services("default").Get(w.t.Context(), "named", metav1.GetOptions{})
	must(w.t, err)
	if in := svc.Status.LoadBalancer.Ingress; len(in) != 1 || in[0].Hostname != "gw.example" || in[0].IP != "" {
		w.t.Errorf("status %+v", in)
	}

	// UDP, and from one endpoint to the other.
	ns, _, err := w.n.NetNS("default", "two")
	must(w.t, err)
	conn, err := ns.DialContext(w.t.Context(), "udp", net.JoinHostPort(public.Spec.ClusterIP, "81"))
	must(w.t, err)
	defer conn.Close()
	ask := func() string {
		_ = conn.SetDeadline(time.Now().Add(time.Second))
		b := make([]byte, 100)
		_, _ = conn.Write([]byte("?"))
		k, _ := conn.Read(b)
		return string(b[:k])
	}
	var first string
	w.within(20*time.Second, "udp is answered", func() error {
		if first = ask(); first == "" {
			return errors.New("no answer")
		}
		return nil
	})
	if first != "two" { // the flow moves when its endpoint ends
		w.delete(first)
		w.within(20*time.Second, "the flow moves", func() error {
			if got := ask(); got != "two" {
				return fmt.Errorf("answer %q", got)
			}
			return nil
		})
	}

	// An address goes back with its Service.
	for _, name := range []string{"public", "named"} {
		must(w.t, w.client.CoreV1().Services("default").Delete(w.t.Context(), name, metav1.DeleteOptions{}))
	}
	w.within(20*time.Second, "the addresses are free", func() error {
		if left := w.n.LoadBalancers(); len(left) != 0 {
			return fmt.Errorf("%v", left)
		}
		return nil
	})
	if _, err := w.get("outside", "http://"+ip.String()); err == nil {
		w.t.Error("a deleted service answers")
	}
	if first == "two" {
		w.delete("one")
	}
	w.delete("two")
}

func (w *world) addressOf(service string) (a netip.Addr) {
	w.t.Helper()
	w.within(20*time.Second, service+" has an address", func() error {
		var ok bool
		if a, ok = w.n.LoadBalancers()["default/"+service]; !ok {
			return errors.New("none")
		}
		return nil
	})
	return a
}

const endpointsYAML = `
apiVersion: v1
kind: Service
metadata: {name: far}
spec:
  ports: [{name: web, port: 80, targetPort: 9000}]
---
apiVersion: v1
kind: Endpoints
metadata: {name: far}
subsets: [{addresses: [{ip: 172.30.200.5}], ports: [{name: web, port: 9000}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: near-1, labels: {app: near}}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [{name: app, image: app, readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Pod
metadata: {name: near-2, labels: {app: near}}
spec:
  nodeName: n2
  terminationGracePeriodSeconds: 0
  containers: [{name: app, image: app, readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}]
---
apiVersion: v1
kind: Service
metadata: {name: near}
spec:
  internalTrafficPolicy: Local
  selector: {app: near}
  ports: [{port: 80, targetPort: 8080}]
`

func endpoints(w *world) {
	var l net.Listener
	must(w.t, w.out.Do(func() (err error) {
		l, err = net.Listen("tcp", "172.30.200.5:9000")
		return err
	}))
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { _, _ = rw.Write([]byte("machine -")) })}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	w.apply(endpointsYAML)
	w.pod("near-1", "is ready", ready)
	w.pod("near-2", "is ready", ready)
	ip := func(name string) string {
		svc, err := w.client.CoreV1().Services("default").Get(w.t.Context(), name, metav1.GetOptions{})
		must(w.t, err)
		return svc.Spec.ClusterIP
	}
	w.answers("near-1", "http://"+ip("far"), nil, "machine")
	w.answers("near-1", "http://"+ip("near"), nil, "near-1")
	for range 10 {
		w.answers("near-2", "http://"+ip("near"), nil, "near-2")
	}
	// How long a change takes to reach the rules: from the API server's answer to the first connection.
	begun := time.Now()
	_, err := w.client.CoreV1().Services("default").Patch(w.t.Context(), "far", types.MergePatchType,
		[]byte(`{"spec":{"ports":[{"name":"web","port":80,"targetPort":9000},{"name":"more","port":81,"targetPort":9000}]}}`), metav1.PatchOptions{})
	must(w.t, err)
	_, err = w.client.CoreV1().Endpoints("default").Patch(w.t.Context(), "far", types.MergePatchType, //nolint:staticcheck // old, not gone
		[]byte(`{"subsets":[{"addresses":[{"ip":"172.30.200.5"}],"ports":[{"name":"web","port":9000},{"name":"more","port":9000}]}]}`), metav1.PatchOptions{})
	must(w.t, err)
	w.answers("near-1", "http://"+ip("far")+":81", nil, "machine")
	w.t.Logf("a new port answered %v after the patch", time.Since(begun))
	for _, name := range []string{"near", "far"} {
		must(w.t, w.client.CoreV1().Services("default").Delete(w.t.Context(), name, metav1.DeleteOptions{}))
	}
	w.delete("near-1")
	w.delete("near-2")
}
