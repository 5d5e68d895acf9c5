// Package debug answers questions about what isthmusd knows and what it serves, as JSON: which proxies are connected and
// what they took, configuration objects, endpoints, services, and what one proxy is served. It shows no private key.
package debug

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/internal/redact"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// Config is what the answers are made from.
type Config struct {
	Snapshots mesh.Snapshots
	Clients   func() []xds.ClientStatus
	// Held returns what the client with that node id is served, and whether it is connected here.
	Held func(node string) (xds.Set, bool)
	// Others asks the other replicas for a path, and returns the answers of those that have one. Nil: there are none.
	Others func(ctx context.Context, path string) [][]byte
}

// pages are what there is, for whoever asks without knowing.
var pages = map[string]string{
	"/debug/adsz":        "connected xDS clients: who, since when, and what each was sent and took, by type",
	"/debug/syncz":       "how far each proxy is, in Istio's form",
	"/debug/configz":     "configuration objects in use",
	"/debug/endpointz":   "endpoints by service and port",
	"/debug/registryz":   "services",
	"/debug/config_dump": "what one proxy is served, in the form of Envoy's config_dump: ?proxyID=NODE or NAME.NAMESPACE",
}

// Handler answers GET below /debug/.
func Handler(c Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/{$}", func(w http.ResponseWriter, _ *http.Request) { answer(w, pages) })
	mux.HandleFunc("GET /debug/adsz", func(w http.ResponseWriter, r *http.Request) {
		clients := collect(c, r, c.adsz())
		slices.SortStableFunc(clients, func(a, b Client) int { return cmp.Compare(a.Node, b.Node) })
		answer(w, clients)
	})
	mux.HandleFunc("GET /debug/syncz", func(w http.ResponseWriter, r *http.Request) {
		answer(w, collect(c, r, c.syncz()))
	})
	for path, of := range map[string]func(*mesh.Snapshot) any{"configz": configz, "endpointz": endpointz, "registryz": registryz} {
		mux.HandleFunc("GET /debug/"+path, func(w http.ResponseWriter, _ *http.Request) {
			snap, _ := c.Snapshots.Latest()
			if snap == nil {
				fail(w, http.StatusServiceUnavailable, "NotReady", "nothing is known yet: the first snapshot is still being built", "isthmus status says what is missing")
				return
			}
			answer(w, of(snap))
		})
	}
	mux.HandleFunc("GET /debug/config_dump", c.configDump)
	return mux
}

// collect adds what the other replicas say, unless this one alone is asked.
func collect[T any](c Config, r *http.Request, own []T) []T {
	for _, body := range c.ask(r) {
		var more []T
		if json.Unmarshal(body, &more) == nil {
			own = append(own, more...)
		}
	}
	return own
}

func (c Config) ask(r *http.Request) [][]byte {
	if c.Others == nil || r.URL.Query().Get(admin.LocalOnly) != "" {
		return nil
	}
	return c.Others(r.Context(), r.URL.RequestURI())
}

// Client is one connected xDS client.
type Client struct {
	Node      string          `json:"node"`
	Identity  string          `json:"identity,omitempty"`
	Address   string          `json:"address"`
	Connected time.Time       `json:"connectedAt"`
	Delta     bool            `json:"delta"`
	Types     map[string]Type `json:"types"` // by type URL
}

// Type is the account of one resource type.
type Type struct {
	State     string `json:"state"` // SYNCED, STALE, NOT SENT, NACK
	Sent      string `json:"sent,omitempty"`
	Acked     string `json:"acked,omitempty"`
	Nack      string `json:"nack,omitempty"`
	Wildcard  bool   `json:"wildcard,omitempty"`
	Names     int    `json:"subscribed"`
	Held      int    `json:"held"`
	Pending   int    `json:"pending"`
	Responses uint64 `json:"responses"`
	Acks      uint64 `json:"acks"`
	Nacks     uint64 `json:"nacks"`
}

// StateOf says how far a client is with a type.
func StateOf(t xds.TypeStatus) string {
	switch {
	case t.Nack != "":
		return "NACK"
	case t.Pending == 0 && t.Acked == t.Sent: // also when it resumed with all there is
		return "SYNCED"
	case t.Sent == "":
		return "NOT SENT"
	}
	return "STALE"
}

func (c Config) adsz() []Client {
	out := []Client{}
	for _, s := range c.Clients() {
		x := Client{Node: s.Node.GetId(), Identity: s.Identity, Address: s.Addr, Connected: s.Since, Delta: s.Delta, Types: map[string]Type{}}
		for _, t := range s.Types {
			x.Types[t.TypeURL] = Type{State: StateOf(t), Sent: t.Sent, Acked: t.Acked, Nack: t.Nack, Wildcard: t.Wildcard, Names: t.Names, Held: t.Held, Pending: t.Pending, Responses: t.Responses, Acks: t.Acks, Nacks: t.Nacks}
		}
		out = append(out, x)
	}
	return out
}

// Sync is how far a proxy is, with the names that Istio's page has.
type Sync struct {
	Proxy         string `json:"proxy"`
	ClusterID     string `json:"cluster_id,omitempty"`
	ClusterSent   string `json:"cluster_sent,omitempty"`
	ClusterAcked  string `json:"cluster_acked,omitempty"`
	ListenerSent  string `json:"listener_sent,omitempty"`
	ListenerAcked string `json:"listener_acked,omitempty"`
	RouteSent     string `json:"route_sent,omitempty"`
	RouteAcked    string `json:"route_acked,omitempty"`
	EndpointSent  string `json:"endpoint_sent,omitempty"`
	EndpointAcked string `json:"endpoint_acked,omitempty"`
}

func (c Config) syncz() []Sync {
	out := []Sync{}
	for _, s := range c.Clients() {
		id := s.Node.GetId()
		if !strings.HasPrefix(id, "sidecar~") && !strings.HasPrefix(id, "router~") {
			continue
		}
		x := Sync{Proxy: id, ClusterID: s.Node.GetMetadata().GetFields()["CLUSTER_ID"].GetStringValue()}
		known := false
		for _, t := range s.Types {
			switch t.TypeURL {
			case xds.ClusterType:
				x.ClusterSent, x.ClusterAcked, known = t.Sent, t.Acked, true
			case xds.ListenerType:
				x.ListenerSent, x.ListenerAcked, known = t.Sent, t.Acked, true
			case xds.RouteType:
				x.RouteSent, x.RouteAcked, known = t.Sent, t.Acked, true
			case xds.EndpointType:
				x.EndpointSent, x.EndpointAcked, known = t.Sent, t.Acked, true
			}
		}
		if known { // an agent beside its Envoy has a stream of its own
			out = append(out, x)
		}
	}
	return out
}

// Object is one configuration object as it is used: with defaults, and names written out.
type Object struct {
	mesh.ObjectRef
	Spec json.RawMessage `json:"spec"`
}

var (
	refType   = reflect.TypeFor[mesh.ObjectRef]()
	protoType = reflect.TypeFor[proto.Message]()
)

// configz finds every list of objects with a protobuf spec in the snapshot: a new kind is shown without a word here.
// What carries keys has no such spec.
func configz(snap *mesh.Snapshot) any {
	out := []Object{}
	v := reflect.ValueOf(snap).Elem()
	for i := range v.NumField() {
		list := v.Field(i)
		if list.Kind() == reflect.Pointer && !list.IsNil() {
			single := reflect.MakeSlice(reflect.SliceOf(list.Type()), 0, 1)
			list = reflect.Append(single, list)
		}
		if list.Kind() != reflect.Slice || list.Type().Elem().Kind() != reflect.Pointer || list.Type().Elem().Elem().Kind() != reflect.Struct {
			continue
		}
		object, has := list.Type().Elem().Elem().FieldByName("Object")
		spec, hasSpec := list.Type().Elem().Elem().FieldByName("Spec")
		if !has || !hasSpec || object.Type != refType || !spec.Type.Implements(protoType) {
			continue
		}
		for j := range list.Len() {
			x := list.Index(j).Elem()
			m, _ := x.FieldByIndex(spec.Index).Interface().(proto.Message)
			out = append(out, Object{x.FieldByIndex(object.Index).Interface().(mesh.ObjectRef), specOf(m)})
		}
	}
	slices.SortStableFunc(out, func(a, b Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// specOf writes a spec without the keys that an EnvoyFilter may carry.
func specOf(m proto.Message) json.RawMessage {
	text, err := protojson.Marshal(m)
	if err == nil {
		var v any
		if err = json.Unmarshal(text, &v); err == nil {
			redact.JSON(v)
			text, err = json.Marshal(v)
		}
	}
	if err != nil {
		text, _ = json.Marshal("not shown: " + err.Error())
	}
	return text
}

// Endpoints are those of one port of a service.
type Endpoints struct {
	Service   string     `json:"svc"`
	Port      uint32     `json:"port"`
	Endpoints []Endpoint `json:"ep"`
}

// Endpoint is one instance.
type Endpoint struct {
	Address   string            `json:"address"`
	Port      uint32            `json:"port"`
	Workload  string            `json:"workload,omitempty"`
	Namespace string            `json:"namespace,omitempty"`
	Cluster   string            `json:"cluster,omitempty"`
	Network   string            `json:"network,omitempty"`
	Locality  string            `json:"locality,omitempty"`
	Identity  string            `json:"identity,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Weight    uint32            `json:"weight,omitempty"`
	TLS       bool              `json:"tls"`
	Ready     bool              `json:"ready"`
	Freshness string            `json:"freshness"`
}

func endpointz(snap *mesh.Snapshot) any {
	out := []Endpoints{}
	for _, s := range snap.Services {
		for _, p := range s.Ports {
			x := Endpoints{Service: s.Host, Port: p.Number, Endpoints: []Endpoint{}}
			for _, e := range s.Endpoints {
				x.Endpoints = append(x.Endpoints, Endpoint{
					Address: e.Address, Port: e.PortOf(p), Workload: e.Workload, Namespace: e.Namespace, Cluster: string(e.Cluster), Network: string(e.Network),
					Locality: e.Locality, Identity: e.Identity, Labels: e.Labels, Weight: e.Weight, TLS: e.TLS, Ready: e.Ready, Freshness: e.Freshness.String(),
				})
			}
			out = append(out, x)
		}
	}
	return out
}

// Service is one host.
type Service struct {
	Host       string          `json:"host"`
	Object     mesh.ObjectRef  `json:"object"`
	Namespace  string          `json:"namespace"`
	Ports      []mesh.Port     `json:"ports"`
	Addresses  []string        `json:"addresses"`
	Resolution mesh.Resolution `json:"resolution"` // 0 static, 1 DNS, 2 none, 3 dynamic
	External   bool            `json:"external,omitempty"`
	Headless   bool            `json:"headless,omitempty"`
	Global     bool            `json:"global,omitempty"`
	Exported   bool            `json:"exported,omitempty"`
	Endpoints  int             `json:"endpoints"`
	Ready      int             `json:"ready"`
}

func registryz(snap *mesh.Snapshot) any {
	out := []Service{}
	for _, s := range snap.Services {
		x := Service{Host: s.Host, Object: s.Object, Namespace: s.Namespace, Ports: s.Ports, Addresses: []string{}, Resolution: s.Resolution, External: s.External, Headless: s.Headless, Global: s.Global, Exported: s.Exported, Endpoints: len(s.Endpoints)}
		for _, a := range s.VIPs {
			x.Addresses = append(x.Addresses, a.String())
		}
		for _, e := range s.Endpoints {
			if e.Ready {
				x.Ready++
			}
		}
		out = append(out, x)
	}
	return out
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("content-type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func fail(w http.ResponseWriter, code int, reason, message, hint string) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(&admin.Error{Reason: reason, Message: message, Hint: hint})
}

// configDump answers what one proxy is served: here, or at the replica that it is connected to.
func (c Config) configDump(w http.ResponseWriter, r *http.Request) {
	want := r.URL.Query().Get("proxyID")
	if want == "" {
		fail(w, http.StatusBadRequest, "BadRequest", "whose configuration is missing: ?proxyID=NODE or ?proxyID=NAME.NAMESPACE", "isthmus proxy-status lists those that are connected")
		return
	}
	if len(want) > 512 {
		fail(w, http.StatusBadRequest, "BadRequest", "proxyID is longer than a node id", "")
		return
	}
	for _, s := range c.Clients() {
		id := s.Node.GetId()
		if id != want && (strings.Count(id, "~") != 3 || strings.Split(id, "~")[2] != want) {
			continue
		}
		if set, ok := c.Held(id); ok {
			answer(w, dump(set))
			return
		}
	}
	r.URL.RawQuery = url.Values{"proxyID": {want}, admin.LocalOnly: r.URL.Query()[admin.LocalOnly]}.Encode()
	for _, body := range c.ask(r) {
		w.Header().Set("content-type", "application/json")
		_, _ = w.Write(body)
		return
	}
	fail(w, http.StatusNotFound, "UnknownProxy", fmt.Sprintf("no proxy %q is connected", want), "isthmus proxy-status lists those that are")
}
