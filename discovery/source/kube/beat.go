package kube

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"slices"
	"time"

	api "github.com/isthmus-mesh/isthmus/discovery/source/kube/served"
)

// served is what an API server said it has, of the groups that matter.
type served struct {
	have     map[[2]string][]string // versions by group and resource
	looked   uint64                 // counts answers
	complete bool                   // at least one answer
}

func (s served) versions(group, resource string) []string { return s.have[[2]string{group, resource}] }

// Times of beats.
const (
	beatTimeout = 3 * time.Second  // a server that answers later is as good as lost
	lostAfter   = 2 * time.Second  // without an answer
	hangUpAfter = 10 * time.Second // without an answer, connections are made anew
)

// beat asks the server again and again what it serves: that tells of new kinds, and whether the server is there. The
// answer is as good as empty while nothing changes.
func (c *cluster) beat(ctx context.Context, conn *connection) {
	var tag string
	started, heard := time.Now(), time.Time{}
	for ctx.Err() == nil {
		have, next, err := c.look(ctx, conn, tag)
		now := time.Now()
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			heard = now
			if tag = next; have != nil {
				c.tell(have)
			}
		} else if now.Sub(later(started, heard)) > hangUpAfter {
			conn.close() // a connection may hang that another one would not
			started = now
		}
		c.mark(err, heard, now)
		if err == nil {
			c.learnSigners(ctx, conn)
		}
		pause(ctx, c.src.cfg.Beat)
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// mark notes whether the server is there.
func (c *cluster) mark(err error, heard, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.served.looked++
		if c.connect.IsZero() {
			c.connect, c.copy.at = now, time.Time{}
		}
		if !c.up {
			c.up, c.since, c.why = true, now, nil
			c.log.Info("API server is there", "server", c.conn.server)
		}
		c.begin()
	} else if !c.up && c.since.IsZero() || c.up && now.Sub(heard) >= lostAfter || isUnauthorized(err) {
		if c.up || c.why == nil {
			c.since = now
			if c.up && !heard.IsZero() {
				c.since = heard
			}
		}
		c.up, c.why = false, err
	} else if !c.up {
		c.why = err
	}
	if err != nil {
		c.begin()
	}
	c.src.metrics.objects(c)
	c.complaints()
}

// tell takes what is served and wakes those who wait for it.
func (c *cluster) tell(have map[[2]string][]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.served.complete && maps.EqualFunc(c.served.have, have, slices.Equal) {
		return
	}
	c.served.have, c.served.complete = have, true
	close(c.news)
	c.news = make(chan struct{})
}

// look asks what is served of what is read here.
func (c *cluster) look(ctx context.Context, conn *connection, tag string) (map[[2]string][]string, string, error) {
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	return api.Look(ctx, conn.http, conn.base, tag, c.wants)
}

// isUnauthorized reports whether the server does not know the credentials.
func isUnauthorized(err error) bool {
	var s *api.StatusError
	return errors.As(err, &s) && s.Code == http.StatusUnauthorized
}

// wants reports whether a resource of the group is read; "" asks for any.
func (c *cluster) wants(group, resource string) bool {
	return slices.ContainsFunc(c.tables, func(t *table) bool {
		return t.optional && t.group == group && (resource == "" || t.resource == resource)
	})
}
