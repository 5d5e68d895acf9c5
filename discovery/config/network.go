package config

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	networking "istio.io/api/networking/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Labels and annotations of gateways between networks, as Istio has them.
const (
	labelGatewayPort = "networking.istio.io/gatewayPort"
	annNodeSelector  = "traffic.istio.io/nodeSelector"
	groupGatewayAPI  = "gateway.networking.k8s.io"
	classEastWest    = "istio-east-west"
	classRemote      = "istio-remote"
	optionListener   = "gateway.istio.io/listener-protocol"
)

// ReasonNoAddress: a gateway has no address that other networks could dial.
const ReasonNoAddress = "NoGatewayAddress"

// eastWestRouters are the routers that a Gateway API Gateway of class istio-east-west programs.
var eastWestRouters = map[string]string{"istio": "eastwestgateway"}

func isHostName(s string) bool { return len(validation.IsDNS1123Subdomain(s)) == 0 }

// ExternalAddresses returns the addresses a Service has outside of its cluster, but for node ports.
func ExternalAddresses(s *corev1.Service) []string {
	var out []string
	for _, in := range s.Status.LoadBalancer.Ingress {
		switch {
		case in.IP != "":
			out = append(out, in.IP)
		case in.Hostname != "":
			out = append(out, in.Hostname)
		}
	}
	out = append(out, s.Spec.ExternalIPs...)
	slices.Sort(out)
	return slices.Compact(out)
}

// serviceGateways makes the gateways of a network out of a Service that is labelled as one.
func (o *object) serviceGateways(network mesh.NetworkID, s *corev1.Service) {
	n := &mesh.Network{ID: network, Object: o.Ref}
	port, ok := o.gatewayPortOf(s)
	if !ok {
		return
	}
	for _, a := range ExternalAddresses(s) {
		n.Gateways = append(n.Gateways, mesh.NetworkGateway{Object: o.Ref, Address: a, Port: port, Cluster: o.d.opts.Local})
	}
	if len(n.Gateways) == 0 && s.Spec.Type == corev1.ServiceTypeNodePort {
		n.Gateways = o.nodeGateways(s, port)
	}
	if len(n.Gateways) == 0 {
		remedy := "wait for the load balancer, or check why it gives none"
		switch s.Spec.Type {
		case corev1.ServiceTypeNodePort:
			remedy = "give the nodes addresses, or remove the annotation that chooses among them"
		case "", corev1.ServiceTypeClusterIP:
			remedy = "make its type LoadBalancer or NodePort, or give it externalIPs"
		}
		o.Note("", ReasonNoAddress, "the gateway of network "+written.Show(string(network))+" has no address that other networks could dial", remedy)
	}
	o.d.in.Networks = append(o.d.in.Networks, n)
}

// gatewayPortOf returns the Service's port for other networks: what its label or annotation says, else 15443 or the
// port named tls.
func (o *object) gatewayPortOf(s *corev1.Service) (uint32, bool) {
	field, text := "metadata.labels["+labelGatewayPort+"]", s.Labels[labelGatewayPort]
	if text == "" {
		field, text = "metadata.annotations["+labelGatewayPort+"]", s.Annotations[labelGatewayPort]
	}
	if text != "" {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			o.Note(field, written.ReasonInvalidValue, written.Show(text)+" is not a port; the gateway is left out", "write a number from 1 to 65535")
			return 0, false
		}
		return uint32(n), true
	}
	port := uint32(gatewayPort)
	for _, p := range s.Spec.Ports {
		if p.Port == gatewayPort {
			return gatewayPort, true
		}
		if p.Name == "tls" && p.Port > 0 {
			port = uint32(p.Port)
		}
	}
	return port, true
}

// nodeGateways are the nodes, at the node port of the Service's port.
func (o *object) nodeGateways(s *corev1.Service, port uint32) []mesh.NetworkGateway {
	i := slices.IndexFunc(s.Spec.Ports, func(p corev1.ServicePort) bool { return uint32(p.Port) == port })
	if i < 0 || s.Spec.Ports[i].NodePort <= 0 {
		return nil
	}
	selector := map[string]string{}
	if text, ok := s.Annotations[annNodeSelector]; ok && text != "" {
		if err := json.Unmarshal([]byte(text), &selector); err != nil {
			o.Note("metadata.annotations["+annNodeSelector+"]", written.ReasonInvalidValue, written.Show(text)+" is not a map of labels; it is ignored", `write for example {"gateway": "true"}`)
		}
	}
	var out []mesh.NetworkGateway
	for _, name := range slices.Sorted(maps.Keys(o.d.opts.Nodes)) {
		node := o.d.opts.Nodes[name]
		if !written.Selects(selector, node.Labels) {
			continue
		}
		for _, a := range node.Addresses {
			if !ofFamily(s, a) {
				continue
			}
			out = append(out, mesh.NetworkGateway{Object: o.Ref, Address: a, Port: uint32(s.Spec.Ports[i].NodePort), Cluster: o.d.opts.Local, Locality: node.Locality})
		}
	}
	return out
}

// ofFamily reports whether a Service is served at an address, by its families. Without any all are: the API server has
// not filled them in.
func ofFamily(s *corev1.Service, address string) bool {
	a, err := netip.ParseAddr(address)
	if err != nil || len(s.Spec.IPFamilies) == 0 {
		return true
	}
	family := corev1.IPv4Protocol
	if a.Is6() && !a.Is4In6() {
		family = corev1.IPv6Protocol
	}
	return slices.Contains(s.Spec.IPFamilies, family)
}

// gatewayAPI is what is read of a Gateway API Gateway.
type gatewayAPI struct {
	written.Envelope
	Spec struct {
		GatewayClassName string           `json:"gatewayClassName"`
		Addresses        []gatewayAddress `json:"addresses"`
		Listeners        []struct {
			Name     string `json:"name"`
			Port     int64  `json:"port"`
			Protocol string `json:"protocol"`
			TLS      struct {
				Mode    string            `json:"mode"`
				Options map[string]string `json:"options"`
			} `json:"tls"`
		} `json:"listeners"`
	} `json:"spec"`
	Status struct {
		Addresses []gatewayAddress `json:"addresses"`
	} `json:"status"`
}

type gatewayAddress struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

// eastWest reports whether the object is a Gateway API Gateway between networks.
func (o *object) eastWest() bool {
	if o.Group != groupGatewayAPI || o.Ref.Kind != "Gateway" {
		return false
	}
	var g gatewayAPI
	return json.Unmarshal(o.Raw, &g) == nil && (g.Spec.GatewayClassName == classEastWest || g.Spec.GatewayClassName == classRemote)
}

// eastWestGateway makes gateways of the addresses that the Gateway has been given, or that it asks for.
func (o *object) eastWestGateway() {
	var g gatewayAPI
	if err := json.Unmarshal(o.Raw, &g); err != nil {
		o.Invalid("", written.TypeMessage(err), "give the field a value of its type")
		return
	}
	network := g.Labels[labelNetwork]
	if network == "" {
		o.Note("metadata.labels["+labelNetwork+"]", written.ReasonMissing, "the gateway says no network; it is left out", "name the network that it leads to")
		return
	}
	port, field := uint32(gatewayPort), ""
	var servers []*networking.Server
	for i, l := range g.Spec.Listeners {
		passes := strings.EqualFold(l.Protocol, "TLS") && (l.TLS.Mode == "Passthrough" || l.TLS.Options[optionListener] == "auto-passthrough")
		if passes && field == "" {
			field = fmt.Sprintf("spec.listeners[%d].port", i)
			if !o.CheckPort(field, l.Port) {
				return
			}
			port = uint32(l.Port)
		}
		if passes {
			servers = append(servers, &networking.Server{
				Port: &networking.Port{Number: uint32(l.Port), Protocol: "TLS", Name: l.Name}, Hosts: []string{"*.local"},
				Tls: &networking.ServerTLSSettings{Mode: networking.ServerTLSSettings_AUTO_PASSTHROUGH},
			})
		}
	}
	if field == "" && len(g.Spec.Listeners) > 0 {
		o.Note("spec.listeners", written.ReasonUnsupported, "no listener passes TLS through; the gateway is left out", "add a listener of protocol TLS with tls.mode Passthrough")
		return
	}
	addresses := g.Status.Addresses
	if len(addresses) == 0 {
		addresses = g.Spec.Addresses
	}
	n := &mesh.Network{ID: mesh.NetworkID(network), Object: o.Ref}
	if len(servers) > 0 && g.Spec.GatewayClassName == classEastWest && !o.d.opts.Remote {
		// What the class means to Istio: every service is open to the clusters of the mesh.
		o.d.in.Gateways = append(o.d.in.Gateways, &mesh.Gateway{Object: o.Ref, Spec: &networking.Gateway{Selector: eastWestRouters, Servers: servers}})
	}
	cluster := o.d.opts.Local
	if g.Spec.GatewayClassName == classRemote {
		cluster = ""
	}
	for i, a := range addresses {
		value := strings.ToLower(a.Value)
		if ip, err := netip.ParseAddr(value); err == nil {
			value = ip.Unmap().String()
		} else if !isHostName(value) {
			o.Note(fmt.Sprintf("addresses[%d]", i), written.ReasonInvalidValue, written.Show(a.Value)+" is neither an IP address nor a host name; it is left out", "correct it")
			continue
		}
		n.Gateways = append(n.Gateways, mesh.NetworkGateway{Object: o.Ref, Address: value, Port: port, Cluster: cluster})
	}
	if len(n.Gateways) == 0 {
		o.Note("", ReasonNoAddress, "the gateway of network "+written.Show(network)+" has no address that other networks could dial", "wait for the address in its status, or write spec.addresses")
	}
	o.d.in.Networks = append(o.d.in.Networks, n)
}
