// Package patient lists and watches objects of an API server for informers, and tries again by itself. Left to
// themselves informers wait up to a minute between tries, long after the server is back; and they say that a try failed,
// never that one did not.
package patient

import (
	"context"
	"math/rand/v2"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// Times between tries.
const (
	first   = 200 * time.Millisecond
	Longest = 5 * time.Second
)

// Client lists and watches the objects of one kind.
type Client[L runtime.Object] interface {
	List(context.Context, metav1.ListOptions) (L, error)
	Watch(context.Context, metav1.ListOptions) (watch.Interface, error)
}

// ListWatch returns what an informer reads by. narrow limits what is read, nil: all. told hears of every try, with nil
// when it went well; it must not block; nil: nobody does. of is what the client was made from: it says whether lists may
// be streamed.
func ListWatch[L runtime.Object](c Client[L], narrow func(*metav1.ListOptions), told func(error), of any) cache.ListerWatcher {
	if narrow == nil {
		narrow = func(*metav1.ListOptions) {}
	}
	if told == nil {
		told = func(error) {}
	}
	list := func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		narrow(&o)
		return try(ctx, told, func() (runtime.Object, error) { return c.List(ctx, o) })
	}
	look := func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		narrow(&o)
		return try(ctx, told, func() (watch.Interface, error) { return c.Watch(ctx, o) })
	}
	return cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListFunc:            func(o metav1.ListOptions) (runtime.Object, error) { return list(context.Background(), o) },
		WatchFunc:           func(o metav1.ListOptions) (watch.Interface, error) { return look(context.Background(), o) },
		ListWithContextFunc: list, WatchFuncWithContext: look,
	}, of)
}

// try calls f until it succeeds, fails for good or ctx ends.
func try[T any](ctx context.Context, told func(error), f func() (T, error)) (T, error) {
	for pause := first; ; pause = min(2*pause, Longest) {
		out, err := f()
		if ctx.Err() != nil {
			return out, err
		}
		told(err)
		if err == nil || !passes(err) {
			return out, err
		}
		t := time.NewTimer(pause/2 + time.Duration(rand.Int64N(int64(pause/2))))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return out, err
		}
	}
}

// passes reports whether an error is one that the same request may get over. Others are for the informer to handle: a
// version that is too old, an option that is not known, a kind that is not there.
func passes(err error) bool {
	switch apierrors.ReasonForError(err) {
	case metav1.StatusReasonUnknown, metav1.StatusReasonForbidden, metav1.StatusReasonUnauthorized, metav1.StatusReasonInternalError,
		metav1.StatusReasonServiceUnavailable, metav1.StatusReasonTimeout, metav1.StatusReasonServerTimeout, metav1.StatusReasonTooManyRequests:
		return true
	}
	return false
}
