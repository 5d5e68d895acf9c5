package config

import (
	"google.golang.org/protobuf/proto"
	extensions "istio.io/api/extensions/v1alpha1"
	telemetry "istio.io/api/telemetry/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
)

// unhonoured checks an object of a kind that has no effect yet as strictly as the others: a mistake in it would bite on
// the day it has one. It reports that it has none.
func (o *object) unhonoured() {
	var spec proto.Message
	switch o.Ref.Kind {
	case "Telemetry":
		spec = &telemetry.Telemetry{}
	case "WasmPlugin":
		spec = &extensions.WasmPlugin{}
	}
	if !o.named() {
		return
	}
	if spec != nil && !o.EmptySpec() {
		if _, ok := o.Spec(spec); !ok {
			return
		}
	}
	if !o.Failed {
		o.Note("kind", written.ReasonUnsupported, o.Ref.Kind+" is not honoured: the object has no effect", "remove it so that nobody relies on it")
	}
}
