// Package config turns Kubernetes, Istio and MCS objects, written as YAML or JSON, into the model: it decodes them
// strictly, fills in defaults, converts old fields to their newer ones and validates each object by itself and
// (CheckReferences) against the others.
//
// It is pure: it reads no file, no clock and no cluster. One bad object is left out and becomes a Problem; it never
// keeps another object from being used.
package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Options are what Decode needs to know beyond the documents.
type Options struct {
	// Domain is the cluster's DNS domain; empty means "cluster.local". Short hosts are written out with it.
	Domain string
	// Namespaces are the labels of the namespaces that other documents declare, by name. Namespace objects among
	// the documents decoded add to them and win.
	Namespaces map[string]map[string]string
	// Nodes are the nodes that other documents declare, by name; those among the documents decoded add to them and win: pods have their locality, and a gateway behind node ports its addresses, from them.
	Nodes map[string]Node
	// External are the addresses that Services have outside of their clusters, by host: for gateways named by their Service.
	External map[string][]string
	// RootNamespace holds the mesh's own configuration; empty means "istio-system".
	RootNamespace string
	// TrustDomain is what the mesh configuration has where it names none; empty means Istio's "cluster.local".
	TrustDomain mesh.TrustDomain
	// Local is the name of the cluster the objects are from; empty when unknown.
	Local mesh.ClusterID
	// Remote is set when that is not the cluster of this control plane: objects say then where they are from.
	Remote bool
	// Network is that of pods whose label names none; empty: it is not known here.
	Network mesh.NetworkID
	// ByLabel makes a pod a member of mesh TLS only by its own label, which injection sets. Without it the label of its
	// namespace is believed, for places that have no injection.
	ByLabel bool
}

// Node is what the mesh needs of a Kubernetes node.
type Node struct {
	Locality  string            // region/zone/subzone
	Labels    map[string]string // for those who choose nodes by label
	PodRanges []netip.Prefix    // of its pods' addresses
	Addresses []string          // as other networks reach it: external ones, else internal ones; none when it is not ready
}

// cluster is what objects carry of where they are from: nothing in the cluster of the control plane.
func (o Options) cluster() mesh.ClusterID {
	if o.Remote {
		return o.Local
	}
	return ""
}

// Decode turns the documents of one file into what a source reports. source names the file in ObjectRefs, which point
// at FILE:LINE. The Problems are returned only, Input.Problems stays empty. Equal arguments give equal results.
//
// An object with an error is left out. An object with something that the product does not honour is used without it
// and has a Problem with reason "Unsupported".
func Decode(source string, data []byte, o Options) (mesh.Input, []mesh.Problem) {
	d := newDecoder(source, data, o)
	d.opts.Namespaces, d.opts.Nodes = merged(d.opts.Namespaces, d.namespaces()), merged(d.opts.Nodes, d.nodes())
	for _, obj := range d.objects {
		obj.decode()
	}
	return d.in, d.problems
}

// Namespaces returns the labels of the Namespace objects in the documents of one file, by name; nil if it has none.
func Namespaces(data []byte) map[string]map[string]string {
	if !bytes.Contains(data, []byte("Namespace")) {
		return nil
	}
	return newDecoder("", data, Options{}).namespaces()
}

// Nodes returns what matters of the Node objects in the documents of one file, by name; nil if it has none.
func Nodes(data []byte) map[string]Node {
	if !bytes.Contains(data, []byte("Node")) {
		return nil
	}
	return newDecoder("", data, Options{}).nodes()
}

// NodeOf returns what the mesh needs of a node.
func NodeOf(n *corev1.Node) Node {
	out := Node{Labels: n.Labels, Locality: Locality(n.Labels), PodRanges: podRanges(n)}
	ready := !slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue
	})
	if !ready {
		return out
	}
	for _, t := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
		for _, a := range n.Status.Addresses {
			if a.Type == t && a.Address != "" {
				out.Addresses = append(out.Addresses, a.Address)
			}
		}
		if len(out.Addresses) > 0 {
			break
		}
	}
	return out
}

// podRanges are the addresses that the cluster gives to pods of a node; some networks do not use them.
func podRanges(n *corev1.Node) (out []netip.Prefix) {
	all := n.Spec.PodCIDRs
	if len(all) == 0 && n.Spec.PodCIDR != "" {
		all = []string{n.Spec.PodCIDR}
	}
	for _, s := range all {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// merged returns the union of both; over wins.
func merged[V any](under, over map[string]V) map[string]V {
	if len(over) == 0 {
		return under
	}
	out := make(map[string]V, len(under)+len(over))
	maps.Copy(out, under)
	maps.Copy(out, over)
	return out
}

// decoder is one run of Decode.
type decoder struct {
	source   string
	opts     Options
	objects  []*object
	in       mesh.Input
	problems []mesh.Problem
	seen     map[string]string // object -> where it was first declared
	exact    bool              // source says all: there are no lines
}

// newDecoder splits data and finds the objects in it.
func newDecoder(source string, data []byte, o Options) *decoder {
	if o.Domain == "" {
		o.Domain = "cluster.local"
	}
	d := &decoder{source: source, opts: o, seen: map[string]string{}}
	for _, doc := range written.Split(data) {
		raw, line, err := doc.JSON()
		if err != nil {
			ref := d.document(line)
			d.problems = append(d.problems, mesh.Problem{Object: ref, Reason: written.ReasonInvalidYAML, Message: err.Error(),
				Remedy: "correct the YAML; the other documents of the file are used"})
			continue
		}
		d.add(doc, raw, "", "", 0)
	}
	return d
}

// document names a piece of the file that is not, or not yet, known to be an object.
func (d *decoder) document(line int) mesh.ObjectRef {
	return mesh.ObjectRef{Kind: written.KindFile, Name: d.source, Source: d.at(line)}
}

func (d *decoder) at(line int) string {
	if d.exact {
		return d.source
	}
	return fmt.Sprintf("%s:%d", d.source, line)
}

// namespaces returns the labels of the Namespace objects found.
func (d *decoder) namespaces() map[string]map[string]string {
	var out map[string]map[string]string
	for _, o := range d.objects {
		if o.Group != "" || o.Ref.Kind != "Namespace" {
			continue
		}
		if out == nil {
			out = map[string]map[string]string{}
		}
		out[o.Ref.Name] = o.Labels
	}
	return out
}

// nodes returns the Node objects found that parse.
func (d *decoder) nodes() map[string]Node {
	var out map[string]Node
	for _, o := range d.objects {
		var n corev1.Node
		if o.Group != "" || o.Ref.Kind != "Node" || json.Unmarshal(o.Raw, &n) != nil {
			continue
		}
		if out == nil {
			out = map[string]Node{}
		}
		out[o.Ref.Name] = NodeOf(&n)
	}
	return out
}
