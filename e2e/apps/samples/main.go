// Command samples stands in for the images of Istio's sample applications, so that YAML written for them runs in the
// lab unchanged: bookinfo's four services, helloworld, httpbin and sleep. They answer as the originals do where a check
// looks, and say in JSON who answered and whom they saw calling.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

const usage = `samples APP [flags]

APP is productpage, details, reviews, ratings, helloworld, httpbin or sleep.
The pod's name is $POD_NAME, else $HOSTNAME. productpage and reviews find the others
as bookinfo does: DETAILS_HOSTNAME, REVIEWS_HOSTNAME, RATINGS_HOSTNAME, SERVICES_DOMAIN.

`

func main() {
	f := flag.NewFlagSet("samples", flag.ExitOnError)
	port := f.Int("port", 0, "port to listen on; default the original's")
	version := f.String("version", "v1", "version that it says it is")
	stars := f.String("stars", "", "reviews: colour of the stars; empty: none are asked for")
	f.Usage = func() { fmt.Fprint(f.Output(), usage); f.PrintDefaults() }
	if len(os.Args) < 2 || strings.HasPrefix(os.Args[1], "-") {
		f.Usage()
		os.Exit(2)
	}
	_ = f.Parse(os.Args[2:])
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	app := os.Args[1]
	if app == "sleep" {
		<-ctx.Done()
		return
	}
	s := &service{app: app, version: *version, stars: *stars, pod: first(os.Getenv("POD_NAME"), os.Getenv("HOSTNAME")), client: &http.Client{Timeout: 10 * time.Second,
		Transport: &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second}}}
	h, err := s.handler()
	if err == nil {
		if *port == 0 {
			*port = ports[app]
		}
		err = serve(ctx, fmt.Sprintf(":%d", *port), h)
	}
	if err != nil {
		slog.Error("sample ended", "app", app, "err", err)
		os.Exit(1)
	}
}

// ports are those of the originals.
var ports = map[string]int{"productpage": 9080, "details": 9080, "reviews": 9080, "ratings": 9080, "helloworld": 5000, "httpbin": 80}

func first(values ...string) string {
	i := slices.IndexFunc(values, func(s string) bool { return s != "" })
	if i < 0 {
		return ""
	}
	return values[i]
}

func serve(ctx context.Context, address string, h http.Handler) error {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{Addr: address, Handler: h, ReadHeaderTimeout: 10 * time.Second, Protocols: &protocols}
	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		done <- srv.Shutdown(end)
	}()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-done
}
