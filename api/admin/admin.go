// Package admin is what isthmusd and the operator's tool say to each other: JSON over HTTP on a unix socket that only
// the operator can open, or over TLS through the API server with a reviewed token.
package admin

import "time"

// DefaultSocket is where isthmusd listens for its operator.
const DefaultSocket = "/run/isthmus/isthmusd.sock"

// The way through the API server: the tool asks it for a token of a service account in isthmusd's namespace, and calls
// the Service through its proxy. isthmusd has the token reviewed, and then whether the account may do what is asked.
const (
	// ServiceName and Port are where the admin API is.
	ServiceName = "isthmusd"
	Port        = 15015
	// OperatorAccount may do everything, ViewerAccount looks only.
	OperatorAccount = "isthmus-operator"
	ViewerAccount   = "isthmus-viewer"
	// Audience of the tokens.
	Audience = "isthmus.io/admin"
	// TokenHeader carries the token: the API server keeps the header Authorization for itself.
	TokenHeader = "X-Isthmus-Token"
	// CallerHeader says to the replica that answers who called. What a caller writes there itself is overwritten.
	CallerHeader = "X-Isthmus-Caller"
	// FromHeader says from where: "socket", or an address. It is treated as CallerHeader is.
	FromHeader = "X-Isthmus-From"
	// AccessGroup is the API group in Roles. Its resources are the first parts of the paths below: status, peers, tokens, ...
	AccessGroup = "admin.isthmus.io"
	// LocalOnly is the query parameter with which one replica asks another for what that one alone knows.
	LocalOnly = "local"
)

// Error is the body of every answer that is not 2xx.
type Error struct {
	Reason  string `json:"reason"`         // CamelCase, stable
	Message string `json:"message"`        // one line that names the object
	Hint    string `json:"hint,omitempty"` // what to do
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// TokenRequest asks for a join token: POST /v1/tokens.
type TokenRequest struct {
	Kind           string            `json:"kind"` // cluster or vm
	Name           string            `json:"name"` // the one cluster or machine that may join
	TTL            string            `json:"ttl,omitempty"`
	AutoApprove    bool              `json:"autoApprove,omitempty"`
	Namespace      string            `json:"namespace,omitempty"` // these for vm
	ServiceAccount string            `json:"serviceAccount,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`
	Ports          map[string]uint32 `json:"ports,omitempty"`
	Uses           int               `json:"uses,omitempty"` // 1 unless said otherwise
}

// TokenReply carries a new token. It is the only place where the secret is ever shown.
type TokenReply struct {
	Token   string    `json:"token"`
	ID      string    `json:"id"`
	Expires time.Time `json:"expires"`
}

// Token is one issued token without its secret: GET /v1/tokens, DELETE /v1/tokens/ID.
type Token struct {
	ID         string    `json:"id"`
	Kind       string    `json:"kind"`
	Name       string    `json:"name"`
	State      string    `json:"state"` // issued, redeemed, revoked, expired
	Expires    time.Time `json:"expires"`
	RedeemedBy string    `json:"redeemedBy,omitempty"`
	RedeemedAt time.Time `json:"redeemedAt,omitzero"`
	From       string    `json:"from,omitempty"`
}

// WorkloadTokenRequest asks for a bound service-account token: POST /v1/workload-tokens.
type WorkloadTokenRequest struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	Pod            string `json:"pod"`
	TTL            string `json:"ttl,omitempty"`
}

// JoinRequest redeems a token: POST /v1/join.
type JoinRequest struct {
	Token  string `json:"token"`
	DryRun bool   `json:"dryRun,omitempty"`
	// AllowOverlap joins though address ranges of two clusters on one network overlap.
	AllowOverlap bool `json:"allowOverlap,omitempty"`
}

// JoinReply says what was joined.
type JoinReply struct {
	Cluster string   `json:"cluster"` // the one that joins: this cluster
	Issuer  string   `json:"issuer"`  // cluster that issued the token
	Pending bool     `json:"pending"` // waits for the issuer's operator
	Members []string `json:"members"` // clusters known now, this one included
	DryRun  bool     `json:"dryRun,omitempty"`
}

// LeaveRequest takes this cluster out of the mesh: POST /v1/leave.
type LeaveRequest struct {
	DryRun bool `json:"dryRun,omitempty"`
}

// LeaveReply says what was left.
type LeaveReply struct {
	Cluster string   `json:"cluster"` // the one that leaves: this cluster
	Members []string `json:"members"` // the clusters it leaves
	Exports []string `json:"exports"` // hosts that end in those
	Imports []string `json:"imports"` // hosts that end here, or lose the endpoints of those
	Heard   []string `json:"heard"`   // members that heard it
	Unheard []string `json:"unheard"` // members that were not reached
	DryRun  bool     `json:"dryRun,omitempty"`
}

// Peer is another cluster of the mesh: GET /v1/peers; POST /v1/peers/NAME/approve, evict, drain.
type Peer struct {
	Name        string    `json:"name"`
	TrustDomain string    `json:"trustDomain"`
	Topology    string    `json:"topology"`
	Network     string    `json:"network"`
	State       string    `json:"state"`     // approved, pending, evicted, left
	Freshness   string    `json:"freshness"` // fresh, late, expired
	LastHeard   time.Time `json:"lastHeard,omitzero"`
	StaleSince  time.Time `json:"staleSince,omitzero"`
	Path        string    `json:"path"` // direct ADDRESS, or via CLUSTER, or down
	Gateways    []string  `json:"gateways"`
	Services    int       `json:"services"`
	Endpoints   int       `json:"endpoints"`
	Epoch       uint64    `json:"epoch"`
	Seq         uint64    `json:"seq"`
	Alive       string    `json:"alive"` // gossip's opinion: alive, suspect, dead, unknown
	Problem     string    `json:"problem,omitempty"`
	// Refused counts what is not taken of it, by reason: records since the start, and what is wrong in those in use.
	Refused map[string]uint64 `json:"refused,omitempty"`
	// Drain is how this cluster's traffic to it is taken away; nil: it is not.
	Drain *Drain `json:"drain,omitempty"`
}

// DrainRequest takes the traffic to a cluster away: POST /v1/peers/NAME/drain.
type DrainRequest struct {
	Over string `json:"over,omitempty"` // how long that takes; 10m unless given
	Undo bool   `json:"undo,omitempty"` // give all back at once
}

// Drain is where a drain stands.
type Drain struct {
	Begun   time.Time `json:"begun"`
	Over    string    `json:"over"`
	Percent int       `json:"percent"` // of its share that is taken away
}

// EvictReply says who is out: POST /v1/peers/NAME/evict.
type EvictReply struct {
	Cluster string `json:"cluster"`
	State   string `json:"state"` // evicted
	// Also are those that it alone had let in: nobody vouches for them now.
	Also []string `json:"also,omitempty"`
	// Elsewhere are the members that let it in, too: there it stays until they evict it.
	Elsewhere []string `json:"elsewhere,omitempty"`
}

// Trust says which roots are trusted: GET /v1/trust.
type Trust struct {
	Cluster     string        `json:"cluster"`
	TrustDomain string        `json:"trustDomain"`
	Phase       string        `json:"phase"`           // steady, telling, overlap
	Given       string        `json:"given,omitempty"` // where a CA that is given comes from
	Roots       []TrustRoot   `json:"roots"`           // of this cluster
	Expires     time.Time     `json:"expires"`         // of the chain that signs
	Started     time.Time     `json:"started,omitzero"`
	By          string        `json:"by,omitempty"`
	Lagging     []TrustLag    `json:"lagging"` // who is waited for
	Domains     []TrustDomain `json:"domains"` // of others
}

// TrustRoot is one root certificate of this cluster.
type TrustRoot struct {
	Subject     string    `json:"subject"`
	Fingerprint string    `json:"fingerprint"` // SHA-256, hexadecimal
	State       string    `json:"state"`       // signs, next, old
	NotAfter    time.Time `json:"notAfter"`
	Until       time.Time `json:"until,omitzero"` // of an old one: trusted for so long
}

// TrustLag is somebody who does not have the newest roots yet.
type TrustLag struct {
	Kind string `json:"kind"` // peer, proxy, replica
	Name string `json:"name"`
	Why  string `json:"why"`
}

// TrustDomain is a trust domain of others whose workloads are let in.
type TrustDomain struct {
	Name    string   `json:"name"`
	Cluster string   `json:"cluster,omitempty"`
	Roots   []string `json:"roots"` // fingerprints
}

// RotateRequest begins a rotation of the root: POST /v1/trust.
type RotateRequest struct {
	Now     bool   `json:"now,omitempty"`     // the new root signs at once
	Overlap string `json:"overlap,omitempty"` // how long the old one is trusted then
	Cancel  bool   `json:"cancel,omitempty"`  // give up one that does not sign yet
}

// Service is one exported or imported service.
type Service struct {
	Host      string         `json:"host"`
	Addresses []string       `json:"addresses"`
	Ports     []string       `json:"ports"`
	Endpoints map[string]int `json:"endpoints"` // ready ones by cluster
}

// Status is one screen of everything: GET /v1/status.
type Status struct {
	Cluster     string        `json:"cluster"`
	TrustDomain string        `json:"trustDomain"`
	Network     string        `json:"network"`
	Version     string        `json:"version"`
	Revision    uint64        `json:"revision"`
	Ready       bool          `json:"ready"`
	Gateways    []string      `json:"gateways"`
	Sources     []Source      `json:"sources,omitempty"`
	Peers       []Peer        `json:"peers"`
	Exports     []Service     `json:"exports"`
	Imports     []Service     `json:"imports"`
	Proxies     []Proxy       `json:"proxies"`
	Machines    []Machine     `json:"machines"`
	Problems    []ProblemLine `json:"problems"`
}

// Source is one API server that objects are read from.
type Source struct {
	Cluster   string       `json:"cluster"`
	Remote    bool         `json:"remote,omitempty"` // read by remote secret
	Server    string       `json:"server"`
	Connected bool         `json:"connected"`
	Since     time.Time    `json:"since,omitzero"` // connected or lost; zero: never connected
	Error     string       `json:"error,omitempty"`
	Objects   int          `json:"objects"`
	Kinds     []SourceKind `json:"kinds"`
}

// SourceKind is how one kind of objects is read.
type SourceKind struct {
	Kind    string `json:"kind"` // plural and group
	Version string `json:"version,omitempty"`
	Objects int    `json:"objects"`
	State   string `json:"state"` // synced, syncing, absent, forbidden, failed
	Message string `json:"message,omitempty"`
	Remedy  string `json:"remedy,omitempty"`
}

// ProblemLine is one thing that is wrong.
type ProblemLine struct {
	Object  string `json:"object"`
	Source  string `json:"source,omitempty"`
	Field   string `json:"field,omitempty"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`
}

// Proxy is one xDS client: GET /v1/proxies.
type Proxy struct {
	Node     string                `json:"node"`
	Identity string                `json:"identity,omitempty"`
	Address  string                `json:"address"`
	Types    map[string]ProxyState `json:"types"` // by short type name: CDS, EDS, LDS, RDS, SDS, ...
}

// ProxyState says how far one resource type got at one proxy.
type ProxyState struct {
	State string `json:"state"` // SYNCED, STALE, NOT SENT, NACK
	Nack  string `json:"nack,omitempty"`
	// Sent and Acked are content hashes over all resources of the type; equal hashes, equal resources.
	Sent    string `json:"sent,omitempty"`
	Acked   string `json:"acked,omitempty"`
	Held    int    `json:"held,omitempty"`    // resources that the client has
	Pending int    `json:"pending,omitempty"` // changes not yet sent
}

// Machine is a virtual machine that registered itself.
type Machine struct {
	Name      string    `json:"name"`
	Namespace string    `json:"namespace"`
	Address   string    `json:"address"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"`
}

// ExplainRequest asks how a request would travel: POST /v1/explain.
type ExplainRequest struct {
	From    string            `json:"from"` // WORKLOAD.NAMESPACE or SERVICE.NAMESPACE
	URL     string            `json:"url"`
	Method  string            `json:"method,omitempty"`
	Headers map[string]string `json:"headers,omitempty"`
	NoProbe bool              `json:"noProbe,omitempty"` // do not try handshakes
}

// Explanation is the way of one request.
type Explanation struct {
	From      string        `json:"from"`
	URL       string        `json:"url"`
	Host      string        `json:"host"`
	Object    string        `json:"object"`
	Addresses []string      `json:"addresses"`
	Port      uint32        `json:"port"`
	Protocol  string        `json:"protocol"`
	Route     string        `json:"route"` // VirtualService and rule, or "default"
	Targets   []Destination `json:"targets"`
	Problems  []string      `json:"problems,omitempty"`
}

// Destination is one weighted branch of a route.
type Destination struct {
	Host      string             `json:"host"`
	Subset    string             `json:"subset,omitempty"`
	Labels    map[string]string  `json:"labels,omitempty"`
	Weight    uint32             `json:"weight"` // percent
	Cluster   string             `json:"cluster"`
	TLS       string             `json:"tls"`
	Endpoints []ExplainedAddress `json:"endpoints"`
}

// ExplainedAddress is one endpoint and the way to it.
type ExplainedAddress struct {
	Workload  string   `json:"workload"`
	Cluster   string   `json:"cluster"`
	Address   string   `json:"address,omitempty"`
	Via       []string `json:"via,omitempty"` // gateways; empty: direct
	SNI       string   `json:"sni,omitempty"`
	Chain     string   `json:"chain,omitempty"` // filter chain at the far gateway
	Identity  string   `json:"identity"`
	Freshness string   `json:"freshness"`
	Ready     bool     `json:"ready"`
	Handshake *Probe   `json:"handshake,omitempty"`
}

// Probe is a TLS handshake with the endpoint, made while explaining.
type Probe struct {
	At       time.Time `json:"at"`
	Took     string    `json:"took"`
	Gateway  string    `json:"gateway,omitempty"`
	Version  string    `json:"version,omitempty"`
	Identity string    `json:"identity,omitempty"` // what the far side proved
	Error    string    `json:"error,omitempty"`
}
