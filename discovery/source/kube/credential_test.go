package kube_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestCredentials reads the Secrets of gateways in all namespaces, follows them, and takes no notice of others.
func TestCredentials(t *testing.T) {
	text, err := os.ReadFile("../../translate/testdata/api/gateway-mutual.txtar")
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster(t)
	c.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: gw}")
	first := ""
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		if doc, _, _ = strings.Cut(doc, "\n-- "); strings.Contains(doc, "kind: Secret") {
			c.apply(doc)
			if strings.Contains(doc, "name: cert-b,") {
				first = doc
			}
		}
	}
	c.apply("apiVersion: v1\nkind: Secret\nmetadata: {name: password, namespace: gw}\nstringData: {password: hunter2}")
	sink := newRecorder()
	run(t, "amber", c.REST(), sink)
	sink.wait(t, 30*second, sink.isSynced)
	found := func() map[string]*mesh.Credential {
		out := map[string]*mesh.Credential{}
		for _, k := range sink.keys("amber/") {
			in, _ := sink.get(k)
			for _, x := range in.Credentials {
				out[x.Object.Namespace+"/"+x.Object.Name] = x
			}
		}
		return out
	}
	want := func(n int) func() error {
		return func() error {
			if have := found(); len(have) != n {
				return fmt.Errorf("credentials %v, want %d", have, n)
			}
			return nil
		}
	}
	sink.wait(t, 10*second, want(3))
	if b := found()["gw/cert-b"]; b == nil || len(b.Key) == 0 || len(b.Certificate) == 0 {
		t.Fatalf("cert-b: %v", b)
	}
	c.remove(first)
	sink.wait(t, 10*second, want(2))
}
