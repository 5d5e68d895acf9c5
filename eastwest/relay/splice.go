package relay

import (
	"io"
	"net"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	pipeSize = 1 << 20 // octets asked for; the kernel may give less
	copySize = 32 << 10
)

// pipes holds empty pipes between uses. A direction that waits for data holds none, so an idle connection costs its
// two sockets only.
type pipes struct {
	pool sync.Pool
	bufs sync.Pool // for copying where no pipe is to be had
}

type pipe struct{ r, w int }

func (p *pipes) get() (*pipe, error) {
	if v, ok := p.pool.Get().(*pipe); ok {
		return v, nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, err
	}
	_, _ = unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize) // a smaller pipe does too
	v := &pipe{r: fds[0], w: fds[1]}
	runtime.SetFinalizer(v, (*pipe).close) // the pool drops pipes that are not used for long
	return v, nil
}

// put takes back an empty pipe.
func (p *pipes) put(v *pipe) { p.pool.Put(v) }

// discard closes a pipe that may still hold octets.
func (v *pipe) discard() {
	runtime.SetFinalizer(v, nil)
	v.close()
}

func (v *pipe) close() {
	_ = unix.Close(v.r)
	_ = unix.Close(v.w)
}

// pump moves octets from src to dst with splice(2) until src ends, which gives nil, or one of them fails. moved is told
// how many after each move.
func (p *pipes) pump(dst, src *net.TCPConn, moved func(int)) error {
	in, err := src.SyscallConn()
	if err != nil {
		return err
	}
	out, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	var (
		held    *pipe
		n       int // octets in held
		opErr   error
		noPipe  bool
		fill    func(fd uintptr) bool
		release func(fd uintptr) bool
	)
	fill = func(fd uintptr) bool {
		if held == nil {
			if held, opErr = p.get(); opErr != nil {
				noPipe = true
				return true
			}
		}
		n, opErr = spliceOnce(int(fd), held.w, pipeSize)
		if opErr == unix.EAGAIN {
			p.put(held)
			held = nil
			return false
		}
		return true
	}
	release = func(fd uintptr) bool {
		var m int
		m, opErr = spliceOnce(held.r, int(fd), n)
		if opErr == unix.EAGAIN {
			return false
		}
		if n -= m; m == 0 && opErr == nil {
			opErr = io.ErrNoProgress
		}
		return true
	}
	defer func() {
		if held != nil && n == 0 {
			p.put(held)
		} else if held != nil {
			held.discard()
		}
	}()
	for {
		if err := in.Read(fill); err != nil {
			return err
		}
		if noPipe { // out of descriptors: slower, but it goes on
			return p.copy(dst, src, moved)
		}
		if opErr != nil {
			n = 0
			return opErr
		}
		if n == 0 {
			return nil
		}
		for size := n; n > 0; {
			if err := out.Write(release); err != nil {
				return err
			}
			if opErr != nil {
				return opErr
			}
			if n == 0 {
				moved(size)
			}
		}
	}
}

// spliceOnce moves at most n octets and gives zero at the end of the input.
func spliceOnce(from, to, n int) (int, error) {
	for {
		m, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			return int(max(m, 0)), err
		}
	}
}

// copy does what pump does through memory.
func (p *pipes) copy(dst, src *net.TCPConn, moved func(int)) error {
	buf, ok := p.bufs.Get().(*[]byte)
	if !ok {
		b := make([]byte, copySize)
		buf = &b
	}
	defer p.bufs.Put(buf)
	for {
		n, err := src.Read(*buf)
		if n > 0 {
			if _, werr := dst.Write((*buf)[:n]); werr != nil {
				return werr
			}
			moved(n)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
