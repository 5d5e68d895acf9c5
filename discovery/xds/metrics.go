package xds

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	clients   prometheus.Gauge
	refused   prometheus.Counter
	responses *prometheus.CounterVec
	resources *prometheus.CounterVec
	answers   *prometheus.CounterVec
	bytes     prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	auto := promauto.With(reg)
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: "isthmus", Subsystem: "xds", Name: name, Help: help}
	}
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return auto.NewCounterVec(prometheus.CounterOpts(opts(name, help)), labels)
	}
	return &metrics{
		clients:   auto.NewGauge(prometheus.GaugeOpts(opts("clients", "Connected xDS clients."))),
		refused:   auto.NewCounter(prometheus.CounterOpts(opts("refused_total", "xDS streams that were refused."))),
		responses: vec("responses_total", "Responses sent, by resource type.", "type"),
		resources: vec("resources_sent_total", "Resources sent, by resource type.", "type"),
		answers:   vec("answers_total", "Clients' answers to responses, by resource type and answer (ack, nack).", "type", "answer"),
		bytes:     auto.NewCounter(prometheus.CounterOpts(opts("bytes_sent_total", "Bytes of responses sent, before transport framing."))),
	}
}

// metricLabel is the short name of a type that the server serves. A type that only a client has named is "other".
func (s *sub) metricLabel() string {
	if s.label == "" {
		return "other"
	}
	return s.label
}
