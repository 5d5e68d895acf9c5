package kube

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Reasons of Problems about API servers. They are stable.
const (
	ReasonSourceLost     = "SourceLost"     // an API server does not answer
	ReasonUnauthorized   = "Unauthorized"   // it does not know the credentials
	ReasonForbidden      = "Forbidden"      // a right is missing
	ReasonNotRead        = "NotRead"        // a kind cannot be listed or watched for another cause
	ReasonUnknownVersion = "UnknownVersion" // a kind is served at versions that are not understood
	ReasonNetworkDiffers = "NetworkDiffers" // the cluster's network is called otherwise in the configuration
	ReasonRemoteSecret   = "BadRemoteSecret"
	ReasonRemoteTwice    = "DuplicateCluster" // two remote secrets, or a remote secret and the local cluster, have one name
)

func (c *cluster) problemsKey() string { return string(c.id) + "/problems" }

// complaints reports what is wrong with the cluster as a whole. The caller holds mu.
func (c *cluster) complaints() {
	var out []mesh.Problem
	if !c.up && c.why != nil {
		out = append(out, c.lost())
	}
	for _, t := range c.tables {
		if p, wrong := t.problem(); wrong {
			out = append(out, p)
		}
	}
	if n := c.src.cfg.Network; !c.remote && c.network != "" && n != "" && c.network != n {
		out = append(out, mesh.Problem{
			Object: mesh.ObjectRef{Kind: kindNamespace, Name: c.src.cfg.Namespace, Source: c.said}, Field: "metadata.labels[" + labelNetwork + "]", Reason: ReasonNetworkDiffers,
			Message: fmt.Sprintf("pods are on network %s, gateways and machines on %s, as the configuration of isthmusd says", c.network, n), Remedy: "write the same network in both",
		})
	}
	if reflect.DeepEqual(out, c.problems) {
		return
	}
	for _, p := range out {
		if !slices.Contains(c.problems, p) {
			c.log.Warn("API server", "err", p.String())
		}
	}
	c.problems = out
	if len(out) == 0 {
		c.sink.Forget(c.problemsKey())
		return
	}
	c.sink.Report(c.problemsKey(), mesh.Input{Problems: slices.Clone(out)})
}

func (c *cluster) ref() mesh.ObjectRef {
	return mesh.ObjectRef{Kind: "Cluster", Name: string(c.id), Source: c.said}
}

// lost says that the API server does not answer as it should.
func (c *cluster) lost() mesh.Problem {
	p := mesh.Problem{Object: c.ref(), Reason: ReasonSourceLost, Remedy: "check that " + c.conn.server + " runs and can be reached from isthmusd; it is tried all the time"}
	state := "what it said stays in use"
	switch {
	case !c.live:
		state = "nothing is known of it yet"
	case !c.copy.at.IsZero():
		state = "what was known of it at " + c.copy.at.UTC().Format(time.RFC3339) + " is in use"
	}
	p.Message = fmt.Sprintf("the API server %s is lost since %s; %s: %s", c.conn.server, c.since.UTC().Format(time.RFC3339), state, plain(c.why))
	if isUnauthorized(c.why) {
		p.Reason = ReasonUnauthorized
		p.Remedy = "restart isthmusd if its service account was made anew"
		if c.remote {
			p.Remedy = "make the remote secret anew: isthmus create-remote-secret --name " + string(c.id)
		}
	}
	return p
}

// warmUp is how long a server that has just come up is not believed when it says what is forbidden.
const warmUp = 2 * time.Second

// varies matches what differs from try to try.
var varies = regexp.MustCompile(`(read tcp|write tcp|dial tcp) [^ ]+->`)

// plain shortens a client's error so that it stays the same while its cause does.
func plain(err error) string {
	s := err.Error()
	if i := strings.LastIndex(s, `": `); strings.HasPrefix(s, "Get ") && i > 0 {
		s = s[i+3:]
	}
	return varies.ReplaceAllString(s, "$1 ")
}

// problem says what is wrong with reading a kind, if anything is. The caller holds mu.
func (t *table) problem() (mesh.Problem, bool) {
	if t.err == nil || t.state != StateForbidden && t.state != StateFailed {
		return mesh.Problem{}, false
	}
	if t.state == StateForbidden && t.since.Sub(t.c.since) < warmUp && time.Since(t.since) < warmUp {
		return mesh.Problem{}, false // a server that starts forbids everything until it has read the roles
	}
	p := mesh.Problem{Object: t.c.ref(), Field: t.fullName(), Reason: ReasonNotRead, Message: fmt.Sprintf("%s cannot be read since %s: %s", t.fullName(), t.since.UTC().Format(time.RFC3339), plain(t.err))}
	var version *unknownVersion
	switch {
	case t.state == StateForbidden:
		p.Reason, p.Message = ReasonForbidden, fmt.Sprintf("isthmusd may not %s %s: %s", t.verb, t.fullName(), plain(t.err))
		p.Remedy = fmt.Sprintf("allow get, list and watch on %s to the account that isthmusd uses; isthmus install does", t.fullName())
		if t.c.remote {
			p.Remedy = fmt.Sprintf("allow get, list and watch on %s to the account of the remote secret; isthmus create-remote-secret --name %s does", t.fullName(), t.c.id)
		}
	case errors.As(t.err, &version):
		p.Reason, p.Message = ReasonUnknownVersion, version.Error()
		p.Remedy = "have the CustomResourceDefinition serve one of " + strings.Join(t.versions, ", ") + ", too"
	case apierrors.IsNotFound(t.err):
		p.Remedy = "check the API server: a kind of Kubernetes itself is missing"
	default:
		p.Remedy = "check the log of the API server; it is tried all the time"
	}
	if len(t.entries) > 0 {
		p.Message += "; what was read before stays in use"
	}
	return p, true
}
