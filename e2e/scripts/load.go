package scripts

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// after is for how long a load goes on after what the story did: whatever comes late is in the counts, too.
const after = time.Second

// load is a caller that sends requests at a steady rate while the story goes on.
type load struct {
	cmd    *exec.Cmd
	enough io.Closer // its standard input: it sends no more when that ends
	errOut strings.Builder
	begun  chan struct{} // closed when a request has ended
	ended  chan error    // what the program ended with
	last   string        // the last line that it printed; read it after ended
}

// read takes the lines that the program prints, one a request and the summary.
func (l *load) read(out io.Reader) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for first := true; lines.Scan(); first = false {
		if first {
			close(l.begun)
		}
		l.last = lines.Text()
	}
	l.ended <- l.cmd.Wait()
	close(l.ended)
}

// kill ends it whatever it does.
func (l *load) kill() {
	_ = l.cmd.Process.Kill()
	<-l.ended
}

// load starts a load in a Pod and waits for the first answer. Options of the program caller may follow.
func (s *story) load(ctx context.Context, args []string) (string, error) {
	name := args[0]
	if s.loads[name] != nil {
		return "", usageError(fmt.Sprintf("load %s runs already", name))
	}
	c, err := s.cluster(args[1])
	if err != nil {
		return "", err
	}
	which, container := split(args[2])
	pod, err := c.Pod(ctx, which)
	if err != nil {
		return "", err
	}
	words := []string{"kube", "kubectl", "exec", "-i", "-n", pod.Namespace, pod.Name}
	if container != "" {
		words = append(words, "-c", container)
	}
	words = append(words, "--", filepath.Join(s.cfg.Bin, "caller"), "--json", "--each", "--until-eof", "--duration=10m", "--rate=100", "--url", args[3])
	l := &load{cmd: exec.CommandContext(s.ctx, filepath.Join(s.cfg.Bin, "kube")), begun: make(chan struct{}), ended: make(chan error, 1)}
	l.cmd.Args = append(words, args[4:]...)
	l.cmd.Env = []string{"KUBECONFIG=" + c.Kubeconfig(), "HOME=" + s.ts.MkAbs(".")}
	l.cmd.Stderr, l.cmd.WaitDelay = &l.errOut, 2*time.Second
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if l.enough, err = l.cmd.StdinPipe(); err != nil {
		return "", err
	}
	if err := l.cmd.Start(); err != nil {
		return "", err
	}
	go l.read(out)
	s.loads[name] = l
	select {
	case <-l.begun:
		return "", nil
	case err = <-l.ended:
		err = fmt.Errorf("it ended without one: %v", err)
	case <-time.After(20 * time.Second):
		err = errors.New("no request has ended in 20 s")
	case <-ctx.Done():
		err = ctx.Err()
	}
	delete(s.loads, name)
	l.kill()
	return "", fmt.Errorf("load %s: %w: %s", name, err, strings.TrimSpace(l.errOut.String()))
}

// unload ends a load and checks what came back, as call does.
func (s *story) unload(ctx context.Context, args []string) (string, error) {
	l := s.loads[args[0]]
	if l == nil {
		return "", usageError(fmt.Sprintf("no load %s", args[0]))
	}
	delete(s.loads, args[0])
	select {
	case err := <-l.ended:
		return l.last, fmt.Errorf("load %s ended before it should: %v: %s", args[0], err, strings.TrimSpace(l.errOut.String()))
	case <-time.After(after):
	}
	_ = l.enough.Close() // closed already: it is about to end
	select {
	case err := <-l.ended:
		if err != nil {
			return l.last, fmt.Errorf("load %s: %w: %s", args[0], err, strings.TrimSpace(l.errOut.String()))
		}
	case <-ctx.Done():
		l.kill()
		return l.last, ctx.Err()
	case <-time.After(30 * time.Second):
		l.kill()
		return l.last, fmt.Errorf("load %s does not end", args[0])
	}
	got := &counts{}
	if err := json.Unmarshal([]byte(l.last), got); err != nil {
		return l.last, fmt.Errorf("what caller says: %w", err)
	}
	if got.Requests == 0 {
		return got.String(), errors.New("the load sent no request")
	}
	s.ts.Logf("%s", got)
	return got.String() + "\n", got.check(args[1:])
}
