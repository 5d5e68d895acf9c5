package stub

import (
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

var (
	zones = []string{"global", "clusterset.local"}
	to    = netip.MustParseAddr("10.96.0.20")
)

const usual = `.:53 {
    errors
    health {
        lameduck 5s
    }
    ready
    # names of this cluster
    kubernetes cluster.local in-addr.arpa ip6.arpa { # reversed, too
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
    }
    forward . /etc/resolv.conf
    cache 30
    loop
    reload
    loadbalance
}
`

func TestAdd(t *testing.T) {
	got, err := Add(usual, zones, to)
	if err != nil {
		t.Fatal(err)
	}
	want := usual + begin + `
global:53 {
    errors
    cache 1
    forward . 10.96.0.20
}
clusterset.local:53 {
    errors
    cache 1
    forward . 10.96.0.20
}
` + end + "\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if again, err := Add(got, zones, to); err != nil || again != got {
		t.Errorf("added twice: %v\n%s", err, again)
	}
	if moved, err := Add(got, zones, netip.MustParseAddr("fd00::35")); err != nil || !strings.Contains(moved, "forward . fd00::35") || strings.Contains(moved, to.String()) {
		t.Errorf("another address: %v\n%s", err, moved)
	}
	if !Has(got) || Has(usual) || !Reloads(got) || Reloads(strings.Replace(usual, "reload", "# reload", 1)) {
		t.Error("Has or Reloads is wrong")
	}
}

// TestEdited removes our blocks from a file that was changed around them since.
func TestEdited(t *testing.T) {
	got, err := Add(usual, zones, to)
	if err != nil {
		t.Fatal(err)
	}
	edited := strings.Replace(got, "cache 30", "cache 60", 1) + "example.org {\n    whoami\n}\n"
	want := strings.Replace(usual, "cache 30", "cache 60", 1) + "example.org {\n    whoami\n}\n"
	if back, err := Remove(edited); err != nil || back != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, back, want)
	}
}

func TestRefused(t *testing.T) {
	added, err := Add(usual, zones, to)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, file, want, hint string }{
		{"zone taken", usual + "global:53 {\n  forward . 1.1.1.1\n}\n", "line 18: zone global has a server block already", "remove that block"},
		{"taken with dot and no port", "dns://Clusterset.Local. {\n}\n", "line 1: zone clusterset.local has", "remove that block"},
		{"among others", "a.example, b.example\nglobal {\n}\n", "zone global has", "remove that block"},
		{"proxy", strings.Replace(usual, "forward .", "proxy .", 1), "line 12: plugin proxy is gone since CoreDNS 1.5", "write forward in place of proxy"},
		{"not closed", ".:53 {\n errors\n", "a block is not closed", ""},
		{"closed twice", ".:53 {\n}\n}\n", "line 3: a block is closed that was not opened", ""},
		{"quote", ".:53 {\n log \"x\n}\n", "line 2: a quoted word is not closed", ""},
		{"end gone", strings.Replace(added, end, "", 1), "the line \"# isthmus: end.\" is not", "by hand"},
		{"begin gone", strings.Replace(added, begin, "", 1), "takes these lines out.\" is not", "by hand"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Add(c.file, zones, to)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(diag.HintOf(err), c.hint) {
				t.Errorf("got %v, hint %q; want %q, hint %q", err, diag.HintOf(err), c.want, c.hint)
			}
		})
	}
}

// TestElsewhere adds beside blocks that only look as if they served a zone of ours.
func TestElsewhere(t *testing.T) {
	for _, file := range []string{
		"", "global:5353 {\n}\n", "tls://global {\n}\n", "notglobal {\n}\n", ". {\n # global {\n log \"global {\"\n}\n",
		"(global) {\n  errors\n}\n. {\n  import global\n}\n", "import /etc/coredns/custom/*.server\n. {\n}\n", ". {\n kubernetes cluster.local clusterset.local\n}",
		". { proxyprotocol\n rewrite name proxy forward\n}\n",
	} {
		got, err := Add(file, zones, to)
		if err != nil {
			t.Errorf("%q: %v", file, err)
		} else if back, err := Remove(got); err != nil || back != file {
			t.Errorf("%q came back as %q, %v", file, back, err)
		}
	}
}

// TestBack: whatever file can be added to comes back byte for byte.
func TestBack(t *testing.T) {
	pieces := []string{usual, "a {\n}\n", "a {\n}", "\n", "\r\n", "# comment\n", "# comment", " ", "x.example:53 {\n\tlog\n}\n", "{$VAR} {\n}\n", "global", begin + " \n", "#" + end + "\n"}
	rapid.Check(t, func(t *rapid.T) {
		file := strings.Join(rapid.SliceOfN(rapid.SampledFrom(pieces), 0, 6).Draw(t, "pieces"), "")
		added, err := Add(file, zones, to)
		if err != nil {
			t.Skip(err)
		}
		if again, err := Add(added, zones, to); err != nil || again != added {
			t.Fatalf("added twice: %v\n%q\n%q", err, added, again)
		}
		if back, err := Remove(added); err != nil || back != file {
			t.Fatalf("%q came back as %q, %v", file, back, err)
		}
	})
}

func FuzzCorefile(f *testing.F) {
	f.Add(usual)
	f.Add("a {\n}")
	f.Add(begin + "\n" + end)
	f.Fuzz(func(t *testing.T, file string) {
		rest, err := Remove(file)
		if err != nil {
			return
		}
		added, err := Add(rest, zones, to)
		if err != nil {
			return
		}
		if back, err := Remove(added); err != nil || back != rest {
			t.Errorf("%q came back as %q, %v", rest, back, err)
		}
	})
}

func TestDomains(t *testing.T) {
	for _, c := range []struct{ name, before, added, removed string }{
		{"none", "", `{"clusterset.local":["10.96.0.20"],"global":["10.96.0.20"]}`, ""},
		{"others", `{"acme.local": ["1.2.3.4"]}`, `{"acme.local":["1.2.3.4"],"clusterset.local":["10.96.0.20"],"global":["10.96.0.20"]}`, `{"acme.local":["1.2.3.4"]}`},
		{"null", "null", `{"clusterset.local":["10.96.0.20"],"global":["10.96.0.20"]}`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			added, err := AddDomains(c.before, zones, to)
			if err != nil || added != c.added {
				t.Fatalf("%s, %v", added, err)
			}
			if again, err := AddDomains(added, zones, to); err != nil || again != added {
				t.Errorf("added twice: %s, %v", again, err)
			}
			if removed, err := RemoveDomains(added, zones); err != nil || removed != c.removed {
				t.Errorf("removed: %s, %v", removed, err)
			}
		})
	}
	if _, err := AddDomains(`{"global":["9.9.9.9"]}`, zones, to); err == nil || !strings.Contains(err.Error(), "global is led to [9.9.9.9] already") {
		t.Errorf("a zone that is led elsewhere: %v", err)
	}
	if _, err := AddDomains(`["global"]`, zones, to); err == nil || !strings.Contains(err.Error(), "not a JSON object") {
		t.Errorf("a list: %v", err)
	}
}
