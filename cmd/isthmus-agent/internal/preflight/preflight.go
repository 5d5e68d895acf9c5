// Package preflight says whether a machine can join the mesh, before a token is spent on it, and what joining will change
// there. Gather looks, Judge decides; Judge is pure.
package preflight

import (
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Result is what a check came to.
type Result string

// The results. Failed keeps the machine from joining.
const (
	OK      Result = "ok"
	Warning Result = "warning"
	Failed  Result = "error"
)

// Finding is one check.
type Finding struct {
	Check  string `json:"check"`
	Result Result `json:"result"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"` // empty when the result is OK
}

// Change is one thing that joining changes on the machine.
type Change struct {
	What  string `json:"what"`
	Where string `json:"where"`
}

// Report is all that was found. Ready is false when a finding is Failed.
type Report struct {
	Ready    bool      `json:"ready"`
	Findings []Finding `json:"findings"`
	Changes  []Change  `json:"changes"`
}

// Facts is what was seen on the machine. Errors may carry a hint, which is the remedy.
type Facts struct {
	UID      int
	NetAdmin bool   // the process has CAP_NET_ADMIN
	Kernel   string // release, as uname -r
	Files    error  // whether the files may be written

	Later bool // the agent is not started now: what only it needs is a warning

	Capture  bool  // traffic is to be captured
	NFTables error // of the capture rules, tried; not looked at without Capture

	Systemd bool  // a service is to be made
	Unit    error // of the unit

	Ports     []Port
	Resolvers []string // host:port
	Resolv    error    // of reading them

	EnvoyPath string // as given; empty: not looked at
	EnvoyHint string // what to do without one
	EnvoySays string // what it answered to --version
	Envoy     error

	Token     *Window    // nil: no token was given
	Endpoints []Endpoint // of the issuer
	Now       time.Time
}

// Port is one port of the agent or of Envoy.
type Port struct {
	Network string // tcp or udp
	Number  int
	For     string
	Err     error // nil: free
}

// Window is when the token is valid, by the issuer's clock.
type Window struct{ NotBefore, Expires time.Time }

// Endpoint is one address of the issuer's gateways, host:port.
type Endpoint struct {
	Address string
	Err     error // nil: it takes connections
}

// Judge decides on facts.
func Judge(f Facts) []Finding {
	out := []Finding{f.rights(), f.kernel()}
	if f.Capture {
		out = append(out, verdict("nftables", f.NFTables, "takes the capture rules", "the kernel needs nf_tables with NAT for family inet (Linux 5.2 or newer); or join with --no-capture"))
	}
	out = append(out, verdict("files", f.Files, "may be written", "run as root, or choose other folders with --config-dir and --data-dir"))
	if f.Systemd {
		out = append(out, verdict("systemd", f.Unit, "will run the agent", "join with --systemd=false and start the agent your own way"))
	}
	out = append(out, f.ports(), f.resolver())
	for i := range out {
		if f.Later && out[i].Result == Failed && out[i].Check != "files" {
			out[i].Result = Warning
		}
	}
	if f.EnvoyPath != "" {
		out = append(out, f.envoy())
	}
	if f.Token != nil {
		out = append(out, f.clock(), f.reach())
	}
	return out
}

func ok(check, format string, args ...any) Finding {
	return Finding{Check: check, Result: OK, Detail: fmt.Sprintf(format, args...)}
}

func verdict(check string, err error, good, remedy string) Finding {
	if err == nil {
		return ok(check, "%s", good)
	}
	return Finding{check, Failed, oneLine(err), hintOr(err, remedy)}
}

func (f Facts) rights() Finding {
	who := "root"
	if f.UID != 0 {
		who = "user " + strconv.Itoa(f.UID)
	}
	switch {
	case f.Systemd && f.UID != 0:
		return Finding{"rights", Failed, who + " may not make a service", "run as root, or join with --systemd=false"}
	case f.Capture && !f.NetAdmin:
		return Finding{"rights", Failed, who + " without CAP_NET_ADMIN may not capture traffic", "run as root or with CAP_NET_ADMIN, or join with --no-capture"}
	case f.NetAdmin:
		return ok("rights", "%s, with CAP_NET_ADMIN", who)
	}
	return ok("rights", "%s", who)
}

// oldest is the kernel since which NAT knows family inet.
var oldest = [2]int{5, 2}

var release = regexp.MustCompile(`^(\d+)\.(\d+)`)

func (f Facts) kernel() Finding {
	m := release.FindStringSubmatch(f.Kernel)
	if m == nil {
		return Finding{"kernel", Warning, fmt.Sprintf("release %q is not understood", f.Kernel), "Linux 5.2 or newer is needed"}
	}
	if older(m, oldest) && f.Capture {
		return Finding{"kernel", Warning, "Linux " + f.Kernel, "capture needs Linux 5.2 or newer; if nftables is ok above all is well"}
	}
	return ok("kernel", "Linux %s", f.Kernel)
}

func older(m []string, than [2]int) bool {
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return major < than[0] || major == than[0] && minor < than[1]
}

func (f Facts) ports() Finding {
	var all, taken []string
	see := ""
	for _, p := range f.Ports {
		name := fmt.Sprintf("%s %d", strings.ToUpper(p.Network), p.Number)
		all = append(all, strconv.Itoa(p.Number)+"/"+p.Network)
		if p.Err == nil {
			continue
		}
		taken = append(taken, fmt.Sprintf("%s (%s): %s", name, p.For, oneLine(p.Err)))
		if see == "" {
			see = fmt.Sprintf("see who has it and end that: ss -%snp 'sport = :%d'", map[string]string{"tcp": "lt", "udp": "lu"}[p.Network], p.Number)
		}
	}
	if len(taken) > 0 {
		return Finding{"ports", Failed, strings.Join(taken, "; "), see}
	}
	return ok("ports", "free: %s", strings.Join(all, " "))
}

func (f Facts) resolver() Finding {
	switch {
	case f.Resolv != nil:
		return verdict("resolver", f.Resolv, "", "put a name server into /etc/resolv.conf")
	case len(f.Resolvers) == 0:
		return Finding{"resolver", Warning, "/etc/resolv.conf names no name server: only names of the mesh will be answered", "put a name server into /etc/resolv.conf, or dns.upstream into the configuration"}
	}
	return ok("resolver", "names outside of the mesh are asked of %s", strings.Join(f.Resolvers, " "))
}

// tested is the version of Envoy that the configuration is made for.
const tested = "1.40"

var envoyVersion = regexp.MustCompile(`version: [0-9a-f]+/((\d+)\.(\d+)\.\d+)`)

func (f Facts) envoy() Finding {
	if f.Envoy != nil {
		return Finding{"envoy", Failed, fmt.Sprintf("no Envoy at %q: %s", f.EnvoyPath, oneLine(f.Envoy)), f.EnvoyHint}
	}
	m := envoyVersion.FindStringSubmatch(f.EnvoySays)
	switch {
	case m == nil:
		return Finding{"envoy", Warning, f.EnvoyPath + " does not say which version it is", "make sure that it is Envoy " + tested}
	case m[2]+"."+m[3] != tested:
		return Finding{"envoy", Warning, f.EnvoyPath + " is version " + m[1], "Envoy " + tested + " is what is tested; another may refuse the configuration"}
	}
	return ok("envoy", "%s is version %s", f.EnvoyPath, m[1])
}

func (f Facts) clock() Finding {
	const set = "compare date -u with a clock that is right, and set it; the issuer's clock decides about the token"
	stamp := func(t time.Time) string { return t.UTC().Format(time.DateTime) + " UTC" }
	switch {
	case f.Now.Before(f.Token.NotBefore):
		return Finding{"clock", Warning, fmt.Sprintf("%s here is before the token was made, %s: this clock is behind by %s or more",
			stamp(f.Now), stamp(f.Token.NotBefore), f.Token.NotBefore.Sub(f.Now).Round(time.Second)), set}
	case !f.Now.Before(f.Token.Expires):
		return Finding{"clock", Warning, fmt.Sprintf("%s here is after the token's end, %s: it has expired, or this clock is ahead", stamp(f.Now), stamp(f.Token.Expires)), set}
	}
	return ok("clock", "%s, within the token's time", stamp(f.Now))
}

func (f Facts) reach() Finding {
	var good, bad []string
	for _, e := range f.Endpoints {
		if e.Err == nil {
			good = append(good, e.Address)
		} else {
			bad = append(bad, fmt.Sprintf("%s: %s", e.Address, oneLine(e.Err)))
		}
	}
	const remedy = "this machine must reach the issuer's gateways over TCP: check routes and firewalls"
	switch {
	case len(good) == 0:
		return Finding{"issuer", Failed, "no endpoint of the token gave an answer: " + strings.Join(bad, "; "), remedy}
	case len(bad) > 0:
		return Finding{"issuer", Warning, strings.Join(bad, "; "), remedy}
	}
	return ok("issuer", "takes connections at %s", strings.Join(good, " "))
}

// Ready reports whether nothing failed.
func Ready(findings []Finding) bool {
	for _, f := range findings {
		if f.Result == Failed {
			return false
		}
	}
	return true
}

// FailedChecks names what failed.
func FailedChecks(findings []Finding) []string {
	var out []string
	for _, f := range findings {
		if f.Result == Failed {
			out = append(out, f.Check)
		}
	}
	return out
}

// Write writes the report for people to read.
func (r Report) Write(w io.Writer) error {
	var b strings.Builder
	b.WriteString("this machine:\n")
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "  %-8s %-9s %s\n", f.Result, f.Check, f.Detail)
		if f.Remedy != "" {
			fmt.Fprintf(&b, "  %-8s %-9s hint: %s\n", "", "", f.Remedy)
		}
	}
	b.WriteString("joining will change:\n")
	for _, c := range r.Changes {
		fmt.Fprintf(&b, "  %s: %s\n", c.Where, c.What)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
