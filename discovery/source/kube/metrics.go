package kube

import (
	"sync"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"k8s.io/klog/v2"
)

type metrics struct {
	connected *prometheus.GaugeVec
	kept      *prometheus.GaugeVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	return &metrics{
		connected: f.NewGaugeVec(prometheus.GaugeOpts{Namespace: "isthmus", Subsystem: "kube", Name: "connected", Help: "1 for a cluster whose API server answers, 0 for one that is lost."}, []string{"cluster"}),
		kept:      f.NewGaugeVec(prometheus.GaugeOpts{Namespace: "isthmus", Subsystem: "kube", Name: "objects", Help: "Objects known of each cluster whose API server is read."}, []string{"cluster"}),
	}
}

// objects counts. The caller holds the cluster's mu.
func (m *metrics) objects(c *cluster) {
	n := 0
	for _, t := range c.tables {
		n += len(t.entries)
	}
	up := 0.0
	if c.up {
		up = 1
	}
	m.connected.WithLabelValues(string(c.id)).Set(up)
	m.kept.WithLabelValues(string(c.id)).Set(float64(n))
}

func (m *metrics) forget(c *cluster) {
	m.connected.DeleteLabelValues(string(c.id))
	m.kept.DeleteLabelValues(string(c.id))
}

var quiet sync.Once

// quietLibrary keeps client-go from writing to standard error in a format of its own: what an operator would act on is
// said by us.
func quietLibrary() { quiet.Do(func() { klog.SetLogger(logr.Discard()) }) }
