package operator

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Waiting answers on the socket before there is anything to answer with: status says why.
type Waiting struct {
	srv    *http.Server
	status atomic.Pointer[admin.Status]
	ended  chan struct{}
}

// Wait begins to answer, until Close.
func Wait(socket string, log *slog.Logger) (*Waiting, error) {
	l, err := listen(socket)
	if err != nil {
		if diag.HintOf(err) == "" {
			err = diag.Hint(err, "name another admin.socket, in a folder that isthmusd may write to")
		}
		return nil, err
	}
	w := &Waiting{ended: make(chan struct{})}
	w.Say(admin.Status{})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(out http.ResponseWriter, _ *http.Request) {
		out.Header().Set("content-type", "application/json")
		_ = json.NewEncoder(out).Encode(w.status.Load())
	})
	mux.HandleFunc("/", func(out http.ResponseWriter, _ *http.Request) {
		fail(out, http.StatusServiceUnavailable, &admin.Error{Reason: "NotReady", Message: "isthmusd has not begun to serve yet", Hint: "isthmus status says what it waits for"})
	})
	w.srv = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		defer close(w.ended)
		if err := w.srv.Serve(l); err != http.ErrServerClosed { //nolint:errorlint // as it is documented
			log.Error("the admin socket is lost", "part", "operator", "err", err)
		}
	}()
	return w, nil
}

// Say sets the status.
func (w *Waiting) Say(s admin.Status) {
	s.Gateways, s.Peers, s.Exports, s.Imports, s.Proxies, s.Machines = []string{}, []admin.Peer{}, []admin.Service{}, []admin.Service{}, []admin.Proxy{}, []admin.Machine{}
	if s.Problems == nil {
		s.Problems = []admin.ProblemLine{}
	}
	w.status.Store(&s)
}

// Close ends it and gives the socket free. nil is ended.
func (w *Waiting) Close() {
	if w != nil {
		w.srv.Close()
		<-w.ended
	}
}
