package scripts

import (
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/wan"
)

func TestParseLink(t *testing.T) {
	got, err := parseLink([]string{"delay=50ms", "jitter=5ms", "loss=2.5%", "reorder=1%", "mtu=1300"})
	if want := (wan.Link{Delay: 50 * time.Millisecond, Jitter: 5 * time.Millisecond, Loss: 0.025, Reorder: 0.01, MTU: 1300}); err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err := parseLink(nil); err != nil || got != (wan.Link{}) {
		t.Errorf("nothing said: %+v, %v", got, err)
	}
	for _, bad := range []string{"delay=5", "loss=5", "loss=101%", "mtu=10", "speed=1", "jitter=1s"} {
		if _, err := parseLink([]string{bad}); err == nil {
			t.Errorf("%s was taken", bad)
		}
	}
}
