package plugin

import (
	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// CoreDNS gathers the default registry, so plugins register there.
var (
	answers = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: name, Name: "answers_total",
		Help: "Answers given, by result: answer, nodata, nxdomain, no_data (before the first data).",
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
)
