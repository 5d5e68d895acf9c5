// Package security decodes and checks the kinds of Istio's security API: who may call what, by which tokens and under
// which certificates.
package security

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"

	security "istio.io/api/security/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// object is what the checks of this package are methods of.
type object struct {
	*written.Object
	harmless bool // what is wrong is that it matches nothing
}

// dryRunAnnotation makes a policy one that decides nothing.
const dryRunAnnotation = "istio.io/dry-run"

// AuthorizationPolicy decodes the object. One that is wrong is Closed; nil when it would decide nothing.
func AuthorizationPolicy(w *written.Object) *mesh.AuthorizationPolicy {
	o := &object{Object: w}
	if p := o.authorizationPolicy(); p != nil || o.harmless {
		return p
	}
	return o.closedPolicy()
}

func (o *object) authorizationPolicy() *mesh.AuthorizationPolicy {
	spec := &security.AuthorizationPolicy{}
	if o.EmptySpec() { // it allows nothing
		var e written.Envelope
		if !o.Into(&e) {
			return nil
		}
		o.Meta = e.ObjectMeta
	} else if _, ok := o.Spec(spec); !ok {
		return nil
	}
	o.checkAuthorization(spec)
	dry := false
	switch v := o.Meta.Annotations[dryRunAnnotation]; v {
	case "", "false":
	case "true":
		dry = true
		if a := spec.GetAction(); a != security.AuthorizationPolicy_ALLOW && a != security.AuthorizationPolicy_DENY {
			o.Reject("metadata.annotations["+dryRunAnnotation+"]", written.ReasonUnsupported, fmt.Sprintf("a policy with action %s cannot be tried", a), "remove the annotation, or use action ALLOW or DENY")
		}
	default:
		o.Invalid("metadata.annotations["+dryRunAnnotation+"]", written.Show(v)+" is neither true nor false", "write \"true\" to try the policy without effect")
	}
	if o.Failed {
		return nil
	}
	return &mesh.AuthorizationPolicy{Object: o.Ref, DryRun: dry, Spec: spec}
}

// RequestAuthentication decodes the object. One that is wrong is Closed; nil when it is for nobody.
func RequestAuthentication(w *written.Object) *mesh.RequestAuthentication {
	o := &object{Object: w}
	if r := o.requestAuthentication(); r != nil {
		return r
	}
	return o.closedRequests()
}

func (o *object) requestAuthentication() *mesh.RequestAuthentication {
	spec := &security.RequestAuthentication{}
	if _, ok := o.Spec(spec); !ok {
		return nil
	}
	o.checkRequests(spec)
	if o.Failed {
		return nil
	}
	return &mesh.RequestAuthentication{Object: o.Ref, Spec: spec}
}

func (o *object) checkAuthorization(p *security.AuthorizationPolicy) {
	if p.GetSelector() != nil && len(p.GetTargetRefs()) > 0 {
		o.Reject("spec.targetRefs", written.ReasonConflict, "stands beside a selector", "keep one of the two")
	}
	o.CheckTargets(p.GetTargetRef(), p.GetTargetRefs())
	switch custom := p.GetAction() == security.AuthorizationPolicy_CUSTOM; {
	case custom && p.GetProvider().GetName() == "":
		o.Reject("spec.provider.name", written.ReasonMissing, "action CUSTOM needs a provider", "name one of meshConfig.extensionProviders")
	case !custom && p.GetProvider() != nil:
		o.Reject("spec.provider", written.ReasonConflict, "only action CUSTOM has a provider", "remove it, or set action: CUSTOM")
	}
	if p.GetAction() != security.AuthorizationPolicy_ALLOW && len(p.GetRules()) == 0 {
		o.harmless = !o.Failed
		o.Reject("spec.rules", written.ReasonMissing, fmt.Sprintf("action %s without rules matches nothing", p.GetAction()), "write a rule; {} matches everything")
	}
	for i, r := range p.GetRules() {
		at := fmt.Sprintf("spec.rules[%d]", i)
		for j, f := range r.GetFrom() {
			o.checkSource(fmt.Sprintf("%s.from[%d].source", at, j), f.GetSource())
		}
		for j, t := range r.GetTo() {
			o.checkOperation(fmt.Sprintf("%s.to[%d].operation", at, j), t.GetOperation())
		}
		for j, c := range r.GetWhen() {
			o.checkCondition(fmt.Sprintf("%s.when[%d]", at, j), c)
		}
	}
}

func (o *object) checkSource(at string, s *security.Source) {
	lists := map[string][]string{
		"principals": s.GetPrincipals(), "notPrincipals": s.GetNotPrincipals(), "requestPrincipals": s.GetRequestPrincipals(), "notRequestPrincipals": s.GetNotRequestPrincipals(),
		"namespaces": s.GetNamespaces(), "notNamespaces": s.GetNotNamespaces(), "ipBlocks": s.GetIpBlocks(), "notIpBlocks": s.GetNotIpBlocks(),
		"remoteIpBlocks": s.GetRemoteIpBlocks(), "notRemoteIpBlocks": s.GetNotRemoteIpBlocks(), "serviceAccounts": s.GetServiceAccounts(), "notServiceAccounts": s.GetNotServiceAccounts(),
		"trustDomains": s.GetTrustDomains(), "notTrustDomains": s.GetNotTrustDomains(),
	}
	o.checkLists(at, lists)
	for _, name := range []string{"ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks"} {
		for i, b := range lists[name] {
			o.CheckBlock(fmt.Sprintf("%s.%s[%d]", at, name, i), b)
		}
	}
	for _, name := range []string{"serviceAccounts", "notServiceAccounts"} {
		for i, a := range lists[name] {
			if strings.Contains(a, "*") || strings.Count(a, "/") > 1 {
				o.Invalid(fmt.Sprintf("%s.%s[%d]", at, name, i), written.Show(a)+" is not a service account", "write NAMESPACE/NAME or NAME, without wildcards")
			}
		}
	}
	if len(lists["serviceAccounts"])+len(lists["notServiceAccounts"]) > 0 && len(lists["principals"])+len(lists["notPrincipals"])+len(lists["namespaces"])+len(lists["notNamespaces"]) > 0 {
		o.Reject(at+".serviceAccounts", written.ReasonConflict, "stands beside principals or namespaces", "keep one of them")
	}
}

// checkLists refuses a clause that says nothing, and empty values in one that does.
func (o *object) checkLists(at string, lists map[string][]string) {
	said := false
	for _, name := range slices.Sorted(maps.Keys(lists)) {
		for i, v := range lists[name] {
			if said = true; strings.TrimSpace(v) == "" {
				o.Invalid(fmt.Sprintf("%s.%s[%d]", at, name, i), "the value is empty", "write a value, or remove it")
			}
		}
	}
	if !said {
		o.Reject(at, written.ReasonMissing, "matches nothing in particular", "write a condition, or remove the clause to match everything")
	}
}

func (o *object) checkOperation(at string, s *security.Operation) {
	lists := map[string][]string{
		"hosts": s.GetHosts(), "notHosts": s.GetNotHosts(), "ports": s.GetPorts(), "notPorts": s.GetNotPorts(),
		"methods": s.GetMethods(), "notMethods": s.GetNotMethods(), "paths": s.GetPaths(), "notPaths": s.GetNotPaths(),
	}
	o.checkLists(at, lists)
	for _, name := range []string{"ports", "notPorts"} {
		for i, p := range lists[name] {
			o.checkPortText(fmt.Sprintf("%s.%s[%d]", at, name, i), p)
		}
	}
	for _, name := range []string{"paths", "notPaths"} {
		for i, p := range lists[name] {
			o.checkTemplate(fmt.Sprintf("%s.%s[%d]", at, name, i), p)
		}
	}
}

func (o *object) checkPortText(field, text string) {
	if n, err := strconv.ParseUint(text, 10, 16); err != nil || n == 0 {
		o.Invalid(field, written.Show(text)+" is not a port", "write a number from 1 to 65535")
	}
}

// checkTemplate refuses path templates that Envoy does not take: "{*}" is one segment, "{**}" any number and the last one.
func (o *object) checkTemplate(field, path string) {
	if !strings.ContainsAny(path, "{}") {
		return
	}
	segments := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for i, s := range segments {
		switch {
		case s == "{*}", !strings.ContainsAny(s, "{}*"):
		case s == "{**}" && !slices.Contains(segments[i+1:], "{**}"):
		default:
			o.Invalid(field, written.Show(path)+" is not a path template", "write {*} or {**} as whole segments, {**} once, and no other * beside them")
			return
		}
	}
}

// conditionKeys are the attributes that conditions may name, and the beginnings of those with a name in brackets
// (Istio's reference of authorization conditions).
var conditionKeys = []string{
	"request.headers[", "request.auth.principal", "request.auth.audiences", "request.auth.presenter", "request.auth.claims[", "source.ip", "remote.ip", "source.namespace",
	"source.principal", "source.serviceAccount", "source.trustDomain", "destination.ip", "destination.port", "connection.sni", "experimental.envoy.filters.",
}

func (o *object) checkCondition(at string, c *security.Condition) {
	key := c.GetKey()
	known := slices.ContainsFunc(conditionKeys, func(k string) bool {
		if strings.HasSuffix(k, "[") {
			return strings.HasPrefix(key, k) && strings.HasSuffix(key, "]") && len(key) > len(k)+1
		}
		return key == k || strings.HasSuffix(k, ".") && strings.HasPrefix(key, k)
	})
	switch {
	case key == "":
		o.Reject(at+".key", written.ReasonMissing, "the key is missing", "name an attribute, for example request.headers[x-user]")
	case !known:
		o.Invalid(at+".key", written.Show(key)+" is not an attribute", "write one of those of Istio's authorization conditions, for example request.headers[x-user]")
	}
	if len(c.GetValues())+len(c.GetNotValues()) == 0 {
		o.Reject(at+".values", written.ReasonMissing, "there is no value", "write values or notValues")
	}
	for i, v := range slices.Concat(c.GetValues(), c.GetNotValues()) {
		field := fmt.Sprintf("%s.values[%d]", at, i)
		if n := len(c.GetValues()); i >= n {
			field = fmt.Sprintf("%s.notValues[%d]", at, i-n)
		}
		switch key {
		case "source.ip", "remote.ip", "destination.ip":
			o.CheckBlock(field, v)
		case "destination.port":
			o.checkPortText(field, v)
		}
	}
}

func (o *object) checkRequests(r *security.RequestAuthentication) {
	if r.GetSelector() != nil && len(r.GetTargetRefs()) > 0 {
		o.Reject("spec.targetRefs", written.ReasonConflict, "stands beside a selector", "keep one of the two")
	}
	o.CheckTargets(r.GetTargetRef(), r.GetTargetRefs())
	for i, j := range r.GetJwtRules() {
		at := fmt.Sprintf("spec.jwtRules[%d]", i)
		if j.GetIssuer() == "" {
			o.Reject(at+".issuer", written.ReasonMissing, "the issuer is missing", "write the iss of the tokens")
		}
		if j.GetJwksUri() != "" && j.GetJwks() != "" {
			o.Reject(at+".jwksUri", written.ReasonConflict, "stands beside jwks", "keep one of the two")
		}
		if u := j.GetJwksUri(); u != "" {
			if p, err := url.Parse(u); err != nil || p.Host == "" || p.Scheme != "http" && p.Scheme != "https" {
				o.Invalid(at+".jwksUri", written.Show(u)+" is not a URL", "write http://... or https://...")
			}
		}
		o.checkKeys(at, j)
		for k, c := range j.GetOutputClaimToHeaders() {
			o.CheckHeader(fmt.Sprintf("%s.outputClaimToHeaders[%d].header", at, k), c.GetHeader())
			if c.GetClaim() == "" {
				o.Reject(fmt.Sprintf("%s.outputClaimToHeaders[%d].claim", at, k), written.ReasonMissing, "the claim is missing", "name a claim; nested ones have dots between them")
			}
		}
		for k, h := range j.GetFromHeaders() {
			o.CheckHeader(fmt.Sprintf("%s.fromHeaders[%d].name", at, k), h.GetName())
		}
		for k, p := range j.GetFromParams() {
			if p == "" {
				o.Reject(fmt.Sprintf("%s.fromParams[%d]", at, k), written.ReasonMissing, "the name is empty", "name a query parameter")
			}
		}
	}
}

// maxKeys bounds the keys written into a rule.
const maxKeys = 256 << 10

// checkKeys wants keys as RFC 7517 writes them: a set, or one key.
func (o *object) checkKeys(at string, j *security.JWTRule) {
	if h := j.GetOutputPayloadToHeader(); h != "" {
		o.CheckHeader(at+".outputPayloadToHeader", h)
	}
	text := j.GetJwks()
	var v struct {
		Type string            `json:"kty"`
		Keys []json.RawMessage `json:"keys"`
	}
	switch err := json.Unmarshal([]byte(text), &v); {
	case text == "":
	case len(text) > maxKeys:
		o.Invalid(at+".jwks", fmt.Sprintf("it has %d bytes", len(text)), "write no more keys than are in use, or their URL in jwksUri")
	case err != nil, v.Type == "" && v.Keys == nil:
		o.Invalid(at+".jwks", "it is not a set of JSON web keys", `write for example {"keys": [{"kty": "RSA", "n": "...", "e": "AQAB"}]}`)
	}
}

// PeerAuthentication decodes the object; nil when something is wrong with it.
func PeerAuthentication(w *written.Object) *mesh.PeerAuthentication {
	o := &object{Object: w}
	spec := &security.PeerAuthentication{}
	if _, ok := o.Spec(spec); !ok {
		return nil
	}
	if len(spec.PortLevelMtls) > 0 && len(spec.Selector.GetMatchLabels()) == 0 {
		o.Reject("spec.portLevelMtls", written.ReasonConflict, "stands without a selector", "select workloads by label")
	}
	for _, n := range slices.Sorted(maps.Keys(spec.PortLevelMtls)) {
		o.CheckPort(fmt.Sprintf("spec.portLevelMtls[%d]", n), int64(n))
	}
	if o.Failed {
		return nil
	}
	return &mesh.PeerAuthentication{Object: o.Ref, Spec: spec}
}
