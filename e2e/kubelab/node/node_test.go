package node_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// One cluster serves all: it takes ten seconds to start.
func TestNode(t *testing.T) {
	w := cluster(t)
	for _, test := range []struct {
		name string
		run  func(*world)
	}{
		{"deployment and services", deployment},
		{"volumes and environment", volumes},
		{"order of containers", order},
		{"probes", probes},
		{"restarts and ends", restarts},
		{"network plugins", plugins},
		{"services from outside", outside},
		{"endpoints outside and traffic policies", endpoints},
		{"host network and daemons", daemons},
		{"frozen node", frozen},
	} {
		t.Run(test.name, func(t *testing.T) {
			sub := *w
			sub.t = t
			test.run(&sub)
		})
	}
}

const webYAML = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 0
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - name: app
        image: example.org/app:v1
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /health, port: http}, periodSeconds: 1, failureThreshold: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
`

func deployment(w *world) {
	w.apply(webYAML)
	w.scale("web", 3)
	var pods []corev1.Pod
	w.within(60*time.Second, "three pods are ready", func() error {
		var err error
		pods, err = w.readyPods("app=web")
		if err == nil && len(pods) != 3 {
			err = fmt.Errorf("%d pods", len(pods))
		}
		return err
	})
	on := map[string]int{}
	for _, p := range pods {
		on[p.Spec.NodeName]++
		if len(p.Status.PodIPs) != 2 || p.Status.HostIP == "" || p.Status.ContainerStatuses[0].State.Running == nil {
			w.t.Errorf("status of %s: %+v", p.Name, p.Status)
		}
	}
	if len(on) != 2 {
		w.t.Errorf("pods are on %v", on)
	}
	svc, err := w.client.CoreV1().Services("default").Get(w.t.Context(), "web", metav1.GetOptions{})
	must(w.t, err)
	if len(svc.Spec.ClusterIPs) != 2 {
		w.t.Fatalf("cluster addresses %v", svc.Spec.ClusterIPs)
	}
	for i, ip := range svc.Spec.ClusterIPs {
		url := "http://" + net.JoinHostPort(ip, "80")
		// From a pod every pod answers in turn, the caller included, and sees who called.
		caller, callerIP := pods[0], pods[0].Status.PodIPs[i].IP
		answered := map[string]bool{}
		w.within(20*time.Second, "all pods answer at "+url, func() error {
			body, err := w.get(caller.Name, url)
			if err != nil {
				return err
			}
			name, from, _ := strings.Cut(body, " ")
			if (name != caller.Name) != (strings.TrimPrefix(from, "::ffff:") == callerIP) {
				w.t.Errorf("%s was called by %s, not by %s %s", name, from, caller.Name, callerIP)
			}
			answered[name] = true
			if len(answered) < 3 {
				return fmt.Errorf("only %v", answered)
			}
			return nil
		})
		for _, from := range []string{"", "control"} {
			if i == 1 && from == "control" {
				continue // its network has no IPv6
			}
			if _, err := w.get(from, url); err != nil {
				w.t.Errorf("from the router or control plane (%q): %v", from, err)
			}
		}
	}
	w.scale("web", 1)
	w.within(60*time.Second, "one pod is left", func() error {
		list, err := w.client.CoreV1().Pods("default").List(w.t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
		if err == nil && len(list.Items) != 1 {
			err = fmt.Errorf("%d pods", len(list.Items))
		}
		return err
	})
	for range 20 {
		if _, err := w.get("", "http://"+svc.Spec.ClusterIP); err != nil {
			w.t.Error("one endpoint left:", err)
		}
	}
	w.scale("web", 0)
	w.within(60*time.Second, "the service refuses", func() error {
		begun := time.Now()
		if _, err := w.get("", "http://"+svc.Spec.ClusterIP); err == nil {
			return fmt.Errorf("somebody answers")
		} else if !strings.Contains(err.Error(), "refused") && !strings.Contains(err.Error(), "unreachable") {
			return err
		}
		w.t.Logf("refused after %v", time.Since(begun))
		return nil
	})
	must(w.t, w.client.AppsV1().Deployments("default").Delete(w.t.Context(), "web", metav1.DeleteOptions{}))
}

func (w *world) scale(name string, n int32) {
	w.t.Helper()
	_, err := w.client.AppsV1().Deployments("default").Patch(w.t.Context(), name, types.MergePatchType,
		[]byte(fmt.Sprintf(`{"spec":{"replicas":%d}}`, n)), metav1.PatchOptions{})
	must(w.t, err)
}

func (w *world) readyPods(selector string) ([]corev1.Pod, error) {
	list, err := w.client.CoreV1().Pods("default").List(w.t.Context(), metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, err
	}
	var out []corev1.Pod
	for _, p := range list.Items {
		if ready(&p) && p.DeletionTimestamp == nil {
			out = append(out, p)
		}
	}
	return out, nil
}

const everyVolume = `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: blue, SIZE: "7"}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {password: "s3cret", USER: anna}
---
apiVersion: v1
kind: Pod
metadata: {name: all, labels: {app: all, tier: "one"}, annotations: {note: "first \"words\""}}
spec:
  nodeSelector: {topology.kubernetes.io/zone: b}
  hostAliases: [{ip: 10.9.9.9, hostnames: [far.example]}]
  dnsConfig: {options: [{name: ndots, value: "2"}], searches: [extra.example]}
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 2000}
  containers:
  - name: main
    image: shell
    command: [sh, -c, 'echo started "$0" "$1" with $GREETING; exec sleep 100000']
    args: [$(GREETING), $$(GREETING)-$(NOBODY)]
    securityContext: {runAsUser: 1337, runAsGroup: 1338}
    resources: {limits: {cpu: 1500m, memory: 64Mi}}
    envFrom:
    - configMapRef: {name: settings}
      prefix: P_
    - secretRef: {name: keys}
    - secretRef: {name: none, optional: true}
    env:
    - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: HOST_IP, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: APP, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
    - {name: MEMORY, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    - {name: COLOR, valueFrom: {configMapKeyRef: {name: settings, key: color}}}
    - {name: PASSWORD, valueFrom: {secretKeyRef: {name: keys, key: password}}}
    - {name: GREETING, value: "hello-$(POD_NAME)"}
    volumeMounts:
    - {name: config, mountPath: /etc/config}
    - {name: one, mountPath: /etc/one-file, subPath: color}
    - {name: secret, mountPath: /etc/keys, readOnly: true}
    - {name: podinfo, mountPath: /etc/istio/pod}
    - {name: token, mountPath: /var/run/secrets/tokens}
    - {name: scratch, mountPath: /scratch}
    - {name: node, mountPath: /node}
  - name: side
    image: shell
    volumeMounts:
    - {name: scratch, mountPath: /other}
    - {name: scratch, mountPath: /deep/er, subPath: sub/folder}
  volumes:
  - {name: config, configMap: {name: settings}}
  - {name: one, configMap: {name: settings}}
  - {name: secret, secret: {secretName: keys, defaultMode: 0400, items: [{key: password, path: deep/pw}]}}
  - name: podinfo
    downwardAPI:
      items:
      - {path: labels, fieldRef: {fieldPath: metadata.labels}}
      - {path: annotations, fieldRef: {fieldPath: metadata.annotations}}
  - name: token
    projected:
      sources:
      - serviceAccountToken: {path: istio-token, audience: istio-ca, expirationSeconds: 3600}
      - configMap: {name: settings, items: [{key: color, path: colour}]}
      - downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}
  - {name: scratch, emptyDir: {}}
  - {name: node, hostPath: {path: /var/lib/things, type: DirectoryOrCreate}}
`

func volumes(w *world) {
	w.apply(everyVolume)
	pod := w.pod("all", "is ready", ready)
	if pod.Spec.NodeName != "n2" {
		w.t.Errorf("on node %s", pod.Spec.NodeName)
	}
	check := func(script, want string) {
		w.t.Helper()
		if got := w.exec("all", "main", script); got != want {
			w.t.Errorf("%s\n got: %q\nwant: %q", script, got, want)
		}
	}
	check("id -u; id -g; id -G; hostname", "1337\n1338\n1338 2000\nall\n")
	check("echo $P_color $P_SIZE $USER $COLOR $PASSWORD $GREETING $APP $NODE $CPU $MEMORY", "blue 7 anna blue s3cret hello-all all n2 2 64\n")
	check("echo $POD_IP $HOST_IP", pod.Status.PodIP+" "+pod.Status.HostIP+"\n")
	check("cat /etc/config/color /etc/one-file /etc/keys/deep/pw /var/run/secrets/tokens/colour /var/run/secrets/tokens/name", "blueblues3cretblueall")
	check("grep -v topology.kubernetes.io /etc/istio/pod/labels; cat /etc/istio/pod/annotations", "app=\"all\"\ntier=\"one\"\nnote=\"first \\\"words\\\"\"")
	check("grep -c . /var/run/secrets/tokens/istio-token; ls /var/run/secrets/kubernetes.io/serviceaccount", "1\nca.crt\nnamespace\ntoken\n")
	check("touch /etc/keys/x 2>/dev/null || echo no; echo hi > /scratch/from-main; ls /node", "no\n")
	check("grep far.example /etc/hosts; grep -c \"$POD_IP.all\" /etc/hosts", "10.9.9.9\tfar.example\n1\n")
	check("grep -v nameserver /etc/resolv.conf", "search default.svc.cluster.local svc.cluster.local cluster.local extra.example\noptions ndots:2\n")
	if got := w.exec("all", "side", "cat /other/from-main; ls -d /other/sub/folder; touch /deep/er/x; ls /other/sub/folder; grep CapEff /proc/self/status"); got != "hi\n/other/sub/folder\nx\nCapEff:\t00000000a80425fb\n" {
		w.t.Errorf("the other container sees %q", got)
	}
	log, _ := os.ReadFile(filepath.Join(w.logs, "default_all", "main.log"))
	if want := "started hello-all $(GREETING)-$(NOBODY) with hello-all\n"; string(log) != want {
		w.t.Errorf("log %q, want %q", log, want)
	}

	// What volumes are made of changes, and they with it.
	ctx := w.t.Context()
	_, err := w.client.CoreV1().ConfigMaps("default").Patch(ctx, "settings", types.MergePatchType, []byte(`{"data":{"color":"red","new":"1"}}`), metav1.PatchOptions{})
	must(w.t, err)
	_, err = w.client.CoreV1().Pods("default").Patch(ctx, "all", types.MergePatchType, []byte(`{"metadata":{"labels":{"tier":"two"}}}`), metav1.PatchOptions{})
	must(w.t, err)
	token := w.exec("all", "main", "cat /var/run/secrets/tokens/istio-token")
	must(w.t, w.n.RotateTokens("default", "all"))
	w.within(20*time.Second, "volumes follow", func() error {
		got := w.exec("all", "main", "cat /etc/config/color /etc/config/new /var/run/secrets/tokens/colour; grep tier /etc/istio/pod/labels; cat /etc/one-file")
		if want := "red1redtier=\"two\"\nblue"; got != want {
			return fmt.Errorf("%q, want %q", got, want)
		}
		if w.exec("all", "main", "cat /var/run/secrets/tokens/istio-token") == token {
			return fmt.Errorf("the old token")
		}
		return nil
	})
	must(w.t, w.n.CheckNetwork(ctx, "default", "all"))
	w.delete("all")
}
