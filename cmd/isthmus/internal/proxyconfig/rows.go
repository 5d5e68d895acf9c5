package proxyconfig

import (
	"cmp"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// Rows are a kind's resources as a table, the heads first.
func (d *Dump) Rows(kind string, f Filter) [][]string {
	heads := map[string][]string{
		"listeners": {"LISTENER", "ADDRESS", "PORT", "MATCH", "DESTINATION"},
		"routes":    {"ROUTE", "VIRTUAL HOST", "DOMAINS", "MATCH", "DESTINATION", "OBJECT"},
		"clusters":  {"HOST", "PORT", "SUBSET", "DIRECTION", "TYPE", "OBJECT"},
		"endpoints": {"ENDPOINT", "STATUS", "WORKLOAD", "CLUSTER"},
		"secrets":   {"SECRET", "TYPE", "STATE", "NAMES", "SERIAL", "NOT AFTER"},
	}
	rows := map[string]func(Resource) [][]string{"listeners": listenerRows, "routes": routeRows, "clusters": clusterRows, "endpoints": endpointRows, "secrets": secretRows}
	if heads[kind] == nil {
		return nil
	}
	out := [][]string{heads[kind]}
	for _, r := range d.Of(kind) {
		if !f.Lets(kind, r) {
			continue
		}
		for _, row := range rows[kind](r) {
			if r.State != "active" && r.State != "static" {
				row[0] += " (" + r.State + ")"
			}
			for i := range row {
				row[i] = cmp.Or(row[i], "-")
			}
			out = append(out, row)
		}
	}
	return out
}

// Refused are the versions that the Envoy did not take, one a line.
func (d *Dump) Refused() (out []string) {
	for _, kind := range Kinds {
		for _, r := range d.Of(kind) {
			if r.Error != "" {
				out = append(out, fmt.Sprintf("%s %s: %s", strings.TrimSuffix(kind, "s"), r.Name, r.Error))
			}
		}
	}
	return out
}

// object is the configuration object that a resource was made from.
func object(x map[string]any) string {
	return cmp.Or(text(x, "metadata", "filter_metadata", "isthmus", "object"), text(x, "metadata", "filter_metadata", "istio", "config"))
}

func address(a any) (host, port string) {
	if s, ok := at(a, "socket_address").(map[string]any); ok {
		return text(s, "address"), cmp.Or(text(s, "port_value"), text(s, "named_port"))
	}
	if p := text(a, "pipe", "path"); p != "" {
		return p, ""
	}
	if l := text(a, "envoy_internal_address", "server_listener_name"); l != "" {
		return strings.TrimSuffix(l+"/"+text(a, "envoy_internal_address", "endpoint_id"), "/"), ""
	}
	return "", ""
}

func listenerRows(r Resource) (out [][]string) {
	host, port := address(r.Body["address"])
	if at(r.Body, "internal_listener") != nil {
		host = "internal"
	}
	chains := items(r.Body["filter_chains"])
	if c, ok := r.Body["default_filter_chain"].(map[string]any); ok {
		chains = append(chains, c)
	}
	for _, c := range chains {
		row := []string{r.Name, host, port, chainMatch(c), chainDestination(c)}
		if len(out) == 0 || !slices.Equal(out[len(out)-1], row) {
			out = append(out, row)
		}
	}
	if len(out) == 0 {
		out = append(out, []string{r.Name, host, port, "", ""})
	}
	return out
}

func chainMatch(c map[string]any) string {
	m := at(c, "filter_chain_match")
	var out []string
	for _, x := range []struct{ field, name string }{{"destination_port", "port"}, {"transport_protocol", "transport"}} {
		if v := text(m, x.field); v != "" {
			out = append(out, x.name+" "+v)
		}
	}
	for _, p := range items(at(m, "prefix_ranges")) {
		out = append(out, text(p, "address_prefix")+"/"+cmp.Or(text(p, "prefix_len"), "0"))
	}
	for _, x := range []struct{ field, name string }{{"server_names", "SNI"}, {"application_protocols", "ALPN"}} {
		if l := stringsOf(at(m, x.field)); len(l) > 0 {
			out = append(out, x.name+" "+strings.Join(l, ","))
		}
	}
	return cmp.Or(strings.Join(out, "; "), "all")
}

func chainDestination(c map[string]any) string {
	for _, f := range items(c["filters"]) {
		cfg := at(f, "typed_config")
		typ := text(cfg, "@type")
		switch {
		case strings.HasSuffix(typ, ".HttpConnectionManager"):
			if name := text(cfg, "rds", "route_config_name"); name != "" {
				return "route " + name
			}
			return "inline route " + text(cfg, "route_config", "name")
		case strings.HasSuffix(typ, ".TcpProxy"):
			if name := text(cfg, "cluster"); name != "" {
				return "cluster " + name
			}
			var out []string
			for _, w := range items(at(cfg, "weighted_clusters", "clusters")) {
				out = append(out, text(w, "name")+" "+text(w, "weight"))
			}
			return "clusters " + strings.Join(out, ", ")
		}
	}
	return ""
}

func routeRows(r Resource) (out [][]string) {
	for _, h := range items(r.Body["virtual_hosts"]) {
		for _, x := range items(h["routes"]) {
			out = append(out, []string{r.Name, text(h, "name"), short(stringsOf(h["domains"])), routeMatch(at(x, "match")), routeDestination(x), cmp.Or(object(x), object(h))})
		}
		if len(items(h["routes"])) == 0 {
			out = append(out, []string{r.Name, text(h, "name"), short(stringsOf(h["domains"])), "", "404", object(h)})
		}
	}
	if len(out) == 0 {
		out = append(out, []string{r.Name, "", "", "", "404", object(r.Body)})
	}
	return out
}

// short names the first two.
func short(list []string) string {
	if n := len(list) - 2; n > 0 {
		return fmt.Sprintf("%s + %d more", strings.Join(list[:2], ", "), n)
	}
	return strings.Join(list, ", ")
}

func routeMatch(m any) string {
	out := ""
	for _, f := range []struct{ field, mark string }{{"path", ""}, {"prefix", "*"}, {"path_separated_prefix", "/*"}} {
		if v := text(m, f.field); v != "" {
			out = v + f.mark
		}
	}
	if v := text(m, "safe_regex", "regex"); v != "" {
		out = "~" + v
	}
	for _, h := range items(at(m, "headers")) {
		out += " " + text(h, "name") + headerValue(h)
	}
	for _, q := range items(at(m, "query_parameters")) {
		out += " ?" + text(q, "name")
	}
	return strings.TrimSpace(out)
}

func headerValue(h map[string]any) string {
	eq := "="
	if at(h, "invert_match") == true {
		eq = "!="
	}
	for _, f := range []struct{ field, mark string }{{"exact", ""}, {"prefix", "*"}, {"suffix", ""}, {"contains", ""}} {
		if v := text(h, "string_match", f.field); v != "" {
			return eq + v + f.mark
		}
	}
	if v := text(h, "string_match", "safe_regex", "regex"); v != "" {
		return eq + "~" + v
	}
	return ""
}

func routeDestination(x map[string]any) string {
	if d := at(x, "direct_response"); d != nil {
		return "answer " + text(d, "status")
	}
	if d, ok := at(x, "redirect").(map[string]any); ok {
		return "redirect " + cmp.Or(text(d, "host_redirect"), text(d, "path_redirect"), text(d, "prefix_rewrite"), text(d, "scheme_redirect"), "to https")
	}
	if c := text(x, "route", "cluster"); c != "" {
		return c
	}
	var out []string
	for _, w := range items(at(x, "route", "weighted_clusters", "clusters")) {
		out = append(out, text(w, "name")+" "+text(w, "weight"))
	}
	return strings.Join(out, ", ")
}

func clusterRows(r Resource) [][]string {
	c := splitCluster(r.Name)
	typ := cmp.Or(text(r.Body, "type"), text(r.Body, "cluster_type", "name"), "STATIC")
	return [][]string{{c.host, c.port, c.subset, c.direction, typ, object(r.Body)}}
}

func endpointRows(r Resource) (out [][]string) {
	for _, l := range items(r.Body["endpoints"]) {
		for _, e := range items(l["lb_endpoints"]) {
			host, port := address(at(e, "endpoint", "address"))
			if port != "" {
				host = net.JoinHostPort(host, port)
			}
			out = append(out, []string{host, cmp.Or(text(e, "health_status"), "HEALTHY"), text(e, "metadata", "filter_metadata", "isthmus", "workload"), r.Name})
		}
	}
	return out
}

func secretRows(r Resource) [][]string {
	row := []string{r.Name, "", r.State, "", "", ""}
	for _, f := range []struct{ field, name string }{{"tls_certificate", "certificate"}, {"validation_context", "authorities"}, {"session_ticket_keys", "ticket keys"}, {"generic_secret", "generic"}} {
		if r.Body[f.field] != nil {
			row[1] = f.name
		}
	}
	source := at(r.Body, "tls_certificate", "certificate_chain")
	if source == nil {
		source = at(r.Body, "validation_context", "trusted_ca")
	}
	if file := text(source, "filename"); file != "" {
		row[3] = file
	}
	if cert := certificate(source); cert != nil {
		var names []string
		for _, u := range cert.URIs {
			names = append(names, u.String())
		}
		names = append(names, cert.DNSNames...)
		row[3], row[4], row[5] = cmp.Or(short(names), cert.Subject.CommonName), cert.SerialNumber.Text(16), cert.NotAfter.UTC().Format(time.RFC3339)
	} else if domains := items(at(r.Body, "validation_context", "custom_validator_config", "typed_config", "trust_domains")); len(domains) > 0 {
		var names []string
		for _, d := range domains {
			names = append(names, text(d, "name"))
		}
		row[3] = short(names)
	}
	return [][]string{row}
}

// certificate is the first one in a data source; nil when there is none to be read.
func certificate(source any) *x509.Certificate {
	data := []byte(text(source, "inline_string"))
	if b := text(source, "inline_bytes"); b != "" {
		data, _ = base64.StdEncoding.DecodeString(b)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return cert
}
