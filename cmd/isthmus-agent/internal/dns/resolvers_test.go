package dns

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// program is the C program that is linked with each library: it prints what getaddrinfo finds.
const program = `
#include <stdio.h>
#include <netdb.h>
#include <string.h>
#include <arpa/inet.h>
#include <sys/socket.h>
int main(int argc, char **argv) {
	struct addrinfo hints, *list, *a;
	char text[64];
	memset(&hints, 0, sizeof hints);
	hints.ai_socktype = SOCK_STREAM;
	int e = getaddrinfo(argv[1], 0, &hints, &list);
	if (e) { printf("error: %s\n", gai_strerror(e)); return 0; }
	for (a = list; a; a = a->ai_next) {
		void *p = a->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)a->ai_addr)->sin_addr : (void *)&((struct sockaddr_in6 *)a->ai_addr)->sin6_addr;
		puts(inet_ntop(a->ai_family, p, text, sizeof text));
	}
	return 0;
}
`

// TestResolvers asks the agent as programs do: with the resolvers of glibc, musl and Go, and a resolv.conf like a pod's.
func TestResolvers(t *testing.T) {
	if os.Getenv("RESOLVERS_INSIDE") != "" {
		inside(t)
		return
	}
	if name := os.Getenv("RESOLVERS_LOOKUP"); name != "" { // Go's resolver
		addrs, err := (&net.Resolver{PreferGo: true}).LookupHost(context.Background(), name)
		if err != nil {
			addrs = []string{"error: " + err.Error()}
		}
		fmt.Println(strings.Join(addrs, "\n"))
		return
	}
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("no unshare")
	}
	cmd := exec.Command("unshare", "-Urmn", os.Args[0], "-test.run", "^TestResolvers$", "-test.v")
	cmd.Env = append(os.Environ(), "RESOLVERS_INSIDE=1")
	out, err := cmd.CombinedOutput()
	if err != nil && strings.Contains(string(out), "unshare:") {
		t.Skipf("no namespaces: %s", out)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// asked keeps what was asked.
type asked struct {
	*Server
	mu   sync.Mutex
	list []string
}

func (a *asked) ServeDNS(w mdns.ResponseWriter, q *mdns.Msg) {
	text := w.LocalAddr().Network() + " " + mdns.TypeToString[q.Question[0].Qtype] + " " + strings.TrimSuffix(q.Question[0].Name, ".")
	if opt := q.IsEdns0(); opt != nil {
		text += fmt.Sprintf(" EDNS %d", opt.UDPSize())
	}
	a.mu.Lock()
	a.list = append(a.list, text)
	a.mu.Unlock()
	a.Server.ServeDNS(w, q)
}

func (a *asked) take() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := a.list
	a.list = nil
	slices.Sort(out)
	return out
}

// inside runs in a network and a mount namespace of its own, where 127.0.0.1:53 and resolv.conf are ours.
func inside(t *testing.T) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	conf := filepath.Join(dir, "resolv.conf")
	text := "nameserver 127.0.0.1\nsearch bookinfo.svc.cluster.local svc.cluster.local cluster.local global\noptions ndots:5 timeout:2\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "--bind", conf, "/etc/resolv.conf").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	outside, _ := liar(t, func(q *mdns.Msg) []*mdns.Msg {
		m := new(mdns.Msg).SetReply(q)
		switch {
		case q.Question[0].Qtype == mdns.TypeA && strings.EqualFold(q.Question[0].Name, "www.example.com."):
			m = truth(q)
		case !strings.EqualFold(q.Question[0].Name, "www.example.com."):
			m.Rcode = mdns.RcodeNameError
		}
		return []*mdns.Msg{m}
	})
	s := &asked{Server: New(Config{Upstream: []string{outside}, Log: slog.New(slog.DiscardHandler), Dialer: func() net.Dialer { return net.Dialer{} }})}
	pods := &dnsv1.Host{Headless: true}
	for i := range 100 {
		pods.Addresses = append(pods.Addresses, fmt.Sprintf("10.1.0.%d", i+1))
	}
	s.Set(zone.New(map[string]*dnsv1.Host{
		"reviews.bookinfo.global":          {Addresses: []string{"240.0.0.7"}},
		"both.bookinfo.global":             {Addresses: []string{"240.0.0.8", "fd69::8"}},
		"*.wild.global":                    {Addresses: []string{"240.0.0.9"}},
		"pods.bookinfo.svc.cluster.local":  pods,
		"local.bookinfo.svc.cluster.local": {Addresses: []string{"10.96.0.7"}},
	}, zone.Options{Zones: Zones, Recursive: true}))
	pc, err := net.ListenPacket("udp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	for _, srv := range []*mdns.Server{{PacketConn: pc, Handler: s}, {Listener: l, Handler: s}} {
		done, started := make(chan struct{}), make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		go func() { defer close(done); _ = srv.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = srv.Shutdown(); <-done })
	}
	for _, r := range resolversHere(t, dir) {
		t.Run(r.name, func(t *testing.T) { s.exercise(t, r) })
	}
	t.Run("dig", s.digs)
}

// digs asks with dig, which shows answers as they are.
func (a *asked) digs(t *testing.T) {
	if _, err := exec.LookPath("dig"); err != nil {
		t.Skip("no dig")
	}
	for _, c := range []struct{ args, want string }{
		{"reviews.bookinfo.global AAAA", "status: NOERROR"},
		{"reviews.bookinfo.global AAAA", "ANSWER: 0, AUTHORITY: 1"},
		{"none.bookinfo.global A", "status: NXDOMAIN"},
		{"+search reviews.bookinfo A", "240.0.0.7"},
		{"pods.bookinfo.svc.cluster.local A", "ANSWER: 100"},
		{"+bufsize=4096 pods.bookinfo.svc.cluster.local A", "(UDP)"},
		{"+edns=1 +noednsneg reviews.bookinfo.global A", "BADVERS"},
		{"-c CH reviews.bookinfo.global TXT", "REFUSED"},
		{"+opcode=notify reviews.bookinfo.global SOA", "status: NOTIMP"},
		{"reviews.bookinfo.global ANY", "RFC8482"},
		{"-x 240.0.0.7", "reviews.bookinfo.global."},
	} {
		a.take()
		out, err := exec.Command("dig", strings.Fields(c.args)...).CombinedOutput()
		t.Logf("dig %s; sent: %s", c.args, strings.Join(a.take(), ", "))
		if err != nil || !strings.Contains(string(out), c.want) {
			t.Errorf("dig %s: %v, want %q in\n%s", c.args, err, c.want, out)
		}
	}
}

type resolver struct {
	name   string
	lookup func(name string) ([]string, error)
	tcp    bool // it asks again over TCP when an answer was cut
}

// resolversHere returns those that can be built or run on this machine.
func resolversHere(t *testing.T, dir string) []resolver {
	t.Helper()
	run := func(env []string, name string, args ...string) ([]string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, name, args...)
		cmd.Env = append(slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "RESOLVERS_") }), env...)
		out, err := cmd.Output()
		lines := slices.DeleteFunc(strings.Split(string(bytes.TrimSpace(out)), "\n"), func(l string) bool { return l == "PASS" || l == "" })
		return lines, err
	}
	out := []resolver{{"Go", func(n string) ([]string, error) {
		return run([]string{"RESOLVERS_LOOKUP=" + n}, os.Args[0], "-test.run", "^TestResolvers$")
	}, true}}
	source := filepath.Join(dir, "lookup.c")
	if err := os.WriteFile(source, []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, compiler string
		tcp            bool
	}{{"glibc", "gcc", true}, {"musl", "musl-gcc", false}} { // musl asks over TCP from 1.2.4 on
		binary := filepath.Join(dir, c.name)
		if text, err := exec.Command(c.compiler, "-o", binary, source).CombinedOutput(); err != nil {
			t.Logf("%s is not here: %v %s", c.name, err, text)
			continue
		}
		out = append(out, resolver{c.name, func(n string) ([]string, error) { return run(nil, binary, n) }, c.tcp})
	}
	if _, err := exec.LookPath("python3"); err == nil {
		out = append(out, resolver{"Python (glibc)", func(n string) ([]string, error) {
			return run(nil, "python3", "-c", "import socket,sys\ntry:\n for a in sorted(set(x[4][0] for x in socket.getaddrinfo(sys.argv[1],None))): print(a)\nexcept socket.gaierror as e: print('error:',e)", n)
		}, true})
	}
	return out
}

// exercise looks names up and logs what was sent for each.
func (a *asked) exercise(t *testing.T, r resolver) {
	for _, c := range []struct {
		name string
		want []string // nil: no such name
	}{
		{"reviews.bookinfo.global.", []string{"240.0.0.7"}},
		{"reviews.bookinfo.global", []string{"240.0.0.7"}},
		{"both.bookinfo.global.", []string{"240.0.0.8", "fd69::8"}},
		{"reviews.bookinfo", []string{"240.0.0.7"}}, // by the search list
		{"local", []string{"10.96.0.7"}},
		{"any.wild.global.", []string{"240.0.0.9"}},
		{"none.bookinfo.global.", nil},
		{"www.example.com", []string{"192.0.2.1"}},
	} {
		a.take()
		got, err := r.lookup(c.name)
		slices.Sort(got)
		sent := a.take()
		t.Logf("%s %-26s -> %s; sent: %s", r.name, c.name, strings.Join(got, " "), strings.Join(sent, ", "))
		if err != nil || c.want != nil && !slices.Equal(got, c.want) || c.want == nil && !strings.HasPrefix(strings.Join(got, ""), "error") {
			t.Errorf("%s: got %v, %v, want %v", c.name, got, err, c.want)
		}
	}
	a.take()
	got, err := r.lookup("pods.bookinfo.svc.cluster.local.")
	sent := a.take()
	over := slices.ContainsFunc(sent, func(s string) bool { return strings.HasPrefix(s, "tcp") })
	t.Logf("%s of 100 addresses got %d; sent: %s", r.name, len(got), strings.Join(sent, ", "))
	if want := map[bool]int{true: 100, false: 1}[r.tcp]; err != nil || len(got) < want || over != r.tcp {
		t.Errorf("of 100 addresses %d, over TCP %v; %v", len(got), over, err)
	}
}
