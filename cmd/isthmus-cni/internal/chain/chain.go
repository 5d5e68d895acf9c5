// Package chain edits CNI network configurations: it puts our plugin at the end of a list of plugins and takes it out
// again. It is pure: bytes in, bytes out. The format is that of the CNI specification 1.1, section 1.
package chain

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"sort"
	"strings"
)

// PluginType is the type of our entry, and the name of the program in the folder of plugins.
const PluginType = "isthmus-cni"

// MaxSize is the largest configuration that is read, in bytes.
const MaxSize = 1 << 20

// ErrNotNetwork is wrapped by errors about files that are no network configuration.
var ErrNotNetwork = errors.New("not a CNI network configuration")

// Plugin is our entry in a list of plugins.
type Plugin struct {
	Type       string     `json:"type"`
	Name       string     `json:"name,omitempty"` // when it stands alone
	LogLevel   string     `json:"log_level,omitempty"`
	Kubernetes Kubernetes `json:"kubernetes"`
}

// Kubernetes is how the plugin asks for Pods, and of which it does not.
type Kubernetes struct {
	Kubeconfig        string   `json:"kubeconfig"`
	ExcludeNamespaces []string `json:"exclude_namespaces,omitempty"`
}

// object keeps the order and the spelling of what it does not know.
type object map[string]json.RawMessage

// Main returns which of the files in a folder of configurations the kubelet's runtime uses: of those that are
// configurations the first by name. names are all files there; read returns a file's content.
func Main(names []string, read func(string) ([]byte, error)) (string, error) {
	names = slices.Clone(names)
	sort.Strings(names)
	var problems []error
	for _, n := range names {
		if ext := path.Ext(n); ext != ".conf" && ext != ".conflist" && ext != ".json" {
			continue
		}
		data, err := read(n)
		if err == nil {
			_, err = parse(data)
		}
		if err == nil {
			return n, nil
		}
		problems = append(problems, fmt.Errorf("%s: %w", n, err))
	}
	return "", errors.Join(append([]error{errors.New("no network is configured yet")}, problems...)...)
}

// ListName returns the name of the file after Insert: a single configuration becomes a list.
func ListName(name string) string {
	if path.Ext(name) == ".conflist" {
		return name
	}
	return strings.TrimSuffix(name, path.Ext(name)) + ".conflist"
}

// parse returns the configuration as a list; a single plugin becomes a list of one.
func parse(data []byte) (object, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are read", ErrNotNetwork, len(data), MaxSize)
	}
	var o object
	if err := json.Unmarshal(data, &o); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotNetwork, err)
	}
	if _, list := o["plugins"]; list {
		plugins, err := o.plugins()
		if err == nil && len(plugins) == 0 {
			err = fmt.Errorf("%w: plugins is empty", ErrNotNetwork)
		}
		return o, err
	}
	if typeOf(o) == "" {
		return nil, fmt.Errorf("%w: neither plugins nor a type", ErrNotNetwork)
	}
	one := object{}
	for k, v := range o {
		if k != "name" && k != "cniVersion" {
			one[k] = v
		}
	}
	list := object{"plugins": nil}
	for _, k := range []string{"name", "cniVersion"} {
		if v, ok := o[k]; ok {
			list[k] = v
		}
	}
	return list, list.set([]object{one})
}

func (o object) plugins() ([]object, error) {
	var plugins []object
	if err := json.Unmarshal(o["plugins"], &plugins); err != nil {
		return nil, fmt.Errorf("%w: plugins: %w", ErrNotNetwork, err)
	}
	for i, p := range plugins {
		if typeOf(p) == "" {
			return nil, fmt.Errorf("%w: plugins[%d] has no type", ErrNotNetwork, i)
		}
	}
	return plugins, nil
}

func (o object) set(plugins []object) error {
	b, err := json.Marshal(plugins)
	o["plugins"] = b
	return err
}

func typeOf(o object) (t string) {
	_ = json.Unmarshal(o["type"], &t)
	return t
}

// Insert returns the configuration as a list with our plugin at its end, once. changed is false when it was there in
// just this form.
func Insert(data []byte, p Plugin) (out []byte, changed bool, err error) {
	list, err := parse(data)
	if err != nil {
		return nil, false, err
	}
	plugins, err := list.plugins()
	if err != nil {
		return nil, false, err
	}
	p.Type = PluginType
	entry, err := json.Marshal(p)
	if err != nil {
		return nil, false, err
	}
	if last := plugins[len(plugins)-1]; typeOf(last) == PluginType && bytes.Contains(data, []byte(`"plugins"`)) {
		have, err := json.Marshal(last)
		if err != nil {
			return nil, false, err
		}
		if equalJSON(have, entry) {
			return data, false, nil
		}
	}
	plugins = slices.DeleteFunc(plugins, func(o object) bool { return typeOf(o) == PluginType })
	var ours object
	if err := json.Unmarshal(entry, &ours); err != nil {
		return nil, false, err
	}
	if err := list.set(append(plugins, ours)); err != nil {
		return nil, false, err
	}
	out, err = list.format()
	return out, true, err
}

// Remove returns the configuration without our plugin. changed is false when it was not there.
func Remove(data []byte) (out []byte, changed bool, err error) {
	list, err := parse(data)
	if err != nil {
		return nil, false, err
	}
	plugins, err := list.plugins()
	if err != nil {
		return nil, false, err
	}
	rest := slices.DeleteFunc(slices.Clone(plugins), func(o object) bool { return typeOf(o) == PluginType })
	if len(rest) == len(plugins) {
		return data, false, nil
	}
	if err := list.set(rest); err != nil {
		return nil, false, err
	}
	out, err = list.format()
	return out, true, err
}

func (o object) format() ([]byte, error) {
	out, err := json.MarshalIndent(o, "", "  ")
	return append(out, '\n'), err
}

// equalJSON compares values, not spelling.
func equalJSON(a, b []byte) bool {
	var x, y any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	ax, errA := json.Marshal(x)
	by, errB := json.Marshal(y)
	return errA == nil && errB == nil && bytes.Equal(ax, by)
}
