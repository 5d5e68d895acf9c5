package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/e2e/kubelab/node/box"
)

// volumes are the folders of a Pod's volumes.
type volumes struct {
	w     *worker
	again chan struct{}

	mu      sync.Mutex
	written map[string]map[string]file // by volume: what its folder holds
	tokens  map[string]token           // by volume and path
}

type file struct {
	data string
	mode os.FileMode
}

type token struct {
	text    string
	refresh time.Time
}

func newVolumes(w *worker) *volumes {
	return &volumes{w: w, again: make(chan struct{}, 1), written: map[string]map[string]file{}, tokens: map[string]token{}}
}

func (v *volumes) dir(name string) string { return filepath.Join(v.w.dir(), "volumes", name) }

func (v *volumes) remove() {
	if err := os.RemoveAll(v.w.dir()); err != nil {
		v.w.n.log.Warn("volumes of a pod not removed", "pod", v.w.namespace+"/"+v.w.name, "err", err)
	}
}

// keep holds the volumes equal to what they are made of, and tokens fresh, until ctx ends.
func (v *volumes) keep(ctx context.Context) {
	const longest = time.Hour
	pause := longest
	for {
		timer := time.NewTimer(min(pause, v.nextToken(longest)))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-v.again:
		case <-timer.C:
		}
		timer.Stop()
		pause = longest
		if err := v.sync(ctx); err != nil && ctx.Err() == nil {
			v.w.event(corev1.EventTypeWarning, "FailedMount", err.Error())
			pause = 2 * time.Second
		}
	}
}

func (v *volumes) nextToken(longest time.Duration) time.Duration {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, t := range v.tokens {
		longest = min(longest, max(time.Until(t.refresh), time.Second))
	}
	return longest
}

// expire has every token be asked for anew.
func (v *volumes) expire() {
	v.mu.Lock()
	clear(v.tokens)
	v.mu.Unlock()
	poke(v.again)
}

// sync makes every volume as it should be. It goes on after errors.
func (v *volumes) sync(ctx context.Context) error {
	var errs []error
	pod := v.w.latest()
	for i := range pod.Spec.Volumes {
		vol := &pod.Spec.Volumes[i]
		if err := v.one(ctx, pod, vol); err != nil {
			errs = append(errs, fmt.Errorf("MountVolume.SetUp failed for volume %q: %w", vol.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (v *volumes) one(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume) error {
	var files map[string]file
	var err error
	switch {
	case vol.EmptyDir != nil:
		if err := os.MkdirAll(v.dir(vol.Name), 0o777); err != nil {
			return err
		}
		return os.Chmod(v.dir(vol.Name), 0o777)
	case vol.HostPath != nil:
		return v.hostPath(vol.HostPath)
	case vol.ConfigMap != nil:
		s := vol.ConfigMap
		var data map[string][]byte
		if data, err = v.w.configMap(ctx, s.Name, isTrue(s.Optional)); err == nil {
			files, err = project(data, s.Items, mode(s.DefaultMode), isTrue(s.Optional))
		}
	case vol.Secret != nil:
		s := vol.Secret
		var data map[string][]byte
		if data, err = v.w.secret(ctx, s.SecretName, isTrue(s.Optional)); err == nil {
			files, err = project(data, s.Items, mode(s.DefaultMode), isTrue(s.Optional))
		}
	case vol.DownwardAPI != nil:
		files, err = v.downward(vol.DownwardAPI.Items, mode(vol.DownwardAPI.DefaultMode))
	case vol.Projected != nil:
		files, err = v.projected(ctx, pod, vol)
	default:
		return errors.New("a kind of volume the lab does not have")
	}
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if old, ok := v.written[vol.Name]; ok && maps.Equal(old, files) {
		return nil
	}
	if err := writeAtomically(v.dir(vol.Name), files, fsGroup(pod)); err != nil {
		return err
	}
	v.written[vol.Name] = files
	return nil
}

func mode(m *int32) os.FileMode {
	if m == nil {
		return 0o644
	}
	return os.FileMode(*m) & 0o777
}

func fsGroup(pod *corev1.Pod) int {
	if s := pod.Spec.SecurityContext; s != nil && s.FSGroup != nil {
		return int(*s.FSGroup)
	}
	return -1
}

// project chooses the keys that a volume shows, all when no items are given.
func project(data map[string][]byte, items []corev1.KeyToPath, m os.FileMode, optional bool) (map[string]file, error) {
	out := map[string]file{}
	if len(items) == 0 {
		for k, v := range data {
			out[k] = file{string(v), m}
		}
		return out, nil
	}
	for _, item := range items {
		v, ok := data[item.Key]
		if !ok && optional {
			continue
		}
		if !ok {
			return nil, fmt.Errorf("references non-existent key: %s", item.Key)
		}
		f := file{string(v), m}
		if item.Mode != nil {
			f.mode = mode(item.Mode)
		}
		out[filepath.Clean(item.Path)] = f
	}
	return out, nil
}

func (v *volumes) downward(items []corev1.DownwardAPIVolumeFile, m os.FileMode) (map[string]file, error) {
	out := map[string]file{}
	for _, item := range items {
		var value string
		var err error
		switch {
		case item.FieldRef != nil:
			value, err = v.w.field(item.FieldRef.FieldPath)
		case item.ResourceFieldRef != nil:
			value, err = resourceField(v.w.containerSpec(item.ResourceFieldRef.ContainerName), item.ResourceFieldRef)
		}
		if err != nil {
			return nil, err
		}
		f := file{value, m}
		if item.Mode != nil {
			f.mode = mode(item.Mode)
		}
		out[filepath.Clean(item.Path)] = f
	}
	return out, nil
}

func (v *volumes) projected(ctx context.Context, pod *corev1.Pod, vol *corev1.Volume) (map[string]file, error) {
	out, m := map[string]file{}, mode(vol.Projected.DefaultMode)
	for _, s := range vol.Projected.Sources {
		var files map[string]file
		var data map[string][]byte
		var err error
		switch {
		case s.ConfigMap != nil:
			if data, err = v.w.configMap(ctx, s.ConfigMap.Name, isTrue(s.ConfigMap.Optional)); err == nil {
				files, err = project(data, s.ConfigMap.Items, m, isTrue(s.ConfigMap.Optional))
			}
		case s.Secret != nil:
			if data, err = v.w.secret(ctx, s.Secret.Name, isTrue(s.Secret.Optional)); err == nil {
				files, err = project(data, s.Secret.Items, m, isTrue(s.Secret.Optional))
			}
		case s.DownwardAPI != nil:
			files, err = v.downward(s.DownwardAPI.Items, m)
		case s.ServiceAccountToken != nil:
			var text string
			text, err = v.token(ctx, pod, vol.Name, s.ServiceAccountToken)
			files = map[string]file{filepath.Clean(s.ServiceAccountToken.Path): {text, m}}
		default:
			err = errors.New("a projected source the lab does not have")
		}
		if err != nil {
			return nil, err
		}
		maps.Copy(out, files)
	}
	return out, nil
}

// token returns the service account's token of one source, a new one when four fifths of the old one's life are over.
func (v *volumes) token(ctx context.Context, pod *corev1.Pod, volume string, s *corev1.ServiceAccountTokenProjection) (string, error) {
	key := volume + "/" + s.Path
	v.mu.Lock()
	t, ok := v.tokens[key]
	v.mu.Unlock()
	if ok && time.Now().Before(t.refresh) {
		return t.text, nil
	}
	req := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: s.ExpirationSeconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	if s.Audience != "" {
		req.Spec.Audiences = []string{s.Audience}
	}
	asked := time.Now()
	account := pod.Spec.ServiceAccountName
	if account == "" {
		account = "default"
	}
	res, err := v.w.n.client.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(ctx, account, req, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("token for service account %s: %w", account, err)
	}
	life := res.Status.ExpirationTimestamp.Sub(asked)
	t = token{res.Status.Token, asked.Add(life * 4 / 5)}
	v.mu.Lock()
	v.tokens[key] = t
	v.mu.Unlock()
	return t.text, nil
}

// hostPath makes a path of the node that is to be made when missing.
func (v *volumes) hostPath(s *corev1.HostPathVolumeSource) error {
	kind := corev1.HostPathUnset
	if s.Type != nil {
		kind = *s.Type
	}
	return v.w.n.host.Do(func() error {
		st, err := os.Stat(s.Path)
		switch kind {
		case corev1.HostPathDirectoryOrCreate:
			return os.MkdirAll(s.Path, 0o755)
		case corev1.HostPathFileOrCreate:
			f, err := os.OpenFile(s.Path, os.O_CREATE|os.O_RDONLY, 0o644)
			if err != nil {
				return err
			}
			return f.Close()
		case corev1.HostPathUnset: // runtimes make it
			if errors.Is(err, os.ErrNotExist) {
				return os.MkdirAll(s.Path, 0o755)
			}
			return err
		case corev1.HostPathDirectory:
			if err == nil && !st.IsDir() {
				err = fmt.Errorf("hostPath type check failed: %s is not a directory", s.Path)
			}
		}
		return err
	})
}

// mounts are a container's volume mounts.
func (c *container) mounts(spec *corev1.Container, values map[string]string) ([]box.Mount, error) {
	pod := c.w.latest()
	var out []box.Mount
	for _, m := range spec.VolumeMounts {
		var vol *corev1.Volume
		for i := range pod.Spec.Volumes {
			if pod.Spec.Volumes[i].Name == m.Name {
				vol = &pod.Spec.Volumes[i]
			}
		}
		if vol == nil {
			return nil, fmt.Errorf("no volume %q", m.Name)
		}
		b := box.Mount{Source: c.w.vol.dir(m.Name), Target: filepath.Join("/", m.MountPath), ReadOnly: m.ReadOnly}
		if vol.HostPath != nil {
			b.Source, b.OfHost = vol.HostPath.Path, true
		}
		sub := m.SubPath
		if m.SubPathExpr != "" {
			sub = expand(m.SubPathExpr, values)
		}
		if sub != "" {
			if !filepath.IsLocal(sub) {
				return nil, fmt.Errorf("subPath %q leads out of volume %q", sub, m.Name)
			}
			path := filepath.Join(b.Source, sub)
			if vol.EmptyDir != nil {
				if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
					if err := os.MkdirAll(path, 0o777); err != nil {
						return nil, err
					}
					_ = os.Chmod(path, 0o777)
				}
			}
			b.Source = path
			if !b.OfHost {
				real, err := filepath.EvalSymlinks(path)
				if err != nil {
					return nil, err
				}
				b.Source = real
			}
		}
		out = append(out, b)
	}
	return out, nil
}

// writeAtomically replaces the files of a volume all at once: readers see the old ones or the new ones. As kubelets do,
// the files are in a folder that the link ..data points to, and links in the volume lead through it.
func writeAtomically(dir string, files map[string]file, group int) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	fresh, err := os.MkdirTemp(dir, time.Now().UTC().Format("..2006_01_02_15_04_05."))
	if err != nil {
		return err
	}
	if err := os.Chmod(fresh, 0o755); err != nil {
		return err
	}
	top := map[string]bool{}
	for name, f := range files {
		if !filepath.IsLocal(name) {
			return fmt.Errorf("path %q leads out of the volume", name)
		}
		first, _, _ := strings.Cut(name, "/")
		top[first] = true
		path := filepath.Join(fresh, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(f.data), 0o600); err != nil {
			return err
		}
		m := f.mode
		if group >= 0 {
			m |= m & 0o400 >> 3
			if err := os.Chown(path, -1, group); err != nil {
				return err
			}
		}
		if err := os.Chmod(path, m); err != nil {
			return err
		}
	}
	return swap(dir, fresh, top)
}

// swap makes ..data point to the folder fresh and the links of a volume those of top.
func swap(dir, fresh string, top map[string]bool) error {
	data, next := filepath.Join(dir, "..data"), filepath.Join(dir, "..data_tmp")
	old, _ := os.Readlink(data)
	_ = os.Remove(next)
	if err := os.Symlink(filepath.Base(fresh), next); err != nil {
		return err
	}
	if err := os.Rename(next, data); err != nil {
		return err
	}
	for name := range top {
		err := os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name))
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "..") && !top[e.Name()] {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if old != "" && filepath.IsLocal(old) {
		return os.RemoveAll(filepath.Join(dir, old))
	}
	return nil
}
