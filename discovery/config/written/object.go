// Package written reads one API object as somebody wrote it: it finds the object's lines, decodes it strictly, checks
// values that many kinds have, and collects what is wrong. It knows no kind of object.
package written

import (
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Object is one API object while it is decoded.
type Object struct {
	Ref    mesh.ObjectRef
	Group  string // of its API, empty for the core
	Domain string // the cluster's DNS domain, for hosts without one
	Meta   metav1.ObjectMeta
	Labels map[string]string // as the header has them
	Raw    []byte            // JSON
	Typed  any               // pointer to the Kubernetes type, instead of Raw
	Doc    *Document         // where it stands; nil when nobody wrote it as text
	Prefix string            // path of the object in its Document, "" or "items[3]."
	Failed bool              // something is wrong: the object is left out
	// Lenient makes fields that a message does not have a Problem that the object outlives.
	Lenient bool
	// Problems takes what is found.
	Problems *[]mesh.Problem
}

// Reject reports an error: the object is left out.
func (o *Object) Reject(field, reason, message, remedy string) {
	o.Failed = true
	o.Note(field, reason, message, remedy)
}

// Invalid rejects a value.
func (o *Object) Invalid(field, message, remedy string) {
	o.Reject(field, ReasonInvalidValue, message, remedy)
}

// Unsupported reports a field that is understood and not honoured, and what that means for the object.
func (o *Object) Unsupported(field, consequence string) {
	o.Note(field, ReasonUnsupported, "is not supported: "+consequence, "remove the field so that nobody relies on it")
}

// Note reports a Problem; the object is used nevertheless. The message begins with the line of the field.
func (o *Object) Note(field, reason, message, remedy string) {
	if field != "" && o.Doc != nil {
		if n := o.Doc.LineOf(o.Prefix + field); n > 0 {
			message = fmt.Sprintf("line %d: %s", n, message)
		}
	}
	*o.Problems = append(*o.Problems, mesh.Problem{Object: o.Ref, Field: OneLine(field), Reason: reason, Message: message, Remedy: remedy})
}

// Host writes a host out in full: a name without a dot is a Service of the object's namespace.
func (o *Object) Host(h string) string {
	h = strings.TrimSuffix(strings.ToLower(h), ".")
	if h == "" || strings.ContainsAny(h, ".*:") {
		return mesh.FromClusterSet(h) // rules on either name are for both
	}
	return h + "." + o.Ref.Namespace + ".svc." + o.Domain
}

// Show quotes a user's value in a message.
func Show(s string) string { return fmt.Sprintf("%q", Clip(s, 80)) }

// CutLast cuts s at the last sep.
func CutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// KindFile is the Kind of ObjectRefs in Problems that are about a file or a document rather than an object in it.
const KindFile = "File"

// Reasons of the Problems that are made of objects as they are written. They are stable.
const (
	ReasonInvalidYAML    = "InvalidYAML"    // a document does not parse
	ReasonNotAnObject    = "NotAnObject"    // no apiVersion, kind or name
	ReasonUnknownKind    = "UnknownKind"    // a kind, or a version of it, that its API group does not have
	ReasonUnknownField   = "UnknownField"   // a field that the kind does not have
	ReasonInvalidValue   = "InvalidValue"   // a value of the wrong type or outside its range
	ReasonMissing        = "Missing"        // a required field is absent
	ReasonConflict       = "Conflict"       // fields that exclude each other
	ReasonDuplicate      = "Duplicate"      // declared twice
	ReasonUnsupported    = "Unsupported"    // understood, not honoured
	ReasonClosed         = "FailsClosed"    // a security object that is wrong: it keeps out what it may have been meant to
	ReasonSatisfied      = "Satisfied"      // not needed: what it asks for is done without it
	ReasonUnknownHost    = "UnknownHost"    // a host that no service has
	ReasonUnknownSubset  = "UnknownSubset"  // a subset that no DestinationRule of the host defines
	ReasonUnknownPort    = "UnknownPort"    // a port that the host does not have
	ReasonUnknownGateway = "UnknownGateway" // a Gateway that does not exist
	ReasonConflictHosts  = "ConflictingHosts"
	ReasonAddressInUse   = "AddressInUse"
	ReasonNotHTTP        = "NotHTTP"         // http rules for ports that are not HTTP
	ReasonNeedsMutualTLS = "NeedsMutualTLS"  // mesh TLS turned off where a gateway is on the way
	ReasonAliasOfMesh    = "AliasOfMeshHost" // an externalName that is a host of the mesh
)
