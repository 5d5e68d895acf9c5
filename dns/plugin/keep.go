package plugin

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// The file of the last good data: the magic line, the SHA-256 of all that follows, then each host with its length
// (a varint) before it.
const (
	keptMagic = "isthmus dns hosts 1\n"
	// maxKept is the largest file that is written or read.
	maxKept = 64 << 20
	// keepEvery is the least time between two writes. A large file is written less often: a hundredth of the time at most.
	keepEvery = time.Second
)

var errTooLarge = fmt.Errorf("more than %d MiB", maxKept>>20)

// keeper writes the newest zone to disk, not each one on the way there.
type keeper struct {
	file  string
	zone  atomic.Pointer[zone.Zone] // to be written; nil when it is
	dirty chan struct{}
	every time.Duration
}

func newKeeper(file string) *keeper {
	return &keeper{file: file, dirty: make(chan struct{}, 1), every: keepEvery}
}

// changed says that there is a new zone. It does not wait.
func (k *keeper) changed(z *zone.Zone) {
	k.zone.Store(z)
	select {
	case k.dirty <- struct{}{}:
	default:
	}
}

// run writes until ctx ends, and then once more if something is left.
func (k *keeper) run(ctx context.Context) error {
	for {
		select {
		case <-k.dirty:
		case <-ctx.Done():
			k.write()
			return nil
		}
		wait := max(k.every, 100*k.write())
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			k.write()
			return nil
		}
	}
}

// write keeps the newest zone, if it is not kept yet, and returns how long it took.
func (k *keeper) write() time.Duration {
	z := k.zone.Swap(nil)
	if z == nil {
		return 0
	}
	started := time.Now()
	if err := k.save(z); err != nil {
		keepFailures.Inc()
		log.Warningf("last good data not kept in %s: %v", k.file, err)
	}
	return time.Since(started)
}

// save replaces the file in one step: a reader, or a crash, finds the old one or the new one.
func (k *keeper) save(z *zone.Zone) (err error) {
	f, err := os.CreateTemp(filepath.Dir(k.file), "."+filepath.Base(k.file)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	sum, size := sha256.New(), 0
	if _, err = f.Write(append([]byte(keptMagic), make([]byte, sha256.Size)...)); err != nil {
		return err
	}
	w := bufio.NewWriterSize(io.MultiWriter(f, sum), 64<<10)
	var record []byte
	for h := range z.All() {
		body, merr := proto.Marshal(h)
		if merr != nil {
			return merr
		}
		record = append(binary.AppendUvarint(record[:0], uint64(len(body))), body...)
		if size += len(record); size > maxKept-len(keptMagic)-sha256.Size {
			return errTooLarge
		}
		if _, err = w.Write(record); err != nil {
			return err
		}
	}
	if err = w.Flush(); err != nil {
		return err
	}
	if _, err = f.WriteAt(sum.Sum(nil), int64(len(keptMagic))); err != nil {
		return err
	}
	if err = errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), k.file)
}

// load returns what is kept, by name. A file that is not whole counts as none: isthmusd knows better.
func (k *keeper) load() map[string]*dnsv1.Host {
	kept, err := read(k.file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warningf("last good data in %s are not used: %v", k.file, err)
	}
	return kept
}

func read(file string) (map[string]*dnsv1.Host, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxKept+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxKept {
		return nil, errTooLarge
	}
	return decode(data)
}

// decode reads the contents of a file.
func decode(data []byte) (map[string]*dnsv1.Host, error) {
	data, ok := bytes.CutPrefix(data, []byte(keptMagic))
	if !ok || len(data) < sha256.Size {
		return nil, errors.New("not a file of this program or version")
	}
	sum, data := data[:sha256.Size], data[sha256.Size:]
	if got := sha256.Sum256(data); !bytes.Equal(got[:], sum) {
		return nil, errors.New("it was damaged: the checksum is another")
	}
	kept := map[string]*dnsv1.Host{}
	for len(data) > 0 {
		size, n := binary.Uvarint(data)
		if n <= 0 || size > uint64(len(data)-n) {
			return nil, errors.New("a host is cut off")
		}
		h := new(dnsv1.Host)
		if err := proto.Unmarshal(data[n:n+int(size)], h); err != nil {
			return nil, fmt.Errorf("a host: %w", err)
		}
		kept[h.GetName()], data = h, data[n+int(size):]
	}
	return kept, nil
}
