package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestServe(t *testing.T) {
	ports := make([]string, 2)
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, ports[i], _ = net.SplitHostPort(l.Addr().String())
		defer l.Close()
		_ = l.Close()
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- serve(ctx, who{App: "a", Version: "v2", Pod: "p"}, ports[:1], ports[1:], slog.New(slog.DiscardHandler))
	}()
	var resp *http.Response
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		req, _ := http.NewRequest(http.MethodGet, "http://127.0.0.1:"+ports[0]+"/status/503", nil)
		req.Header.Set("X-Forwarded-Client-Cert", "By=spiffe://x/y;URI=spiffe://td/ns/n/sa/s")
		var err error
		if resp, err = http.DefaultClient.Do(req); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer resp.Body.Close()
	var got who
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if want := (who{"a", "v2", "p", "spiffe://td/ns/n/sa/s"}); got != want || resp.StatusCode != 503 {
		t.Errorf("%d %+v, want 503 %+v", resp.StatusCode, got, want)
	}
	conn, err := net.Dial("tcp", "127.0.0.1:"+ports[1])
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintln(conn, "ping")
	r := bufio.NewReader(conn)
	line, _ := r.ReadString('\n')
	echo, err := r.ReadString('\n')
	if !strings.Contains(line, `"version":"v2"`) || echo != "ping\n" {
		t.Errorf("TCP says %q, %q (%v)", line, echo, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := r.ReadByte(); err != io.EOF && err == nil {
		t.Error("the connection outlives the server")
	}
}
