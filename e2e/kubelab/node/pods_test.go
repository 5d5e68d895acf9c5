package node_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const orderYAML = `
apiVersion: v1
kind: Pod
metadata: {name: order}
spec:
  terminationGracePeriodSeconds: 20
  volumes: [{name: log, hostPath: {path: /var/lib/test/order, type: DirectoryOrCreate}}]
  initContainers:
  - {name: first, image: shell, args: ["sleep 0.2; echo first >> /log/f"], volumeMounts: [&m {name: log, mountPath: /log}]}
  - name: side
    image: shell
    restartPolicy: Always
    args: ["trap 'echo side-end >> /log/f; exit 0' TERM; echo side >> /log/f; sleep 0.3; echo side-up >> /log/f; touch /tmp/up; while :; do sleep 0.05; done"]
    startupProbe: {exec: {command: [test, -e, /tmp/up]}, periodSeconds: 1, failureThreshold: 20}
    volumeMounts: [*m]
  - {name: second, image: shell, args: ["echo second >> /log/f"], volumeMounts: [*m]}
  containers:
  - name: main
    image: shell
    args: ["trap 'sleep 0.3; echo main-end >> /log/f; exit 0' TERM; echo main >> /log/f; while :; do sleep 0.05; done"]
    lifecycle:
      postStart: {exec: {command: [sh, -c, "sleep 0.2; echo post-start >> /log/f"]}}
      preStop: {exec: {command: [sh, -c, "echo pre-stop >> /log/f"]}}
    volumeMounts: [*m]
  - {name: other, image: shell, args: ["echo other >> /log/f; exec sleep 1000"], volumeMounts: [*m]}
`

func order(w *world) {
	w.apply(orderYAML)
	pod := w.pod("order", "is ready", ready)
	for _, c := range pod.Status.InitContainerStatuses {
		if done := c.State.Terminated != nil && c.State.Terminated.ExitCode == 0; done == (c.Name == "side") {
			w.t.Errorf("init container %s: %+v", c.Name, c.State)
		}
	}
	if condition(pod, corev1.PodInitialized) != corev1.ConditionTrue || pod.Status.Phase != corev1.PodRunning {
		w.t.Errorf("status %+v", pod.Status)
	}
	w.within(10*time.Second, "all have begun", func() error {
		if log := w.read("order/f"); !strings.Contains(log, "other") {
			return errors.New(log)
		}
		return nil
	})
	w.delete("order")
	if got, want := w.read("order/f"), "first\nside\nside-up\nsecond\nmain\npost-start\nother\npre-stop\nmain-end\nside-end\n"; got != want {
		w.t.Errorf("order:\n%s\nwant:\n%s", got, want)
	}
}

func (w *world) read(name string) string {
	b, _ := os.ReadFile(filepath.Join(w.files, name))
	return string(b)
}

const probesYAML = `
apiVersion: v1
kind: Pod
metadata: {name: lively}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: app
    ports: [{name: web, containerPort: 8080}]
    startupProbe: {tcpSocket: {port: web}, periodSeconds: 1}
    livenessProbe: {httpGet: {path: /health, port: 8080}, periodSeconds: 1, failureThreshold: 3}
    readinessProbe: {httpGet: {path: /health, port: 8443, scheme: HTTPS}, periodSeconds: 1, failureThreshold: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: switched}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: app, image: app, readinessProbe: {exec: {command: [test, -e, /tmp/ready]}, periodSeconds: 1, failureThreshold: 1}}
  - {name: rpc, image: shell, readinessProbe: {grpc: {port: 9090}, periodSeconds: 1}}
---
apiVersion: v1
kind: Pod
metadata: {name: stillborn}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: app, image: shell, startupProbe: {tcpSocket: {port: 1}, periodSeconds: 1, failureThreshold: 1}}
`

func probes(w *world) {
	w.apply(probesYAML)
	pod := w.pod("lively", "is ready", ready)
	if s := pod.Status.ContainerStatuses[0].Started; s == nil || !*s {
		w.t.Error("a ready container is not started")
	}
	url := "http://" + pod.Status.PodIP + ":8080"
	_, err := w.get("", url+"/set?healthy=false")
	must(w.t, err)
	w.pod("lively", "is not ready", func(p *corev1.Pod) bool { return !ready(p) && p.Status.Phase == corev1.PodRunning })
	pod = w.pod("lively", "was restarted and recovered", func(p *corev1.Pod) bool { return ready(p) && p.Status.ContainerStatuses[0].RestartCount == 1 })
	if last := pod.Status.ContainerStatuses[0].LastTerminationState.Terminated; last == nil || last.ExitCode == 0 {
		w.t.Errorf("last state %+v", pod.Status.ContainerStatuses[0].LastTerminationState)
	}

	w.pod("switched", "runs", func(p *corev1.Pod) bool {
		return p.Status.Phase == corev1.PodRunning && p.Status.ContainerStatuses[1].Ready // by the other container's port
	})
	for range 2 {
		w.exec("switched", "app", "touch /tmp/ready")
		w.pod("switched", "is ready", ready)
		w.exec("switched", "app", "rm /tmp/ready")
		w.pod("switched", "is not ready", func(p *corev1.Pod) bool { return !ready(p) })
	}
	pod = w.pod("stillborn", "is restarted", func(p *corev1.Pod) bool { return p.Status.ContainerStatuses[0].RestartCount >= 2 })
	if ready(pod) {
		w.t.Error("ready before it was started")
	}
	for _, name := range []string{"lively", "switched", "stillborn"} {
		w.delete(name)
	}
}

const restartsYAML = `
apiVersion: v1
kind: Pod
metadata: {name: crashing}
spec:
  containers: [{name: c, image: shell, args: ["echo once more; exit 3"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: trying}
spec:
  restartPolicy: OnFailure
  volumes: [{name: v, emptyDir: {}}]
  initContainers: [{name: side, image: shell, restartPolicy: Always}]
  containers: [{name: c, image: shell, args: ["echo x >> /v/f; test $(wc -l < /v/f) = 3"], volumeMounts: [{name: v, mountPath: /v}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: failing}
spec:
  restartPolicy: Never
  containers: [{name: c, image: shell, args: ["exit 3"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: init-failing}
spec:
  restartPolicy: Never
  initContainers: [{name: i, image: shell, args: ["exit 4"]}]
  containers: [{name: c, image: shell}]
---
apiVersion: v1
kind: Pod
metadata: {name: nowhere}
spec:
  containers: [{name: c, image: "example.org/no/such-image:v1"}]
---
apiVersion: v1
kind: Pod
metadata: {name: waiting}
spec:
  containers: [{name: c, image: shell, env: [{name: A, valueFrom: {configMapKeyRef: {name: later, key: a}}}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: stubborn}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: shell, args: ["trap '' TERM; while :; do sleep 0.1; done"]}]
`

func restarts(w *world) {
	w.apply(restartsYAML)
	first := func(p *corev1.Pod) corev1.ContainerStatus {
		if len(p.Status.ContainerStatuses) == 0 {
			return corev1.ContainerStatus{}
		}
		return p.Status.ContainerStatuses[0]
	}
	waits := func(reason string) func(*corev1.Pod) bool {
		return func(p *corev1.Pod) bool {
			s := first(p).State.Waiting
			return s != nil && s.Reason == reason
		}
	}
	w.pod("crashing", "backs off", func(p *corev1.Pod) bool {
		return waits("CrashLoopBackOff")(p) && first(p).RestartCount >= 2 && first(p).LastTerminationState.Terminated.ExitCode == 3
	})
	w.pod("trying", "succeeds", func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodSucceeded && first(p).RestartCount == 2 })
	w.pod("failing", "fails", func(p *corev1.Pod) bool {
		return p.Status.Phase == corev1.PodFailed && first(p).State.Terminated != nil && first(p).State.Terminated.ExitCode == 3
	})
	w.pod("init-failing", "fails", func(p *corev1.Pod) bool { return p.Status.Phase == corev1.PodFailed })
	pod := w.pod("nowhere", "waits for its image", waits("ErrImagePull"))
	if m := first(pod).State.Waiting.Message; !strings.Contains(m, "example.org/no/such-image:v1") {
		w.t.Errorf("message %q", m)
	}
	w.pod("waiting", "waits for a ConfigMap", waits("CreateContainerConfigError"))
	w.apply("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: later}\ndata: {a: b}")
	w.pod("waiting", "is ready", ready)

	w.pod("stubborn", "is ready", ready)
	must(w.t, w.n.KillContainer("default", "stubborn", "c", syscall.SIGKILL))
	w.pod("stubborn", "was restarted", func(p *corev1.Pod) bool { return first(p).RestartCount == 1 && ready(p) })
	must(w.t, w.n.StopPod("default", "stubborn"))
	w.pod("stubborn", "was restarted again", func(p *corev1.Pod) bool { return first(p).RestartCount == 2 && ready(p) })
	begun := time.Now()
	w.delete("stubborn")
	if took := time.Since(begun); took < 900*time.Millisecond {
		w.t.Errorf("it had a second to end and got %v", took)
	}
	for _, name := range []string{"crashing", "trying", "failing", "init-failing", "nowhere", "waiting"} {
		now := int64(0)
		must(w.t, w.client.CoreV1().Pods("default").Delete(w.t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &now}))
	}
}

const chained = `{"cniVersion": "1.0.0", "name": "chained", "plugins": [
	{"type": "labcni", "capabilities": {"ipRanges": true}},
	{"type": "recorder"}
]}`

const plainPod = `
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 5
  containers: [{name: c, image: shell}]
`

func plugins(w *world) {
	self, err := os.ReadFile("/proc/self/exe")
	must(w.t, err)
	must(w.t, os.WriteFile(filepath.Join(w.bin, "recorder"), self, 0o755))
	conf := filepath.Join(w.cni, "05-chained.conflist")
	must(w.t, os.WriteFile(conf, []byte(chained), 0o644))
	w.apply(fmt.Sprintf(plainPod, "chained"))
	pod := w.pod("chained", "is ready", ready)
	recorded := func() []string {
		b, err := os.ReadFile(filepath.Join(w.bin, "recorded"))
		must(w.t, err)
		return strings.Split(strings.TrimSpace(string(b)), "\n")
	}
	must(w.t, w.n.CheckNetwork(w.t.Context(), "default", "chained"))
	w.delete("chained")
	var calls []string
	w.within(10*time.Second, "the plugin was called three times", func() error {
		if calls = recorded(); len(calls) != 3 {
			return fmt.Errorf("%q", calls)
		}
		return nil
	})
	for i, command := range []string{"ADD", "CHECK", "DEL"} {
		for _, want := range []string{command + " eth0 ", "K8S_POD_NAME=chained;", "K8S_POD_NAMESPACE=default;", "K8S_POD_UID=" + string(pod.UID),
			"netns=true", `"address":"` + pod.Status.PodIP + `/32"`, pod.Status.PodIPs[1].IP} {
			if !strings.Contains(calls[i], want) {
				w.t.Errorf("%s: no %q in %s", command, want, calls[i])
			}
		}
	}

	// A plugin that fails keeps the Pod from starting, and is called again.
	must(w.t, os.WriteFile(filepath.Join(w.bin, "fail"), nil, 0o644))
	w.apply(fmt.Sprintf(plainPod, "unlucky"))
	w.within(30*time.Second, "an event tells", func() error {
		events, err := w.client.CoreV1().Events("default").List(w.t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=unlucky,reason=FailedCreatePodSandBox"})
		if err == nil && (len(events.Items) == 0 || !strings.Contains(events.Items[0].Message, "told to fail")) {
			err = errors.New("no event")
		}
		return err
	})
	must(w.t, os.Remove(filepath.Join(w.bin, "fail")))
	w.pod("unlucky", "is ready", ready)
	w.delete("unlucky")

	must(w.t, os.Remove(conf)) // the next Pod goes by what is left
	before := len(recorded())
	w.apply(fmt.Sprintf(plainPod, "plain"))
	w.pod("plain", "is ready", ready)
	if after := len(recorded()); after != before {
		w.t.Error("a plugin was called that is not configured any more")
	}
	w.delete("plain")
}

const daemonYAML = `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      terminationGracePeriodSeconds: 0
      tolerations: [{operator: Exists}]
      volumes: [{name: conf, hostPath: {path: /etc/cni/net.d}}]
      containers: [{name: c, image: shell, volumeMounts: [{name: conf, mountPath: /host/etc/cni/net.d}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: hosted}
spec:
  hostNetwork: true
  nodeName: n2
  terminationGracePeriodSeconds: 0
  containers:
  - {name: app, image: app, readinessProbe: {httpGet: {path: /health, port: 8080}, periodSeconds: 1}, securityContext: {privileged: true}}
`

func daemons(w *world) {
	w.apply(daemonYAML)
	var pods []corev1.Pod
	w.within(60*time.Second, "one daemon a node", func() (err error) {
		if pods, err = w.readyPods("app=agent"); err == nil && (len(pods) != 2 || pods[0].Spec.NodeName == pods[1].Spec.NodeName) {
			err = fmt.Errorf("%d pods", len(pods))
		}
		return err
	})
	w.exec(pods[0].Name, "c", "echo '{}' > /host/etc/cni/net.d/90-written")
	if _, err := os.Stat(filepath.Join(w.cni, "90-written")); err != nil {
		w.t.Error("hostPath of a daemon:", err)
	}
	hosted := w.pod("hosted", "is ready", ready)
	if hosted.Status.PodIP != hosted.Status.HostIP || hosted.Status.HostIP != w.c.Spec.Nodes[1].Address.String() {
		w.t.Errorf("addresses %v, node's %s", hosted.Status.PodIPs, hosted.Status.HostIP)
	}
	if got := w.exec("hosted", "app", "grep CapBnd /proc/self/status; hostname"); strings.Contains(got, "a80425fb") || !strings.HasSuffix(got, "\n") {
		w.t.Errorf("a privileged container has %s", got)
	}
	w.delete("hosted")
	must(w.t, w.client.AppsV1().DaemonSets("default").Delete(w.t.Context(), "agent", metav1.DeleteOptions{}))
}

func frozen(w *world) {
	w.apply(strings.Replace(fmt.Sprintf(plainPod, "iced"), "image: shell", "image: app", 1))
	pod := w.pod("iced", "is ready", ready)
	url := "http://" + pod.Status.PodIP + ":8080"
	w.within(10*time.Second, "it answers", func() error { _, err := w.get("", url); return err })
	must(w.t, w.n.Freeze(pod.Spec.NodeName))
	if body, err := w.get("", url); err == nil {
		w.t.Errorf("a frozen pod answers %q", body)
	}
	must(w.t, w.n.Thaw(pod.Spec.NodeName))
	w.within(10*time.Second, "it answers again", func() error { _, err := w.get("", url); return err })
	w.delete("iced")
}
