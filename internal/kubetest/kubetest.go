// Package kubetest runs a real Kubernetes API server for tests: etcd and kube-apiserver on loopback, role-based access
// control on, no nodes. What needs Pods that run is for the lab in e2e/kubelab.
package kubetest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/isthmus-mesh/isthmus/internal/kubeplane"
)

// Path returns the program that holds the control plane: the one that the environment's KUBE names, else the one that
// "make kube" built. Without either the test is skipped, or fails when REQUIRE_TOOLS is set, as "make test" does.
func Path(t testing.TB) string {
	t.Helper()
	_, here, _, _ := runtime.Caller(0)
	path := os.Getenv("KUBE")
	if path == "" {
		path = filepath.Join(filepath.Dir(here), "..", "..", "build", "bin", "kube")
	}
	if _, err := os.Stat(path); err == nil && !testing.Short() {
		return path
	}
	if os.Getenv("REQUIRE_TOOLS") != "" {
		t.Fatalf("no Kubernetes at %s: run make kube, or set KUBE", path)
	}
	t.Skipf("no Kubernetes at %s (make kube builds it), or -short", path)
	return ""
}

// Config says what a Server has beside the API.
type Config struct {
	// Controllers runs the controller manager, too: it makes the service accounts of namespaces, EndpointSlices of
	// Services, Pods of Deployments, and collects garbage. It costs a second and 120 MB.
	Controllers bool
}

// Server is an API server with its etcd. It ends with the test.
type Server struct {
	t     testing.TB
	path  string
	plane *kubeplane.Plane
	dir   string
	cfg   Config

	mu    sync.Mutex
	procs map[string]*process
}

// APIServer starts an API server without controllers; it answers when the call returns.
func APIServer(t testing.TB) *Server {
	t.Helper()
	return New(t, Config{})
}

// New starts an API server and waits until it answers.
func New(t testing.TB, cfg Config) *Server {
	t.Helper()
	s := &Server{t: t, path: Path(t), cfg: cfg, dir: t.TempDir(), procs: map[string]*process{}}
	t.Cleanup(s.end)
	var err error
	for range 3 { // another program may take the port before ours does
		if err = s.boot(); err == nil {
			return s
		}
		s.end()
	}
	t.Fatalf("start Kubernetes: %v", err)
	return nil
}

func (s *Server) boot() error {
	ports, err := freePorts(2)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(s.dir, "plane")
	if err != nil {
		return err
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	s.plane, err = kubeplane.New(kubeplane.Config{
		Name: "test", Dir: dir, Address: loopback, Port: ports[0],
		EtcdURL:      "http://" + netip.AddrPortFrom(loopback, ports[1]).String(),
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}, Controllers: s.cfg.Controllers,
	})
	if err != nil {
		return err
	}
	if err := s.run("etcd", s.plane.Etcd()); err != nil {
		return err
	}
	return s.start()
}

func (s *Server) start() error {
	if err := s.run("apiserver", s.plane.APIServer()); err != nil {
		return err
	}
	if err := s.ready(); err != nil {
		return err
	}
	if s.cfg.Controllers {
		return s.run("controller-manager", s.plane.ControllerManager())
	}
	return nil
}

// ready waits for /readyz and for the bootstrap roles, which are there a moment later.
func (s *Server) ready() error {
	client, err := kubernetes.NewForConfig(s.config(s.plane.Admin()))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	p := s.procs["apiserver"]
	for {
		err := client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("the API server ended: %s", p.tail())
		case <-ctx.Done():
			return fmt.Errorf("%w; its log ends: %s", err, p.tail())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Kubeconfig is the file of the administrator's kubeconfig.
func (s *Server) Kubeconfig() string { return s.plane.Admin() }

// REST returns the administrator's client configuration, a copy that may be changed.
func (s *Server) REST() *rest.Config { return s.config(s.plane.Admin()) }

// Client returns the administrator's client.
func (s *Server) Client() kubernetes.Interface {
	s.t.Helper()
	c, err := kubernetes.NewForConfig(s.REST())
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// User returns the client configuration of a user in groups, who may do what the roles bound to them allow.
func (s *Server) User(name string, groups ...string) *rest.Config {
	s.t.Helper()
	text, err := s.plane.Kubeconfig(s.plane.URL(), name, groups...)
	if err != nil {
		s.t.Fatal(err)
	}
	file := filepath.Join(s.t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return s.config(file)
}

// Token returns a token of a service account for the audiences, the API server itself when none is given. The account
// must exist. The token lasts an hour.
func (s *Server) Token(namespace, account string, audiences ...string) string {
	s.t.Helper()
	r, err := s.Client().CoreV1().ServiceAccounts(namespace).CreateToken(context.Background(), account,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: audiences}}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatalf("token of %s/%s: %v", namespace, account, err)
	}
	return r.Status.Token
}

// ServiceAccount returns the client configuration of a service account that exists.
func (s *Server) ServiceAccount(namespace, account string) *rest.Config {
	s.t.Helper()
	c := rest.AnonymousClientConfig(s.REST())
	c.BearerToken = s.Token(namespace, account)
	return c
}

func (s *Server) config(file string) *rest.Config {
	c, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		s.t.Fatal(err)
	}
	c.QPS, c.Burst = 500, 1000 // a test never waits for itself
	return c
}

// Stop ends the API server at once, as a crash does: connections break, and new ones are refused. Its data stays.
func (s *Server) Stop() { s.kill("controller-manager"); s.kill("apiserver") }

// Start starts the API server again at the same address after Stop, and waits until it answers.
func (s *Server) Start() {
	s.t.Helper()
	if err := s.start(); err != nil {
		s.t.Fatalf("start the API server again: %v", err)
	}
}

// Freeze stops the API server without closing anything: connections stay and nobody answers. Thaw undoes it.
func (s *Server) Freeze() { s.signal(syscall.SIGSTOP) }

// Thaw lets a frozen API server go on.
func (s *Server) Thaw() { s.signal(syscall.SIGCONT) }

func (s *Server) signal(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.procs["apiserver"]; p != nil {
		_ = p.cmd.Process.Signal(sig) // it may have ended
	}
}

func (s *Server) end() {
	for _, name := range []string{"controller-manager", "apiserver", "etcd"} {
		if p := s.procs[name]; p != nil && s.t.Failed() {
			s.t.Logf("the log of %s ends:\n%s", name, p.tail())
		}
		s.kill(name)
	}
}

// process is one program that runs; its log is a file.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

func (s *Server) run(name string, argv []string) error {
	p := &process{cmd: exec.Command(s.path, argv[1:]...), log: filepath.Join(s.dir, name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a killed test leaves nothing
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the signal is sent when this thread ends
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // how it ended is in its log
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	s.mu.Lock()
	s.procs[name] = p
	s.mu.Unlock()
	return nil
}

func (s *Server) kill(name string) {
	s.mu.Lock()
	p := s.procs[name]
	delete(s.procs, name)
	s.mu.Unlock()
	if p != nil {
		_ = p.cmd.Process.Kill() // it may have ended
		<-p.done
	}
}

func (p *process) tail() string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	return strings.TrimSpace(string(bytes.Join(lines[max(0, len(lines)-15):], []byte("\n"))))
}

// freePorts returns TCP ports of loopback that were free a moment ago.
func freePorts(n int) ([]uint16, error) {
	var out []uint16
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		out = append(out, netip.MustParseAddrPort(l.Addr().String()).Port())
	}
	return out, nil
}
