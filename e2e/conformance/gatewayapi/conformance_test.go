// Package gatewayapi runs the conformance suite of the Kubernetes Gateway API against a cluster with the product in it.
// It is a module of its own, for the suite has the versions of Kubernetes' libraries that it was written for.
package gatewayapi

import (
	"testing"

	"sigs.k8s.io/gateway-api/conformance"
)

// TestConformance takes the suite's own flags; see the story that calls it.
func TestConformance(t *testing.T) { conformance.RunConformance(t) }
