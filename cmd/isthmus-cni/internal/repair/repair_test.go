package repair

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func pod(name string, change func(*corev1.Pod)) *corev1.Pod {
	yes := true
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: "u", OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "r", Controller: &yes}}},
		Spec:       corev1.PodSpec{NodeName: "n"},
		Status: corev1.PodStatus{InitContainerStatuses: []corev1.ContainerStatus{{
			Name: Container, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}},
			LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 126}},
		}}},
	}
	if change != nil {
		change(p)
	}
	return p
}

func TestBroken(t *testing.T) {
	for _, c := range []struct {
		name   string
		want   bool
		change func(*corev1.Pod)
	}{
		{"failed and waits", true, nil},
		{"just failed", true, func(p *corev1.Pod) {
			p.Status.InitContainerStatuses[0].State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 1}}
		}},
		{"passed", false, func(p *corev1.Pod) {
			p.Status.InitContainerStatuses[0] = corev1.ContainerStatus{Name: Container, Ready: true, State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}
		}},
		{"runs again", false, func(p *corev1.Pod) {
			p.Status.InitContainerStatuses[0].State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
		}},
		{"another container", false, func(p *corev1.Pod) { p.Status.InitContainerStatuses[0].Name = "migrate" }},
		{"goes already", false, func(p *corev1.Pod) { now := metav1.Now(); p.DeletionTimestamp = &now }},
		{"nobody would make it anew", false, func(p *corev1.Pod) { p.OwnerReferences = nil }},
	} {
		if got := Broken(pod("p", c.change)); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

func TestRun(t *testing.T) {
	client := fake.NewClientset(pod("early", nil))
	var ready atomic.Bool
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, Config{Client: client, Node: "n", Ready: ready.Load}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		goleak.VerifyNone(t, goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"))
	})
	gone := func(name string) bool {
		_, err := client.CoreV1().Pods("default").Get(ctx, name, metav1.GetOptions{})
		return apierrors.IsNotFound(err)
	}
	ready.Store(true)
	eventually(t, "a Pod that failed before is deleted", func() bool { return gone("early") })
	if _, err := client.CoreV1().Pods("default").Create(ctx, pod("good", func(p *corev1.Pod) { p.Status = corev1.PodStatus{} }), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Pods("default").Create(ctx, pod("late", nil), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one that fails later, too", func() bool { return gone("late") })
	if gone("good") {
		t.Error("a good Pod was deleted")
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}
