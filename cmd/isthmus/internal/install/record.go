package install

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"time"

	"helm.sh/helm/v3/pkg/release"
	helmtime "helm.sh/helm/v3/pkg/time"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
)

const (
	maxRecord  = 32 << 20 // of a record unpacked; a Secret holds 1 MiB packed
	maxHistory = 10       // records that are kept, as Helm does
	recordType = "helm.sh/release.v1"
)

// history returns the records of the release, oldest first. They are Helm's: Secrets of its type, the release as
// gzipped JSON in base64, its version and status in labels. A record has half a megabyte: those that were replaced
// before the newest deployed one have no more here than their labels say, unless all is set.
func (c *Cluster) history(ctx context.Context, namespace string, all bool) ([]*release.Release, error) {
	list, err := c.metadata.Resource(secrets).Namespace(namespace).List(ctx, metav1.ListOptions{
		LabelSelector: labels.Set{"owner": "helm", "name": ReleaseName}.String(),
	})
	if err != nil {
		return nil, fmt.Errorf("list the records of release %s in %s: %w", ReleaseName, namespace, err)
	}
	version := func(o metav1.PartialObjectMetadata) int {
		n, _ := strconv.Atoi(o.Labels["version"]) // 0 is older than any
		return n
	}
	slices.SortFunc(list.Items, func(a, b metav1.PartialObjectMetadata) int { return version(b) - version(a) })
	var out []*release.Release
	deployed := false
	for _, o := range list.Items {
		status := release.Status(o.Labels["status"])
		r := &release.Release{Name: ReleaseName, Namespace: namespace, Version: version(o), Info: &release.Info{Status: status}}
		if all || !deployed || status != release.StatusSuperseded && status != release.StatusFailed {
			secret, err := c.get(ctx, secrets, namespace, o.Name)
			if apierrors.IsNotFound(err) {
				continue // removed meanwhile
			} else if err != nil {
				return nil, fmt.Errorf("read the record Secret/%s/%s: %w", namespace, o.Name, err)
			}
			if r, err = unpack(secret); err != nil {
				return nil, fmt.Errorf("read %s: %w", title(secret), err)
			}
		}
		deployed = deployed || r.Info.Status == release.StatusDeployed
		out = append(out, r)
	}
	slices.Reverse(out)
	return out, nil
}

func unpack(secret *unstructured.Unstructured) (*release.Release, error) {
	text, _, err := unstructured.NestedString(secret.Object, "data", "release")
	if err != nil {
		return nil, err
	}
	for range 2 { // once by the Secret, once by Helm
		data, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, err
		}
		text = string(data)
	}
	z, err := gzip.NewReader(bytes.NewReader([]byte(text)))
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(z, maxRecord))
	if err != nil {
		return nil, err
	}
	r := &release.Release{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	if r.Info == nil {
		return nil, fmt.Errorf("the record says nothing of the release's state")
	}
	return r, nil
}

func pack(r *release.Release, now time.Time) (*unstructured.Unstructured, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	z, err := gzip.NewWriterLevel(&buf, gzip.DefaultCompression) // the best takes six times as long for 2 % less
	if err != nil {
		return nil, err
	}
	if _, err := z.Write(data); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	text := base64.StdEncoding.EncodeToString(buf.Bytes())
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Secret", "type": recordType,
		"metadata": map[string]any{
			"name": recordName(r.Version), "namespace": r.Namespace,
			"labels": map[string]any{
				"name": r.Name, "owner": "helm", "status": r.Info.Status.String(), "version": strconv.Itoa(r.Version),
				"modifiedAt": strconv.FormatInt(now.Unix(), 10),
			},
		},
		"data": map[string]any{"release": base64.StdEncoding.EncodeToString([]byte(text))},
	}}, nil
}

func recordName(version int) string {
	return fmt.Sprintf("sh.helm.release.v1.%s.v%d", ReleaseName, version)
}

// write keeps the record, new or not.
func (c *Cluster) write(ctx context.Context, r *release.Release) error {
	secret, err := pack(r, time.Now())
	if err != nil {
		return fmt.Errorf("record release %s: %w", ReleaseName, err)
	}
	client := c.dynamic.Resource(secrets).Namespace(r.Namespace)
	if _, err = client.Update(ctx, secret, metav1.UpdateOptions{FieldManager: manager}); apierrors.IsNotFound(err) {
		_, err = client.Create(ctx, secret, metav1.CreateOptions{FieldManager: manager})
	}
	if err != nil {
		return fmt.Errorf("record release %s in %s: %w", ReleaseName, title(secret), err)
	}
	return nil
}

// last returns the newest record, or nil.
func last(history []*release.Release) *release.Release {
	if len(history) == 0 {
		return nil
	}
	return history[len(history)-1]
}

// same reports whether the record says that m is what is deployed.
func same(r *release.Release, m *Manifest) bool {
	if r == nil || r.Info.Status != release.StatusDeployed || r.Manifest != m.Text {
		return false
	}
	values, err := plain(r.Config)
	return err == nil && reflect.DeepEqual(values, m.Values) &&
		r.Chart != nil && r.Chart.Metadata != nil && r.Chart.Metadata.Version == m.Chart.Metadata.Version
}

// begin records that m is being installed.
func (c *Cluster) begin(ctx context.Context, history []*release.Release, m *Manifest) (*release.Release, error) {
	now := helmtime.Now()
	r := &release.Release{
		Name: ReleaseName, Namespace: m.Namespace, Chart: m.Chart, Config: m.Values, Manifest: m.Text, Version: 1,
		Info: &release.Info{FirstDeployed: now, LastDeployed: now, Status: release.StatusPendingInstall, Description: "Install in progress", Notes: m.Notes},
	}
	if before := last(history); before != nil {
		r.Version = before.Version + 1
		r.Info.FirstDeployed, r.Info.Status, r.Info.Description = before.Info.FirstDeployed, release.StatusPendingUpgrade, "Upgrade in progress"
	}
	return r, c.write(ctx, r)
}

// finish records how it ended. Records before it are superseded, the oldest are removed.
func (c *Cluster) finish(ctx context.Context, history []*release.Release, r *release.Release, failure error) error {
	if failure != nil {
		r.SetStatus(release.StatusFailed, failure.Error())
		return c.write(ctx, r)
	}
	r.SetStatus(release.StatusDeployed, map[bool]string{true: "Install complete", false: "Upgrade complete"}[r.Version == 1])
	if err := c.write(ctx, r); err != nil {
		return err
	}
	for i, old := range history {
		if len(history)-i >= maxHistory {
			err := c.dynamic.Resource(secrets).Namespace(r.Namespace).Delete(ctx, recordName(old.Version), metav1.DeleteOptions{})
			if err != nil && !apierrors.IsNotFound(err) {
				return fmt.Errorf("remove the record of revision %d: %w", old.Version, err)
			}
		} else if s := old.Info.Status; s == release.StatusDeployed || s.IsPending() {
			old.SetStatus(release.StatusSuperseded, "Superseded")
			if err := c.write(ctx, old); err != nil {
				return err
			}
		}
	}
	return nil
}
