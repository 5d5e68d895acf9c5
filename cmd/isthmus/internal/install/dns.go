package install

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/release"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/dns/stub"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Where the cluster's own DNS is configured.
const (
	dnsNamespace = "kube-system"
	corefileKey  = "Corefile"
	domainsKey   = "stubDomains"
	// stubBefore and stubAfter keep, on kube-dns's ConfigMap, what its stubDomains were and what they became.
	stubBefore = "isthmus.io/stub-domains-before"
	stubAfter  = "isthmus.io/stub-domains-after"
)

// Stub is a change of the cluster's DNS.
type Stub struct {
	ConfigMap string // coredns or kube-dns, in kube-system
	Key       string
	Before    string
	After     string
	Reloads   bool // CoreDNS takes it by itself

	there  *unstructured.Unstructured
	adding bool
	drop   bool // the key was not there before
}

// Changes reports whether there is anything to write.
func (s *Stub) Changes() bool { return s.Before != s.After || s.drop }

// StubAdd returns the change that leads the zones of the installation to its DNS.
func (c *Cluster) StubAdd(ctx context.Context, namespace string, zones []string) (*Stub, error) {
	s, err := c.dnsConfig(ctx)
	if err != nil {
		return nil, err
	}
	to, err := c.dnsAddress(ctx, namespace)
	if err != nil {
		return nil, err
	}
	if s.Key == corefileKey {
		s.After, err = stub.Add(s.Before, zones, to)
		s.Reloads = stub.Reloads(s.Before)
	} else {
		s.Reloads, s.adding = true, true
		s.After, err = stub.AddDomains(s.Before, zones, to)
	}
	if err != nil {
		return nil, fmt.Errorf("ConfigMap %s/%s: %w", dnsNamespace, s.ConfigMap, err)
	}
	return s, nil
}

// Zones returns the zones that the installation's DNS answers; none when it runs none.
func (m *Manifest) Zones() ([]string, error) { return zonesOf(m.Chart, m.Values) }

// Zones returns the zones of the installation in the namespace; those of the chart when there is none.
func (c *Cluster) Zones(ctx context.Context, namespace string) ([]string, error) {
	history, err := c.history(ctx, namespace, false)
	if err != nil {
		return nil, err
	}
	if rec := last(history); rec != nil {
		return recordZones(rec)
	}
	ch, err := Chart()
	if err != nil {
		return nil, err
	}
	return zonesOf(ch, nil)
}

func recordZones(r *release.Release) ([]string, error) { return zonesOf(r.Chart, r.Config) }

func zonesOf(ch *chart.Chart, values map[string]any) ([]string, error) {
	all, err := chartutil.CoalesceValues(ch, values)
	if err != nil {
		return nil, fmt.Errorf("values: %w", err)
	}
	dns, err := all.Table("dns")
	if err != nil || dns["enabled"] != true {
		return nil, nil // a chart without the table has no DNS
	}
	var out []string
	list, _ := dns["zones"].([]any)
	for _, z := range list {
		out = append(out, fmt.Sprint(z))
	}
	return out, nil
}

// Diff shows the change line by line.
func (s *Stub) Diff() string {
	before, after := strings.Split(s.Before, "\n"), strings.Split(s.After, "\n")
	head := 0
	for head < min(len(before), len(after)) && before[head] == after[head] {
		head++
	}
	tail := 0
	for tail < min(len(before), len(after))-head && before[len(before)-1-tail] == after[len(after)-1-tail] {
		tail++
	}
	var out strings.Builder
	for _, x := range []struct {
		sign  string
		lines []string
	}{
		{"  ", before[max(0, head-2):head]}, {"- ", before[head : len(before)-tail]},
		{"+ ", after[head : len(after)-tail]}, {"  ", after[len(after)-tail : min(len(after), len(after)-tail+2)]},
	} {
		for _, l := range x.lines {
			out.WriteString(strings.TrimRight(x.sign+l, " ") + "\n")
		}
	}
	return out.String()
}

// StubRemove returns the change that takes the zones out again. Where nobody has edited since, the configuration is
// byte for byte what it was; else only what is ours goes.
func (c *Cluster) StubRemove(ctx context.Context, zones []string) (*Stub, error) {
	s, err := c.dnsConfig(ctx)
	if err != nil {
		return nil, err
	}
	if s.Key == corefileKey {
		s.Reloads = stub.Reloads(s.Before)
		if s.After, err = stub.Remove(s.Before); err != nil {
			return nil, fmt.Errorf("ConfigMap %s/%s: %w", dnsNamespace, s.ConfigMap, err)
		}
		return s, nil
	}
	s.Reloads = true
	notes := s.there.GetAnnotations()
	if notes[stubAfter] == "" {
		s.After = s.Before // we were not here
		return s, nil
	}
	var before *string
	if err := json.Unmarshal([]byte(notes[stubBefore]), &before); err != nil {
		return nil, fmt.Errorf("ConfigMap %s/%s: annotation %s: %w", dnsNamespace, s.ConfigMap, stubBefore, err)
	}
	if s.Before == notes[stubAfter] {
		if s.drop = before == nil; before != nil {
			s.After = *before
		}
		return s, nil
	}
	s.After, err = stub.RemoveDomains(s.Before, zones)
	s.drop = s.After == ""
	return s, err
}

// dnsConfig finds CoreDNS's ConfigMap, else that of kube-dns.
func (c *Cluster) dnsConfig(ctx context.Context) (*Stub, error) {
	for _, x := range []struct{ name, key string }{{"coredns", corefileKey}, {"kube-dns", domainsKey}} {
		cm, err := c.get(ctx, configMaps, dnsNamespace, x.name)
		if apierrors.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("get ConfigMap %s/%s: %w", dnsNamespace, x.name, err)
		}
		text, ok, err := unstructured.NestedString(cm.Object, "data", x.key)
		if err != nil {
			return nil, fmt.Errorf("ConfigMap %s/%s: %w", dnsNamespace, x.name, err)
		}
		if ok || x.key == domainsKey {
			return &Stub{ConfigMap: x.name, Key: x.key, Before: text, there: cm}, nil
		}
	}
	return nil, diag.Hint(fmt.Errorf("%w: neither ConfigMap %s/coredns with a Corefile nor %s/kube-dns is there", ErrNoDNS, dnsNamespace, dnsNamespace),
		"lead the zones to the Service isthmus-dns in the DNS that the cluster has")
}

// ErrNoDNS says that the cluster has no DNS whose configuration is known.
var ErrNoDNS = fmt.Errorf("no DNS of the cluster is known")

func (c *Cluster) dnsAddress(ctx context.Context, namespace string) (netip.Addr, error) {
	svc, err := c.get(ctx, services, namespace, "isthmus-dns")
	if err != nil {
		return netip.Addr{}, diag.Hint(fmt.Errorf("get Service %s/isthmus-dns: %w", namespace, err), "install with dns.enabled=true")
	}
	text, _, _ := unstructured.NestedString(svc.Object, "spec", "clusterIP")
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return addr, fmt.Errorf("Service %s/isthmus-dns has no address: %q", namespace, text)
	}
	return addr, nil
}

// WriteStub carries the change out, unless someone was faster.
func (c *Cluster) WriteStub(ctx context.Context, s *Stub) error {
	data := map[string]any{s.Key: s.After}
	if s.drop {
		data[s.Key] = nil
	}
	meta := map[string]any{"resourceVersion": s.there.GetResourceVersion()}
	if s.Key == domainsKey {
		meta["annotations"] = s.notes()
	}
	patch, err := json.Marshal(map[string]any{"metadata": meta, "data": data})
	if err != nil {
		return err
	}
	_, err = c.dynamic.Resource(configMaps).Namespace(dnsNamespace).Patch(ctx, s.ConfigMap, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: manager})
	if apierrors.IsConflict(err) {
		return diag.Hint(fmt.Errorf("ConfigMap %s/%s was edited at the same time", dnsNamespace, s.ConfigMap), "run it again")
	} else if err != nil {
		return fmt.Errorf("write ConfigMap %s/%s: %w", dnsNamespace, s.ConfigMap, err)
	}
	return nil
}

// notes returns the annotations that remember what was there, or, when the zones go, take themselves out.
func (s *Stub) notes() map[string]any {
	have := s.there.GetAnnotations()
	if !s.adding {
		return map[string]any{stubBefore: nil, stubAfter: nil}
	}
	before := have[stubBefore]
	if have[stubAfter] == "" {
		var text *string
		if _, ok, _ := unstructured.NestedString(s.there.Object, "data", s.Key); ok {
			text = &s.Before
		}
		data, _ := json.Marshal(text) // a string or null
		before = string(data)
	}
	return map[string]any{stubBefore: before, stubAfter: s.After}
}
