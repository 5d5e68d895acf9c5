// Package manifest finds the Pods in YAML files, in workloads of every kind, and puts the proxy into them with the code
// of the webhook. Documents without a Pod pass as they are, byte for byte.
package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/discovery/inject"
)

// MaxDepth is how deep lists may be within lists.
const MaxDepth = 8

// Outcome is what was found out about one Pod or workload.
type Outcome struct {
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"` // of its document, from 1
	Object string `json:"object"`         // KIND/NAMESPACE/NAME
	inject.Decision
}

// Options say how Pods are injected.
type Options struct {
	Config    *inject.Config
	Namespace string // of objects that name none; "" means default
}

// Inject returns the content of a file with the proxy in each Pod that gets one, and what became of each. The error
// joins one for each object that is wrong, FILE:LINE: first; the text is then worth nothing.
func Inject(file string, data []byte, o Options) ([]byte, []Outcome, error) {
	r := &run{file: file, o: o, namespaces: map[string]map[string]string{}}
	docs := split(data)
	for _, d := range docs { // wherever it stands, a Namespace speaks for all of its Pods
		r.readNamespaces(d)
	}
	var out bytes.Buffer
	for _, d := range docs {
		out.WriteString(d.separator)
		out.Write(r.document(d))
	}
	return out.Bytes(), r.outcomes, errors.Join(r.errs...)
}

type run struct {
	file       string
	o          Options
	namespaces map[string]map[string]string
	outcomes   []Outcome
	errs       []error
	doc        document
}

func (r *run) fail(line int, format string, args ...any) {
	r.errs = append(r.errs, fmt.Errorf("%s:%d: %w", r.file, line, fmt.Errorf(format, args...)))
}

// document is one YAML document: the line that begins it, "" for the first, and what follows.
type document struct {
	separator string
	text      []byte
	line      int // of the first line of text, from 1
}

// split cuts at lines that begin with ---; inside a document none can.
func split(data []byte) []document {
	docs := []document{{line: 1}}
	n := 0
	for line := range bytes.Lines(data) {
		n++
		if bytes.HasPrefix(line, []byte("---")) {
			docs = append(docs, document{separator: string(line), line: n + 1})
			continue
		}
		last := &docs[len(docs)-1]
		last.text = append(last.text, line...)
	}
	return docs
}

func (r *run) readNamespaces(d document) {
	var o struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Name   string            `json:"name"`
			Labels map[string]string `json:"labels"`
		} `json:"metadata"`
	}
	if bytes.Contains(d.text, []byte("Namespace")) && yaml.Unmarshal(d.text, &o) == nil && o.Kind == "Namespace" {
		r.namespaces[o.Metadata.Name] = o.Metadata.Labels
	}
}

// document returns the text of a document, injected where there is a Pod in it.
func (r *run) document(d document) []byte {
	if len(bytes.TrimSpace(d.text)) == 0 {
		return d.text
	}
	var object map[string]any
	jsonText, err := yaml.YAMLToJSON(d.text)
	if err != nil {
		line, text := yamlError(err)
		r.fail(d.line-1+line, "%s", text)
		return nil
	}
	if string(jsonText) == "null" {
		return d.text // comments alone
	}
	dec := json.NewDecoder(bytes.NewReader(jsonText))
	dec.UseNumber()
	if err := dec.Decode(&object); err != nil {
		r.fail(d.line, "the document is no object")
		return nil
	}
	r.doc = d
	changed := r.object(object, 0)
	if !changed {
		return d.text
	}
	text, err := yaml.Marshal(object)
	if err != nil {
		r.fail(d.line, "write the document: %v", err)
		return nil
	}
	return text
}

// yamlError takes the line out of a YAML error; 1 when it has none.
func yamlError(err error) (int, string) {
	text := strings.TrimPrefix(strings.TrimPrefix(err.Error(), "error converting YAML to JSON: "), "yaml: ")
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if number, message, ok := strings.Cut(rest, ": "); ok {
			if n, err := strconv.Atoi(number); err == nil {
				return n, message
			}
		}
	}
	return 1, text
}

// templates is where the Pod is in each kind of workload.
var templates = map[string][]string{
	"Pod": {}, "PodTemplate": {"template"}, "Deployment": {"spec", "template"}, "StatefulSet": {"spec", "template"}, "DaemonSet": {"spec", "template"},
	"ReplicaSet": {"spec", "template"}, "ReplicationController": {"spec", "template"}, "Job": {"spec", "template"},
	"CronJob": {"spec", "jobTemplate", "spec", "template"}, "DeploymentConfig": {"spec", "template"}, "Rollout": {"spec", "template"},
}

func (r *run) object(o map[string]any, depth int) (changed bool) {
	kind, _ := o["kind"].(string)
	if items, ok := o["items"].([]any); ok && strings.HasSuffix(kind, "List") {
		if depth == MaxDepth {
			r.fail(r.doc.line, "lists within lists, over %d deep", MaxDepth)
			return false
		}
		for _, item := range items {
			if m, ok := item.(map[string]any); ok && r.object(m, depth+1) {
				changed = true
			}
		}
		return changed
	}
	path, ok := templates[kind]
	if !ok {
		return false
	}
	at := o
	for _, key := range path {
		next, ok := at[key].(map[string]any)
		if !ok {
			return false // the API server will say what is missing
		}
		at = next
	}
	return r.pod(o, at)
}

func (r *run) pod(o, template map[string]any) bool {
	metadata, _ := o["metadata"].(map[string]any)
	str := func(m map[string]any, key string) string { s, _ := m[key].(string); return s }
	name, namespace := str(metadata, "name"), str(metadata, "namespace")
	if name == "" {
		name = strings.TrimSuffix(str(metadata, "generateName"), "-")
	}
	if namespace == "" {
		namespace = r.o.Namespace
	}
	if namespace == "" {
		namespace = "default"
	}
	object := str(o, "kind") + "/" + namespace + "/" + name
	data, err := json.Marshal(template)
	var pod corev1.Pod
	if err == nil {
		err = json.Unmarshal(data, &pod)
	}
	if err != nil {
		r.fail(r.doc.line, "%s: %v", object, err)
		return false
	}
	q := inject.Request{Namespace: inject.Namespace{Name: namespace}}
	q.Namespace.Labels, q.Namespace.Known = r.namespaces[namespace], inject.Speaks(r.namespaces[namespace])
	if str(o, "kind") != "Pod" {
		q.Owner = inject.Owner{APIVersion: str(o, "apiVersion"), Kind: str(o, "kind"), Name: name}
	}
	result, err := r.o.Config.Inject(&pod, q)
	if err != nil {
		r.fail(r.lineOf(err), "%s: %w", object, err)
		return false
	}
	r.outcomes = append(r.outcomes, Outcome{File: r.file, Line: r.doc.line, Object: object, Decision: result.Decision})
	if result.Pod == nil {
		return false
	}
	if err := replace(template, result.Pod); err != nil {
		r.fail(r.doc.line, "%s: %w", object, err)
		return false
	}
	return true
}

// replace writes the Pod's metadata and spec into the template; what else is there stays.
func replace(template map[string]any, pod *corev1.Pod) error {
	data, err := json.Marshal(pod)
	if err != nil {
		return err
	}
	var out map[string]any
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if err := dec.Decode(&out); err != nil {
		return err
	}
	template["metadata"], template["spec"] = out["metadata"], out["spec"]
	return nil
}

// lineOf finds the line of the annotation or label that an error is about, else that of the document.
func (r *run) lineOf(err error) int {
	for _, word := range strings.Fields(err.Error()) {
		key := strings.TrimSuffix(word, ":")
		if !strings.Contains(key, "istio.io/") {
			continue
		}
		n := 0
		for line := range bytes.Lines(r.doc.text) {
			n++
			if bytes.Contains(line, []byte(key)) {
				return r.doc.line - 1 + n
			}
		}
	}
	return r.doc.line
}
