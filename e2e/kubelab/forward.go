package kubelab

import (
	"context"
	"io"
	"net"
	"sync"
)

// forward carries connections from a listener, in this process's own network, to where dial leads. It ends with ctx.
func forward(ctx context.Context, l net.Listener, dial func(context.Context) (net.Conn, error)) error {
	var wait sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	defer wait.Wait()
	for {
		in, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		wait.Go(func() { carry(ctx, in, dial) })
	}
}

func carry(ctx context.Context, in net.Conn, dial func(context.Context) (net.Conn, error)) {
	defer in.Close()
	out, err := dial(ctx)
	if err != nil {
		return // the client sees a closed connection, as from a server that is down
	}
	defer out.Close()
	stop := context.AfterFunc(ctx, func() { _, _ = in.Close(), out.Close() })
	defer stop()
	done := make(chan struct{}, 2)
	one := func(to, from net.Conn) {
		_, _ = io.Copy(to, from)
		_ = to.(*net.TCPConn).CloseWrite()
		done <- struct{}{}
	}
	go one(out, in)
	one(in, out)
	<-done
	<-done
}
