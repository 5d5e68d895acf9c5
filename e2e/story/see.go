package story

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/e2e/lab"
)

func status(ctx context.Context, w *World) (string, error) {
	screen, err := w.isthmus(ctx, "amber", "status")
	if err != nil {
		return "", err
	}
	for _, want := range []string{"LINKS", "EXPORTS", "IMPORTS", "PROBLEMS  0", "reviews.default.global", "birch.mesh", "cedar.mesh"} {
		if !strings.Contains(screen, want) {
			err = errors.Join(err, fmt.Errorf("status does not show %q", want))
		}
	}
	s, jerr := w.status(ctx, "amber")
	return fmt.Sprintf("%d links, %d exports, %d imports, %d proxies, %d problems", len(s.Peers), len(s.Exports), len(s.Imports), len(s.Proxies), len(s.Problems)), errors.Join(err, jerr)
}

func explained(ctx context.Context, w *World) (string, error) {
	var e admin.Explanation
	if err := w.ask(ctx, "amber", &e, "explain", "--from", "productpage.default", reviewsURL); err != nil {
		return "", err
	}
	if len(e.Targets) != 1 || len(e.Targets[0].Endpoints) != 5 || len(e.Addresses) != 2 {
		return "", fmt.Errorf("explain shows %d targets, addresses %v", len(e.Targets), e.Addresses)
	}
	var err error
	for _, x := range e.Targets[0].Endpoints {
		if x.Handshake == nil || x.Handshake.Error != "" || x.Handshake.Identity != x.Identity {
			err = errors.Join(err, fmt.Errorf("%s in %s: handshake %+v, want %s", x.Workload, x.Cluster, x.Handshake, x.Identity))
		}
		if x.Cluster != "amber" && (len(x.Via) == 0 || x.Chain == "" || !strings.HasSuffix(x.SNI, ".p9080."+x.Cluster+".reviews.default.global")) {
			err = errors.Join(err, fmt.Errorf("%s in %s: via %v, server name %s, chain %s", x.Workload, x.Cluster, x.Via, x.SNI, x.Chain))
		}
	}
	text, terr := w.isthmus(ctx, "amber", "explain", "--from", "productpage.default", reviewsURL)
	if !strings.Contains(text, "via gateway 172.31.0.21:15443") {
		terr = errors.Join(terr, errors.New("explain does not show birch's gateway"))
	}
	return fmt.Sprintf("%s, %s, 5 ways, each with a TLS 1.3 handshake just now", e.Host, e.Route), errors.Join(err, terr)
}

// impostor starts an isthmusd with a name, a key and a data directory of its own beside birch's.
func (w *World) impostor(ctx context.Context, name string) (socket string, stop func() error, err error) {
	dir := w.dataDir("impostor-" + name)
	if err := os.MkdirAll(filepath.Join(dir, "config"), 0o700); err != nil {
		return "", nil, err
	}
	socket = filepath.Join(dir, "d.sock")
	text := fmt.Sprintf("cluster: %s\ntrustDomain: impostor.mesh\ndataDir: %s\nlisten: 127.0.0.1:25012\nmetrics: \"\"\nsource: {dir: %s}\nadmin: {socket: %s}\ngateways: [\"172.31.0.99:15443\"]\n",
		name, dir, filepath.Join(dir, "config"), socket)
	file := filepath.Join(dir, "isthmusd.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return "", nil, err
	}
	p, err := w.Start("birch/isthmusd", "impostor-"+name, []string{"isthmusd", "--config", file}, nil)
	if err != nil {
		return "", nil, err
	}
	stop = func() error {
		if err := p.Kill(syscall.SIGTERM); err != nil {
			return err
		}
		_, err := p.Wait(ctx)
		return err
	}
	return socket, stop, lab.Eventually(ctx, 10*time.Second, func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// thief shows a spent token from a birch with another key.
func (w *World) thief(ctx context.Context, token string) (string, error) {
	socket, stop, err := w.impostor(ctx, "birch")
	if err != nil {
		return "", err
	}
	_, said, code, err := w.Exec(ctx, "birch/isthmusd", []string{"isthmus", "--socket", socket, "join", token})
	if err == nil && (code != 1 || !strings.Contains(said, "TokenSpent")) {
		err = fmt.Errorf("the impostor got exit code %d: %s", code, said)
	}
	lines := strings.Split(strings.TrimSpace(said), "\n")
	return lines[len(lines)-1], errors.Join(err, stop())
}

const badYAML = `apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: wrong, namespace: default}
spec:
  hosts: [details.default.svc.cluster.local]
  http:
  - route:
    - destination: {host: ghost.default.global, subset: v9}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: thief, namespace: default}
spec:
  hosts: [thief.example.com]
  addresses: ["%s"]
  ports: [{number: 80, name: http, protocol: HTTP}]
  resolution: STATIC
---
apiVersion: v1
kind: Service
metadata: {name: broken, namespace: default}
spec: {portz: 1
`

func badInput(ctx context.Context, w *World) (string, error) {
	fresh, err := w.isthmus(ctx, "amber", "token", "create", "--for", "elder")
	if err != nil {
		return "", err
	}
	short, err := w.isthmus(ctx, "amber", "token", "create", "--for", "elder", "--ttl", "1s")
	if err != nil {
		return "", err
	}
	socket, stop, err := w.impostor(ctx, "elder")
	if err != nil {
		return "", err
	}
	join := func(token, words string) error {
		_, said, code, err := w.Exec(ctx, "birch/isthmusd", []string{"isthmus", "--socket", socket, "join", token})
		if err == nil && (code != 1 || !strings.Contains(said, words)) {
			err = fmt.Errorf("join of a token that should be refused with %q: exit code %d: %s", words, code, said)
		}
		return err
	}
	errs := []error{join(fresh[:len(fresh)/2], "cut"), join(edited(fresh), "edited")}
	errs = append(errs, pass(ctx, 2*time.Second), join(short, "TokenExpired"))
	_, err = w.refused(ctx, "amber", "is taken", "token", "create", "--for", "birch")
	errs = append(errs, err, stop())
	peers, err := w.peers(ctx, "amber")
	if len(peers) != 2 {
		errs = append(errs, fmt.Errorf("after refused joins amber lists %d peers", len(peers)))
	}
	errs = append(errs, err)

	addrs, err := w.lookup(ctx, pods["amber"], "reviews.default.global.")
	if err != nil {
		return "", errors.Join(append(errs, err)...)
	}
	if err := w.Cluster("amber").Apply("bad.yaml", fmt.Appendf(nil, badYAML, addrs[0])); err != nil {
		return "", err
	}
	var seen []string
	errs = append(errs, lab.Eventually(ctx, 5*time.Second, func(ctx context.Context) error {
		s, err := w.status(ctx, "amber")
		if err != nil {
			return err
		}
		reasons := map[string]bool{}
		seen = nil
		for _, p := range s.Problems {
			reasons[p.Reason] = true
			seen = append(seen, p.Reason)
			if p.Source != "" && !strings.Contains(p.Source, "bad.yaml") {
				return fmt.Errorf("a problem outside of bad.yaml: %s %s", p.Source, p.Message)
			}
		}
		for _, want := range []string{"UnknownHost", "AddressInUse", "InvalidYAML"} {
			if !reasons[want] {
				return fmt.Errorf("status does not show %s, only %v", want, seen)
			}
		}
		return nil
	}))
	rs, err := w.call(ctx, client, reviewsURL, "--n", "50")
	errs = append(errs, err, rs.none(), w.Cluster("amber").Delete("bad.yaml"), lab.Eventually(ctx, 5*time.Second, func(ctx context.Context) error {
		s, err := w.status(ctx, "amber")
		if err == nil && len(s.Problems) > 0 {
			err = fmt.Errorf("%d problems stay after the file is gone", len(s.Problems))
		}
		return err
	}))
	return fmt.Sprintf("tokens cut, edited, expired, for a taken name: refused, amber still has 2 peers; bad objects: %s, all others work", strings.Join(seen, ", ")), errors.Join(errs...)
}

// edited changes one byte of what a token says, not of its form.
func edited(token string) string {
	head, rest, _ := strings.Cut(token, "_")
	payload, sig, _ := strings.Cut(rest, ".")
	raw, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return token
	}
	text := strings.Replace(string(raw), "elder", "alder", 1)
	return head + "_" + base64.RawURLEncoding.EncodeToString([]byte(text)) + "." + sig
}
