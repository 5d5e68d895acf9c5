package kube_test

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestManyPods bounds what is kept of many Pods that have what Pods have, and what one change costs. "make soak" has 5,000 of them.
func TestManyPods(t *testing.T) {
	pods := 1000 // it is the same for each; to make them is what takes long
	if os.Getenv("SOAK") != "" {
		pods = 5000
	}
	c := newCluster(t)
	c.apply(namespaceShop)
	client := c.Client().CoreV1().Pods("shop")
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := w; i < pods; i += 8 {
				if _, err := client.Create(context.Background(), fatPod(i), metav1.CreateOptions{}); err != nil {
					t.Errorf("create a Pod: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	before := heap()
	sink := newRecorder()
	run(t, "amber", c.REST(), sink)
	took := sink.wait(t, 60*second, sink.isSynced)
	if n := len(sink.keys("amber/pods/")); n != pods {
		t.Fatalf("%d Pods are reported", n)
	}
	kept := heap() - before
	t.Logf("%d Pods are read in %s and kept in %d KiB, %d bytes each", pods, took, kept>>10, kept/int64(pods))
	if kept > 5<<10*int64(pods) { // the objects themselves have 12 KiB and more
		t.Errorf("%d Pods are kept in %d KiB", pods, kept>>10)
	}
	reports, _ := sink.counts()
	sum := 0
	for _, n := range reports {
		sum += n
	}
	p, err := client.Get(context.Background(), "pod-17", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.Status.Phase, p.Status.PodIP = corev1.PodRunning, "10.1.7.7"
	if _, err := client.UpdateStatus(context.Background(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	sink.wait(t, 10*second, func() error {
		in, _ := sink.get("amber/pods/shop/pod-17")
		if len(in.Workloads) != 1 || len(in.Workloads[0].Addresses) != 1 {
			return fmt.Errorf("the change is not seen")
		}
		return nil
	})
	after, _ := sink.counts()
	for k, n := range after {
		if want := reports[k]; n != want && k != "amber/pods/shop/pod-17" || k == "amber/pods/shop/pod-17" && n != want+1 {
			t.Errorf("one Pod's change had %s reported %d times, before it were %d", k, n, want)
		}
	}
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// fatPod is a Pod as a Deployment makes it, with the environment and mounts that nobody here needs.
func fatPod(i int) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: fmt.Sprintf("pod-%d", i), Labels: map[string]string{"app": fmt.Sprintf("app-%d", i/10), "pod-template-hash": "7d9f8c6b5"},
		Annotations: map[string]string{"note": strings.Repeat("x", 2000)},
	}}
	for j := range 2 {
		x := corev1.Container{Name: fmt.Sprintf("c%d", j), Image: "registry.example.com/app:v1", Ports: []corev1.ContainerPort{{Name: fmt.Sprintf("http%d", j), ContainerPort: int32(8080 + j)}}}
		for k := range 40 {
			x.Env = append(x.Env, corev1.EnvVar{Name: fmt.Sprintf("VARIABLE_%d", k), Value: strings.Repeat("v", 60)})
		}
		p.Spec.Containers = append(p.Spec.Containers, x)
	}
	return p
}
