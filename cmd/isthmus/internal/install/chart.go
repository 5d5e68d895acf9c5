// Package install puts Isthmus on a Kubernetes cluster and takes it off again. It renders the chart with Helm's library,
// applies the objects on the server's side and keeps Helm's own record of the release, so that helm lists and upgrades it.
package install

import (
	"bytes"
	"cmp"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/strvals"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/isthmus-mesh/isthmus/deploy/helm"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// ReleaseName is the name of the release that `isthmus install` makes.
const ReleaseName = "isthmus"

// maxValues bounds a file of values.
const maxValues = 4 << 20

// Chart returns the chart that this program carries.
func Chart() (*chart.Chart, error) {
	var files []*loader.BufferedFile
	root := helm.Chart()
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(root, name)
		files = append(files, &loader.BufferedFile{Name: name, Data: data})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the chart: %w", err)
	}
	return loader.LoadFiles(files)
}

// Profiles lists the names that ValuesFrom.Profile takes.
func Profiles() []string {
	entries, _ := fs.Glob(helm.Chart(), "profiles/*.yaml")
	for i, e := range entries {
		entries[i] = strings.TrimSuffix(path.Base(e), ".yaml")
	}
	return entries
}

// ValuesFrom says where values come from; later ones win: the profile, the files in their order, the settings.
type ValuesFrom struct {
	Profile string
	Files   []string
	Set     []string // as helm's --set: a.b=c,d={x,y}
}

// None reports whether nothing was given.
func (v ValuesFrom) None() bool { return v.Profile == "" && len(v.Files) == 0 && len(v.Set) == 0 }

// Read returns the values that differ from the chart's own.
func (v ValuesFrom) Read() (map[string]any, error) {
	out := map[string]any{}
	if v.Profile != "" {
		data, err := fs.ReadFile(helm.Chart(), "profiles/"+path.Base(v.Profile)+".yaml")
		if err != nil {
			return nil, diag.Hint(fmt.Errorf("no profile %q", v.Profile), "one of %s", strings.Join(Profiles(), ", "))
		}
		if err := yaml.Unmarshal(data, &out); err != nil {
			return nil, fmt.Errorf("profile %s: %w", v.Profile, err)
		}
	}
	for _, name := range v.Files {
		if st, err := os.Stat(name); err == nil && st.Size() > maxValues {
			return nil, fmt.Errorf("values %s: %d bytes, more than %d", name, st.Size(), maxValues)
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read values: %w", err)
		}
		var from map[string]any
		if err := yaml.UnmarshalStrict(data, &from); err != nil {
			return nil, fmt.Errorf("values %s: %w", name, err)
		}
		out = chartutil.MergeTables(from, out)
	}
	for _, s := range v.Set {
		if err := strvals.ParseInto(s, out); err != nil {
			return nil, diag.Hint(fmt.Errorf("--set %s: %w", s, err), "--set a.b=value, lists as a.b={x,y}")
		}
	}
	return out, nil
}

// Manifest is what the chart becomes with some values.
type Manifest struct {
	Chart     *chart.Chart
	Namespace string
	Values    map[string]any // that differ from the chart's own
	Text      string         // as helm template prints it
	Notes     string
	Objects   []*unstructured.Unstructured // in the order of installation; only read, definitions are shared
}

// Render makes the manifest. It is pure: equal values give equal text.
func Render(c *chart.Chart, values map[string]any, namespace string, upgrade bool) (*Manifest, error) {
	values, err := plain(values)
	if err != nil {
		return nil, err
	}
	top, err := chartutil.ToRenderValues(c, values, chartutil.ReleaseOptions{
		Name: ReleaseName, Namespace: namespace, Revision: 1, IsInstall: !upgrade, IsUpgrade: upgrade,
	}, chartutil.DefaultCapabilities)
	if err != nil {
		return nil, valuesError(c, err)
	}
	files, err := engine.Render(c, top)
	if err != nil {
		return nil, renderError(err)
	}
	m := &Manifest{Chart: c, Namespace: namespace, Values: values}
	for name, text := range files {
		if path.Base(name) == "NOTES.txt" {
			m.Notes = strings.TrimSpace(text) + "\n"
			delete(files, name)
		}
	}
	parts, err := documentsOf(files)
	if err != nil {
		return nil, fmt.Errorf("render the chart: %w", err)
	}
	var text bytes.Buffer
	for _, p := range parts {
		fmt.Fprintf(&text, "---\n# Source: %s\n%s\n", p.source, p.text)
		if len(p.object.Object) > 0 { // else a comment alone
			m.Objects = append(m.Objects, p.object)
		}
	}
	m.Text = text.String()
	return m, nil
}

// plain returns values as YAML would read them, so that those of a record and those of flags are equal when they are.
func plain(values map[string]any) (map[string]any, error) {
	data, err := yaml.Marshal(values)
	if err != nil {
		return nil, fmt.Errorf("values: %w", err)
	}
	out := map[string]any{}
	err = yaml.Unmarshal(data, &out)
	return out, err
}

// How the schema's library and the template engine put what they have to say.
var (
	unknown  = regexp.MustCompile(`^- at '(.*)': additional propert(?:y|ies) (.*) not allowed$`)
	wrong    = regexp.MustCompile(`^- at '(.*)': (.*)$`)
	quoted   = regexp.MustCompile(`'([^']*)'`)
	location = regexp.MustCompile(`^execution error at \([^)]*\): `)
)

// valuesError says which values are wrong by their paths.
func valuesError(c *chart.Chart, err error) error {
	var said []string
	hint := "docs/guide/isthmus-install.md lists every value"
	for line := range strings.Lines(err.Error()) {
		line = strings.TrimSpace(line)
		if m := unknown.FindStringSubmatch(line); m != nil {
			for _, q := range quoted.FindAllStringSubmatch(m[2], -1) {
				at := strings.Trim(strings.ReplaceAll(m[1], "/", ".")+"."+q[1], ".")
				said = append(said, "unknown value "+at)
				if near := nearest(c.Values, at); near != "" {
					hint = fmt.Sprintf("did you mean %s? docs/guide/isthmus-install.md lists every value", near)
				}
			}
		} else if m := wrong.FindStringSubmatch(line); m != nil {
			said = append(said, fmt.Sprintf("value %s: %s", strings.Trim(strings.ReplaceAll(m[1], "/", "."), "."), m[2]))
		}
	}
	if len(said) == 0 {
		return diag.Hint(err, "%s", hint)
	}
	slices.Sort(said)
	return diag.Hint(fmt.Errorf("%s", strings.Join(slices.Compact(said), "; ")), "%s", hint)
}

// nearest finds the name beside the unknown one that differs least, or "" when none is alike.
func nearest(values map[string]any, at string) string {
	parts := strings.Split(at, ".")
	for _, p := range parts[:len(parts)-1] {
		next, ok := values[p].(map[string]any)
		if !ok {
			return ""
		}
		values = next
	}
	last := parts[len(parts)-1]
	names := slices.Sorted(maps.Keys(values))
	if len(names) == 0 {
		return ""
	}
	best := slices.MinFunc(names, func(a, b string) int { return cmp.Compare(diag.Distance(a, last), diag.Distance(b, last)) })
	if diag.Distance(best, last) > 2 {
		return ""
	}
	return strings.Join(append(parts[:len(parts)-1], best), ".")
}

// renderError reduces an error of a template to what the chart itself says in it.
func renderError(err error) error {
	text := location.ReplaceAllString(err.Error(), "")
	if text == err.Error() {
		return fmt.Errorf("render the chart: %w", err)
	}
	return diag.Hint(fmt.Errorf("values: %s", strings.TrimSpace(text)), "docs/guide/isthmus-install.md lists every value")
}
