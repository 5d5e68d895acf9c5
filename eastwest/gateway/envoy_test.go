package gateway_test

import (
	"testing"

	"github.com/isthmus-mesh/isthmus/eastwest/gateway/gatewaytest"
)

func TestEnvoy(t *testing.T) {
	if testing.Short() {
		t.Skip("runs Envoy")
	}
	gatewaytest.Run(t, gatewaytest.StartEnvoy)
}
