package patient_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"

	"github.com/isthmus-mesh/isthmus/internal/patient"
)

// server is an API server that fails with err, which other goroutines may change.
type server struct {
	mu  sync.Mutex
	err error
}

func (s *server) says() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *server) set(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *server) List(context.Context, metav1.ListOptions) (*corev1.ConfigMapList, error) {
	if err := s.says(); err != nil {
		return nil, err
	}
	return &corev1.ConfigMapList{}, nil
}

func (s *server) Watch(context.Context, metav1.ListOptions) (watch.Interface, error) {
	if err := s.says(); err != nil {
		return nil, err
	}
	return watch.NewFake(), nil
}

// However long the server was away, it is read again soon after it is back, and both is told.
func TestBackAfterAnHour(t *testing.T) {
	for _, away := range []error{
		errors.New("connection refused"),
		apierrors.NewForbidden(schema.GroupResource{Resource: "configmaps"}, "", errors.New("no right")),
		apierrors.NewServiceUnavailable("starting"),
	} {
		for name, ask := range map[string]func(context.Context, cache.ListerWatcherWithContext) error{
			"list": func(ctx context.Context, lw cache.ListerWatcherWithContext) error {
				_, err := lw.ListWithContext(ctx, metav1.ListOptions{})
				return err
			},
			"watch": func(ctx context.Context, lw cache.ListerWatcherWithContext) error {
				_, err := lw.WatchWithContext(ctx, metav1.ListOptions{})
				return err
			},
		} {
			synctest.Test(t, func(t *testing.T) {
				s := &server{err: away}
				failed, went := 0, 0
				lw := patient.ListWatch(s, nil, func(err error) {
					if err != nil {
						failed++
					} else {
						went++
					}
				}, nil)
				start := time.Now()
				time.AfterFunc(time.Hour, func() { s.set(nil) })
				if err := ask(t.Context(), lw.(cache.ListerWatcherWithContext)); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if late := time.Since(start) - time.Hour; late < 0 || late > patient.Longest {
					t.Errorf("%s after %v: read %s after the server was back", name, away, late)
				}
				if went != 1 || failed < 700 || failed > 1500 {
					t.Errorf("%s: told of %d failures and %d successes", name, failed, went)
				}
			})
		}
	}
}

// What only the informer can handle goes to it at once, and so does the end.
func TestHandsOver(t *testing.T) {
	s := &server{err: apierrors.NewResourceExpired("too old")}
	lw := patient.ListWatch(s, nil, nil, nil).(cache.ListerWatcherWithContext)
	if _, err := lw.ListWithContext(t.Context(), metav1.ListOptions{}); !apierrors.IsResourceExpired(err) {
		t.Errorf("%v", err)
	}
	s.set(errors.New("connection refused"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lw.WatchWithContext(ctx, metav1.ListOptions{}); err == nil {
		t.Error("goes on after the end")
	}
}
