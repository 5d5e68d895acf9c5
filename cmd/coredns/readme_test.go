package main

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/miekg/dns"
)

// TestPages: every Corefile on the pages starts, and answers for its zones before there are data.
func TestPages(t *testing.T) {
	dnsserver.Directives = ordered(dnsserver.Directives)
	dnsserver.Quiet = true
	dir := t.TempDir()
	for page, want := range map[string]int{"../../dns/plugin/README.md": 3, "../../docs/guide/coredns.md": 1} {
		files := corefiles(t, page)
		if len(files) != want {
			t.Errorf("%s: %d Corefiles, want %d", page, len(files), want)
		}
		for _, file := range files {
			t.Run(filepath.Base(page), func(t *testing.T) {
				// What is the machine's own is moved: files, ports.
				file = strings.NewReplacer("/var/lib/isthmus", dir, "localhost:9153", "localhost:0", ":53 ", ":0 ", ". {", ".:0 {", "partner.example {", "partner.example:0 {").Replace(file)
				instance, err := caddy.Start(caddy.CaddyfileInput{Contents: []byte(file), Filepath: "Corefile", ServerTypeName: "dns"})
				if err != nil {
					t.Fatalf("%v\n%s", err, file)
				}
				defer func() {
					for _, err := range instance.ShutdownCallbacks() {
						t.Error(err)
					}
					if err := instance.Stop(); err != nil {
						t.Error(err)
					}
				}()
				name := "reviews.default.global."
				if strings.HasPrefix(file, "partner") {
					name = "api.partner.example."
				}
				address := instance.Servers()[0].LocalAddr().(net.Addr).String()
				client := dns.Client{Timeout: 10 * time.Second}
				r, _, err := client.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), address)
				if err != nil || r.Rcode != dns.RcodeServerFailure {
					t.Errorf("before the first data: %v, %v", r, err)
				}
			})
		}
	}
}

// corefiles returns the blocks of a page that are marked as such.
func corefiles(t *testing.T, page string) (out []string) {
	t.Helper()
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	in := false
	for line := range strings.Lines(string(data)) {
		switch mark := strings.TrimSpace(line); {
		case mark == "~~~ corefile" || mark == "```corefile":
			in = true
			out = append(out, "")
		case mark == "~~~" || mark == "```":
			in = false
		case in:
			out[len(out)-1] += line
		}
	}
	return out
}

func TestOrder(t *testing.T) {
	stock := []string{"prometheus", "errors", "cache", "hosts", "kubernetes", "file", "forward"}
	if got := ordered(stock); !slices.Equal(got, []string{"prometheus", "errors", "cache", "hosts", "isthmus", "kubernetes", "file", "forward"}) {
		t.Error(got)
	}
	if !slices.Contains(stock, "isthmus") && slices.Index(dnsserver.Directives, "kubernetes") < 0 {
		t.Error("CoreDNS has no plugin kubernetes to stand before")
	}
}
