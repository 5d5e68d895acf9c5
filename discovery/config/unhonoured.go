package config

import (
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	extensions "istio.io/api/extensions/v1alpha1"
	networking "istio.io/api/networking/v1"
	envoyfilter "istio.io/api/networking/v1alpha3"
	proxyconfig "istio.io/api/networking/v1beta1"
	security "istio.io/api/security/v1"
	telemetry "istio.io/api/telemetry/v1"
)

// unhonoured checks an object of a kind that has no effect yet as strictly as the others: a mistake in it would bite on
// the day it has one. It reports that it has none.
func (o *object) unhonoured() {
	var spec proto.Message
	switch o.ref.Kind {
	case "AuthorizationPolicy":
		spec = &security.AuthorizationPolicy{}
	case "RequestAuthentication":
		spec = &security.RequestAuthentication{}
	case "EnvoyFilter":
		spec = &envoyfilter.EnvoyFilter{}
	case "ProxyConfig":
		spec = &proxyconfig.ProxyConfig{}
	case "WorkloadGroup":
		spec = &networking.WorkloadGroup{}
	case "Telemetry":
		spec = &telemetry.Telemetry{}
	case "WasmPlugin":
		spec = &extensions.WasmPlugin{}
	}
	if !o.named() {
		return
	}
	if spec != nil && !o.emptySpec() {
		if _, ok := o.spec(spec); !ok {
			return
		}
		switch s := spec.(type) {
		case *security.AuthorizationPolicy:
			o.checkAuthorization(s)
		case *security.RequestAuthentication:
			o.checkRequests(s)
		case *envoyfilter.EnvoyFilter:
			o.checkFilter(s)
		case *networking.WorkloadGroup:
			o.checkGroup(s)
		}
	}
	if !o.failed {
		o.note("kind", ReasonUnsupported, o.ref.Kind+" is not honoured: the object has no effect", "remove it so that nobody relies on it")
	}
}

// emptySpec reports whether an object says nothing where that means something: a policy without a spec denies all.
func (o *object) emptySpec() bool {
	var e envelope
	return (o.ref.Kind == "AuthorizationPolicy" || o.ref.Kind == "Telemetry") && o.into(&e) && (len(e.Spec) == 0 || string(e.Spec) == "null")
}

func (o *object) checkAuthorization(p *security.AuthorizationPolicy) {
	if p.GetSelector() != nil && len(p.GetTargetRefs()) > 0 {
		o.reject("spec.targetRefs", ReasonConflict, "stands beside a selector", "keep one of the two")
	}
	switch custom := p.GetAction() == security.AuthorizationPolicy_CUSTOM; {
	case custom && p.GetProvider().GetName() == "":
		o.reject("spec.provider.name", ReasonMissing, "action CUSTOM needs a provider", "name one of meshConfig.extensionProviders")
	case !custom && p.GetProvider() != nil:
		o.reject("spec.provider", ReasonConflict, "only action CUSTOM has a provider", "remove it, or set action: CUSTOM")
	}
	if p.GetAction() != security.AuthorizationPolicy_ALLOW && len(p.GetRules()) == 0 {
		o.reject("spec.rules", ReasonMissing, fmt.Sprintf("action %s without rules matches nothing", p.GetAction()), "write a rule; {} matches everything")
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
	}
	o.checkLists(at, lists)
	for _, name := range []string{"ipBlocks", "notIpBlocks", "remoteIpBlocks", "notRemoteIpBlocks"} {
		for i, b := range lists[name] {
			o.checkBlock(fmt.Sprintf("%s.%s[%d]", at, name, i), b)
		}
	}
	if len(lists["serviceAccounts"])+len(lists["notServiceAccounts"]) > 0 && len(lists["principals"])+len(lists["notPrincipals"])+len(lists["namespaces"])+len(lists["notNamespaces"]) > 0 {
		o.reject(at+".serviceAccounts", ReasonConflict, "stands beside principals or namespaces", "keep one of them")
	}
}

// checkLists refuses a clause that says nothing, and empty values in one that does.
func (o *object) checkLists(at string, lists map[string][]string) {
	said := false
	for _, name := range slices.Sorted(maps.Keys(lists)) {
		for i, v := range lists[name] {
			if said = true; strings.TrimSpace(v) == "" {
				o.invalid(fmt.Sprintf("%s.%s[%d]", at, name, i), "the value is empty", "write a value, or remove it")
			}
		}
	}
	if !said {
		o.reject(at, ReasonMissing, "matches nothing in particular", "write a condition, or remove the clause to match everything")
	}
}

func (o *object) checkBlock(field, block string) {
	if _, err := netip.ParsePrefix(block); err == nil {
		return
	}
	if _, err := netip.ParseAddr(block); err != nil {
		o.invalid(field, show(block)+" is not an address or a range of addresses", "write for example 10.0.0.0/8")
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
		o.invalid(field, show(text)+" is not a port", "write a number from 1 to 65535")
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
			o.invalid(field, show(path)+" is not a path template", "write {*} or {**} as whole segments, {**} once, and no other * beside them")
			return
		}
	}
}

// conditionKeys are the attributes that conditions may name, and the beginnings of those with a name in brackets
// (Istio's reference of authorization conditions).
var conditionKeys = []string{
	"request.headers[", "request.auth.principal", "request.auth.audiences", "request.auth.presenter", "request.auth.claims[", "source.ip", "remote.ip", "source.namespace",
	"source.principal", "source.serviceAccount", "destination.ip", "destination.port", "connection.sni", "experimental.envoy.filters.",
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
		o.reject(at+".key", ReasonMissing, "the key is missing", "name an attribute, for example request.headers[x-user]")
	case !known:
		o.invalid(at+".key", show(key)+" is not an attribute", "write one of those of Istio's authorization conditions, for example request.headers[x-user]")
	}
	if len(c.GetValues())+len(c.GetNotValues()) == 0 {
		o.reject(at+".values", ReasonMissing, "there is no value", "write values or notValues")
	}
	for i, v := range slices.Concat(c.GetValues(), c.GetNotValues()) {
		field := fmt.Sprintf("%s.values[%d]", at, i)
		if n := len(c.GetValues()); i >= n {
			field = fmt.Sprintf("%s.notValues[%d]", at, i-n)
		}
		switch key {
		case "source.ip", "remote.ip", "destination.ip":
			o.checkBlock(field, v)
		case "destination.port":
			o.checkPortText(field, v)
		}
	}
}

func (o *object) checkRequests(r *security.RequestAuthentication) {
	if r.GetSelector() != nil && len(r.GetTargetRefs()) > 0 {
		o.reject("spec.targetRefs", ReasonConflict, "stands beside a selector", "keep one of the two")
	}
	for i, j := range r.GetJwtRules() {
		at := fmt.Sprintf("spec.jwtRules[%d]", i)
		if j.GetIssuer() == "" {
			o.reject(at+".issuer", ReasonMissing, "the issuer is missing", "write the iss of the tokens")
		}
		if j.GetJwksUri() != "" && j.GetJwks() != "" {
			o.reject(at+".jwksUri", ReasonConflict, "stands beside jwks", "keep one of the two")
		}
		if u := j.GetJwksUri(); u != "" {
			if p, err := url.Parse(u); err != nil || p.Host == "" || p.Scheme != "http" && p.Scheme != "https" {
				o.invalid(at+".jwksUri", show(u)+" is not a URL", "write http://... or https://...")
			}
		}
		for k, h := range j.GetFromHeaders() {
			o.checkHeader(fmt.Sprintf("%s.fromHeaders[%d].name", at, k), h.GetName())
		}
		for k, p := range j.GetFromParams() {
			if p == "" {
				o.reject(fmt.Sprintf("%s.fromParams[%d]", at, k), ReasonMissing, "the name is empty", "name a query parameter")
			}
		}
	}
}

func (o *object) checkFilter(f *envoyfilter.EnvoyFilter) {
	if f.GetWorkloadSelector() != nil && len(f.GetTargetRefs()) > 0 {
		o.reject("spec.targetRefs", ReasonConflict, "stands beside a workloadSelector", "keep one of the two")
	}
	for i, p := range f.GetConfigPatches() {
		at := fmt.Sprintf("spec.configPatches[%d]", i)
		if p.GetApplyTo() == envoyfilter.EnvoyFilter_INVALID {
			o.reject(at+".applyTo", ReasonMissing, "does not say what it applies to", "write for example HTTP_FILTER")
		}
		op := p.GetPatch().GetOperation()
		if op == envoyfilter.EnvoyFilter_Patch_INVALID {
			o.reject(at+".patch.operation", ReasonMissing, "the operation is missing", "write for example MERGE or INSERT_BEFORE")
		} else if op != envoyfilter.EnvoyFilter_Patch_REMOVE && len(p.GetPatch().GetValue().GetFields()) == 0 {
			o.reject(at+".patch.value", ReasonMissing, fmt.Sprintf("operation %s needs a value", op), "write what is to be put there")
		}
		config := p.GetPatch().GetValue().GetFields()["typed_config"].GetStructValue().GetFields()
		if t := config["@type"].GetStringValue(); strings.Contains(t, "envoy.config.filter.") || strings.Contains(t, "envoy.api.v2") || strings.Contains(t, ".v2.") || strings.Contains(t, ".v2alpha.") {
			o.invalid(at+".patch.value.typed_config", show(t)+" is a type of Envoy's API version 2, which no Envoy reads any more", "write its v3 type: type.googleapis.com/envoy.extensions....v3....")
		}
	}
}

func (o *object) checkGroup(g *networking.WorkloadGroup) {
	if g.GetTemplate() == nil {
		o.reject("spec.template", ReasonMissing, "the template is missing", "write what its WorkloadEntries have in common: serviceAccount, network, ports")
	}
	if g.GetTemplate().GetAddress() != "" {
		o.invalid("spec.template.address", "a template has no address", "remove it: each machine has its own")
	}
	for _, name := range slices.Sorted(maps.Keys(g.GetTemplate().GetPorts())) {
		o.checkPort(fmt.Sprintf("spec.template.ports[%s]", name), int64(g.GetTemplate().GetPorts()[name]))
	}
	p := g.GetProbe()
	if p == nil {
		return
	}
	if p.GetHealthCheckMethod() == nil {
		o.reject("spec.probe", ReasonMissing, "says neither httpGet, tcpSocket, exec nor grpc", "add one of them")
	}
	if h := p.GetHttpGet(); h != nil {
		o.checkPort("spec.probe.httpGet.port", int64(h.GetPort()))
	}
	if s := p.GetTcpSocket(); s != nil {
		o.checkPort("spec.probe.tcpSocket.port", int64(s.GetPort()))
	}
	if e := p.GetExec(); e != nil && len(e.GetCommand()) == 0 {
		o.reject("spec.probe.exec.command", ReasonMissing, "the command is missing", "write the program and its arguments")
	}
}
