// Package lab builds clusters and machines in Linux network namespaces and runs the product's programs in them, as
// a node runs pods: it is the hardware of the end-to-end tests and of the demo.
//
// A world (world.yaml and a folder of Kubernetes objects per cluster) says what there is. A namespace "wan" holds
// the only network the clusters share; each cluster has a router namespace whose bridge is the pod network and which
// lets nothing out but TCP 15443 and nothing in. East-west gateways have a leg in both. Pods, control planes and DNS
// servers have one namespace each.
//
// The package knows the programs by their command lines and their files only; it imports nothing of the product.
// It needs root or a user namespace: call Main first in main or TestMain, it arranges either.
package lab
