package plugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/dns/zone"
	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

// HostType is the type URL of the resources the plugin subscribes to.
const HostType = "type.googleapis.com/isthmus.dns.v1.Host"

// feed keeps a zone equal to what isthmusd serves. Its fields belong to the goroutine that calls update.
type feed struct {
	cfg   Config
	hosts map[string]*dnsv1.Host
	given func(*zone.Zone)
}

func newFeed(cfg Config, given func(*zone.Zone)) (*feed, error) {
	f := &feed{cfg: cfg, hosts: map[string]*dnsv1.Host{}, given: given}
	if cfg.Cache == "" {
		return f, nil
	}
	data, err := os.ReadFile(cfg.Cache)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the last good data: %w", err)
	}
	var kept []json.RawMessage
	if err := json.Unmarshal(data, &kept); err != nil {
		log.Warningf("last good data in %s cannot be read and are not used: %v", cfg.Cache, err)
		return f, nil
	}
	for _, raw := range kept {
		h := new(dnsv1.Host)
		if protojson.Unmarshal(raw, h) == nil {
			f.hosts[h.GetName()] = h
		}
	}
	f.publish()
	return f, nil
}

func (f *feed) run(ctx context.Context) error {
	root, err := os.ReadFile(f.cfg.Root)
	if err != nil {
		return fmt.Errorf("read the root certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(root) {
		return fmt.Errorf("%s holds no certificate", f.cfg.Root)
	}
	hostname, err := os.Hostname()
	if err != nil {
		hostname = "coredns"
	}
	metadata, err := structpb.NewStruct(map[string]any{"CLUSTER_ID": f.cfg.Cluster, "GENERATOR": "dns"})
	if err != nil {
		return err
	}
	// What was kept on disk is offered with a version nobody serves: all of it is sent anew, and what is gone is named.
	resume := map[string]string{}
	for name := range f.hosts {
		resume[name] = "kept"
	}
	client := xdsclient.New(xdsclient.Config{
		Resume:  map[string]map[string]string{HostType: resume},
		Targets: f.cfg.Servers,
		DialOptions: []grpc.DialOption{
			grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: f.cfg.ServerName, MinVersion: tls.VersionTLS13})),
			grpc.WithPerRPCCredentials(bearer{f.cfg.Token, f.cfg.Cluster}),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		},
		Node:      &corev3.Node{Id: "dns~" + hostname, Metadata: metadata},
		Subscribe: map[string][]string{HostType: nil},
		OnUpdate:  f.update,
		OnState: func(up bool, err error) {
			connected.Set(map[bool]float64{true: 1}[up])
			if err != nil && ctx.Err() == nil {
				log.Warningf("no stream from isthmusd: %v", err)
			}
		},
		Log: slog.New(slog.DiscardHandler),
	})
	return client.Run(ctx)
}

// update takes one response. The first one on a connection says what is new since the versions we have.
func (f *feed) update(u xdsclient.Update) error {
	if u.TypeURL != HostType {
		return nil
	}
	for _, r := range u.Added {
		h := new(dnsv1.Host)
		if err := r.GetResource().UnmarshalTo(h); err != nil {
			return fmt.Errorf("host %s: %w", r.GetName(), err)
		}
		f.hosts[r.GetName()] = h
	}
	for _, name := range u.Removed {
		delete(f.hosts, name)
	}
	f.publish()
	return nil
}

func (f *feed) publish() {
	f.given(zone.New(f.hosts, zone.Options{Zones: f.cfg.Zones, TTL: f.cfg.TTL}))
	if f.cfg.Cache == "" {
		return
	}
	if err := f.save(); err != nil {
		log.Warningf("last good data not kept: %v", err)
	}
}

func (f *feed) save() error {
	kept := make([]json.RawMessage, 0, len(f.hosts))
	for _, h := range f.hosts {
		raw, err := protojson.Marshal(h)
		if err != nil {
			return err
		}
		kept = append(kept, raw)
	}
	data, err := json.Marshal(kept)
	if err != nil {
		return err
	}
	tmp := filepath.Join(filepath.Dir(f.cfg.Cache), "."+filepath.Base(f.cfg.Cache)+".new")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, f.cfg.Cache)
}

// bearer reads the token anew for each connection, since it is rotated. It says whose API server knows the token.
type bearer struct{ file, cluster string }

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	data, err := os.ReadFile(b.file)
	if err != nil {
		return nil, fmt.Errorf("read the token: %w", err)
	}
	said := map[string]string{"authorization": "Bearer " + strings.TrimSpace(string(data))}
	if b.cluster != "" {
		said["clusterid"] = b.cluster // Istio's header
	}
	return said, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (bearer) RequireTransportSecurity() bool { return true }
