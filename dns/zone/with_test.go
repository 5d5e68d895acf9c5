package zone

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"google.golang.org/protobuf/encoding/prototext"
	"pgregory.net/rapid"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
)

// TestWith: whatever changes came, in whatever portions, the Zone is the one that New makes of the same hosts.
func TestWith(t *testing.T) {
	labels := []string{"a", "b", "c"}
	rapid.Check(t, func(t *rapid.T) {
		hosts := map[string]*dnsv1.Host{}
		o := Options{Zones: []string{"global"}}
		z := New(nil, o)
		name := rapid.Custom(func(t *rapid.T) string {
			n := strings.Join(rapid.SliceOfN(rapid.SampledFrom(labels), 1, 3).Draw(t, "labels"), ".") + ".global"
			if rapid.IntRange(0, 4).Draw(t, "star") == 0 {
				return "*." + n
			}
			return n
		})
		host := rapid.Custom(func(t *rapid.T) *dnsv1.Host {
			h := &dnsv1.Host{Headless: rapid.Bool().Draw(t, "headless")}
			for range rapid.IntRange(0, 3).Draw(t, "addresses") {
				h.Addresses = append(h.Addresses, fmt.Sprintf("240.0.0.%d", rapid.IntRange(1, 5).Draw(t, "address")))
			}
			if rapid.Bool().Draw(t, "port") {
				h.Ports = []*dnsv1.Port{{Name: "http", Number: 80, Protocol: "tcp"}}
			}
			return h
		})
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			changed := rapid.MapOfN(name, host, 0, 4).Draw(t, "changed")
			gone := rapid.SliceOfN(name, 0, 4).Draw(t, "gone")
			before := z
			was := dump(before)
			z = z.With(changed, gone)
			for _, n := range gone {
				delete(hosts, n)
			}
			maps.Copy(hosts, changed)
			if now := dump(before); now != was {
				t.Fatalf("the Zone before has changed:\n%s\n%s", was, now)
			}
		}
		if got, want := dump(z), dump(New(hosts, o)); got != want {
			t.Fatalf("got\n%s\nwant\n%s", got, want)
		}
		if got := len(slices.Collect(z.All())); got != len(hosts) || z.Len() != len(hosts) {
			t.Fatalf("%d hosts, Len %d, want %d", got, z.Len(), len(hosts))
		}
	})
}

// dump shows all that a Zone knows.
func dump(z *Zone) string {
	var out []string
	names, addrs, keys := map[*entry]int{}, map[*entry]int{}, 0
	for s := range z.names.all() {
		names[s.e]++
		keys++
	}
	for s := range z.addrs.all() {
		addrs[s.e]++
		keys++
	}
	for e := range addrs {
		if names[e] == 0 {
			out = append(out, e.name+" is old and has addresses")
		}
	}
	for e, n := range names {
		if n != 1 || addrs[e] != len(slices.Collect(e.reversible())) {
			out = append(out, fmt.Sprintf("%s is there %d times and %d", e.name, n, addrs[e]))
		}
		out = append(out, fmt.Sprintf("%s kids=%d host=%v %v", e.name, e.kids, e.host, prototext.Format(e.proto())))
	}
	for i := range 6 {
		q := new(dns.Msg).SetQuestion(fmt.Sprintf("%d.0.0.240.in-addr.arpa.", i), dns.TypePTR)
		out = append(out, q.Question[0].Name+" "+show(z.Answer(q)))
	}
	slices.Sort(out)
	return strings.Join(out, "\n") + fmt.Sprintf("\nwild=%d hosts=%d keys=%d", z.wild, z.hosts, z.names.n+z.addrs.n-keys)
}

func many(n int) map[string]*dnsv1.Host {
	hosts := make(map[string]*dnsv1.Host, n)
	for i := range n {
		hosts[fmt.Sprintf("service-%06d.team-%03d.global", i, i%500)] = &dnsv1.Host{
			Addresses: []string{fmt.Sprintf("240.%d.%d.%d", i>>16, i>>8&255, i&255), fmt.Sprintf("fd69:7374:686d::%x:%x", i>>16, i&0xffff)},
			Ports:     []*dnsv1.Port{{Name: "http", Number: 80, Protocol: "tcp"}, {Name: "grpc", Number: 8080, Protocol: "tcp"}},
		}
	}
	return hosts
}

// TestGrowth: a Zone that began empty has as large a table as one that began full, and finds everything.
func TestGrowth(t *testing.T) {
	z := New(nil, Options{Zones: []string{"global"}})
	hosts := many(5000)
	for name, h := range hosts {
		z = z.With(map[string]*dnsv1.Host{name: h}, nil)
	}
	if z.names.full() || z.addrs.full() || dump(z) != dump(New(hosts, z.opts)) {
		t.Error("the grown Zone is another")
	}
}

// TestMemory: what a name with two addresses and two ports costs, all included.
func TestMemory(t *testing.T) {
	const n = 30_000
	hosts := many(n)
	used := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := used()
	z := New(hosts, Options{Zones: []string{"global"}})
	each := float64(used()-before) / n
	t.Logf("%.0f bytes a name", each)
	if each > 300 {
		t.Errorf("%.0f bytes a name, want 300 at most", each)
	}
	runtime.KeepAlive(z)
	runtime.KeepAlive(hosts)
}

func BenchmarkReply(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		z := New(many(n), Options{Zones: []string{"global"}})
		var questions []*dns.Msg
		for i := range 100_000 {
			i = i * 7919 % n
			questions = append(questions, new(dns.Msg).SetQuestion(fmt.Sprintf("service-%06d.team-%03d.global.", i, i%500), dns.TypeA))
		}
		buf := make([]byte, 512)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for i := range b.N {
				if _, r := z.Reply(buf, questions[i%len(questions)], 512); r != Answered {
					b.Fatal(r)
				}
			}
		})
	}
}

func BenchmarkWith(b *testing.B) {
	z := New(many(100_000), Options{Zones: []string{"global"}})
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		z = z.With(map[string]*dnsv1.Host{"service-000777.team-277.global": {Addresses: []string{fmt.Sprintf("240.9.9.%d", i%250)}}}, nil)
	}
}

func BenchmarkNew(b *testing.B) {
	hosts := many(100_000)
	b.ResetTimer()
	for range b.N {
		New(hosts, Options{Zones: []string{"global"}})
	}
}
