// Package kubeplane prepares a Kubernetes control plane for tests and the lab: keys and certificates, kubeconfigs, and
// the command lines of the program that "make kube" builds. It starts nothing.
package kubeplane

import (
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Config says what a control plane is called and where it listens.
type Config struct {
	// Name is the cluster's, in kubeconfigs and certificates.
	Name string
	// Dir gets all files; it is made.
	Dir string
	// Address and Port are where the API server is reached, and what it tells its Pods.
	Address netip.Addr
	Port    uint16
	// Listen is the address that the API server binds, default Address.
	Listen netip.Addr
	// Names and Addresses are further ones that the API server's certificate is for.
	Names     []string
	Addresses []netip.Addr
	// EtcdURL is where etcd listens: http://ADDRESS:PORT.
	EtcdURL string
	// ServiceCIDRs are the ranges of Services' cluster addresses, at most one IPv4 and one IPv6, the first one the default.
	ServiceCIDRs []netip.Prefix
	// Controllers says that the controller manager will run. Without it the API server asks no Pod for an existing
	// service account, since nobody makes them.
	Controllers bool
}

// Plane is a control plane whose files are written.
type Plane struct {
	cfg Config
	ca  *authority
}

// New writes keys, certificates and the kubeconfigs of the administrator and of the programs.
func New(cfg Config) (*Plane, error) {
	if !cfg.Listen.IsValid() {
		cfg.Listen = cfg.Address
	}
	p := &Plane{cfg: cfg}
	if cfg.Name == "" || cfg.Dir == "" || !cfg.Address.IsValid() || cfg.Port == 0 || cfg.EtcdURL == "" || len(cfg.ServiceCIDRs) == 0 {
		return nil, errors.New("control plane: name, folder, address, port, etcd and services' range are needed")
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := p.writeKeys(); err != nil {
		return nil, fmt.Errorf("keys of %s: %w", cfg.Name, err)
	}
	for _, u := range []struct {
		file, user string
		groups     []string
	}{
		{adminFile, "admin", []string{"system:masters"}},
		{controllerFile, "system:kube-controller-manager", nil},
		{schedulerFile, "system:kube-scheduler", nil},
	} {
		text, err := p.Kubeconfig(p.URL(), u.user, u.groups...)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(p.file(u.file), text, 0o600); err != nil {
			return nil, err
		}
	}
	return p, nil
}

const (
	adminFile      = "admin.kubeconfig"
	controllerFile = "controller-manager.kubeconfig"
	schedulerFile  = "scheduler.kubeconfig"
)

// URL is the API server's.
func (p *Plane) URL() string {
	return "https://" + netip.AddrPortFrom(p.cfg.Address, p.cfg.Port).String()
}

// CA is the certificate of the authority, in PEM: what clients trust.
func (p *Plane) CA() []byte { return p.ca.pem }

// Admin is the file of the administrator's kubeconfig.
func (p *Plane) Admin() string { return p.file(adminFile) }

func (p *Plane) file(name string) string { return filepath.Join(p.cfg.Dir, name) }

// Kubeconfig returns a kubeconfig for a user in groups, proved by a client certificate made now. All is in the file
// itself, so it may be copied. The context is named after the cluster.
func (p *Plane) Kubeconfig(url, user string, groups ...string) ([]byte, error) {
	cert, key, err := p.ca.issue(pkix.Name{CommonName: user, Organization: groups}, nil, nil)
	if err != nil {
		return nil, err
	}
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: %[1]s
clusters:
- name: %[1]s
  cluster:
    server: %[2]s
    certificate-authority-data: %[3]s
contexts:
- name: %[1]s
  context: {cluster: %[1]s, user: %[4]q}
users:
- name: %[4]q
  user:
    client-certificate-data: %[5]s
    client-key-data: %[6]s
`, p.cfg.Name, url, b64(p.ca.pem), user, b64(cert), b64(key)), nil
}

// Etcd is the command line of etcd; its data is in the folder of the plane.
func (p *Plane) Etcd() []string {
	return []string{"kube", "etcd", "--data-dir=" + p.file("etcd"), "--listen-client-url=" + p.cfg.EtcdURL}
}

// APIServer is the command line of the API server.
func (p *Plane) APIServer() []string {
	var ranges []string
	for _, s := range p.cfg.ServiceCIDRs {
		ranges = append(ranges, s.String())
	}
	argv := []string{
		"kube", "apiserver",
		"--etcd-servers=" + p.cfg.EtcdURL,
		"--bind-address=" + p.cfg.Listen.String(),
		"--advertise-address=" + p.cfg.Address.String(),
		"--secure-port=" + strconv.Itoa(int(p.cfg.Port)),
		"--tls-cert-file=" + p.file("apiserver.crt"),
		"--tls-private-key-file=" + p.file("apiserver.key"),
		"--client-ca-file=" + p.file("ca.crt"),
		"--kubelet-certificate-authority=" + p.file("ca.crt"),
		"--kubelet-client-certificate=" + p.file("kubelet-client.crt"),
		"--kubelet-client-key=" + p.file("kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + p.file("tokens.key"),
		"--service-account-signing-key-file=" + p.file("tokens.key"),
		"--service-cluster-ip-range=" + strings.Join(ranges, ","),
		"--authorization-mode=Node,RBAC",
		"--allow-privileged=true",
		"--profiling=false",
		"--enable-priority-and-fairness=false",
		"--watch-cache=true",
		"--default-watch-cache-size=50",
		"--event-ttl=30m",
		"--shutdown-delay-duration=0s",
	}
	if !p.cfg.Controllers {
		argv = append(argv, "--disable-admission-plugins=ServiceAccount")
	}
	if p.cfg.Address.IsLoopback() { // no EndpointSlice may have such an address
		argv = append(argv, "--endpoint-reconciler-type=none")
	}
	return argv
}

// ControllerManager is the command line of the controller manager.
func (p *Plane) ControllerManager() []string {
	return []string{
		"kube", "controller-manager",
		"--kubeconfig=" + p.file(controllerFile),
		"--service-account-private-key-file=" + p.file("tokens.key"),
		"--root-ca-file=" + p.file("ca.crt"),
		"--cluster-signing-cert-file=" + p.file("ca.crt"),
		"--cluster-signing-key-file=" + p.file("ca.key"),
		"--use-service-account-credentials=true",
		"--leader-elect=false",
		"--secure-port=0",
		"--profiling=false",
		// Storage, certificates of kubelets and the like are not there to be controlled.
		"--controllers=*,-persistentvolume-binder-controller,-persistentvolume-attach-detach-controller,-persistentvolume-expander-controller," +
			"-persistentvolumeclaim-protection-controller,-persistentvolume-protection-controller,-volumeattributesclass-protection-controller," +
			"-ephemeral-volume-controller,-certificatesigningrequest-cleaner-controller,-storageversion-garbage-collector-controller,-device-taint-eviction-controller," +
			"-selinux-warning-controller,-horizontal-pod-autoscaler-controller,-resourceclaim-controller,-storage-version-migrator-controller",
	}
}

// Scheduler is the command line of the scheduler.
func (p *Plane) Scheduler() []string {
	return []string{"kube", "scheduler", "--kubeconfig=" + p.file(schedulerFile), "--leader-elect=false", "--secure-port=0", "--profiling=false"}
}
