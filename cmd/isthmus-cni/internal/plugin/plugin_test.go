package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/isthmus-mesh/isthmus/internal/capture"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

func pod(change func(*corev1.Pod)) *corev1.Pod {
	id := int64(1337)
	always := corev1.ContainerRestartPolicyAlways
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "default", Annotations: map[string]string{annotationStatus: "{}"}},
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{
				{Name: "istio-validation", Image: "isthmus/isthmus-agent"},
				{Name: proxyContainer, Image: "isthmus/isthmus-agent", RestartPolicy: &always, SecurityContext: &corev1.SecurityContext{RunAsUser: &id, RunAsGroup: &id}},
			},
			Containers: []corev1.Container{{Name: "app", Image: "app"}},
		},
	}
	if change != nil {
		change(p)
	}
	return p
}

func TestDecide(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*corev1.Pod)
		skip   string // part of the reason
		rules  []string
	}{
		{name: "a native sidecar", rules: []string{"meta skuid 1337 return", "meta skgid 1337 return", "redirect to :15001", "redirect to :15006"}},
		{name: "an ordinary sidecar", change: func(p *corev1.Pod) {
			p.Spec.Containers, p.Spec.InitContainers = append(p.Spec.Containers, p.Spec.InitContainers[1]), nil
		}, rules: []string{"meta skuid 1337 return"}},
		{name: "not injected", change: func(p *corev1.Pod) { p.Annotations = nil }, skip: annotationStatus},
		{name: "one container", change: func(p *corev1.Pod) { p.Spec.InitContainers = nil }, skip: proxyContainer},
		{name: "excluded namespace", change: func(p *corev1.Pod) { p.Namespace = "kube-system" }, skip: "namespace"},
		{name: "label says no", change: func(p *corev1.Pod) { p.Labels = map[string]string{inject: "false"} }, skip: inject},
		{name: "annotation says no", change: func(p *corev1.Pod) { p.Annotations[inject] = "false" }, skip: inject},
		{name: "label yes wins over annotation no", change: func(p *corev1.Pod) {
			p.Annotations[inject], p.Labels = "false", map[string]string{inject: "true"}
		}, rules: []string{"redirect to :15001"}},
		{name: "an init container makes the rules", change: func(p *corev1.Pod) {
			p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: initContainer})
		}, skip: initContainer},
		{name: "mode none", change: func(p *corev1.Pod) { p.Annotations[capture.AnnotationMode] = "NONE" }, skip: "NONE"},
		{name: "mode by environment", change: func(p *corev1.Pod) {
			p.Spec.InitContainers[1].Env = []corev1.EnvVar{{Name: "ISTIO_META_INTERCEPTION_MODE", Value: "TPROXY"}}
		}, rules: []string{"tproxy to :15006"}},
		{name: "annotation wins over environment", change: func(p *corev1.Pod) {
			p.Spec.InitContainers[1].Env = []corev1.EnvVar{{Name: "ISTIO_META_INTERCEPTION_MODE", Value: "TPROXY"}}
			p.Annotations[capture.AnnotationMode] = "REDIRECT"
		}, rules: []string{"redirect to :15006"}},
		{name: "names", change: func(p *corev1.Pod) {
			p.Spec.InitContainers[1].Env = []corev1.EnvVar{{Name: "ISTIO_META_DNS_CAPTURE", Value: "true"}}
		}, rules: []string{"udp dport 53 redirect to :15053", "tcp dport 53 redirect to :15053"}},
		{name: "another user", change: func(p *corev1.Pod) { id := int64(4000); p.Spec.InitContainers[1].SecurityContext.RunAsUser = &id }, rules: []string{"meta skuid 4000 return"}},
		{name: "ports", change: func(p *corev1.Pod) { p.Annotations[capture.AnnotationExcludeInboundPorts] = "22,9" }, rules: []string{"tcp dport 22 return", "tcp dport 9 return"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, skip, err := Decide(pod(c.change), []string{"kube-system"})
			if err != nil {
				t.Fatal(err)
			}
			if (c.skip == "") != (skip == "") || !strings.Contains(skip, c.skip) {
				t.Fatalf("skipped because %q, want %q", skip, c.skip)
			}
			text := capture.Text(capture.Plan(got))
			for _, r := range c.rules {
				if !strings.Contains(text, "\t"+r+"\n") && !strings.Contains(text, r) {
					t.Errorf("no rule %q in\n%s", r, text)
				}
			}
		})
	}
	if _, _, err := Decide(pod(func(p *corev1.Pod) { p.Annotations[capture.AnnotationExcludeOutboundPorts] = "x" }), nil); err == nil || !strings.Contains(err.Error(), capture.AnnotationExcludeOutboundPorts) {
		t.Errorf("a bad value: %v", err)
	}
}

const (
	inside = "ISTHMUS_CNI_TEST"
	prev   = `"prevResult":{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"address":"10.0.0.5/24","interface":0}]}`
	conf   = `{"cniVersion":"1.0.0","name":"n","type":"isthmus-cni","log_level":"debug","kubernetes":{"kubeconfig":"/nowhere","exclude_namespaces":["kube-system"]},` + prev + `}`
)

// TestCommands runs ADD, CHECK and DEL in a network namespace of its own.
func TestCommands(t *testing.T) {
	if os.Getenv(inside) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestCommands$", "-test.v", "-test.count=1")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}, GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Skipf("no network namespace: %v", err)
		}
		if err != nil {
			t.Fatalf("inside the namespace: %v\n%s", err, out)
		}
		return
	}
	var answer *corev1.Pod
	var log bytes.Buffer
	p := New(&log)
	p.look = func(context.Context, *Config, string, string) (*corev1.Pod, error) { return answer, nil }
	args := func(stdin string) *skel.CmdArgs {
		return &skel.CmdArgs{ContainerID: "c", Netns: "/proc/self/ns/net", IfName: "eth0", Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=p", StdinData: []byte(stdin)}
	}
	rules := func() string {
		chains, err := capture.Installed()
		if err != nil {
			t.Fatal(err)
		}
		return capture.Text(chains)
	}
	answer = pod(func(p *corev1.Pod) { p.Annotations = nil })
	if out := stdout(t, func() error { return p.Add(args(conf)) }); !strings.Contains(out, "10.0.0.5/24") {
		t.Errorf("a Pod without a sidecar: result %s", out)
	}
	if got := rules(); strings.Contains(got, "redirect") {
		t.Errorf("a Pod without a sidecar got rules:\n%s", got)
	}
	answer = pod(nil)
	if err := p.Check(args(conf)); err == nil {
		t.Error("CHECK passed without rules")
	}
	for range 2 { // again: the same
		out := stdout(t, func() error { return p.Add(args(conf)) })
		var result map[string]any
		if err := json.Unmarshal([]byte(out), &result); err != nil || result["cniVersion"] != "1.0.0" || !strings.Contains(out, "10.0.0.5/24") {
			t.Errorf("result %s, %v", out, err)
		}
	}
	if got := rules(); !strings.Contains(got, "meta skuid 1337 return") || !strings.Contains(got, "redirect to :15001") {
		t.Errorf("rules:\n%s", got)
	}
	if err := p.Check(args(conf)); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	answer = pod(func(p *corev1.Pod) { p.Annotations[capture.AnnotationExcludeInboundPorts] = "7777" })
	if err := p.Check(args(conf)); err == nil {
		t.Error("CHECK passed with the rules of another Pod")
	}
	for range 2 {
		if err := p.Del(args(conf)); err != nil {
			t.Errorf("DEL: %v", err)
		}
	}
	for name, stdin := range map[string]string{"first in the chain": strings.Replace(conf, ","+prev, "", 1), "not JSON": "{", "a bad prevResult": strings.Replace(conf, "10.0.0.5/24", "x", 1)} {
		if err := p.Add(args(stdin)); err == nil {
			t.Errorf("%s: ADD passed", name)
		}
	}
	answer = pod(func(p *corev1.Pod) { p.Annotations[capture.AnnotationMode] = "SOMETIMES" })
	if err := p.Add(args(conf)); err == nil || !strings.Contains(err.Error(), "SOMETIMES") || !strings.Contains(err.Error(), "default/p") {
		t.Errorf("a bad annotation: %v", err)
	}
	other := args(conf)
	other.Args = "IgnoreUnknown=1"
	if out := stdout(t, func() error { return p.Add(other) }); !strings.Contains(out, "10.0.0.5/24") {
		t.Errorf("a container that is no Pod: %s", out)
	}
}

// stdout returns what run prints there: a plugin's result.
func stdout(t *testing.T, run func() error) string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	old := os.Stdout
	os.Stdout = w
	err = run()
	os.Stdout = old
	w.Close()
	var b bytes.Buffer
	_, _ = b.ReadFrom(r)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return b.String()
}

// TestLookup asks a real API server, with the rights the chart gives and with fewer.
func TestLookup(t *testing.T) {
	api := kubetest.APIServer(t)
	cs, err := kubernetes.NewForConfig(api.REST())
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	want := pod(nil)
	want.Spec.Containers[0].Image = "x"
	if _, err := cs.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil {
		t.Log(err) // a controller may have made it
	}
	if _, err := cs.CoreV1().Pods("default").Create(ctx, want, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c := &Config{}
	c.Kubernetes.Kubeconfig = api.Kubeconfig()
	got, err := lookup(ctx, c, "default", "p")
	if err != nil || got.Annotations[annotationStatus] != "{}" {
		t.Errorf("got %v, %v", got, err)
	}
	brief, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := lookup(brief, c, "default", "nobody"); err == nil {
		t.Error("a Pod that is not there was found")
	}
	c.Kubernetes.Kubeconfig = "/nowhere"
	if _, err := lookup(ctx, c, "default", "p"); err == nil || !strings.Contains(fmt.Sprint(err), "isthmus-cni") {
		t.Errorf("no kubeconfig: %v", err)
	}
}
