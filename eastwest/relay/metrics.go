package relay

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Results of a connection; the values of the label of that name.
const (
	resultForwarded   = "forwarded"
	resultEmpty       = "empty"        // closed by the client before its first octet
	resultMalformed   = "malformed"    // no well-formed ClientHello
	resultTimeout     = "timeout"      // no whole ClientHello in time
	resultUnknownName = "unknown_name" // no route for the server name, or none was sent
	resultProtocol    = "protocol"     // the chain's application protocol was not offered
	resultNoAddress   = "no_address"   // the route has no address now
	resultUnreachable = "unreachable"  // no address took the connection
	resultOverLimit   = "over_limit"   // too many connections are open
)

var results = []string{resultForwarded, resultEmpty, resultMalformed, resultTimeout, resultUnknownName,
	resultProtocol, resultNoAddress, resultUnreachable, resultOverLimit}

type metrics struct {
	connections  *prometheus.CounterVec
	open         prometheus.Gauge
	toServer     prometheus.Counter
	toClient     prometheus.Counter
	dialFailures prometheus.Counter
	dialSeconds  prometheus.Histogram
	idleClosed   prometheus.Counter
	routes       prometheus.Gauge
	updates      *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "isthmus", Subsystem: "relay", Name: name, Help: help}
	}
	counter := func(name, help string) prometheus.CounterOpts { return prometheus.CounterOpts(opts(name, help)) }
	moved := f.NewCounterVec(counter("bytes_total", "Octets passed on after the ClientHello, by direction (to_server, to_client)."), []string{"direction"})
	m := &metrics{
		connections: f.NewCounterVec(counter("connections_total", "Connections accepted, by what became of them."), []string{"result"}),
		open:        f.NewGauge(prometheus.GaugeOpts(opts("open_connections", "Connections open now, those without a ClientHello included."))),
		toServer:    moved.WithLabelValues("to_server"),
		toClient:    moved.WithLabelValues("to_client"),
		dialFailures: f.NewCounter(counter("dial_failures_total",
			"Addresses that did not take a connection; the next one was tried.")),
		dialSeconds: f.NewHistogram(prometheus.HistogramOpts{Namespace: "isthmus", Subsystem: "relay", Name: "dial_seconds",
			Help: "Time until an address took the connection.", Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5}}),
		idleClosed: f.NewCounter(counter("idle_closed_total", "Connections closed because no octet passed for the idle timeout.")),
		routes:     f.NewGauge(prometheus.GaugeOpts(opts("routes", "Server names that lead somewhere."))),
		updates:    f.NewCounterVec(counter("updates_total", "Updates of the routes, by result (ok, refused)."), []string{"result"}),
	}
	for _, r := range results {
		m.connections.WithLabelValues(r)
	}
	return m
}
