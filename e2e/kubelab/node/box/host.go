package box

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"

	"golang.org/x/sys/unix"
)

// Host is the file system of a node: that of this machine, on which the node writes a layer of its own, with some
// folders replaced. It exists in a mount namespace of its own, while it is open.
type Host struct {
	mnt  int    // the mount namespace
	root string // where the node's root is, in it
}

// OpenHost makes the node's file system. dir is an existing folder of the caller's for mount points; binds maps paths
// in the node's file system to folders of this machine, for example /etc/cni/net.d.
func OpenHost(dir string, binds map[string]string) (*Host, error) {
	h := &Host{root: filepath.Join(dir, "host", "root")}
	if err := os.MkdirAll(filepath.Join(dir, "host"), 0o755); err != nil {
		return nil, fmt.Errorf("node's file system: %w", err)
	}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return err
		}
		if err := layer(filepath.Join(dir, "host")); err != nil {
			return err
		}
		targets := make([]string, 0, len(binds))
		for t := range binds {
			targets = append(targets, t)
		}
		sort.Strings(targets)
		for _, t := range targets {
			if err := bindDir(binds[t], filepath.Join(h.root, t)); err != nil {
				return err
			}
		}
		if err := unix.Mount("", h.root, "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
			return err
		}
		var err error
		h.mnt, err = unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("node's file system: %w; root and overlayfs are needed", err)
	}
	return h, nil
}

// Close gives the file system up; containers that run keep theirs.
func (h *Host) Close() error { return unix.Close(h.mnt) }

// layer mounts a root file system at base/root: this machine's with a layer above that is kept in memory, empty /run
// and /tmp, and this machine's devices and kernel files.
func layer(base string) error {
	if err := unix.Mount("tmpfs", base, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
			return err
		}
	}
	root := filepath.Join(base, "root")
	opts := fmt.Sprintf("lowerdir=/,upperdir=%s/upper,workdir=%s/work", base, base)
	if err := unix.Mount("overlay", root, "overlay", 0, opts); err != nil {
		return fmt.Errorf("mount overlayfs: %w", err)
	}
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		if err := bindDir(d, filepath.Join(root, d)); err != nil {
			return err
		}
	}
	for d, mode := range map[string]string{"/run": "mode=755", "/tmp": "mode=1777"} {
		if err := unix.Mount("tmpfs", filepath.Join(root, d), "tmpfs", 0, mode); err != nil {
			return fmt.Errorf("mount %s: %w", d, err)
		}
	}
	return nil
}

func bindDir(source, target string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s: %w", source, err)
	}
	return nil
}

// enter moves the calling thread into the host's mount namespace.
func (h *Host) enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	return unix.Setns(h.mnt, unix.CLONE_NEWNS)
}

// Do runs fn on a thread in the node's file system: its paths are the node's.
func (h *Host) Do(fn func() error) error {
	return onThread(func() error {
		if err := h.enter(); err != nil {
			return err
		}
		if err := chroot(h.root); err != nil {
			return err
		}
		return fn()
	})
}

func chroot(root string) error {
	if err := unix.Chroot(root); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return unix.Chdir("/")
}

const netnsDir = "/run/netns"

// Bind makes a network namespace visible in the node's file system as a file of that name, and sets its Path.
func (h *Host) Bind(n *NetNS, name string) error {
	path := filepath.Join(netnsDir, name)
	err := h.Do(func() error {
		if err := os.MkdirAll(netnsDir, 0o755); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o400)
		if err != nil {
			return err
		}
		_ = f.Close()
		return unix.Mount(fmt.Sprintf("/proc/thread-self/fd/%d", n.fd), path, "", unix.MS_BIND, "")
	})
	if err != nil {
		return fmt.Errorf("bind network namespace %s: %w", name, err)
	}
	n.Path = path
	return nil
}

// Unbind undoes Bind.
func (h *Host) Unbind(n *NetNS) error {
	return h.Do(func() error {
		err := unix.Unmount(n.Path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			err = nil
		}
		return errors.Join(err, os.RemoveAll(n.Path))
	})
}
