package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// server is one CoreDNS.
type server struct {
	cmd   *exec.Cmd
	port  string
	plane *plane // of isthmus
}

func hostName(i int) string { return fmt.Sprintf("service-%06d.team-%03d.global", i, i%500) }

func v4(i int) string { return fmt.Sprintf("240.%d.%d.%d", i>>16&7, i>>8&255, i&255) }
func v6(i int) string { return fmt.Sprintf("fd69:7374:686d::%x:%x", i>>16, i&0xffff) }

func writeQueries(path string, names int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	random := rand.New(rand.NewPCG(1, 2))
	for range 200_000 {
		name := hostName(random.IntN(names))
		fmt.Fprintf(w, "%s %s\n", name, [...]string{"A", "AAAA"}[random.IntN(2)])
	}
	return errors.Join(w.Flush(), f.Close())
}

func startHosts(ctx context.Context, dir string) (*server, error) {
	var lines strings.Builder
	for i := range few {
		fmt.Fprintf(&lines, "%s %s\n%s %s\n", v4(i), hostName(i), v6(i), hostName(i))
	}
	path := filepath.Join(dir, "hosts")
	if err := os.WriteFile(path, []byte(lines.String()), 0o600); err != nil {
		return nil, err
	}
	return start(ctx, dir, "hosts", few, "hosts "+path+" global {\n ttl 5\n }\n")
}

func startFile(ctx context.Context, dir string) (*server, error) {
	var lines strings.Builder
	lines.WriteString("$ORIGIN global.\n@ 5 IN SOA ns.dns hostmaster 1 7200 1800 86400 5\n@ 5 IN NS ns.dns\n")
	for i := range few {
		name := strings.TrimSuffix(hostName(i), ".global")
		fmt.Fprintf(&lines, "%s 5 IN A %s\n%s 5 IN AAAA %s\n", name, v4(i), name, v6(i))
	}
	path := filepath.Join(dir, "zone")
	if err := os.WriteFile(path, []byte(lines.String()), 0o600); err != nil {
		return nil, err
	}
	return start(ctx, dir, "file", few, "file "+path+" global\n")
}

func startIsthmus(ctx context.Context, dir string, names int) (*server, error) {
	p, err := newPlane(dir, names)
	if err != nil {
		return nil, err
	}
	s, err := start(ctx, dir, fmt.Sprint("isthmus", names), names, fmt.Sprintf(`isthmus global {
	server %s
	server_name isthmusd.bench
	root %s
	token %s
	cluster bench
	cache %s
}
`, p.address, p.root, p.token, filepath.Join(dir, fmt.Sprint("cache", names))))
	if err != nil {
		p.stop()
		return nil, fmt.Errorf("isthmus with %d names: %w", names, err)
	}
	s.plane = p
	return s, nil
}

// start starts a CoreDNS with one plugin and waits until it knows the last of the names.
func start(ctx context.Context, dir, name string, names int, plugin string) (*server, error) {
	binary := os.Getenv("COREDNS")
	if binary == "" {
		binary = "build/bin/coredns"
	}
	l, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(l.LocalAddr().String())
	if err := errors.Join(err, l.Close()); err != nil {
		return nil, err
	}
	corefile := filepath.Join(dir, name+".corefile")
	if err := os.WriteFile(corefile, []byte("global:"+port+" {\nbind 127.0.0.1\n"+plugin+"}\n"), 0o600); err != nil {
		return nil, err
	}
	s := &server{cmd: exec.CommandContext(ctx, binary, "-conf", corefile, "-quiet"), port: port}
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, "127.0.0.1:"+port)
	}}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := resolver.LookupHost(ctx, hostName(names-1)+"."); err == nil {
			return s, nil
		} else if time.Now().After(deadline) {
			s.stop()
			return nil, fmt.Errorf("not ready: %w", err)
		}
	}
}

func (s *server) stop() {
	if s.cmd.Process != nil {
		_ = s.cmd.Process.Signal(syscall.SIGTERM)
		_ = s.cmd.Wait()
	}
	if s.plane != nil {
		s.plane.stop()
		s.plane = nil
	}
}

func (s *server) change(ctx context.Context, perSecond int) { s.plane.change(ctx, perSecond) }

// cpu returns the time the server has used (proc(5), stat).
func (s *server) cpu() time.Duration {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// anon returns the server's own memory in octets.
func (s *server) anon() int {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	m := regexp.MustCompile(`RssAnon:\s+(\d+) kB`).FindSubmatch(data)
	if m == nil {
		return 0
	}
	kib, _ := strconv.Atoi(string(m[1]))
	return kib << 10
}

var (
	rateLine     = regexp.MustCompile(`Queries per second:\s+([\d.]+)`)
	doneLine     = regexp.MustCompile(`Queries completed:\s+(\d+)`)
	lostLine     = regexp.MustCompile(`Queries lost:\s+(\d+)`)
	servfailLine = regexp.MustCompile(`SERVFAIL (\d+)`)
	noErrorLine  = regexp.MustCompile(`NOERROR (\d+)`)
)

// dnsperf asks for a while and returns how many answers came, and what it says of them.
func dnsperf(ctx context.Context, port, queries string) (int, result, error) {
	out, err := exec.CommandContext(ctx, "dnsperf", "-s", "127.0.0.1", "-p", port, "-d", queries, "-l", fmt.Sprint(seconds), "-c", "4", "-q", "100").CombinedOutput()
	if err != nil {
		return 0, result{}, fmt.Errorf("dnsperf: %w\n%s", err, out)
	}
	number := func(re *regexp.Regexp) float64 {
		m := re.FindSubmatch(out)
		if m == nil {
			return 0
		}
		n, _ := strconv.ParseFloat(string(m[1]), 64)
		return n
	}
	r := result{rate: number(rateLine), servfail: int(number(servfailLine)), lost: int(number(lostLine))}
	done := int(number(doneLine))
	if r.rate == 0 || int(number(noErrorLine))+r.servfail != done {
		return 0, r, fmt.Errorf("dnsperf: not all questions have an answer\n%s", out)
	}
	return done, r, nil
}
