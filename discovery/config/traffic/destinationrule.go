//lint:file-ignore SA1019 Folders still hold the older fields and kinds; they are converted here.

package traffic

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// DestinationRule decodes the object; nil when something is wrong with it.
func DestinationRule(w *written.Object) *mesh.DestinationRule {
	o := &object{w}
	spec := &networking.DestinationRule{}
	if _, ok := o.Spec(spec); !ok {
		return nil
	}
	spec.Host = o.Host(spec.Host)
	o.CheckHost("spec.host", spec.Host)
	spec.ExportTo = o.Visibility("spec.exportTo", spec.ExportTo)
	o.trafficPolicy("spec.trafficPolicy", spec.TrafficPolicy)
	names := map[string]bool{}
	for i, s := range spec.Subsets {
		at := fmt.Sprintf("spec.subsets[%d]", i)
		if s.GetName() == "" {
			o.Reject(at+".name", written.ReasonMissing, "the subset has no name", "give it one")
			continue
		}
		o.checkSubset(at+".name", s.Name)
		if names[s.Name] {
			o.Reject(at+".name", written.ReasonDuplicate, "two subsets are named "+written.Show(s.Name), "rename or remove one")
		}
		names[s.Name] = true
		o.trafficPolicy(at+".trafficPolicy", s.TrafficPolicy)
	}
	if o.Failed {
		return nil
	}
	return &mesh.DestinationRule{Object: o.Ref, Spec: spec}
}

// checkSubset refuses what is no subset name; it stands in cluster names and server names.
func (o *object) checkSubset(at, name string) {
	if e := validation.IsDNS1123Label(name); len(e) > 0 {
		o.Invalid(at, written.Show(name)+" is not the name of a subset", written.Rule(e))
	}
}

// policy is what a TrafficPolicy and its settings for one port share.
type policy interface {
	GetLoadBalancer() *networking.LoadBalancerSettings
	GetConnectionPool() *networking.ConnectionPoolSettings
	GetOutlierDetection() *networking.OutlierDetection
	GetTls() *networking.ClientTLSSettings
}

func (o *object) trafficPolicy(at string, p *networking.TrafficPolicy) {
	if p == nil {
		return
	}
	o.settings(at, p)
	seen := map[uint32]bool{}
	for i, s := range p.PortLevelSettings {
		to := fmt.Sprintf("%s.portLevelSettings[%d]", at, i)
		n := s.GetPort().GetNumber()
		o.CheckPort(to+".port.number", int64(n))
		if seen[n] {
			o.Reject(to+".port.number", written.ReasonDuplicate, fmt.Sprintf("port %d has settings twice", n), "merge the two")
		}
		seen[n] = true
		o.settings(to, s)
	}
	if t := p.Tunnel; t != nil {
		if t.Protocol != "" && !strings.EqualFold(t.Protocol, "CONNECT") && !strings.EqualFold(t.Protocol, "POST") {
			o.Invalid(at+".tunnel.protocol", written.Show(t.Protocol)+" is not a method", "write CONNECT or POST")
		}
		t.TargetHost = strings.ToLower(t.TargetHost)
		o.CheckHost(at+".tunnel.targetHost", t.TargetHost)
		o.CheckPort(at+".tunnel.targetPort", int64(t.TargetPort))
	}
	if b := p.RetryBudget; b != nil {
		o.CheckPercent(at+".retryBudget.percent", b.GetPercent().GetValue())
		o.checkDuration(at+".retryBudget.budgetInterval", b.GetBudgetInterval(), 0)
	}
}

func (o *object) settings(at string, p policy) {
	o.loadBalancer(at+".loadBalancer", p.GetLoadBalancer())
	o.connectionPool(at+".connectionPool", p.GetConnectionPool())
	o.outlierDetection(at+".outlierDetection", p.GetOutlierDetection())
	t := p.GetTls()
	if s := t.GetSni(); len(s) > 255 || strings.ContainsAny(s, " \t\r\n\x00*/") {
		o.Invalid(at+".tls.sni", written.Show(s)+" is not a server name", "write a DNS name")
	}
	for i, n := range t.GetSubjectAltNames() {
		if n == "" {
			o.Reject(fmt.Sprintf("%s.tls.subjectAltNames[%d]", at, i), written.ReasonMissing, "the name is empty", "write a name, or remove it")
		}
	}
	if t.GetMode() == networking.ClientTLSSettings_MUTUAL && t.GetCredentialName() == "" && (t.GetClientCertificate() == "" || t.GetPrivateKey() == "") {
		o.Reject(at+".tls", written.ReasonMissing, "mode MUTUAL needs clientCertificate and privateKey", "name their files")
	}
}

func (o *object) loadBalancer(at string, lb *networking.LoadBalancerSettings) {
	if lb == nil {
		return
	}
	if s, ok := lb.LbPolicy.(*networking.LoadBalancerSettings_Simple); ok && s.Simple == networking.LoadBalancerSettings_LEAST_CONN {
		s.Simple = networking.LoadBalancerSettings_LEAST_REQUEST // the newer name
	}
	if h := lb.GetConsistentHash(); h != nil {
		if h.MinimumRingSize != 0 { // the older field
			if h.HashAlgorithm == nil {
				ring := &networking.LoadBalancerSettings_ConsistentHashLB_RingHash{MinimumRingSize: h.MinimumRingSize}
				h.HashAlgorithm = &networking.LoadBalancerSettings_ConsistentHashLB_RingHash_{RingHash: ring}
			}
			h.MinimumRingSize = 0
		}
		o.hash(at+".consistentHash", h)
	}
	o.localityLb(at+".localityLbSetting", lb.LocalityLbSetting)
	if lb.ZoneAwareLbSetting != nil {
		o.Unsupported(at+".zoneAwareLbSetting", "endpoints of all zones are used alike")
	}
	if d := lb.WarmupDurationSecs; d != nil { // the older field
		if lb.Warmup == nil {
			lb.Warmup = &networking.WarmupConfiguration{Duration: d}
		}
		lb.WarmupDurationSecs = nil
	}
	o.warmup(at, lb)
}

func (o *object) warmup(at string, lb *networking.LoadBalancerSettings) {
	w := lb.Warmup
	if w == nil {
		return
	}
	o.checkDuration(at+".warmup.duration", w.Duration, 1e9)
	if w.Duration == nil {
		o.Reject(at+".warmup.duration", written.ReasonMissing, "the duration is missing", "write one")
	}
	o.CheckPercent(at+".warmup.minimumPercent", w.GetMinimumPercent().GetValue())
	if a := w.GetAggression(); a != nil && a.GetValue() < 1 {
		o.Invalid(at+".warmup.aggression", fmt.Sprintf("%v is less than 1", a.GetValue()), "write 1 or more")
	}
	if s := lb.GetSimple(); lb.GetConsistentHash() != nil || s == networking.LoadBalancerSettings_RANDOM || s == networking.LoadBalancerSettings_PASSTHROUGH {
		o.Unsupported(at+".warmup", "only ROUND_ROBIN and LEAST_REQUEST warm up")
		lb.Warmup = nil
	}
}

// localityLb checks the shares and the order of localities.
func (o *object) localityLb(at string, s *networking.LocalityLoadBalancerSetting) {
	if len(s.GetDistribute()) > 0 && (len(s.GetFailover()) > 0 || len(s.GetFailoverPriority()) > 0) {
		o.Reject(at, written.ReasonConflict, "distribute stands beside failover", "keep one of the two")
	}
	for i, d := range s.GetDistribute() {
		total := uint32(0)
		for _, n := range d.GetTo() {
			total += n
		}
		if total != 100 {
			o.Invalid(fmt.Sprintf("%s.distribute[%d].to", at, i), fmt.Sprintf("the shares add up to %d", total), "make them 100")
		}
	}
	for i, f := range s.GetFailover() {
		if f.GetFrom() == f.GetTo() {
			o.Invalid(fmt.Sprintf("%s.failover[%d]", at, i), written.Show(f.GetFrom())+" is to stand in for itself", "name another region")
		}
	}
}

func (o *object) hash(at string, h *networking.LoadBalancerSettings_ConsistentHashLB) {
	switch k := h.HashKey.(type) {
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpHeaderName:
		o.CheckHeader(at+".httpHeaderName", k.HttpHeaderName)
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpCookie:
		if k.HttpCookie.GetName() == "" {
			o.Reject(at+".httpCookie.name", written.ReasonMissing, "the cookie has no name", "name it")
		}
		o.checkDuration(at+".httpCookie.ttl", k.HttpCookie.GetTtl(), 0)
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpQueryParameterName:
		if k.HttpQueryParameterName == "" {
			o.Reject(at+".httpQueryParameterName", written.ReasonMissing, "the parameter has no name", "name it")
		}
	case nil:
		o.Reject(at, written.ReasonMissing, "says not what to hash", "add httpHeaderName, httpCookie, useSourceIp or httpQueryParameterName")
	}
	const largestRing = 8 << 20 // Envoy's
	if n := h.GetRingHash().GetMinimumRingSize(); n > largestRing {
		o.Invalid(at+".ringHash.minimumRingSize", fmt.Sprintf("%d is too large", n), fmt.Sprintf("write at most %d", largestRing))
	}
	const largestTable = 5000011 // Envoy's
	if n := h.GetMaglev().GetTableSize(); n > largestTable {
		o.Invalid(at+".maglev.tableSize", fmt.Sprintf("%d is too large", n), fmt.Sprintf("write a prime of at most %d", largestTable))
	} else if n != 0 && !isPrime(n) {
		o.Invalid(at+".maglev.tableSize", fmt.Sprintf("%d is not a prime", n), "write a prime, for example 65537")
	}
}

func isPrime(n uint64) bool {
	for i := uint64(2); i*i <= n; i++ {
		if n%i == 0 {
			return false
		}
	}
	return n > 1
}

func (o *object) connectionPool(at string, c *networking.ConnectionPoolSettings) {
	if c == nil {
		return
	}
	count := func(field string, n int32) {
		if n < 0 {
			o.Invalid(at+field, fmt.Sprintf("%d is negative", n), "write 0 for the default, or more")
		}
	}
	t, h := c.GetTcp(), c.GetHttp()
	count(".tcp.maxConnections", t.GetMaxConnections())
	o.checkDuration(at+".tcp.connectTimeout", t.GetConnectTimeout(), 1e6)
	o.checkDuration(at+".tcp.maxConnectionDuration", t.GetMaxConnectionDuration(), 1e6)
	o.checkDuration(at+".tcp.idleTimeout", t.GetIdleTimeout(), 0)
	o.checkDuration(at+".tcp.tcpKeepalive.time", t.GetTcpKeepalive().GetTime(), 1e9)
	o.checkDuration(at+".tcp.tcpKeepalive.interval", t.GetTcpKeepalive().GetInterval(), 1e9)
	count(".http.http1MaxPendingRequests", h.GetHttp1MaxPendingRequests())
	count(".http.http2MaxRequests", h.GetHttp2MaxRequests())
	count(".http.maxRequestsPerConnection", h.GetMaxRequestsPerConnection())
	count(".http.maxRetries", h.GetMaxRetries())
	count(".http.maxConcurrentStreams", h.GetMaxConcurrentStreams())
	o.checkDuration(at+".http.idleTimeout", h.GetIdleTimeout(), 0)
	o.checkDuration(at+".http.http2KeepAlive.interval", h.GetHttp2KeepAlive().GetInterval(), 1e6)
	o.checkDuration(at+".http.http2KeepAlive.timeout", h.GetHttp2KeepAlive().GetTimeout(), 1e6)
}

func (o *object) outlierDetection(at string, d *networking.OutlierDetection) {
	if d == nil {
		return
	}
	if n := d.ConsecutiveErrors; n != 0 { // the older field
		if n < 0 {
			o.Invalid(at+".consecutiveErrors", fmt.Sprintf("%d is negative", n), "write 0 or more")
		} else if d.ConsecutiveGatewayErrors == nil {
			d.ConsecutiveGatewayErrors = wrapperspb.UInt32(uint32(n))
		}
		d.ConsecutiveErrors = 0
	}
	o.checkDuration(at+".interval", d.Interval, 1e6)
	o.checkDuration(at+".baseEjectionTime", d.BaseEjectionTime, 1e6)
	o.CheckPercent(at+".maxEjectionPercent", float64(d.MaxEjectionPercent))
	o.CheckPercent(at+".minHealthPercent", float64(d.MinHealthPercent))
	for i, code := range d.OutlierDetectionHttpErrorCodes {
		if code < 100 || code > 599 {
			o.Invalid(fmt.Sprintf("%s.outlierDetectionHttpErrorCodes[%d]", at, i), fmt.Sprintf("%d is not a status", code), "write a number from 100 to 599")
		}
	}
}
