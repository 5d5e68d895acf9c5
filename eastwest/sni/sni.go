// Package sni knows the server names that carry routing between clusters: the pod form, Istio's form, and the names
// under which a control plane is reached through a gateway. It is pure and reversible.
package sni

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// MaxLen is the longest server name in octets (RFC 1035, section 2.3.4).
const MaxLen = 253

// ErrName is wrapped by every error about a name that is not of the wanted form.
var ErrName = errors.New("not a routable server name")

// ALPN lists the application protocols that mesh clients offer, as Istio's sidecars do. A gateway takes no connection
// without one of them.
var ALPN = []string{"istio", "istio-peer-exchange", "istio-http/1.0", "istio-http/1.1", "istio-h2"}

// Pod is the meaning of WORKLOAD.pPORT.CLUSTER.SERVICE.NAMESPACE.global: one instance of an exported service.
type Pod struct {
	Workload  string // a DNS label or subdomain
	Port      uint32 // the service's port
	Cluster   mesh.ClusterID
	Service   string
	Namespace string
}

// Name returns the server name, lower case. It fails when a part is not a DNS name or the whole is over MaxLen.
func (p Pod) Name() (string, error) {
	for _, label := range []string{string(p.Cluster), p.Service, p.Namespace} {
		if !mesh.IsLabel(label) {
			return "", fmt.Errorf("%q in the server name of %s: %w", label, p.Workload, ErrName)
		}
	}
	for label := range strings.SplitSeq(p.Workload, ".") {
		if !mesh.IsLabel(label) {
			return "", fmt.Errorf("workload %q: %w", p.Workload, ErrName)
		}
	}
	if p.Port == 0 || p.Port > 65535 {
		return "", fmt.Errorf("port %d of workload %s: %w", p.Port, p.Workload, ErrName)
	}
	name := p.Workload + "." + p.suffix()
	if len(name) > MaxLen {
		return "", fmt.Errorf("server name of workload %s has %d octets, %d are allowed: %w", p.Workload, len(name), MaxLen, ErrName)
	}
	return name, nil
}

// Wildcard returns *.pPORT.CLUSTER.SERVICE.NAMESPACE.global, which covers every instance.
func (p Pod) Wildcard() string { return "*." + p.suffix() }

func (p Pod) suffix() string {
	return "p" + strconv.FormatUint(uint64(p.Port), 10) + "." + string(p.Cluster) + "." + p.Service + "." + p.Namespace + mesh.GlobalSuffix
}

// ParsePod reads what Pod.Name wrote; any other name gives an error that wraps ErrName.
func ParsePod(name string) (Pod, error) {
	bad := fmt.Errorf("%q: %w", name, ErrName)
	rest, ok := strings.CutSuffix(name, mesh.GlobalSuffix)
	if !ok || len(name) > MaxLen {
		return Pod{}, bad
	}
	parts := strings.Split(rest, ".")
	n := len(parts)
	if n < 5 || !strings.HasPrefix(parts[n-4], "p") {
		return Pod{}, bad
	}
	port, err := strconv.ParseUint(parts[n-4][1:], 10, 16)
	if err != nil {
		return Pod{}, bad
	}
	p := Pod{
		Workload: strings.Join(parts[:n-4], "."), Port: uint32(port),
		Cluster: mesh.ClusterID(parts[n-3]), Service: parts[n-2], Namespace: parts[n-1],
	}
	if again, err := p.Name(); err != nil || again != name {
		return Pod{}, bad
	}
	return p, nil
}

// Istio returns outbound_.PORT_.SUBSET_.HOST, the server name of Istio's sni-dnat clusters.
func Istio(port uint32, subset, host string) string {
	return fmt.Sprintf("outbound_.%d_.%s_.%s", port, subset, host)
}

// ParseIstio reads what Istio wrote.
func ParseIstio(name string) (port uint32, subset, host string, err error) {
	bad := fmt.Errorf("%q: %w", name, ErrName)
	parts := strings.SplitN(name, "_.", 4)
	if len(parts) != 4 || parts[0] != "outbound" || parts[3] == "" || strings.Contains(parts[3], "_.") || len(name) > MaxLen {
		return 0, "", "", bad
	}
	n, perr := strconv.ParseUint(parts[1], 10, 16)
	if perr != nil || n == 0 || Istio(uint32(n), parts[2], parts[3]) != name {
		return 0, "", "", bad
	}
	return uint32(n), parts[2], parts[3], nil
}

// Control is a service of a control plane that is reached through port 15443.
type Control string

// The control services. Their server names are CONTROL.TRUSTDOMAIN.
const (
	Join   Control = "join"   // token redemption, ALPN isthmus-join
	Gossip Control = "gossip" // membership, ALPN isthmus-gossip
	Peer   Control = "peer"   // record streams, ALPN h2
	XDS    Control = "xds"    // control plane for machines, ALPN h2
)

// Controls lists all of them, sorted.
var Controls = []Control{Gossip, Join, Peer, XDS}

// Name returns the server name of the control service in the trust domain.
func (c Control) Name(td mesh.TrustDomain) string { return string(c) + "." + string(td) }
