package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/kubelet"
)

const (
	leaseNamespace = "kube-node-lease"
	leaseSeconds   = 40
	renewEvery     = 10 * time.Second
)

// addresses puts the nodes' own addresses on the router.
func (n *Node) addresses() error {
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	have := map[netip.Addr]bool{}
	list, err := h.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("addresses of the router: %w", err)
	}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			have[ip.Unmap()] = true
		}
	}
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("loopback of the router: %w", err)
	}
	for _, s := range n.cfg.Nodes {
		for _, a := range s.Addresses {
			if have[a] {
				continue
			}
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}}
			if a.Is6() {
				addr.Flags = unix.IFA_F_NODAD
			}
			if err := h.AddrAdd(lo, addr); err != nil {
				return fmt.Errorf("give the router the address %v of node %s: %w", a, s.Name, err)
			}
			have[a] = true
		}
	}
	return nil
}

func (n *Node) handle() (h *netlink.Handle, err error) {
	err = n.router.Do(func() error {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("netlink in the router: %w", err)
	}
	return h, nil
}

// register writes the Node objects, again until the API server took them.
func (n *Node) register(ctx context.Context) error {
	for i := range n.cfg.Nodes {
		s := &n.cfg.Nodes[i]
		for pause := 50 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
			err := n.registerOne(ctx, s)
			if err == nil {
				break
			}
			n.log.Debug("node not registered yet", "node", s.Name, "err", err)
			if !sleep(ctx, pause) {
				return nil
			}
		}
	}
	return nil
}

func (n *Node) registerOne(ctx context.Context, s *Spec) error {
	nodes := n.client.CoreV1().Nodes()
	obj := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: s.Name, Labels: s.labels()}}
	for _, p := range s.PodCIDRs {
		obj.Spec.PodCIDRs = append(obj.Spec.PodCIDRs, p.Masked().String())
	}
	obj.Spec.PodCIDR = obj.Spec.PodCIDRs[0]
	_, err := nodes.Create(ctx, obj, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		patch, _ := json.Marshal(map[string]any{"metadata": map[string]any{"labels": s.labels()}})
		_, err = nodes.Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	if err != nil {
		return fmt.Errorf("register node %s: %w", s.Name, err)
	}
	return n.nodeStatus(ctx, s)
}

func (s *Spec) labels() map[string]string {
	out := map[string]string{
		corev1.LabelHostname: s.Name, corev1.LabelOSStable: "linux", corev1.LabelArchStable: "amd64",
	}
	for k, v := range s.Labels {
		out[k] = v
	}
	return out
}

// nodeStatus writes a Node's status.
func (n *Node) nodeStatus(ctx context.Context, s *Spec) error {
	now := metav1.Now()
	condition := func(t corev1.NodeConditionType, status corev1.ConditionStatus, reason string) corev1.NodeCondition {
		return corev1.NodeCondition{Type: t, Status: status, Reason: reason, LastHeartbeatTime: now, LastTransitionTime: now}
	}
	resources := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("16"), corev1.ResourceMemory: resource.MustParse("64Gi"),
		corev1.ResourcePods: resource.MustParse("250"), corev1.ResourceEphemeralStorage: resource.MustParse("100Gi"),
	}
	status := corev1.NodeStatus{
		Capacity: resources, Allocatable: resources,
		Conditions: []corev1.NodeCondition{
			condition(corev1.NodeReady, corev1.ConditionTrue, "KubeletReady"),
			condition(corev1.NodeMemoryPressure, corev1.ConditionFalse, "KubeletHasSufficientMemory"),
			condition(corev1.NodeDiskPressure, corev1.ConditionFalse, "KubeletHasNoDiskPressure"),
			condition(corev1.NodePIDPressure, corev1.ConditionFalse, "KubeletHasSufficientPID"),
		},
		DaemonEndpoints: corev1.NodeDaemonEndpoints{KubeletEndpoint: corev1.DaemonEndpoint{Port: kubelet.Port}},
		NodeInfo: corev1.NodeSystemInfo{
			KubeletVersion: "v1.36.0-lab", ContainerRuntimeVersion: "lab://1", OperatingSystem: "linux", Architecture: "amd64", OSImage: "lab",
		},
	}
	for _, a := range s.Addresses {
		status.Addresses = append(status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	status.Addresses = append(status.Addresses, corev1.NodeAddress{Type: corev1.NodeHostName, Address: s.Name})
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	_, err = n.client.CoreV1().Nodes().Patch(ctx, s.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("status of node %s: %w", s.Name, err)
	}
	return nil
}

// heartbeat renews the Nodes' Leases, and writes a status again that was taken for lost meanwhile.
func (n *Node) heartbeat(ctx context.Context) {
	for {
		for i := range n.cfg.Nodes {
			s := &n.cfg.Nodes[i]
			n.mu.Lock()
			frozen := n.frozen[s.Name]
			n.mu.Unlock()
			if frozen {
				continue
			}
			if err := n.renew(ctx, s); err != nil && ctx.Err() == nil {
				n.log.Debug("lease not renewed", "node", s.Name, "err", err)
			}
		}
		if !sleep(ctx, renewEvery) {
			return
		}
	}
}

func (n *Node) renew(ctx context.Context, s *Spec) error {
	leases := n.client.CoordinationV1().Leases(leaseNamespace)
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"holderIdentity": s.Name, "leaseDurationSeconds": leaseSeconds, "renewTime": metav1.NowMicro()}})
	if err != nil {
		return err
	}
	_, err = leases.Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		seconds, now := int32(leaseSeconds), metav1.NowMicro()
		lease := &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: s.Name, Namespace: leaseNamespace},
			Spec:       coordinationv1.LeaseSpec{HolderIdentity: &s.Name, LeaseDurationSeconds: &seconds, RenewTime: &now},
		}
		_, err = leases.Create(ctx, lease, metav1.CreateOptions{})
	}
	if err != nil {
		return err
	}
	obj, err := n.client.CoreV1().Nodes().Get(ctx, s.Name, metav1.GetOptions{ResourceVersion: "0"})
	if apierrors.IsNotFound(err) {
		return n.registerOne(ctx, s)
	}
	if err != nil {
		return err
	}
	for _, c := range obj.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			return n.nodeStatus(ctx, s)
		}
	}
	return nil
}

// sleep pauses and reports whether ctx lives on.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return ctx.Err() == nil
	}
}
