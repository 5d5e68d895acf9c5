// Package lastknown keeps, in a folder of this replica alone, what a control plane needs to serve when it starts while
// its API server is away: keys, and the objects that were read last. It knows the files and when they are written, not
// what the objects mean.
package lastknown

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A file is a header and the content in gzip. The header, big endian: magic (8 bytes), version (4), zero (4), the time
// at which the content was current in nanoseconds of Unix (8), the length of what follows (8), and SHA-256 over the
// name of the file, what stands before in the header, and what follows it (32).
const (
	magic      = "isthmus\x00"
	version    = 1
	headerSize = 64
	sumAt      = 32
)

// Limits of one file, when it is written and when it is read: bytes on disk, and unpacked.
const (
	maxFile     = 64 << 20
	maxUnpacked = 512 << 20
)

// Errors of files that are not used.
var (
	ErrCorrupt  = errors.New("the file is damaged")
	ErrNewer    = errors.New("a newer isthmusd wrote the file")
	ErrTooLarge = errors.New("it is larger than is kept")
	ErrOpen     = errors.New("others can read the file")
)

// folder holds the files.
type folder struct{ path string }

// openFolder makes the folder, for its owner alone.
func openFolder(path string) (*folder, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o700); err != nil {
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(path, ".new-*")) // of a process that was killed while it wrote
	if err != nil {
		return nil, err
	}
	for _, name := range left {
		_ = os.Remove(name)
	}
	return &folder{path}, nil
}

// inMemory reports whether the folder is on a file system that has no disk.
func (d *folder) inMemory() bool {
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.path, &st); err != nil {
		return false
	}
	return uint32(st.Type) == unix.TMPFS_MAGIC || uint32(st.Type) == unix.RAMFS_MAGIC
}

// write replaces a file, or leaves it as it is: there is never half a file of that name.
func (d *folder) write(name string, at time.Time, fill func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(d.path, ".new-*") // of mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if _, err := f.Seek(headerSize, io.SeekStart); err != nil {
		return err
	}
	out := &counted{to: f, sum: sha256.New()}
	buffered := bufio.NewWriterSize(out, 64<<10)
	z, err := gzip.NewWriterLevel(buffered, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if err := errors.Join(fill(&limited{to: z, left: maxUnpacked}), z.Close(), buffered.Flush()); err != nil {
		return err
	}
	header := append(make([]byte, 0, headerSize), magic...)
	header = binary.BigEndian.AppendUint32(header, version)
	header = binary.BigEndian.AppendUint32(header, 0)
	header = binary.BigEndian.AppendUint64(header, uint64(at.UnixNano()))
	header = binary.BigEndian.AppendUint64(header, uint64(out.n))
	header = append(header, checksum(name, header, out.sum.Sum(nil))...)
	if _, err := f.WriteAt(header, 0); err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(d.path, name)); err != nil {
		return err
	}
	return d.sync()
}

// sync makes names last.
func (d *folder) sync() error {
	f, err := os.Open(d.path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// read returns the content of a file, once all of it is known to be as it was written. An error that wraps
// fs.ErrNotExist says that there is none.
func (d *folder) read(name string) (content io.Reader, at time.Time, err error) {
	path := filepath.Join(d.path, name)
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return nil, at, err
	case !info.Mode().IsRegular():
		return nil, at, fmt.Errorf("%w: it is no regular file", ErrCorrupt)
	case info.Mode().Perm()&0o077 != 0:
		return nil, at, fmt.Errorf("%w (mode %04o)", ErrOpen, info.Mode().Perm())
	case info.Size() > maxFile+headerSize:
		return nil, at, fmt.Errorf("%w: %d bytes", ErrTooLarge, info.Size())
	case info.Size() < headerSize:
		return nil, at, fmt.Errorf("%w: it has %d bytes", ErrCorrupt, info.Size())
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, at, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+headerSize))
	if err != nil {
		return nil, at, err
	}
	return unseal(name, data)
}

// unseal checks a file and returns its content.
func unseal(name string, data []byte) (content io.Reader, at time.Time, err error) {
	if len(data) < headerSize || string(data[:8]) != magic {
		return nil, at, fmt.Errorf("%w: it does not begin as one of isthmusd", ErrCorrupt)
	}
	if v := binary.BigEndian.Uint32(data[8:]); v != version {
		return nil, at, fmt.Errorf("%w: it has version %d, %d is understood", ErrNewer, v, version)
	}
	header, body := data[:headerSize], data[headerSize:]
	if n := binary.BigEndian.Uint64(header[24:]); n != uint64(len(body)) {
		return nil, at, fmt.Errorf("%w: %d bytes follow the header, which speaks of %d", ErrCorrupt, len(body), n)
	}
	sum := sha256.Sum256(body)
	if !bytes.Equal(header[sumAt:], checksum(name, header[:sumAt], sum[:])) {
		return nil, at, fmt.Errorf("%w: its checksum is another", ErrCorrupt)
	}
	z, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return nil, at, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return io.LimitReader(z, maxUnpacked), time.Unix(0, int64(binary.BigEndian.Uint64(header[16:]))), nil
}

// checksum binds the content to the name, so that one file is never taken for another.
func checksum(name string, header, body []byte) []byte {
	h := sha256.New()
	_, _ = io.WriteString(h, name+"\x00")
	_, _ = h.Write(header)
	_, _ = h.Write(body)
	return h.Sum(nil)
}

// remove deletes a file; one that is not there is no error.
func (d *folder) remove(name string) error {
	if err := os.Remove(filepath.Join(d.path, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// names returns the files whose names begin so, without that beginning.
func (d *folder) names(prefix string) ([]string, error) {
	entries, err := os.ReadDir(d.path)
	var out []string
	for _, e := range entries {
		if rest, ok := strings.CutPrefix(e.Name(), prefix); ok {
			out = append(out, rest)
		}
	}
	return out, err
}

// counted counts and sums what is written, up to maxFile.
type counted struct {
	to  io.Writer
	sum hash.Hash
	n   int64
}

// Write implements io.Writer.
func (c *counted) Write(p []byte) (int, error) {
	if c.n += int64(len(p)); c.n > maxFile {
		return 0, fmt.Errorf("%w: more than %d MiB", ErrTooLarge, maxFile>>20)
	}
	_, _ = c.sum.Write(p)
	return c.to.Write(p)
}

// limited passes on so many bytes.
type limited struct {
	to   io.Writer
	left int64
}

// Write implements io.Writer.
func (l *limited) Write(p []byte) (int, error) {
	if l.left -= int64(len(p)); l.left < 0 {
		return 0, fmt.Errorf("%w: more than %d MiB unpacked", ErrTooLarge, maxUnpacked>>20)
	}
	return l.to.Write(p)
}
