package plugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/types/known/structpb"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/dns/zone"
	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

// HostType is the type URL of the resources the plugin subscribes to.
const HostType = "type.googleapis.com/isthmus.dns.v1.Host"

const (
	// connectWithin is how long one address of isthmusd may take to answer before the next one is tried.
	connectWithin = 3 * time.Second
	// restartAfter is how long a part of the feed that failed waits.
	restartAfter = time.Second
)

// feed keeps a zone equal to what isthmusd serves.
type feed struct {
	cfg  Config
	zone atomic.Pointer[zone.Zone] // nil until the first data; written by the goroutine that calls update
	keep *keeper                   // nil: nothing is kept on disk
	next atomic.Uint64             // the address to try
}

func newFeed(cfg Config) *feed {
	f := &feed{cfg: cfg}
	if cfg.Cache == "" {
		return f
	}
	f.keep = newKeeper(cfg.Cache)
	if kept := f.keep.load(); len(kept) > 0 {
		f.publish(f.empty().With(kept, nil))
	}
	return f
}

func (f *feed) empty() *zone.Zone {
	return zone.New(nil, zone.Options{Zones: f.cfg.Zones, TTL: f.cfg.TTL})
}

// run follows isthmusd, and keeps what it says on disk, until ctx ends. Nothing ends it before: not a file that is not
// there yet, and not a panic.
func (f *feed) run(ctx context.Context) {
	var g sync.WaitGroup
	g.Go(func() { again(ctx, "stream", f.stream) })
	if f.keep != nil {
		g.Go(func() { again(ctx, "last good data", f.keep.run) })
	}
	g.Wait()
}

// again runs a part until ctx ends.
func again(ctx context.Context, what string, part func(context.Context) error) {
	for ctx.Err() == nil {
		if err := guarded(ctx, part); err != nil && ctx.Err() == nil {
			log.Errorf("%s: %v", what, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(restartAfter):
		}
	}
}

// guarded runs a part and makes a panic an error: the answers that are there go on.
func guarded(ctx context.Context, part func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			panics.Inc()
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return part(ctx)
}

func (f *feed) stream(ctx context.Context) error {
	hostname, err := os.Hostname()
	if err != nil {
		hostname = "coredns"
	}
	metadata, err := structpb.NewStruct(map[string]any{"CLUSTER_ID": f.cfg.Cluster, "GENERATOR": "dns"})
	if err != nil {
		return err
	}
	// What was kept is offered with a version nobody serves: all of it is sent anew, and what is gone is named.
	resume := map[string]string{}
	if z := f.zone.Load(); z != nil {
		for h := range z.All() {
			resume[h.GetName()] = "kept"
		}
	}
	said := ""
	return xdsclient.New(xdsclient.Config{
		Resume:         map[string]map[string]string{HostType: resume},
		Dial:           f.dial,
		ConnectTimeout: connectWithin,
		Node:           &corev3.Node{Id: "dns~" + hostname, Metadata: metadata},
		Subscribe:      map[string][]string{HostType: nil},
		OnUpdate:       f.update,
		OnState: func(up bool, err error) {
			connected.Set(map[bool]float64{true: 1}[up])
			switch {
			case up:
				said = ""
				log.Info("stream from isthmusd is up")
			case err != nil && ctx.Err() == nil && err.Error() != said: // tried again every second: said once
				said = err.Error()
				log.Warningf("no stream from isthmusd: %v", err)
			}
		},
		Log: slog.New(slog.DiscardHandler),
	}).Run(ctx)
}

// dial connects to one address after the other. The root is read each time: it may come late, and is rotated.
func (f *feed) dial(context.Context) (*grpc.ClientConn, error) {
	root, err := os.ReadFile(f.cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("read the root certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(root) {
		return nil, fmt.Errorf("%s holds no certificate", f.cfg.Root)
	}
	server := f.cfg.Servers[int((f.next.Add(1)-1)%uint64(len(f.cfg.Servers)))]
	return grpc.NewClient(server,
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse)),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, ServerName: f.cfg.ServerName, MinVersion: tls.VersionTLS13})),
		grpc.WithPerRPCCredentials(bearer{f.cfg.Token, f.cfg.Cluster}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
	)
}

// maxResponse is the largest response that is taken: some 500,000 names.
const maxResponse = 64 << 20

// update takes one response. The first one on a connection says what is new since the versions we have. A host that
// cannot be read refuses the response; what is served stays as it is.
func (f *feed) update(u xdsclient.Update) error {
	if u.TypeURL != HostType {
		return nil
	}
	changed := make(map[string]*dnsv1.Host, len(u.Added))
	for _, r := range u.Added {
		h := new(dnsv1.Host)
		if err := r.GetResource().UnmarshalTo(h); err != nil {
			return fmt.Errorf("host %s: %w", r.GetName(), err)
		}
		changed[r.GetName()] = h
	}
	z := f.zone.Load()
	if z == nil {
		z = f.empty()
	}
	f.publish(z.With(changed, u.Removed))
	if f.keep != nil {
		f.keep.changed(f.zone.Load())
	}
	return nil
}

func (f *feed) publish(z *zone.Zone) {
	f.zone.Store(z)
	hosts.Set(float64(z.Len()))
	lastChange.Set(float64(time.Now().Unix()))
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
