package mesh

// Delta says what a Snapshot changes of the one before, where little changed, so that a reader that has derived
// something from that one need not compare everything.
type Delta struct {
	// From is the revision of the Snapshot before, of the same store.
	From uint64
	// Services are those of which endpoints changed, sorted by host. None came or went, and nothing else of them changed.
	Services []ServiceDelta
	// Config: configuration objects differ, too; which ones is to be compared. When false nothing but Services and
	// Workloads differs.
	Config bool
}

// ServiceDelta is a Service whose endpoints changed.
type ServiceDelta struct{ Was, Now *Service }

// Since returns how s differs from old; ok is false when that is not known, and all is to be compared.
func (s *Snapshot) Since(old *Snapshot) (d *Delta, ok bool) {
	if old == nil || s.Delta == nil || s.Delta.From != old.Revision || s.Revision <= old.Revision || len(s.Services) != len(old.Services) || s.Local != old.Local {
		return nil, false
	}
	return s.Delta, true
}
