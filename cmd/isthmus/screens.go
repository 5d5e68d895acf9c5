package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// table writes aligned columns; say starts a new block of them.
type table struct {
	w   io.Writer
	tab *tabwriter.Writer
}

func newTable(w io.Writer) *table {
	return &table{w: w, tab: tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)}
}

func (t *table) row(cells ...string) {
	fmt.Fprintln(t.tab, strings.Join(cells, "\t"))
}

func (t *table) say(format string, args ...any) {
	t.tab.Flush()
	fmt.Fprintf(t.w, format+"\n", args...)
}

func (t *table) flush() error { return t.tab.Flush() }

func ago(at time.Time) string {
	if at.IsZero() {
		return "never"
	}
	return time.Since(at).Truncate(100*time.Millisecond).String() + " ago"
}

func freshness(p admin.Peer) string {
	if p.State != "approved" {
		return p.State
	}
	if p.StaleSince.IsZero() {
		return p.Freshness + ", heard " + ago(p.LastHeard)
	}
	return p.Freshness + ", stale since " + p.StaleSince.Local().Format("15:04:05") + " (" + ago(p.StaleSince) + ")"
}

func peerRows(t *table, peers []admin.Peer) {
	if len(peers) == 0 {
		t.say("no peers yet: isthmus token create --for CLUSTER here, isthmus join TOKEN there")
		return
	}
	t.row("CLUSTER", "TRUST DOMAIN", "TOPOLOGY", "STATE", "PATH", "GATEWAYS", "SERVICES", "ENDPOINTS")
	for _, p := range peers {
		state := freshness(p)
		if p.Drain != nil {
			state += fmt.Sprintf(", drained by %d %%", p.Drain.Percent)
		}
		t.row(p.Name, p.TrustDomain, p.Topology, state, p.Path, strings.Join(p.Gateways, ","), fmt.Sprint(p.Services), fmt.Sprint(p.Endpoints))
	}
	for _, p := range peers {
		if p.Problem != "" {
			t.say("  %s: %s", p.Name, p.Problem)
		}
	}
}

func serviceRows(t *table, services []admin.Service) {
	for _, s := range services {
		var counts []string
		for _, c := range slices.Sorted(maps.Keys(s.Endpoints)) {
			counts = append(counts, fmt.Sprintf("%s:%d", c, s.Endpoints[c]))
		}
		t.row("  "+s.Host, strings.Join(s.Ports, ","), strings.Join(s.Addresses, ","), strings.Join(counts, " "))
	}
}

func statusScreen(t *table, s admin.Status) {
	ready := "ready"
	if !s.Ready {
		ready = "not ready"
	}
	t.say("cluster %s (%s), network %s, isthmusd %s, %s, revision %d", s.Cluster, s.TrustDomain, s.Network, s.Version, ready, s.Revision)
	t.say("gateways %s", or(strings.Join(s.Gateways, ", "), "none"))
	sourceRows(t, s.Sources)
	t.say("\nLINKS")
	peerRows(t, s.Peers)
	t.say("\nEXPORTS")
	serviceRows(t, s.Exports)
	t.say("\nIMPORTS")
	serviceRows(t, s.Imports)
	if len(s.Machines) > 0 {
		t.say("\nMACHINES")
		for _, m := range s.Machines {
			state := "disconnected since "
			if m.Connected {
				state = "connected since "
			}
			t.row("  "+m.Name+"."+m.Namespace, m.Address, state+m.Since.Local().Format("15:04:05"))
		}
	}
	nacks := 0
	for _, p := range s.Proxies {
		for _, st := range p.Types {
			if st.State == "NACK" {
				nacks++
			}
		}
	}
	t.say("\nPROXIES  %d connected, %d refused updates", len(s.Proxies), nacks)
	t.say("\nPROBLEMS  %d", len(s.Problems))
	for _, p := range s.Problems {
		t.say("  %s", problemLine(p))
	}
}

// sourceRows shows each API server, and the kinds that are not read. What is absent is no fault and named in one line.
func sourceRows(t *table, sources []admin.Source) {
	if len(sources) == 0 {
		return
	}
	t.say("\nSOURCES")
	t.row("  CLUSTER", "API SERVER", "STATE", "OBJECTS")
	for _, s := range sources {
		state := "connected since "
		if !s.Connected {
			state = "lost since "
		}
		if state += s.Since.Local().Format("15:04:05"); s.Since.IsZero() {
			state = "connecting"
		}
		name := s.Cluster
		if s.Remote {
			name += " (remote)"
		}
		t.row("  "+name, s.Server, state, fmt.Sprint(s.Objects))
	}
	for _, s := range sources {
		if s.Error != "" {
			t.say("  %s: %s", s.Cluster, s.Error)
		}
		var absent []string
		for _, k := range s.Kinds {
			switch {
			case k.State == "absent":
				absent = append(absent, k.Kind)
			case k.Message != "":
				t.say("  %s: %s %s: %s\n      %s", s.Cluster, k.Kind, k.State, k.Message, k.Remedy)
			case k.State == "syncing":
				t.say("  %s: %s is not listed yet", s.Cluster, k.Kind)
			}
		}
		if len(absent) > 0 {
			t.say("  %s: not installed: %s", s.Cluster, strings.Join(absent, ", "))
		}
	}
}

func problemLine(p admin.ProblemLine) string {
	line := p.Object
	if p.Source != "" {
		line += " (" + p.Source + ")"
	}
	if p.Field != "" {
		line += " " + p.Field
	}
	line += ": " + p.Reason + ": " + p.Message
	if p.Remedy != "" {
		line += "\n      " + p.Remedy
	}
	return line
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func explainScreen(t *table, e admin.Explanation) {
	t.row("from", e.From)
	t.row("url", e.URL)
	t.row("host", e.Host, "("+e.Object+")")
	t.row("addresses", strings.Join(e.Addresses, ", "))
	t.row("port", fmt.Sprintf("%d %s", e.Port, e.Protocol))
	t.row("route", e.Route)
	for _, d := range e.Targets {
		name := d.Host
		if d.Subset != "" {
			name += " subset " + d.Subset + " " + labelText(d.Labels)
		}
		t.say("\n%d %% to %s", d.Weight, name)
		t.say("  cluster %s, %s", d.Cluster, d.TLS)
		for _, x := range d.Endpoints {
			way := "direct to " + x.Address
			if len(x.Via) > 0 {
				way = "via gateway " + strings.Join(x.Via, " or ")
			}
			state := x.Freshness
			if !x.Ready {
				state = "not ready"
			}
			t.say("  - %s in %s (%s), %s", x.Workload, x.Cluster, state, way)
			if x.SNI != "" {
				t.say("      server name %s", x.SNI)
			}
			if x.Chain != "" {
				t.say("      far chain   %s", x.Chain)
			}
			t.say("      identity    %s", or(x.Identity, "none"))
			if h := x.Handshake; h != nil {
				if h.Error != "" {
					t.say("      handshake   failed at %s after %s: %s", h.At.Local().Format("15:04:05.000"), h.Took, h.Error)
				} else {
					t.say("      handshake   %s at %s in %s, proved %s", h.Version, h.At.Local().Format("15:04:05.000"), h.Took, h.Identity)
				}
			}
		}
		if len(d.Endpoints) == 0 {
			t.say("  no endpoints: requests are answered with 503")
		}
	}
	for _, p := range e.Problems {
		t.say("\nproblem: %s", p)
	}
}

func labelText(labels map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		out = append(out, k+"="+labels[k])
	}
	return "(" + strings.Join(out, ",") + ")"
}
