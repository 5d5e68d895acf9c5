package mesh

// KubeObject is an object of the Kubernetes Gateway API, an Ingress, or one of what these lean on (a Namespace's labels,
// a ConfigMap with certificate authorities), as it was declared.
type KubeObject struct {
	// Object has the API's kind, but for the Gateway API's Gateway, which is "Gateway.gateway.networking.k8s.io" here.
	Object ObjectRef
	// Value is a pointer to the API's type, for example *gatewayv1.HTTPRoute. It is never changed.
	Value any `json:"-"`
}

// ObjectStatus is what the status of an object should say.
type ObjectStatus struct {
	Object     ObjectRef
	Group      string // of its API
	Resource   string // plural, as in the API's paths
	Generation int64  // of the object that it is about; 0 when unknown
	// JSON is the status, with conditions that have no time.
	JSON []byte
}

// Derived is what other objects come to in terms of those that a Snapshot holds.
type Derived struct {
	// Input holds Gateways, VirtualServices and Problems. Its objects are named so that no object of the API is named like them.
	Input Input
	// Statuses are sorted by resource, namespace and name.
	Statuses []*ObjectStatus
	// Objects are to be there.
	Objects []*WantedObject
	// Backends say how gateways speak to Services, sorted by host and port.
	Backends []*BackendTLS
}

// BackendTLS is how gateways speak to a port of a Service: in TLS, verified.
type BackendTLS struct {
	Host   string // of the Service
	Port   uint32 // 0: every port that no other one names
	Object ObjectRef
	Name   string   // server name, and what the certificate must have unless Names says more
	Names  []string // DNS names or URIs of which the certificate must have one
	Roots  []byte   // PEM; empty: the system's
	Broken bool     // it cannot be honoured: the port is not called at all
}

// WantedObject is an object of the Kubernetes API that is to be there, as it is applied.
type WantedObject struct {
	Group, Version, Resource string
	Namespace, Name          string
	For                      ObjectRef // on whose behalf
	JSON                     []byte
}

// BackendTLS returns how gateways speak to a port of a Service; nil: nothing is said of it.
func (s *Snapshot) BackendTLS(host string, port uint32) *BackendTLS {
	var all *BackendTLS
	for _, b := range s.Backends {
		switch {
		case b.Host != host:
		case b.Port == port:
			return b
		case b.Port == 0:
			all = b
		}
	}
	return all
}
