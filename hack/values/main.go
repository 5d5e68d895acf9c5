// Command values writes the schema of the chart's values and their table in the guide. Both come from values.yaml: its
// fields, defaults and comments, and from the rules below.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// An object is written as JSON with its keys in order.
type object = map[string]any

// Types that several values have.
var (
	stringType = object{"type": "string"}
	strs       = object{"type": "array", "items": stringType}
	labels     = object{"type": "object", "additionalProperties": object{"type": "string"}}
	env        = object{"type": "object", "additionalProperties": object{"type": []any{"string", "number", "boolean"}}}
	open       = object{"type": "object"} // checked by whoever reads it
	duration   = object{"type": "string", "pattern": `^([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+$`}
	port       = object{"type": "integer", "minimum": 1, "maximum": 65535}
	positive   = object{"type": "integer", "minimum": 1}
	count      = object{"type": "integer", "minimum": 0}
	percent    = object{"type": "integer", "minimum": 1, "maximum": 100}
	optional   = object{"type": "string", "pattern": `^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$`}
	quantities = object{"type": "object", "additionalProperties": object{"type": []any{"string", "number"}}}
	resources  = object{"type": "object", "additionalProperties": false, "properties": object{
		"requests": quantities, "limits": quantities, "claims": object{"type": "array", "items": open},
	}}
	ports = object{"type": "array", "items": object{
		"type": "object", "additionalProperties": false, "required": []any{"name", "port"},
		"properties": object{"name": object{"type": "string", "minLength": 1, "maxLength": 15}, "port": port, "targetPort": port, "nodePort": port, "protocol": enum("TCP", "UDP")},
	}}
)

func enum(values ...any) object { return object{"enum": values} }

// rules say more of values than their defaults do. A pattern without dots is the last name of a path, whatever stands before.
var rules = map[string]object{
	"role": enum("primary", "remote"), "cluster.name": optional, "cluster.network": optional,
	"cluster.trustDomain": {"type": "string", "pattern": `^([a-z0-9]([a-z0-9._-]{0,200}[a-z0-9])?)?$`},
	"image.pullPolicy":    enum("Always", "IfNotPresent", "Never"),
	"isthmusd.logLevel":   enum("debug", "info", "warn", "error"), "cni.logLevel": enum("debug", "info", "warn", "error"),
	"isthmusd.replicas": positive, "replicas": count, "minReplicas": positive, "maxReplicas": positive, "targetCPUPercent": percent,
	"resources": resources, "podLabels": labels, "podAnnotations": labels, "nodeSelector": labels, "tolerations": {"type": "array", "items": open}, "affinity": open, "env": env,
	"isthmusd.config": open, "meshConfig": open, "meshNetworks": open,
	"federation.lateAfter": duration, "federation.lease": duration, "ca.maxTTL": duration,
	"injection.failurePolicy": enum("Fail", "Ignore"), "injection.reinvocationPolicy": enum("Never", "IfNeeded"),
	"validation.failurePolicy": enum("Fail", "Ignore"), "timeoutSeconds": {"type": "integer", "minimum": 1, "maximum": 30},
	"injection.revision": {"type": "string", "pattern": `^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`},
	"proxy.logLevel":     enum("trace", "debug", "info", "warning", "error", "critical", "off"), "proxy.interceptionMode": enum("REDIRECT", "TPROXY"),
	"cni.readyPort": port, "gateways.eastwest.kind": enum("envoy", "relay"), "type": enum("LoadBalancer", "NodePort", "ClusterIP"), "externalTrafficPolicy": enum("", "Cluster", "Local"),
	"labels": labels, "annotations": labels, "ports": ports,
	"dns.ttl": {"type": "integer", "minimum": 1, "maximum": 3600}, "dns.zones": {"type": "array", "items": stringType, "minItems": 1, "uniqueItems": true},
	"remote.controlPlane": {"type": "array", "uniqueItems": true, "items": object{"type": "string", "pattern": `^[0-9a-fA-F.:]+$`}},
	"remote.injectionURL": {"type": "string", "pattern": `^(https://.+)?$`},
}

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: values VALUES.yaml SCHEMA.json GUIDE.md")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "values:", err)
		os.Exit(1)
	}
}

func run(values, schema, guide string) error {
	data, err := os.ReadFile(values)
	if err != nil {
		return err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return err
	}
	var table bytes.Buffer
	root, err := describe(doc.Content[0], "", &table)
	if err != nil {
		return err
	}
	root["$schema"], root["title"] = "http://json-schema.org/draft-07/schema#", "Values of the chart isthmus"
	root["properties"].(object)["global"] = object{"type": "object", "description": "Set by Helm where the chart is part of another; not read."}
	out, err := json.MarshalIndent(root, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(schema, append(out, '\n'), 0o644); err != nil {
		return err
	}
	return fill(guide, table.String())
}

// describe returns the schema of a map of values and adds its rows to the table.
func describe(n *yaml.Node, at string, table *bytes.Buffer) (object, error) {
	properties := object{}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		path := strings.TrimPrefix(at+"."+key.Value, ".")
		text := comment(key.HeadComment)
		rule, ruled := rules[path]
		if !ruled {
			rule, ruled = rules[key.Value]
		}
		if value.Kind == yaml.MappingNode && !ruled {
			sub, err := describe(value, path, table)
			if err != nil {
				return nil, err
			}
			properties[key.Value] = sub
			continue
		}
		if text == "" {
			return nil, fmt.Errorf("%s has no comment", path)
		}
		if !ruled {
			rule = inferred(value)
		}
		p := object{"description": text}
		for k, v := range rule {
			p[k] = v
		}
		properties[key.Value] = p
		fmt.Fprintf(table, "| `%s` | %s | %s |\n", path, show(value), strings.ReplaceAll(text, "|", `\|`))
	}
	return object{"type": "object", "additionalProperties": false, "properties": properties}, nil
}

func inferred(n *yaml.Node) object {
	switch {
	case n.Kind == yaml.SequenceNode:
		return strs
	case n.Tag == "!!bool":
		return object{"type": "boolean"}
	case n.Tag == "!!int":
		return count
	}
	return stringType
}

func comment(text string) string {
	var words []string
	for line := range strings.Lines(text) {
		words = append(words, strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "#")))
	}
	return strings.TrimSpace(strings.Join(words, " "))
}

// show writes a default in one line.
func show(n *yaml.Node) string {
	var v any
	if err := n.Decode(&v); err != nil || v == "" {
		return "empty"
	}
	if s, ok := v.(string); ok {
		return "`" + s + "`"
	}
	data, err := json.Marshal(v)
	if err != nil {
		return "?"
	}
	if string(data) == "{}" || string(data) == "[]" {
		return "empty"
	}
	return "`" + string(data) + "`"
}

var between = regexp.MustCompile(`(?s)(<!-- values: begin -->\n).*(<!-- values: end -->)`)

// fill replaces what stands between the two marks of the guide.
func fill(guide, rows string) error {
	data, err := os.ReadFile(guide)
	if err != nil {
		return err
	}
	if !between.Match(data) {
		return fmt.Errorf("%s: the marks values: begin and values: end are missing", guide)
	}
	text := "$1| value | default | meaning |\n|---|---|---|\n" + strings.ReplaceAll(rows, "$", "$$") + "$2"
	return os.WriteFile(guide, between.ReplaceAll(data, []byte(text)), 0o644)
}
