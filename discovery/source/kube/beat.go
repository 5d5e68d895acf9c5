package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	apidiscovery "k8s.io/api/apidiscovery/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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

// maxDiscovery bounds what a server may say of itself: of thousands of kinds, 200 bytes each.
const maxDiscovery = 8 << 20

// accept asks for all groups with their kinds in one answer (Kubernetes 1.30 and later), else for a list of groups.
const accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"

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
			c.connect = now
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

// statusError is an answer that says nothing but its number.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string {
	return fmt.Sprintf("the API server answers %d %s", e.code, e.text)
}

func isUnauthorized(err error) bool {
	var s *statusError
	return errors.As(err, &s) && s.code == http.StatusUnauthorized
}

// look asks what is served; have is nil if that is as it was when tag was given.
func (c *cluster) look(ctx context.Context, conn *connection, tag string) (have map[[2]string][]string, next string, err error) {
	ctx, cancel := context.WithTimeout(ctx, beatTimeout)
	defer cancel()
	body, header, code, err := conn.get(ctx, "/apis", tag)
	switch {
	case err != nil:
		return nil, "", err
	case code == http.StatusNotModified:
		return nil, tag, nil
	case code == http.StatusForbidden:
		return map[[2]string][]string{}, "", nil // it is there, and says no more
	case code != http.StatusOK:
		return nil, "", &statusError{code, http.StatusText(code)}
	}
	var kind metav1.TypeMeta
	if err := json.Unmarshal(body, &kind); err != nil {
		return nil, "", fmt.Errorf("what the API server says it serves does not parse: %w", err)
	}
	if kind.Kind == "APIGroupList" {
		have, err = c.lookOld(ctx, conn, body)
		return have, "", err
	}
	var list apidiscovery.APIGroupDiscoveryList
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, "", fmt.Errorf("what the API server says it serves does not parse: %w", err)
	}
	have = map[[2]string][]string{}
	for _, g := range list.Items {
		for _, v := range g.Versions {
			for _, r := range v.Resources {
				if c.wants(g.Name, r.Resource) {
					at := [2]string{g.Name, r.Resource}
					have[at] = append(have[at], v.Version)
				}
			}
		}
	}
	return have, header.Get("ETag"), nil
}

// lookOld asks group by group.
func (c *cluster) lookOld(ctx context.Context, conn *connection, body []byte) (map[[2]string][]string, error) {
	var groups metav1.APIGroupList
	if err := json.Unmarshal(body, &groups); err != nil {
		return nil, fmt.Errorf("what the API server says it serves does not parse: %w", err)
	}
	have := map[[2]string][]string{}
	for _, g := range groups.Groups {
		if !c.wants(g.Name, "") {
			continue
		}
		for _, v := range g.Versions {
			body, _, code, err := conn.get(ctx, "/apis/"+v.GroupVersion, "")
			if err != nil {
				return nil, err
			}
			var list metav1.APIResourceList
			if code != http.StatusOK || json.Unmarshal(body, &list) != nil {
				continue
			}
			for _, r := range list.APIResources {
				if c.wants(g.Name, r.Name) {
					at := [2]string{g.Name, r.Name}
					have[at] = append(have[at], v.Version)
				}
			}
		}
	}
	return have, nil
}

// wants reports whether a resource of the group is read; "" asks for any.
func (c *cluster) wants(group, resource string) bool {
	return slices.ContainsFunc(c.tables, func(t *table) bool {
		return t.optional && t.group == group && (resource == "" || t.resource == resource)
	})
}

// get reads a path of the API server.
func (c *connection) get(ctx context.Context, path, tag string) (body []byte, header http.Header, code int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(c.base, "/")+path, nil)
	if err != nil {
		return nil, nil, 0, err
	}
	req.Header.Set("Accept", accept)
	if tag != "" {
		req.Header.Set("If-None-Match", tag)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, nil, 0, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxDiscovery))
	return body, resp.Header, resp.StatusCode, err
}
