// Package box is the Linux side of the lab's node: network namespaces, the file system that containers of one node
// see as their host's, and processes that start in a network namespace with a root file system, a user and
// capabilities of their own.
//
// It knows nothing of Kubernetes. It needs root and overlayfs. All mounts are made in mount namespaces that only this
// process and its containers hold: when they end, however they end, nothing is left mounted.
package box
