package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/mcs-api/config/crd"
	mcsv1alpha1 "sigs.k8s.io/mcs-api/pkg/apis/v1alpha1"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

// mcsCluster is one cluster of a cluster set: an API server and an isthmusd that reads it and writes to it.
type mcsCluster struct {
	t    *testing.T
	name string
	api  *kubetest.Server
	dyn  dynamic.Interface
}

// The older version is asked for: it is served beside the one that is stored.
var (
	exportsV1alpha1 = schema.GroupVersionResource{Group: "multicluster.x-k8s.io", Version: "v1alpha1", Resource: "serviceexports"}
	importsV1alpha1 = schema.GroupVersionResource{Group: "multicluster.x-k8s.io", Version: "v1alpha1", Resource: "serviceimports"}
)

func newMCSCluster(t *testing.T, name string) (*mcsCluster, *daemonTest) {
	t.Helper()
	c := &mcsCluster{t: t, name: name, api: kubetest.APIServer(t)}
	var err error
	if c.dyn, err = dynamic.NewForConfig(c.api.REST()); err != nil {
		t.Fatal(err)
	}
	for _, text := range [][]byte{crd.ServiceExportCRD, crd.ServiceImportCRD} {
		c.create(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}, "", string(text))
	}
	c.namespace("istio-system")
	cfg := testConfig(t, name)
	cfg.Gateways = []string{newGateway(t, cfg.Listen).addr()}
	cfg.Federation.AutoApprove, cfg.allowLoopback = true, true
	cfg.Source.Dir, cfg.Source.Kube.Enabled, cfg.Source.Kube.Kubeconfig = "", true, c.api.Kubeconfig()
	return c, start(t, cfg)
}

func (c *mcsCluster) namespace(name string) {
	c.t.Helper()
	if _, err := c.api.Client().CoreV1().Namespaces().Create(c.t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *mcsCluster) create(gvr schema.GroupVersionResource, namespace, text string) {
	c.t.Helper()
	obj := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &obj); err != nil {
		c.t.Fatal(err)
	}
	var api dynamic.ResourceInterface = c.dyn.Resource(gvr)
	if namespace != "" {
		api = c.dyn.Resource(gvr).Namespace(namespace)
	}
	// A definition is served a moment after it is made.
	eventually(c.t, "create "+gvr.Resource, func() error {
		_, err := api.Create(c.t.Context(), &unstructured.Unstructured{Object: obj}, metav1.CreateOptions{})
		return err
	})
}

// export makes the Service and its ServiceExport; spec is that of the Service, more that of the ServiceExport.
func (c *mcsCluster) export(namespace, spec, more string) {
	c.t.Helper()
	c.create(schema.GroupVersionResource{Version: "v1", Resource: "services"}, namespace, "{apiVersion: v1, kind: Service, metadata: {name: hello}, spec: "+spec+"}")
	c.create(exportsV1alpha1, namespace, "{apiVersion: multicluster.x-k8s.io/v1alpha1, kind: ServiceExport, metadata: {name: hello}, spec: "+more+"}")
}

func (c *mcsCluster) unexport(namespace string) {
	c.t.Helper()
	if err := c.dyn.Resource(exportsV1alpha1).Namespace(namespace).Delete(c.t.Context(), "hello", metav1.DeleteOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

func (c *mcsCluster) get(namespace string) (*mcsv1alpha1.ServiceImport, error) {
	u, err := c.dyn.Resource(importsV1alpha1).Namespace(namespace).Get(context.Background(), "hello", metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	out := &mcsv1alpha1.ServiceImport{}
	return out, runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, out)
}

// imports waits for the import to be as check wants it.
func (c *mcsCluster) imports(namespace string, check func(*mcsv1alpha1.ServiceImport) string) {
	c.t.Helper()
	eventually(c.t, "the ServiceImport in "+c.name, func() error {
		i, err := c.get(namespace)
		if err != nil {
			return err
		}
		if wrong := check(i); wrong != "" {
			return fmt.Errorf("%s: %+v", wrong, i)
		}
		return nil
	})
}

func (c *mcsCluster) lacks(namespace string) {
	c.t.Helper()
	eventually(c.t, "no ServiceImport in "+c.name, func() error {
		if i, err := c.get(namespace); !apierrors.IsNotFound(err) {
			return fmt.Errorf("%v, %v", i, err)
		}
		l, err := c.api.Client().DiscoveryV1().EndpointSlices(namespace).List(context.Background(), metav1.ListOptions{LabelSelector: mcsv1alpha1.LabelServiceName})
		if err == nil && len(l.Items) > 0 {
			err = fmt.Errorf("%d slices", len(l.Items))
		}
		return err
	})
}

// says waits for a condition of the ServiceExport: TYPE=STATUS REASON.
func (c *mcsCluster) says(namespace, want string) {
	c.t.Helper()
	kind, _, _ := strings.Cut(want, "=")
	eventually(c.t, want+" in "+c.name, func() error {
		u, err := c.dyn.Resource(exportsV1alpha1).Namespace(namespace).Get(context.Background(), "hello", metav1.GetOptions{})
		if err != nil {
			return err
		}
		var x mcsv1alpha1.ServiceExport
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &x); err != nil {
			return err
		}
		found := meta.FindStatusCondition(x.Status.Conditions, kind)
		if found == nil || fmt.Sprintf("%s=%s %s", found.Type, found.Status, found.Reason) != want || found.ObservedGeneration != x.Generation {
			return fmt.Errorf("conditions %+v", x.Status.Conditions)
		}
		return nil
	})
}

func portsOf(i *mcsv1alpha1.ServiceImport) string {
	var out []string
	for _, p := range i.Spec.Ports {
		out = append(out, fmt.Sprintf("%s:%d/%s", p.Name, p.Port, p.Protocol))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// Services of the cases below.
const (
	helloPorts = "{name: tcp, port: 42, protocol: TCP}, {name: udp, port: 42, protocol: UDP}"
	helloSpec  = "{selector: {app: hello}, sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 10}}, ports: [" + helloPorts + "]}"
)

// TestMultiClusterServices tells two clusters that joined by token what multi-cluster services (KEP-1645) ask of a
// control plane: the cases are those of the project's conformance suite that need no pods.
func TestMultiClusterServices(t *testing.T) {
	amber, a := newMCSCluster(t, "amber")
	birch, b := newMCSCluster(t, "birch")
	b.mustJoin(t, a)
	both := []*mcsCluster{amber, birch}
	made := 0
	fresh := func() string {
		made++
		name := fmt.Sprintf("mcs-%d", made)
		for _, c := range both {
			c.namespace(name)
		}
		return name
	}
	is := func(want mcsv1alpha1.ServiceImportType) func(*mcsv1alpha1.ServiceImport) string {
		return func(i *mcsv1alpha1.ServiceImport) string {
			if i.Spec.Type != want || (want == mcsv1alpha1.Headless) != (len(i.Spec.IPs) == 0) {
				return "type or addresses"
			}
			return ""
		}
	}
	// second exports from birch at least a second after amber did: times have no fractions.
	second := func(ns, spec, more string) {
		amber.imports(ns, func(*mcsv1alpha1.ServiceImport) string { return "" })
		time.Sleep(1100 * time.Millisecond)
		birch.export(ns, spec, more)
	}

	t.Run("an import lives as long as an export", func(t *testing.T) {
		ns := fresh()
		amber.export(ns, helloSpec, "{}")
		amber.says(ns, "Valid=True Valid")
		amber.says(ns, "Ready=True Exported")
		amber.says(ns, "Conflict=False NoConflicts")
		for _, c := range both {
			c.imports(ns, func(i *mcsv1alpha1.ServiceImport) string {
				switch {
				case is(mcsv1alpha1.ClusterSetIP)(i) != "" || len(i.Spec.IPs) != 2:
					return "type or addresses"
				case portsOf(i) != "tcp:42/TCP udp:42/UDP":
					return "ports"
				case i.Spec.SessionAffinity != "ClientIP" || i.Spec.SessionAffinityConfig == nil || *i.Spec.SessionAffinityConfig.ClientIP.TimeoutSeconds != 10:
					return "affinity"
				case i.Spec.InternalTrafficPolicy == nil || *i.Spec.InternalTrafficPolicy != "Cluster":
					return "policy"
				case len(i.Status.Clusters) != 1 || i.Status.Clusters[0].Cluster != "amber":
					return "clusters"
				}
				return ""
			})
			eventually(t, "an EndpointSlice", func() error {
				l, err := c.api.Client().DiscoveryV1().EndpointSlices(ns).List(t.Context(), metav1.ListOptions{LabelSelector: mcsv1alpha1.LabelServiceName + "=hello," + mcsv1alpha1.LabelSourceCluster + "=amber"})
				if err == nil && len(l.Items) != 1 {
					err = fmt.Errorf("%d slices in %s", len(l.Items), c.name)
				}
				return err
			})
		}
		second(ns, helloSpec, "{}")
		amber.imports(ns, func(i *mcsv1alpha1.ServiceImport) string {
			if len(i.Status.Clusters) != 2 {
				return "clusters"
			}
			return ""
		})
		amber.unexport(ns)
		for _, c := range both {
			c.imports(ns, func(i *mcsv1alpha1.ServiceImport) string {
				if len(i.Status.Clusters) != 1 || i.Status.Clusters[0].Cluster != "birch" {
					return "clusters"
				}
				return ""
			})
		}
		birch.unexport(ns)
		for _, c := range both {
			c.lacks(ns)
		}
	})
	t.Run("headless", func(t *testing.T) {
		ns := fresh()
		amber.export(ns, "{clusterIP: None, selector: {app: hello}, ports: ["+helloPorts+"]}", "{}")
		for _, c := range both {
			c.imports(ns, is(mcsv1alpha1.Headless))
		}
	})
	t.Run("distribution, labels and annotations", func(t *testing.T) {
		ns := fresh()
		amber.export(ns, "{trafficDistribution: PreferClose, selector: {app: hello}, ports: ["+helloPorts+"]}", "{exportedLabels: {one: a}, exportedAnnotations: {two: a}}")
		second(ns, helloSpec, "{exportedLabels: {three: b}, exportedAnnotations: {four: b}}")
		for _, c := range both {
			c.says(ns, "Conflict=True SessionAffinityConflict,TrafficDistributionConflict,LabelsConflict,AnnotationsConflict")
			c.imports(ns, func(i *mcsv1alpha1.ServiceImport) string {
				if i.Labels["one"] != "a" || i.Annotations["two"] != "a" || i.Labels["three"] != "" || i.Annotations["four"] != "" || i.Spec.TrafficDistribution == nil {
					return "labels, annotations or distribution"
				}
				return ""
			})
		}
	})
	t.Run("ports add up", func(t *testing.T) {
		ns := fresh()
		amber.export(ns, helloSpec, "{}")
		second(ns, "{selector: {app: hello}, sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 10}}, ports: [{name: tcp, port: 42}, {name: sctp, port: 142, protocol: SCTP}]}", "{}")
		for _, c := range both {
			c.says(ns, "Conflict=True PortConflict")
			c.imports(ns, func(i *mcsv1alpha1.ServiceImport) string {
				if portsOf(i) != "sctp:142/SCTP tcp:42/TCP udp:42/UDP" {
					return "ports"
				}
				return ""
			})
		}
	})
	t.Run("of ports in conflict the oldest count", func(t *testing.T) {
		ns := fresh()
		amber.export(ns, "{selector: {app: hello}, ports: ["+helloPorts+"]}", "{}")
		second(ns, "{selector: {app: hello}, ports: [{name: tcp, port: 43}]}", "{}")
		for _, c := range both {
			c.says(ns, "Conflict=True PortConflict")
			c.imports(ns, func(i *mcsv1alpha1.ServiceImport) string {
				if portsOf(i) != "tcp:42/TCP udp:42/UDP" {
					return "ports"
				}
				return ""
			})
		}
		amber.unexport(ns) // birch's is the oldest now
		birch.says(ns, "Conflict=False NoConflicts")
		amber.imports(ns, func(i *mcsv1alpha1.ServiceImport) string {
			if portsOf(i) != "tcp:43/TCP" {
				return "ports"
			}
			return ""
		})
	})
	t.Run("of types in conflict the oldest counts", func(t *testing.T) {
		ns := fresh()
		amber.export(ns, "{selector: {app: hello}, ports: ["+helloPorts+"]}", "{}")
		second(ns, "{clusterIP: None, selector: {app: hello}, ports: ["+helloPorts+"]}", "{}")
		for _, c := range both {
			c.says(ns, "Conflict=True TypeConflict")
			c.imports(ns, is(mcsv1alpha1.ClusterSetIP))
		}
	})
	t.Run("what cannot be exported", func(t *testing.T) {
		ns := fresh()
		amber.export(ns, "{type: ExternalName, externalName: example.com}", "{}")
		amber.says(ns, "Valid=False InvalidServiceType")
		birch.create(exportsV1alpha1, ns, "{apiVersion: multicluster.x-k8s.io/v1alpha1, kind: ServiceExport, metadata: {name: hello}}")
		birch.says(ns, "Valid=False NoService")
		for _, c := range both {
			c.lacks(ns)
		}
	})
	t.Run("a namespace that comes later", func(t *testing.T) {
		amber.namespace("later")
		amber.export("later", helloSpec, "{}")
		amber.imports("later", is(mcsv1alpha1.ClusterSetIP))
		birch.namespace("later")
		birch.imports("later", is(mcsv1alpha1.ClusterSetIP))
	})
}
