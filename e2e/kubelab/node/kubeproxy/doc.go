// Package kubeproxy answers for a cluster's Services in network namespaces, by nftables rules that translate addresses,
// and gives Services of type LoadBalancer addresses on the router.
//
// Cluster addresses, external IPs, node ports and load balancer addresses of both families lead to ready endpoints,
// whoever wrote their EndpointSlices. Connections between pods keep their source address; a pod may call itself by a
// Service; traffic policies Local are kept by the node's name, though the nodes share one router.
package kubeproxy
