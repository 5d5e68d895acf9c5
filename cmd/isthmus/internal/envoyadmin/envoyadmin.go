// Package envoyadmin reads an Envoy's admin interface: at an address, or on the loopback of a Pod, by way of the API
// server. It only reads.
package envoyadmin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

const (
	// Port is where Envoys beside an isthmus-agent have their admin interface, on the loopback.
	Port = 15000
	// MaxBytes bounds an answer.
	MaxBytes = 256 << 20
	// patience bounds a question.
	patience = 30 * time.Second
)

// FromAddress asks the admin interface at HOST:PORT, or at the path of a unix socket.
func FromAddress(ctx context.Context, addr, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	network := "tcp"
	if strings.HasPrefix(addr, "/") {
		network = "unix"
	}
	web := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := web.Do(req)
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("ask Envoy at %s: %w", addr, err), "run this where the Envoy runs and name its admin address with --admin, or name a --context, or a dump with -f")
	}
	return body(resp)
}

// FromPod asks the admin interface of a Pod's Envoy through the API server, as kubectl port-forward does, without a port
// on this machine.
func FromPod(ctx context.Context, cfg *rest.Config, namespace, pod, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	type result struct {
		data []byte
		err  error
	}
	done := make(chan result, 1)
	ready := make(chan httpstream.Connection, 1)
	go func() { // what is below knows no context: its connection is closed when ctx ends
		data, err := fromPod(ctx, cfg, namespace, pod, path, ready)
		done <- result{data, err}
	}()
	select {
	case r := <-done:
		return r.data, r.err
	case <-ctx.Done():
		select {
		case conn := <-ready:
			conn.Close()
		default:
		}
		return nil, fmt.Errorf("ask the Envoy of pod %s/%s: %w", namespace, pod, ctx.Err())
	}
}

func fromPod(ctx context.Context, cfg *rest.Config, namespace, pod, path string, ready chan<- httpstream.Connection) ([]byte, error) {
	conn, err := dial(cfg, namespace, pod)
	if err != nil {
		err = fmt.Errorf("reach pod %s/%s: %w", namespace, pod, err)
		return nil, diag.Hint(err, "the right to create pods/portforward in namespace %s is needed, and a pod that runs: kubectl -n %s get pod %s", namespace, namespace, pod)
	}
	defer conn.Close()
	ready <- conn
	headers := http.Header{}
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	headers.Set(corev1.PortHeader, strconv.Itoa(Port))
	headers.Set(corev1.PortForwardRequestIDHeader, "0")
	failures, err := conn.CreateStream(headers)
	if err != nil {
		return nil, fmt.Errorf("reach pod %s/%s: %w", namespace, pod, err)
	}
	failures.Close() // for writing
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	stream, err := conn.CreateStream(headers)
	if err != nil {
		return nil, fmt.Errorf("reach pod %s/%s: %w", namespace, pod, err)
	}
	defer stream.Close()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1"+path, nil)
	if err != nil {
		return nil, err
	}
	req.Close = true
	if err := req.Write(stream); err != nil {
		return nil, fmt.Errorf("ask the Envoy of pod %s/%s: %w", namespace, pod, err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(stream), req)
	if err != nil {
		if said, _ := io.ReadAll(io.LimitReader(failures, 4096)); len(said) > 0 {
			err = errors.New(strings.TrimSpace(string(said)))
		}
		return nil, diag.Hint(fmt.Errorf("ask the Envoy of pod %s/%s: %w", namespace, pod, err), "the pod has a proxy if isthmus check-inject says so")
	}
	return body(resp)
}

// dial opens the way to a pod's ports: over a web socket, or for older API servers by SPDY.
func dial(cfg *rest.Config, namespace, pod string) (httpstream.Connection, error) {
	c := rest.CopyConfig(cfg)
	c.GroupVersion, c.APIPath, c.NegotiatedSerializer = &corev1.SchemeGroupVersion, "/api", scheme.Codecs.WithoutConversion()
	client, err := rest.RESTClientFor(c)
	if err != nil {
		return nil, err
	}
	url := client.Post().Resource("pods").Namespace(namespace).Name(pod).SubResource("portforward").URL()
	transport, upgrader, err := spdy.RoundTripperFor(c)
	if err != nil {
		return nil, err
	}
	overSocket, err := portforward.NewSPDYOverWebsocketDialer(url, c)
	if err != nil {
		return nil, err
	}
	old := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, url)
	conn, _, err := portforward.NewFallbackDialer(overSocket, old, func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	}).Dial(portforward.PortForwardProtocolV1Name)
	return conn, err
}

func body(resp *http.Response) ([]byte, error) {
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, MaxBytes+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read Envoy's answer: %w", err)
	case len(data) > MaxBytes:
		return nil, fmt.Errorf("read Envoy's answer: it is over %d MiB", MaxBytes>>20)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("Envoy answers %s", resp.Status)
	}
	return data, nil
}
