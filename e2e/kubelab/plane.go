package kubelab

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/google/nftables"
	"k8s.io/client-go/kubernetes"

	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

// APIServer is a cluster's API server with the programs that serve it.
type APIServer struct {
	c     *Cluster
	procs map[string]*lab.Proc
}

// startPlane starts the programs of the control plane and waits until the API server answers.
func (c *Cluster) startPlane(ctx context.Context) (*APIServer, error) {
	a := &APIServer{c: c, procs: map[string]*lab.Proc{}}
	if err := a.run("etcd", c.plane.Etcd()); err != nil {
		return nil, err
	}
	return a, a.Start(ctx)
}

func (a *APIServer) run(name string, argv []string) error {
	p, err := a.c.lab.net.Launch(lab.Spec{Node: a.c.Control, Name: name, Argv: argv})
	if err == nil {
		a.procs[name] = p
	}
	return err
}

// Start starts the API server, again after Stop, and waits until it answers. Nothing is started twice.
func (a *APIServer) Start(ctx context.Context) error {
	c := a.c
	parts := []struct {
		name string
		argv []string
	}{{"apiserver", c.plane.APIServer()}, {"controller-manager", c.plane.ControllerManager()}}
	if c.lab.cfg.Scheduler {
		parts = append(parts, struct {
			name string
			argv []string
		}{"scheduler", c.plane.Scheduler()})
	}
	for _, p := range parts {
		if old := a.procs[p.name]; old != nil && old.Alive() {
			continue
		}
		if err := a.run(p.name, p.argv); err != nil {
			return err
		}
		if p.name == "apiserver" { // the others would give up without it
			if err := a.ready(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// ready waits until the API server says that it is, and fails at once when it ends.
func (a *APIServer) ready(ctx context.Context) error {
	client, err := kubernetes.NewForConfig(a.c.REST())
	if err != nil {
		return err
	}
	p := a.procs["apiserver"]
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err = lab.Eventually(ctx, a.c.lab.cfg.Ready, func(ctx context.Context) error {
		if !p.Alive() {
			cancel()
			return errors.New("it ended")
		}
		return client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
	if err != nil {
		return fmt.Errorf("API server: %w; the end of %s:\n%s", err, p.Log, p.Tail(15))
	}
	return nil
}

// Stop ends the API server at once, as a crash does: connections break, and new ones are refused. Its data stays.
func (a *APIServer) Stop(ctx context.Context) error {
	for _, name := range []string{"scheduler", "controller-manager", "apiserver"} {
		p := a.procs[name]
		if p == nil {
			continue
		}
		if err := p.Kill(syscall.SIGKILL); err != nil {
			return err
		}
		if _, err := p.Wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Freeze stops the API server without closing anything: connections stay and nobody answers.
func (a *APIServer) Freeze() error { return a.procs["apiserver"].Kill(syscall.SIGSTOP) }

// Thaw lets a frozen API server go on.
func (a *APIServer) Thaw() error { return a.procs["apiserver"].Kill(syscall.SIGCONT) }

// Cut makes all packets to the API server vanish, from Pods, nodes and other clusters; the test's own connections, which
// start beside it, stay.
func (a *APIServer) Cut() error { return a.cutting(true) }

// Heal undoes Cut. It is no error when nothing is cut.
func (a *APIServer) Heal() error { return a.cutting(false) }

func (a *APIServer) cutting(cut bool) error {
	a.c.lab.mu.Lock()
	defer a.c.lab.mu.Unlock()
	r, err := rulesIn(a.c.Control, tableCut)
	if err != nil {
		return err
	}
	chain := r.chain("apiserver", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	r.conn.FlushChain(chain)
	if cut {
		r.add(chain, notFrom("lo"), tcpPort(apiPort), drop())
	}
	return r.flush(a.c.Control.Name)
}
