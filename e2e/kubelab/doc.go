// Package kubelab runs Kubernetes clusters in network namespaces: real API servers with real controllers, and Pods as
// real processes. It stands on e2e/lab, which has the namespaces, the processes and their cleaning up.
//
// # The network
//
// Node "wan" of the lab is the one wire between clusters: a bridge. A cluster NAME has
//
//	NAME/router   all its Nodes at once. A Pod hangs on it by a veth pair of its own, as with the ptp plugin: an
//	              address of one host on either side and a route to it, never a bridge, so that every packet between
//	              Pods crosses the router and service NAT sees both directions. Interface "wan" is its leg to the wire
//	              with the addresses of its Nodes; "control" the leg to its control plane.
//	NAME/control  etcd, API server, controller manager. "eth0" leads to the router, the default route; "wan" is a
//	              second leg, on which clients outside reach the API server, if the topology lets them.
//
// Service NAT is done by package node, in the router's prerouting for Pods and for packets from the wire, and in the
// control plane's output for the API server's calls of webhooks by cluster address.
//
// The router forwards what comes from Pods and the control plane, hides it behind its first WAN address unless it goes
// to a cluster on the same flat network, and lets nothing in from the wire but answers, and connections that service
// NAT redirected: LoadBalancer addresses and NodePorts. Clusters on one flat network have routes to each other's Pods
// and control planes instead, and let everything in from them.
package kubelab
