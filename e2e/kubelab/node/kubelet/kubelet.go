// Package kubelet serves the part of a kubelet's own API that kubectl logs, exec and port-forward need; the API server
// calls it, with a client certificate. It knows Pods by the interface that it is given.
package kubelet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// Port is a kubelet's.
const Port = 10250

// Pods is what runs on the nodes.
type Pods interface {
	// Attach runs a program in a container, "" being the first, with these streams.
	Attach(ctx context.Context, namespace, pod, container string, argv []string, io box.Streams) (code int, err error)
	// Log is the file with what a container printed.
	Log(namespace, pod, container string) (string, error)
	// NetNS is a Pod's network.
	NetNS(namespace, pod string) (*box.NetNS, error)
}

// Server serves one address.
type Server struct {
	pods     Pods
	listener net.Listener
	config   *tls.Config
}

// New returns a server for a listener, which it closes in the end. The configuration says which clients may call.
func New(pods Pods, l net.Listener, config *tls.Config) *Server {
	config = config.Clone()
	config.NextProtos = []string{"http/1.1"} // streams take over the connection
	return &Server{pods: pods, listener: l, config: config}
}

// Run serves until ctx ends; then open streams break.
func (s *Server) Run(ctx context.Context) error {
	mux := http.NewServeMux()
	for _, uid := range []string{"", "{uid}/"} {
		mux.HandleFunc("/exec/{namespace}/{pod}/"+uid+"{container}", s.exec)
	}
	mux.HandleFunc("/portForward/{namespace}/{pod}", s.portForward)
	mux.HandleFunc("/portForward/{namespace}/{pod}/{uid}", s.portForward)
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", s.logs)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(tls.NewListener(s.listener, s.config)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("kubelet at %s: %w", s.listener.Addr(), err)
	}
	return nil
}

const (
	idle    = 4 * time.Hour
	opening = 30 * time.Second
)

func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	o, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	e := executor{pods: s.pods, namespace: r.PathValue("namespace")}
	remotecommand.ServeExec(w, r, e, r.PathValue("pod"), "", r.PathValue("container"), r.URL.Query()["command"], o,
		idle, opening, remotecommand.SupportedStreamingProtocols)
}

// executor runs programs in one namespace's Pods.
type executor struct {
	pods      Pods
	namespace string
}

// ExecInContainer is called with the streams that the client opened.
func (e executor) ExecInContainer(ctx context.Context, name, _, container string, cmd []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	streams := box.Streams{Terminal: tty}
	if in != nil {
		streams.In = in
	}
	if out != nil {
		streams.Out = out
	}
	if errOut != nil {
		streams.Err = errOut
	}
	if tty {
		sizes := make(chan box.Size)
		streams.Sizes = sizes
		done := make(chan struct{})
		defer close(done)
		go func() {
			for z := range resize {
				select {
				case sizes <- box.Size{Width: z.Width, Height: z.Height}:
				case <-done:
					return
				}
			}
		}()
	}
	code, err := e.pods.Attach(ctx, e.namespace, name, container, cmd, streams)
	if err == nil && code != 0 {
		err = utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: code}
	}
	return err
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request) {
	o, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	f := forwarder{pods: s.pods, namespace: r.PathValue("namespace")}
	portforward.ServePortForward(w, r, f, r.PathValue("pod"), r.PathValue("uid"), o, idle, opening, portforward.SupportedProtocols)
}

// forwarder reaches ports of one namespace's Pods.
type forwarder struct {
	pods      Pods
	namespace string
}

// PortForward carries one connection to a port of a Pod's loopback.
func (f forwarder) PortForward(ctx context.Context, name, _ string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	ns, err := f.pods.NetNS(f.namespace, name)
	if err != nil {
		return err
	}
	conn, err := ns.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, stream)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(stream, conn)
	return err
}

// logs answers what a container printed. Lines have no times here, so what asks for times gets all.
func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	path, err := s.pods.Log(r.PathValue("namespace"), r.PathValue("pod"), r.PathValue("container"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	f, err := os.Open(path)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer f.Close()
	q := r.URL.Query()
	if n, err := strconv.ParseInt(q.Get("tailLines"), 10, 64); err == nil {
		if err := seekTail(f, n); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	limit := int64(1) << 40
	if n, err := strconv.ParseInt(q.Get("limitBytes"), 10, 64); err == nil && n > 0 {
		limit = n
	}
	w.Header().Set("Content-Type", "text/plain")
	flush := http.NewResponseController(w)
	for follow := q.Get("follow") == "true"; ; {
		n, err := io.Copy(w, io.LimitReader(f, limit))
		if limit -= n; err != nil || limit <= 0 || !follow {
			return
		}
		_ = flush.Flush() // a client that is gone ends the request
		select {
		case <-r.Context().Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// seekTail moves to where the last n lines begin, reading backwards.
func seekTail(f io.ReadSeeker, n int64) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	const block = 32 << 10
	buf := make([]byte, block)
	var lines int64
	for at := end; at > 0; {
		size := min(block, at)
		at -= size
		if _, err := f.Seek(at, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.ReadFull(f, buf[:size]); err != nil {
			return err
		}
		for i := size - 1; i >= 0; i-- {
			if buf[i] != '\n' || at+i == end-1 { // the last line's own end begins nothing
				continue
			}
			if lines++; lines == n || n <= 0 {
				_, err := f.Seek(at+i+1, io.SeekStart)
				return err
			}
		}
	}
	offset := int64(0)
	if n <= 0 {
		offset = end
	}
	_, err = f.Seek(offset, io.SeekStart)
	return err
}
