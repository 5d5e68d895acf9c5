// Package served asks an API server which kinds it serves.
package served

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	apidiscovery "k8s.io/api/apidiscovery/v2"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxDiscovery bounds what a server may say of itself: of thousands of kinds, 200 bytes each.
const maxDiscovery = 8 << 20

// accept asks for all groups with their kinds in one answer (Kubernetes 1.30 and later), else for a list of groups.
const accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"

// StatusError is an answer that says nothing but its number.
type StatusError struct {
	Code int
	text string
}

// Error implements error.
func (e *StatusError) Error() string {
	return fmt.Sprintf("the API server answers %d %s", e.Code, e.text)
}

// Look asks the server at base what it serves: versions by group and resource, of those that are wanted; "" as a
// resource asks whether any of the group is. have is nil if that is as it was when tag was given, and next is the tag
// for the next time.
func Look(ctx context.Context, web *http.Client, base, tag string, wants func(group, resource string) bool) (have map[[2]string][]string, next string, err error) {
	s := server{web, strings.TrimSuffix(base, "/"), wants}
	body, header, code, err := s.get(ctx, "/apis", tag)
	switch {
	case err != nil:
		return nil, "", err
	case code == http.StatusNotModified:
		return nil, tag, nil
	case code == http.StatusForbidden:
		return map[[2]string][]string{}, "", nil // it is there, and says no more
	case code != http.StatusOK:
		return nil, "", &StatusError{code, http.StatusText(code)}
	}
	var kind metav1.TypeMeta
	if err := json.Unmarshal(body, &kind); err != nil {
		return nil, "", fmt.Errorf("what the API server says it serves does not parse: %w", err)
	}
	if kind.Kind == "APIGroupList" {
		have, err = s.lookOld(ctx, body)
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
				if wants(g.Name, r.Resource) {
					at := [2]string{g.Name, r.Resource}
					have[at] = append(have[at], v.Version)
				}
			}
		}
	}
	return have, header.Get("ETag"), nil
}

// lookOld asks group by group.
func (s server) lookOld(ctx context.Context, body []byte) (map[[2]string][]string, error) {
	var groups metav1.APIGroupList
	if err := json.Unmarshal(body, &groups); err != nil {
		return nil, fmt.Errorf("what the API server says it serves does not parse: %w", err)
	}
	have := map[[2]string][]string{}
	for _, g := range groups.Groups {
		if !s.wants(g.Name, "") {
			continue
		}
		for _, v := range g.Versions {
			body, _, code, err := s.get(ctx, "/apis/"+v.GroupVersion, "")
			if err != nil {
				return nil, err
			}
			var list metav1.APIResourceList
			if code != http.StatusOK || json.Unmarshal(body, &list) != nil {
				continue
			}
			for _, r := range list.APIResources {
				if s.wants(g.Name, r.Name) {
					at := [2]string{g.Name, r.Name}
					have[at] = append(have[at], v.Version)
				}
			}
		}
	}
	return have, nil
}

// server is one API server.
type server struct {
	web   *http.Client
	base  string
	wants func(group, resource string) bool
}

// get reads a path of the API server.
func (s server) get(ctx context.Context, path, tag string) (body []byte, header http.Header, code int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.base+path, nil)
	if err != nil {
		return nil, nil, 0, err
	}
	req.Header.Set("Accept", accept)
	if tag != "" {
		req.Header.Set("If-None-Match", tag)
	}
	resp, err := s.web.Do(req)
	if err != nil {
		return nil, nil, 0, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxDiscovery))
	return body, resp.Header, resp.StatusCode, err
}
