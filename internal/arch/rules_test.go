package arch

// A rule says what the packages it is for may import: of ours beside themselves, and of other modules beside the
// standard library. A pattern ends in /... to take in all below it. Every package of the module has exactly one rule,
// the first that matches, so a new package needs a line here.
type rule struct {
	pkgs   []string
	ours   []string
	others []string
	// pure packages have no clock, socket, file, log or goroutine: their input says all.
	pure bool
}

// Sets of other modules that several rules name.
var (
	envoyTypes = []string{"github.com/envoyproxy/go-control-plane/envoy/...", "github.com/cncf/xds/go/...", "google.golang.org/protobuf/..."}
	istioTypes = []string{"istio.io/api/..."}
	metrics    = []string{"github.com/prometheus/client_golang/prometheus/..."}
	grpc       = []string{"google.golang.org/grpc/...", "google.golang.org/genproto/googleapis/rpc/..."}
	protobuf   = []string{"google.golang.org/protobuf/..."}
	spiffe     = []string{"github.com/spiffe/go-spiffe/v2/..."}
	kubernetes = []string{"k8s.io/api/...", "k8s.io/apimachinery/...", "k8s.io/client-go/...", "k8s.io/klog/v2", "k8s.io/utils/..."}
	anything   = []string{"..."}
)

// purePackages may be imported wherever the model may be.
var purePackages = []string{
	"discovery/mesh", "discovery/translate/...", "discovery/explain", "eastwest/gateway", "eastwest/sni", "topologies",
	"federation/protocol", "federation/protocol/audience", "federation/protocol/body", "federation/policy", "federation/trust", "dns/zone", "dns/vip",
}

// base is open to every package but discovery/mesh: generated wire types, and small things without rules of their own.
var base = []string{"discovery/mesh", "api/...", "internal/..."}

var rules = []rule{
	{pkgs: []string{"api/isthmus/v1alpha1"}, others: []string{"k8s.io/apimachinery/..."}},
	{pkgs: []string{"api/..."}, ours: []string{"api/..."}, others: protobuf},
	{pkgs: []string{"discovery/mesh"}, others: istioTypes, pure: true},
	{
		pkgs: []string{"discovery/translate/..."}, pure: true,
		ours: join(base, "discovery/translate/...", "topologies", "eastwest/sni"), others: join(envoyTypes, istioTypes...),
	},
	{
		pkgs: []string{"discovery/explain", "eastwest/gateway"}, pure: true,
		ours: join(base, "discovery/translate/scope", "discovery/translate/peerauth", "topologies", "eastwest/sni"), others: join(envoyTypes, istioTypes...),
	},
	{pkgs: []string{"eastwest/sni"}, ours: base, pure: true},
	{pkgs: []string{"topologies/..."}, ours: base, others: []string{"sigs.k8s.io/yaml", "go.yaml.in/yaml/..."}, pure: true},
	{pkgs: []string{"federation/policy"}, ours: join(base, "discovery/translate/peerauth"), others: protobuf, pure: true},
	{pkgs: []string{"federation/protocol"}, ours: join(base, "federation/protocol/audience", "federation/protocol/body"), others: protobuf, pure: true},
	{pkgs: []string{"federation/protocol/audience", "federation/protocol/body", "federation/trust"}, ours: base, others: protobuf, pure: true},
	{pkgs: []string{"dns/stub"}, ours: base, pure: true},
	{pkgs: []string{"dns/zone", "dns/vip"}, ours: base, others: join(protobuf, "github.com/miekg/dns"), pure: true},

	{pkgs: []string{"discovery/store/lists"}, pure: true},
	{pkgs: []string{"discovery/store"}, ours: join(base, append([]string{"discovery/store/lists"}, purePackages...)...), others: metrics},
	{
		pkgs: []string{"discovery/config/..."}, ours: join(base, "discovery/config/..."),
		others: join(append(protobuf, istioTypes...), "istio.io/client-go/pkg/apis/...", "k8s.io/api/...", "k8s.io/apimachinery/...",
			"sigs.k8s.io/mcs-api/pkg/apis/...", "sigs.k8s.io/gateway-api/apis/...", "sigs.k8s.io/yaml", "sigs.k8s.io/json", "go.yaml.in/yaml/..."),
	},
	{
		pkgs: []string{"discovery/gatewayapi"}, ours: base, pure: true,
		others: join(append(protobuf, istioTypes...), "k8s.io/api/...", "k8s.io/apimachinery/...", "sigs.k8s.io/gateway-api/apis/..."),
	},
	{pkgs: []string{"discovery/lint"}, ours: base, others: istioTypes, pure: true},
	{pkgs: []string{"discovery/source/file"}, ours: join(base, "discovery/config", "discovery/config/written"), others: []string{"github.com/fsnotify/fsnotify"}},
	{
		pkgs: []string{"discovery/source/kube/..."}, ours: join(base, "discovery/config", "discovery/config/written", "discovery/identity", "discovery/source/kube/..."),
		others: join(kubernetes, append(metrics, "github.com/go-logr/logr", "github.com/go-jose/go-jose/v4/...")...),
	},
	{
		pkgs: []string{"discovery/inject"}, ours: base,
		others: join(append(protobuf, istioTypes...), "k8s.io/api/...", "k8s.io/apimachinery/...", "sigs.k8s.io/yaml"), pure: true,
	},
	{
		pkgs: []string{"discovery/inject/webhook"}, ours: join(base, "discovery/inject"),
		others: join(metrics, "k8s.io/api/...", "k8s.io/apimachinery/...", "k8s.io/client-go/..."),
	},
	{pkgs: []string{"discovery/source/workload"}, ours: join(base, "discovery/config")},
	{pkgs: []string{"discovery/status/reconcile"}, pure: true},
	{
		pkgs: []string{"discovery/status"}, ours: join(base, "dns/zone", "discovery/status/reconcile"),
		others: join(metrics, "k8s.io/api/...", "k8s.io/apimachinery/...", "k8s.io/client-go/...", "sigs.k8s.io/mcs-api/pkg/apis/..."),
	},
	{pkgs: []string{"discovery/xds"}, ours: join(base, purePackages...), others: join(append(envoyTypes, grpc...), metrics...)},
	{
		pkgs: []string{"discovery/identity"}, ours: join(base, purePackages...),
		others: join(append(istioTypes, grpc...), append(append(metrics, spiffe...), "github.com/go-jose/go-jose/v4/...")...),
	},

	{
		pkgs: []string{"federation/token"}, ours: join(base, "eastwest/sni", "federation/protocol", "federation/policy", "federation/trust"),
		others: join(append(protobuf, grpc...), append(metrics, spiffe...)...),
	},
	{
		pkgs: []string{"federation/ledger"}, ours: join(base, "federation/protocol", "federation/policy", "federation/trust"),
		others: join(protobuf, "go.etcd.io/bbolt/..."),
	},
	{
		pkgs: []string{"federation/kubestate"}, ours: join(base, "federation/protocol"),
		others: join(protobuf, "k8s.io/api/...", "k8s.io/apimachinery/...", "k8s.io/client-go/..."),
	},
	{
		pkgs: []string{"federation/gossip"}, ours: join(base, "federation/protocol"),
		others: join(metrics, "github.com/hashicorp/memberlist"),
	},
	{
		pkgs: []string{"federation/peering"}, ours: join(base, "eastwest/sni", "federation/protocol", "federation/protocol/body", "federation/policy", "federation/trust"),
		others: join(append(envoyTypes, grpc...), append(metrics, spiffe...)...),
	},
	{
		pkgs: []string{"eastwest/relay"}, ours: join(base, "eastwest/sni"),
		others: join(append(envoyTypes, metrics...), "golang.org/x/sys/unix"),
	},
	{
		pkgs: []string{"dns/plugin"}, ours: join(base, "dns/zone"),
		others: join(append(envoyTypes, append(grpc, metrics...)...), "github.com/coredns/...", "github.com/miekg/dns"),
	},

	{pkgs: []string{"cmd/..."}, ours: []string{"cmd/...", "api/...", "discovery/...", "federation/...", "eastwest/...", "dns/...", "topologies", "internal/...", "deploy/..."}, others: anything},
	{pkgs: []string{"deploy/..."}}, // the chart as files
	{pkgs: []string{"hack/..."}, others: anything},
	{pkgs: []string{"e2e/...", "bench/..."}, ours: []string{"api/...", "topologies", "internal/...", "e2e/..."}, others: anything},

	{pkgs: []string{"docs/..."}}, // its tests check the pages

	// Helpers of tests serve the package they stand beside.
	{pkgs: []string{"eastwest/gateway/gatewaytest"}, ours: join(base, "eastwest/gateway", "eastwest/sni", "topologies"), others: anything},
	{pkgs: []string{"internal/..."}, ours: []string{"discovery/mesh", "api/...", "internal/..."}, others: anything},
}

// testHelpers are imported by tests and by each other only.
var testHelpers = []string{"eastwest/gateway/gatewaytest", "cmd/isthmus-agent/internal/catest", "internal/golden", "internal/envoytest", "internal/kubetest", "internal/porttest"}

// homes says which packages alone may import a module, whatever their rule says.
var homes = []struct {
	module string
	only   []string
}{
	{"go.etcd.io/bbolt/...", []string{"federation/ledger"}},
	{"github.com/hashicorp/memberlist", []string{"federation/gossip"}},
	{"github.com/coredns/...", []string{"dns/plugin", "cmd/coredns"}},
	{"github.com/vishvananda/netlink", []string{"e2e/lab", "e2e/kubelab/...", "e2e/wan", "internal/capture", "cmd/isthmus-agent/..."}},
	{"github.com/google/nftables/...", []string{"e2e/lab", "e2e/kubelab/...", "internal/capture"}},
	{"github.com/spf13/cobra", []string{"cmd/..."}},
	{"github.com/fsnotify/fsnotify", []string{"cmd/isthmus-cni/...", "discovery/source/file"}},
	{"k8s.io/client-go/...", []string{"discovery/source/kube/...", "discovery/inject/webhook", "discovery/status", "federation/kubestate", "cmd/...", "internal/kubetest", "internal/patient", "e2e/..."}},
}

// unreachable says what a program must not contain, by whatever chain of imports.
var unreachable = []struct {
	from, never []string
	why         string
}{
	{[]string{"cmd/..."}, []string{"testing", ours("e2e/..."), ours("bench/...")}, "a program contains no test code"},
	{[]string{"cmd/isthmus-agent"}, []string{"k8s.io/client-go/..."}, "it runs beside every workload and talks to isthmusd alone"},
	{
		[]string{"cmd/isthmus-agent", "cmd/coredns"}, []string{ours("discovery/store")}, "only isthmusd is a control plane",
	},
	{
		// cmd/isthmus has the store's builder: it looks at files as isthmusd would.
		[]string{"cmd/isthmus-agent", "cmd/coredns", "cmd/isthmus"},
		[]string{ours("discovery/xds"), ours("discovery/source/..."), ours("federation/ledger"), ours("federation/gossip"), ours("federation/peering")},
		"only isthmusd is a control plane",
	},
	{
		[]string{"discovery/mesh", "discovery/translate", "eastwest/gateway", "eastwest/sni", "topologies", "discovery/explain", "federation/protocol", "federation/policy", "dns/vip"},
		[]string{"google.golang.org/grpc", "net/http", "github.com/prometheus/client_golang/prometheus"},
		"pure packages need no server, client or registry",
	},
}

// Pure packages import and call none of these.
var (
	impureImports = []string{"os/...", "net", "net/http/...", "io/fs", "io/ioutil", "syscall", "log/...", "crypto/rand", "golang.org/x/sys/...", "testing/..."}
	impureCalls   = map[string][]string{
		"time": {"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "NewTimer", "NewTicker", "Tick"},
		"rand": {"Int", "IntN", "Int64", "Int64N", "Uint32", "Uint64", "Float64", "Perm", "Shuffle", "N", "Read"},
	}
)

// badNames say nothing about what a package knows.
var badNames = []string{"util", "utils", "common", "helper", "helpers", "types", "manager", "core", "misc", "shared"}

// Sizes, in lines of files that are neither tests nor generated.
const (
	maxPackageLines = 2500
	maxFileLines    = 500
)

// exception lets one place break one rule, for a reason. One that is needed no longer is an error.
type exception struct {
	rule  string // import, home, reach, pure, size, doc, print, exit, todo, name or metric
	where string // package, file or file:function, from the root of the repository
	what  string // what is let pass: the import, the call; "" for all of the rule there
	why   string
}

var exceptions = []exception{
	{"import", "federation/policy", "federation/protocol", "policy reads and makes the core's records; both are pure"},
	{"import", "federation/trust", "github.com/spiffe/go-spiffe/v2/...", "verifying SVIDs against bundles is go-spiffe's; it does no I/O for it"},
	{"import", "federation/peering", "discovery/xds", "records travel as xDS resources: peers are served by the same server as proxies"},
	{"import", "federation/kubestate", "federation/token", "its tests keep real grants"},
	{"exit", "deploy/helm/helm.go:Chart", "panic", "an embedded folder of a constant name; a bug otherwise"},
	{"exit", "eastwest/gateway/envoy.go:pack", "panic", "an encoding that cannot fail; a bug otherwise"},
	{"reach", "cmd/coredns", "testing", "stock CoreDNS links its plugin erratic, which does"},
	{"size", "e2e/lab", "", "test hardware, not product"},
	{"size", "e2e/kubelab/node", "", "test hardware, not product: all that a node does for Pods"},
}

// join returns a new slice: the sets above are shared.
func join(a []string, b ...string) []string { return append(append([]string{}, a...), b...) }

// ours is the import path of a package of this module.
func ours(path string) string { return module + "/" + path }
