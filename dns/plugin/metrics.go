package plugin

import (
	"sync"

	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// CoreDNS gathers the default registry, so plugins register there.
var (
	answers = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: name, Name: "answers_total",
		Help: "Answers given, by result: answer, nodata, nxdomain, refused, no_data (before the first data).",
	}, []string{"server", "result"})
	hosts = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace, Subsystem: name, Name: "hosts",
		Help: "Hosts that can be answered.",
	})
	connected = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace, Subsystem: name, Name: "connected",
		Help: "1 while the stream from isthmusd is up.",
	})
	lastChange = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace, Subsystem: name, Name: "last_change_timestamp_seconds",
		Help: "Time of the last change that was taken.",
	})
	keepFailures = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: name, Name: "keep_failures_total",
		Help: "Writes of the last good data that failed.",
	})
	panics = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: name, Name: "panics_total",
		Help: "Panics of the feed from isthmusd that were caught.",
	})
)

const resultNone = "no_data" // nothing is known yet

// counters are those of one server, found without the look-up by label that every answer would pay for.
type counters struct {
	by   [zone.Refused + 1]prometheus.Counter
	none prometheus.Counter
}

var perServer sync.Map // server -> *counters

func countersOf(server string) *counters {
	if c, ok := perServer.Load(server); ok {
		return c.(*counters)
	}
	c := &counters{none: answers.WithLabelValues(server, resultNone)}
	for r := zone.Answered; r <= zone.Refused; r++ {
		c.by[r] = answers.WithLabelValues(server, r.String())
	}
	actual, _ := perServer.LoadOrStore(server, c)
	return actual.(*counters)
}
