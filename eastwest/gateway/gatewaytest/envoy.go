package gatewaytest

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// Validate fails the test unless Envoy accepts res.
func Validate(t *testing.T, res gateway.Resources) {
	t.Helper()
	bootstrap := filepath.Join(t.TempDir(), "bootstrap.json")
	writeJSON(t, bootstrap, &bootstrapv3.Bootstrap{
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: res.Clusters, Listeners: res.Listeners},
	})
	out, err := exec.CommandContext(t.Context(), envoytest.Path(t), "--mode", "validate", "--log-level", "warning", "-c", bootstrap).CombinedOutput()
	if err != nil {
		t.Errorf("envoy refuses the resources: %v\n%s", err, out)
	}
}

// envoyGateway is an Envoy that takes clusters and listeners from files.
type envoyGateway struct {
	addr, dir string
	version   int
}

// StartEnvoy runs Envoy with res until the test ends and waits until it listens.
func StartEnvoy(t *testing.T, res gateway.Resources) Gateway {
	t.Helper()
	binary := envoytest.Path(t)
	e := &envoyGateway{dir: t.TempDir()}
	a := res.Listeners[0].Address.GetSocketAddress()
	e.addr = net.JoinHostPort(a.Address, strconv.Itoa(int(a.GetPortValue())))
	e.Update(t, res)
	bootstrap := filepath.Join(e.dir, "bootstrap.json")
	writeJSON(t, bootstrap, &bootstrapv3.Bootstrap{
		Node:             &corev3.Node{Id: "test", Cluster: "test"},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{CdsConfig: e.source("clusters.json"), LdsConfig: e.source("listeners.json")},
	})
	logFile, err := os.Create(filepath.Join(e.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, binary, "-c", bootstrap, "--disable-hot-restart", "--concurrency", "1", "--log-level", "info")
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if err := cmd.Start(); err != nil {
		t.Fatalf("start Envoy: %v", err)
	}
	t.Cleanup(func() {
		stop()
		_ = cmd.Wait()
		_ = logFile.Close()
		if text, err := os.ReadFile(logFile.Name()); err == nil && t.Failed() {
			t.Logf("Envoy's log:\n%s", text[max(0, len(text)-8000):])
		}
	})
	Eventually(t, "Envoy listens", func() bool {
		c, err := net.DialTimeout("tcp", e.addr, time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	return e
}

// Addr is where the gateway listens.
func (e *envoyGateway) Addr() string { return e.addr }

// Update replaces the resources; Envoy takes them up soon after.
func (e *envoyGateway) Update(t *testing.T, res gateway.Resources) {
	t.Helper()
	e.version++
	replace(t, e, "clusters.json", res.Clusters)
	replace(t, e, "listeners.json", res.Listeners)
}

func (e *envoyGateway) source(name string) *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_PathConfigSource{PathConfigSource: &corev3.PathConfigSource{Path: filepath.Join(e.dir, name)}},
	}
}

// replace moves a new file into place, which is what Envoy watches for.
func replace[T proto.Message](t *testing.T, e *envoyGateway, name string, ms []T) {
	t.Helper()
	response := &discoveryv3.DiscoveryResponse{VersionInfo: strconv.Itoa(e.version)}
	for _, m := range ms {
		packed, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		response.Resources = append(response.Resources, packed)
	}
	path := filepath.Join(e.dir, name)
	writeJSON(t, path+".new", response)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func writeJSON(t *testing.T, path string, m proto.Message) {
	t.Helper()
	b, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
