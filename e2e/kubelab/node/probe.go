package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// watch runs the container's start hook and probes until running ends.
func (c *container) watch(running, live context.Context, spec *corev1.Container, proc *box.Process) *sync.WaitGroup {
	var wait sync.WaitGroup
	hooked, started := make(chan struct{}), make(chan struct{})
	kill := func(why string) {
		if live.Err() != nil {
			return // it is ending anyway
		}
		c.w.event(corev1.EventTypeNormal, "Killing", fmt.Sprintf("Container %s %s, will be restarted", c.name, why))
		grace := c.w.grace()
		if p := spec.LivenessProbe; p != nil && p.TerminationGracePeriodSeconds != nil {
			grace = time.Duration(*p.TerminationGracePeriodSeconds) * time.Second
		}
		c.stop(running, grace)
	}
	if h := spec.Lifecycle; h != nil && h.PostStart != nil {
		wait.Go(func() {
			defer close(hooked)
			if err := c.hook(running, proc, h.PostStart); err != nil && running.Err() == nil {
				c.w.event(corev1.EventTypeWarning, "FailedPostStartHook", err.Error())
				kill("failed its start hook")
			}
		})
	} else {
		close(hooked)
	}
	wait.Go(func() {
		if spec.StartupProbe != nil && !c.untilStarted(running, spec.StartupProbe, proc, kill) {
			return
		}
		close(started)
		c.set(func() { c.started, c.ready = true, spec.ReadinessProbe == nil })
		if spec.LivenessProbe != nil {
			wait.Go(func() {
				c.repeat(running, "Liveness", spec.LivenessProbe, proc, false, func(ok bool) bool {
					if !ok {
						kill("failed liveness probe")
					}
					return ok
				})
			})
		}
		if spec.ReadinessProbe != nil {
			c.repeat(running, "Readiness", spec.ReadinessProbe, proc, true, func(ok bool) bool {
				if c.isReady() != ok && running.Err() == nil {
					c.set(func() { c.ready = ok })
				}
				return true
			})
		}
	})
	wait.Go(func() {
		for _, step := range []struct{ is, makes chan struct{} }{{hooked, c.attempted}, {started, c.up}} {
			select {
			case <-step.is:
				closeOnce(step.makes)
			case <-running.Done():
				return
			}
		}
	})
	return &wait
}

func (c *container) isReady() bool {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	return c.ready
}

// untilStarted reports whether the startup probe succeeded before it failed too often.
func (c *container) untilStarted(running context.Context, p *corev1.Probe, proc *box.Process, kill func(string)) (ok bool) {
	c.repeat(running, "Startup", p, proc, true, func(good bool) bool {
		if ok = good; !ok {
			kill("failed startup probe")
		}
		return false
	})
	return ok && running.Err() == nil
}

// repeat probes at the probe's period and reports each result that has come as often in a row as its threshold, until
// report returns false or ctx ends. An eager probe is repeated faster until it first succeeds; failures count once a
// period all the same.
func (c *container) repeat(ctx context.Context, kind string, p *corev1.Probe, proc *box.Process, eager bool, report func(ok bool) bool) {
	period := seconds(p.PeriodSeconds, 10)
	if !sleep(ctx, time.Duration(p.InitialDelaySeconds)*time.Second) {
		return
	}
	quick := min(50*time.Millisecond, period)
	var good, bad int32
	var counted time.Time
	for {
		begun := time.Now()
		err := c.try(ctx, p, proc)
		if ctx.Err() != nil {
			return
		}
		var carryOn = true
		switch {
		case err == nil:
			good, bad, eager = good+1, 0, false
			if good >= max(p.SuccessThreshold, 1) {
				carryOn = report(true)
			}
		case !eager || begun.Sub(counted) >= period:
			good, bad, counted = 0, bad+1, begun
			c.w.event(corev1.EventTypeWarning, "Unhealthy", kind+" probe failed: "+err.Error())
			threshold := p.FailureThreshold
			if threshold == 0 {
				threshold = 3
			}
			if bad >= threshold {
				carryOn = report(false)
			}
		}
		if !carryOn {
			return
		}
		pause := period
		if eager {
			pause, quick = quick, min(quick*3/2, period)
		}
		if !sleep(ctx, pause-min(time.Since(begun), pause)) {
			return
		}
	}
}

func seconds(n, otherwise int32) time.Duration {
	if n <= 0 {
		n = otherwise
	}
	return time.Duration(n) * time.Second
}

// try probes once.
func (c *container) try(ctx context.Context, p *corev1.Probe, proc *box.Process) error {
	ctx, cancel := context.WithTimeout(ctx, seconds(p.TimeoutSeconds, 1))
	defer cancel()
	switch {
	case p.Exec != nil:
		out, errOut, code, err := proc.Exec(ctx, p.Exec.Command, nil)
		if err == nil && code != 0 {
			err = fmt.Errorf("code %d: %s", code, lastLine(string(out)+string(errOut)))
		}
		return err
	case p.HTTPGet != nil:
		return c.httpGet(ctx, p.HTTPGet)
	case p.TCPSocket != nil:
		return c.tcp(ctx, p.TCPSocket)
	case p.GRPC != nil:
		return c.grpc(ctx, p.GRPC)
	}
	return errors.New("a probe of an unknown kind")
}

// address is where a probe goes: to a port of the Pod unless it names a host.
func (c *container) address(host string, port intstr.IntOrString) (string, error) {
	number := port.IntValue()
	if port.Type == intstr.String {
		for _, p := range c.spec().Ports {
			if p.Name == port.StrVal {
				number = int(p.ContainerPort)
			}
		}
	}
	if number < 1 || number > 65535 {
		return "", fmt.Errorf("container %s has no port %s", c.name, port.String())
	}
	if host == "" {
		c.w.mu.Lock()
		host = c.w.ips[0].String()
		c.w.mu.Unlock()
	}
	return net.JoinHostPort(host, strconv.Itoa(number)), nil
}

func (c *container) tcp(ctx context.Context, a *corev1.TCPSocketAction) error {
	address, err := c.address(a.Host, a.Port)
	if err != nil {
		return err
	}
	conn, err := c.w.n.router.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

func (c *container) httpGet(ctx context.Context, a *corev1.HTTPGetAction) error {
	address, err := c.address(a.Host, a.Port)
	if err != nil {
		return err
	}
	target, err := url.Parse(a.Path)
	if err != nil {
		target = &url.URL{Path: a.Path}
	}
	target.Scheme, target.Host = strings.ToLower(string(a.Scheme)), address
	if target.Scheme == "" {
		target.Scheme = "http"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "kube-probe/1.36")
	req.Header.Set("Accept", "*/*")
	for _, h := range a.HTTPHeaders {
		if strings.EqualFold(h.Name, "Host") {
			req.Host = h.Value
		} else {
			req.Header.Add(h.Name, h.Value)
		}
	}
	client := &http.Client{
		Transport: &http.Transport{
			DialContext: c.w.n.router.DialContext, DisableKeepAlives: true, DisableCompression: true,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // as kubelets probe
		},
		CheckRedirect: func(next *http.Request, via []*http.Request) error {
			if next.URL.Hostname() != target.Hostname() || len(via) >= 10 {
				return http.ErrUseLastResponse
			}
			return nil
		},
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 10<<10))
	if res.StatusCode < 200 || res.StatusCode >= 400 {
		return fmt.Errorf("HTTP probe failed with statuscode: %d", res.StatusCode)
	}
	return nil
}

func (c *container) grpc(ctx context.Context, a *corev1.GRPCAction) error {
	address, err := c.address("", intstr.FromInt32(a.Port))
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return c.w.n.router.DialContext(ctx, "tcp", address)
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	service := ""
	if a.Service != nil {
		service = *a.Service
	}
	res, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{Service: service})
	if err != nil {
		return err
	}
	if res.Status != healthv1.HealthCheckResponse_SERVING {
		return fmt.Errorf("service unhealthy (responded with %q)", res.Status)
	}
	return nil
}
