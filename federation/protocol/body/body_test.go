package body

import (
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestTaken: nothing before and at the start, all at the end and after, equal steps between, and never less than before.
func TestTaken(t *testing.T) {
	begun := time.Unix(1700000000, 0)
	r := Ramp{Begun: begun, Over: 10 * time.Minute}
	for _, x := range []struct {
		after time.Duration
		want  uint32
	}{
		{-time.Hour, 0}, {0, 0}, {29 * time.Second, 0}, {30 * time.Second, 1}, {5 * time.Minute, 10}, {10*time.Minute - 1, 19}, {10 * time.Minute, 20}, {time.Hour, 20},
	} {
		if got := r.Taken(begun.Add(x.after)); got != x.want {
			t.Errorf("after %s: %d, want %d", x.after, got, x.want)
		}
	}
	last := uint32(0)
	for at := time.Duration(0); at < 11*time.Minute; at += 700 * time.Millisecond {
		got := r.Taken(begun.Add(at))
		if got < last || got > last+1 {
			t.Fatalf("from %d to %d after %s", last, got, at)
		}
		last = got
	}
	if got := (Ramp{}).Taken(begun); got != 0 {
		t.Errorf("no ramp takes %d", got)
	}
	if got := (Ramp{Begun: begun}).Taken(begun); got != mesh.DrainSteps {
		t.Errorf("at once: %d", got)
	}
}

func TestBodies(t *testing.T) {
	r := Ramp{Begun: time.UnixMilli(1700000000123), Over: 90 * time.Second}
	if got := RampOf(r.Body()); !got.Begun.Equal(r.Begun) || got.Over != r.Over {
		t.Errorf("%+v, want %+v", got, r)
	}
	if IsLeft(r.Body()) || !IsLeft(Left) || IsLeft(nil) || IsLeft([]byte{0xff}) {
		t.Error("the mark of a departure")
	}
	for _, b := range [][]byte{nil, {0xff}, {0x80, 0x01}, []byte("text")} {
		if got := RampOf(b); !got.Begun.IsZero() {
			t.Errorf("%q: %+v", b, got)
		}
	}
}
