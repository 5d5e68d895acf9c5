package appstatus

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/expfmt"
)

const (
	maxScrapes    = 2        // at once
	maxMetrics    = 64 << 20 // bytes taken from one source
	scrapeTimeout = 30 * time.Second
	textFormat    = "text/plain; version=0.0.4; charset=utf-8"
)

// scrapeClient reaches Envoy and the application in the same Pod.
var scrapeClient = &http.Client{
	Transport:     &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10, DialContext: (&net.Dialer{Timeout: 2 * time.Second}).DialContext},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// metrics writes what each source has. One that fails is left out, counted, and logged.
func (s *Server) metrics(w http.ResponseWriter, r *http.Request) {
	select {
	case s.scrapes <- struct{}{}:
		defer func() { <-s.scrapes }()
	case <-r.Context().Done():
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), scrapeTimeout)
	defer cancel()
	var out bytes.Buffer
	for _, x := range []struct {
		name string
		get  func(context.Context, *bytes.Buffer) error
	}{{"envoy", s.envoyMetrics}, {"application", s.appMetrics}, {"agent", s.ownMetrics}} {
		length := out.Len()
		if err := x.get(ctx, &out); err != nil {
			out.Truncate(length)
			s.failures.WithLabelValues(x.name).Inc()
			s.c.Log.Warn("metrics are missing from a scrape", "source", x.name, "err", err)
		}
	}
	w.Header().Set("Content-Type", textFormat)
	_, _ = w.Write(out.Bytes()) // a Prometheus that went away needs no answer
}

func (s *Server) ownMetrics(_ context.Context, out *bytes.Buffer) error {
	families, err := s.c.Reg.Gather()
	if err != nil {
		return err
	}
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(out, f); err != nil {
			return err
		}
	}
	return nil
}

// envoyMetrics names Istio's metrics as Istio does: Envoy puts its own prefix before each.
func (s *Server) envoyMetrics(ctx context.Context, out *bytes.Buffer) error {
	if s.c.StatsPort == 0 {
		return nil
	}
	var in bytes.Buffer
	if err := fetch(ctx, "http://127.0.0.1:"+strconv.Itoa(s.c.StatsPort)+"/stats/prometheus", &in); err != nil {
		return err
	}
	for line := range bytes.Lines(in.Bytes()) {
		if rest, ok := bytes.CutPrefix(line, []byte("envoy_istio_")); ok {
			out.WriteString("istio_")
			line = rest
		} else if rest, ok := bytes.CutPrefix(line, []byte("# TYPE envoy_istio_")); ok {
			out.WriteString("# TYPE istio_")
			line = rest
		}
		out.Write(line)
	}
	return nil
}

func (s *Server) appMetrics(ctx context.Context, out *bytes.Buffer) error {
	a := s.c.Scrape
	if a == nil || a.Scrape != "true" {
		return nil
	}
	port := a.Port
	if port == "" {
		port = "80"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || int(n) == s.c.Port {
		return fmt.Errorf("annotation prometheus.io/port: %.32q is no port of the application", port)
	}
	path, query, _ := strings.Cut(a.Path, "?")
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	var err error
	for _, host := range []string{"localhost", s.c.Address} { // either may be the only one it listens on
		u := url.URL{Scheme: "http", Host: net.JoinHostPort(host, port), Path: path, RawQuery: query}
		if err = fetch(ctx, u.String(), out); err == nil {
			return nil
		}
	}
	return err
}

// fetch appends the lines of a page, which end with a line break and without the mark of OpenMetrics' end.
func fetch(ctx context.Context, from string, out *bytes.Buffer) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	r.Header.Set("Accept", "text/plain;version=0.0.4;q=1,*/*;q=0.1")
	resp, err := scrapeClient.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", from, resp.Status)
	}
	var body bytes.Buffer
	n, err := io.Copy(&body, io.LimitReader(resp.Body, maxMetrics+1))
	if err != nil {
		return err
	}
	if n > maxMetrics {
		return errors.New("over " + strconv.Itoa(maxMetrics) + " bytes")
	}
	text := bytes.TrimRight(body.Bytes(), "\n")
	text = bytes.TrimRight(bytes.TrimSuffix(text, []byte("# EOF")), "\n")
	if len(text) > 0 {
		out.Write(text)
		out.WriteByte('\n')
	}
	return nil
}
