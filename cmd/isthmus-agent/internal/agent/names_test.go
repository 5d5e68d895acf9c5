package agent

import (
	"testing"

	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

func TestGuarded(t *testing.T) {
	err := guarded(func(xdsclient.Update) error { panic("bug") })(xdsclient.Update{})
	if err == nil || err.Error() != "panic: bug" {
		t.Errorf("got %v", err)
	}
	if err := guarded(func(xdsclient.Update) error { return nil })(xdsclient.Update{}); err != nil {
		t.Error(err)
	}
}
