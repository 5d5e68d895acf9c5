// Command hello is a server that says who it is, over HTTP/1.1, HTTP/2 and plain TCP: the stand-in for the sample
// applications that meshes are tried with.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// who is what every answer says.
type who struct {
	App     string `json:"app"`
	Version string `json:"version"`
	Pod     string `json:"pod"`
	Caller  string `json:"caller,omitempty"` // SPIFFE id of the peer, from X-Forwarded-Client-Cert
}

func main() {
	app := flag.String("app", "hello", "name in answers")
	ports := flag.String("http", "5000", "ports for HTTP, with commas between")
	tcp := flag.String("tcp", "", "ports for TCP: a line of JSON on each connection, then an echo of what comes")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), "hello [--app NAME] [--http PORTS] [--tcp PORTS]\n\n",
			"GET /headers answers the request's headers, /status/CODE that status, /delay/DURATION late, everything else who answers.\n",
			"Environment: VERSION (default v1), POD_NAME (default HOSTNAME)\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	w := who{App: *app, Version: first(os.Getenv("VERSION"), "v1"), Pod: first(os.Getenv("POD_NAME"), os.Getenv("HOSTNAME"))}
	if err := serve(ctx, w, list(*ports), list(*tcp), log); err != nil {
		log.Error("hello ended", "err", err)
		os.Exit(1)
	}
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func list(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// serve answers on all ports until ctx ends.
func serve(ctx context.Context, w who, web, tcp []string, log *slog.Logger) error {
	server := &http.Server{Handler: w, ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wait sync.WaitGroup
	for _, port := range append(web, tcp...) {
		l, err := net.Listen("tcp", ":"+port)
		if err != nil {
			cancel(err)
			break
		}
		context.AfterFunc(ctx, func() { _ = l.Close() })
		log.Info("listening", "address", l.Addr().String())
		plain := wait.Go
		if len(web) > 0 {
			web = web[1:]
			plain(func() {
				if err := server.Serve(l); err != nil && ctx.Err() == nil {
					cancel(err)
				}
			})
			continue
		}
		plain(func() { w.lines(ctx, l) })
	}
	<-ctx.Done()
	end, stop := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer stop()
	_ = server.Shutdown(end) // what is open after that breaks
	wait.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func (w who) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	for part := range strings.SplitSeq(r.Header.Get("X-Forwarded-Client-Cert"), ";") {
		if uri, ok := strings.CutPrefix(part, "URI="); ok {
			w.Caller = uri
		}
	}
	verb, arg, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	code := http.StatusOK
	var out any = w
	switch verb {
	case "headers":
		out = r.Header
	case "status":
		if n, err := strconv.Atoi(arg); err == nil && n >= 200 && n < 600 {
			code = n
		}
	case "delay":
		if d, err := time.ParseDuration(arg); err == nil {
			select {
			case <-time.After(min(d, time.Minute)):
			case <-r.Context().Done():
				return
			}
		}
	}
	rw.Header().Set("Content-Type", "application/json")
	rw.WriteHeader(code)
	_ = json.NewEncoder(rw).Encode(out) // the client may be gone
}

// lines serves plain TCP: who answers, then what the client sends.
func (w who) lines(ctx context.Context, l net.Listener) {
	var wait sync.WaitGroup
	defer wait.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		wait.Go(func() {
			defer conn.Close()
			stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
			defer stop()
			if json.NewEncoder(conn).Encode(w) != nil {
				return
			}
			for s := bufio.NewScanner(conn); s.Scan(); {
				if _, err := fmt.Fprintf(conn, "%s\n", s.Bytes()); err != nil {
					return
				}
			}
		})
	}
}
