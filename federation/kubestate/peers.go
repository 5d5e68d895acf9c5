package kubestate

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/api/isthmus/v1alpha1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// write brings one Peer object in line with what is held. Only the replica whose epoch is the newest may.
func (l *Ledger) write(ctx context.Context, id mesh.ClusterID) (err error) {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	k, epoch := l.origin(id), l.epoch
	records, mark, heard := slices.Collect(maps.Values(k.records)), k.mark, k.heard
	k.due = time.Time{}
	l.mu.Unlock()
	defer func() {
		if err != nil {
			l.mu.Lock()
			k.want(time.Now().Add(retryIn))
			l.mu.Unlock()
		}
	}()
	if id == l.cfg.Local {
		return l.update(ctx, id, func(o *v1alpha1.Peer) error {
			if o.Status.Epoch > epoch {
				return fmt.Errorf("write Peer %s: epoch %d was claimed after %d: %w", id, o.Status.Epoch, epoch, ErrDeposed)
			}
			o.Status.State, o.Status.Seq = v1alpha1.PeerSelf, mark.Seq
			return l.fill(o, records)
		})
	}
	self, err := l.get(ctx, l.cfg.Local)
	if err != nil {
		return err
	}
	if self.Status.Epoch > epoch {
		return fmt.Errorf("write Peer %s: epoch %d was claimed after %d: %w", id, self.Status.Epoch, epoch, ErrDeposed)
	}
	peer := l.peer(id)
	if peer == nil && len(records) == 0 {
		return l.forget(ctx, id)
	}
	return l.update(ctx, id, func(o *v1alpha1.Peer) error {
		if at := (protocol.Mark{Epoch: o.Status.Epoch, Seq: o.Status.Seq}); at.Less(mark) {
			o.Status.Epoch, o.Status.Seq = mark.Epoch, mark.Seq
		}
		if heard.After(o.Status.LastHeard) {
			o.Status.LastHeard = heard.UTC().Truncate(time.Second)
		}
		describe(o, peer)
		return l.fill(o, records)
	})
}

// describe says how the cluster stands, for those who read the object.
func describe(o *v1alpha1.Peer, p *protocol.Peer) {
	if p == nil {
		return
	}
	o.Status.State = map[protocol.PeerState]string{protocol.Pending: v1alpha1.PeerPending, protocol.Approved: v1alpha1.PeerApproved, protocol.Evicted: v1alpha1.PeerEvicted, protocol.Gone: v1alpha1.PeerLeft}[p.State]
	o.Status.TokenID, o.Status.VouchedBy = p.TokenID, nil
	for _, v := range p.VouchedBy {
		o.Status.VouchedBy = append(o.Status.VouchedBy, string(v))
	}
	if p.State == protocol.Evicted || p.State == protocol.Gone {
		o.Status.Gateways, o.Status.Network = nil, ""
		return
	}
	o.Spec.TrustDomain, o.Spec.FederationKey = string(p.TrustDomain), p.FederationKey
	if p.Cluster != nil {
		o.Status.Gateways, o.Status.Network = p.Cluster.Gateways, p.Cluster.Network
	}
}

func (l *Ledger) peer(id mesh.ClusterID) *protocol.Peer {
	if l.cfg.Peers == nil {
		return nil
	}
	for _, p := range l.cfg.Peers() {
		if p.Name == id {
			return &p
		}
	}
	return nil
}

// fill puts the records into the object, in order. Above the limit the oldest deletions of exports are left out: their
// origin deletes again what comes back to it.
func (l *Ledger) fill(o *v1alpha1.Peer, records []*federationv1.Record) error {
	rank := func(r *federationv1.Record) int {
		if r.Kind == protocol.KindTombstone && !strings.HasPrefix(r.Key, protocol.KindMember+"/") {
			return 1
		}
		return 0
	}
	slices.SortFunc(records, func(a, b *federationv1.Record) int {
		if d := cmp.Compare(rank(a), rank(b)); d != 0 {
			return d
		}
		if rank(a) == 1 {
			return cmp.Or(-protocol.Compare(a, b), cmp.Compare(a.Key, b.Key))
		}
		return cmp.Compare(protocol.ResourceName(a), protocol.ResourceName(b))
	})
	o.Status.Records = nil
	size := 0
	for i, r := range records {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
		if err != nil {
			return fmt.Errorf("encode record %s: %w", protocol.ResourceName(r), err)
		}
		if size += len(data); size > maxPeerBytes {
			l.cfg.Log.Warn("deletions are not all kept in the Peer object", "part", "ledger", "peer", o.Name, "left out", len(records)-i)
			break
		}
		o.Status.Records = append(o.Status.Records, data)
	}
	return nil
}

func (l *Ledger) get(ctx context.Context, id mesh.ClusterID) (*v1alpha1.Peer, error) {
	o := new(v1alpha1.Peer)
	if err := l.request(ctx, id, o); err != nil {
		return nil, l.cfg.Client.explain("read", "Peer", string(id), err)
	}
	return o, nil
}

func (l *Ledger) request(ctx context.Context, id mesh.ClusterID, into *v1alpha1.Peer) error {
	c := l.cfg.Client
	return c.resources.Get().Namespace(c.namespace).Resource(v1alpha1.PeerResource).Name(string(id)).Do(ctx).Into(into)
}

// update changes one Peer object by compare-and-swap, and makes it when it is not there.
func (l *Ledger) update(ctx context.Context, id mesh.ClusterID, change func(*v1alpha1.Peer) error) error {
	c := l.cfg.Client
	for {
		o := new(v1alpha1.Peer)
		err := l.request(ctx, id, o)
		if apierrors.IsNotFound(err) && !isMissingResource(err) {
			err = l.create(ctx, id, change, o)
		}
		if apierrors.IsAlreadyExists(err) {
			continue
		}
		if err != nil {
			return c.explain("read", "Peer", string(id), err)
		}
		old := o.DeepCopy()
		if err := change(o); err != nil {
			return err
		}
		if reflect.DeepEqual(old, o) {
			return nil
		}
		o.TypeMeta = metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "Peer"}
		if !reflect.DeepEqual(old.Spec, o.Spec) {
			status := o.Status
			err = c.resources.Put().Namespace(c.namespace).Resource(v1alpha1.PeerResource).Name(string(id)).Body(o).Do(ctx).Into(o)
			o.Status = status
		}
		if err == nil {
			err = c.resources.Put().Namespace(c.namespace).Resource(v1alpha1.PeerResource).Name(string(id)).SubResource("status").Body(o).Do(ctx).Error()
		}
		if apierrors.IsConflict(err) {
			continue
		}
		if err != nil {
			return c.explain("write", "Peer", string(id), err)
		}
		return nil
	}
}

// create makes the object, without a status: that is written as for one that was there.
func (l *Ledger) create(ctx context.Context, id mesh.ClusterID, change func(*v1alpha1.Peer) error, into *v1alpha1.Peer) error {
	c := l.cfg.Client
	o := &v1alpha1.Peer{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "Peer"},
		ObjectMeta: metav1.ObjectMeta{Name: string(id), Namespace: c.namespace, Labels: managedBy},
	}
	if err := change(o); err != nil {
		return err
	}
	o.Status = v1alpha1.PeerStatus{}
	return c.resources.Post().Namespace(c.namespace).Resource(v1alpha1.PeerResource).Body(o).Do(ctx).Into(into)
}

// forget deletes the object of a cluster that nobody speaks of any more.
func (l *Ledger) forget(ctx context.Context, id mesh.ClusterID) error {
	c := l.cfg.Client
	err := c.resources.Delete().Namespace(c.namespace).Resource(v1alpha1.PeerResource).Name(string(id)).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return c.explain("delete", "Peer", string(id), err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if k := l.origins[id]; k != nil && len(k.records) == 0 {
		delete(l.origins, id)
	}
	return nil
}
