// Package node acts as the nodes of a Kubernetes cluster, in Linux network namespaces: it registers Node objects, runs
// the Pods that are bound to them as real processes, calls network plugins, answers for Services (package kubeproxy),
// and writes status, by the API server's ordinary protocols alone.
//
// A Pod has a network namespace of its own, made by the network plugins configured on the node as any runtime would
// call them. A container is a program of this machine that its image is mapped to; it sees this machine's files with a
// private layer above them, its volumes, and its own /etc/hosts and /etc/resolv.conf. It runs as the user and with the
// capabilities that its security context asks for.
//
// Several Nodes of a cluster share one process and one network namespace, their router. Nothing outlives the process.
package node
