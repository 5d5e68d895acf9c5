package scripts

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/wan"
)

// link gives one direction of the WAN a rule; without words it is a perfect one again.
func (s *story) link(_ context.Context, args []string) (string, error) {
	rule, err := parseLink(args[2:])
	if err != nil {
		return "", err
	}
	return "", s.lab.Link(args[0], args[1], rule)
}

func parseLink(words []string) (l wan.Link, err error) {
	for _, w := range words {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "delay":
			l.Delay, err = time.ParseDuration(value)
		case "jitter":
			l.Jitter, err = time.ParseDuration(value)
		case "loss":
			l.Loss, err = percent(value)
		case "reorder":
			l.Reorder, err = percent(value)
		case "mtu":
			l.MTU, err = strconv.Atoi(value)
		case "down":
			l.Down = true
		default:
			return l, fmt.Errorf("%q: want delay=, jitter=, loss=, reorder=, mtu= or down", w)
		}
		if err != nil {
			return l, fmt.Errorf("%s: %w", w, err)
		}
	}
	return l, l.Check()
}

func percent(s string) (float64, error) {
	n, ok := strings.CutSuffix(s, "%")
	if !ok {
		return 0, fmt.Errorf("want a number with %%")
	}
	v, err := strconv.ParseFloat(n, 64)
	return v / 100, err
}
