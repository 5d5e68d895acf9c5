// Command testlog reads what "go test -json" prints and shows how tests get on: a line for each package and for each
// test that takes long, everything that a failed test printed, and at the end what took the longest. It fails when a
// test has, or when it was given nothing to read.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	long  = 20 // seconds from which a test has a line of its own
	shown = 15 // tests in the table
)

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "testlog:", err)
		os.Exit(1)
	}
}

// event is one line of go test -json; see "go doc test2json" and "go help buildjson".
type event struct {
	Time                                      time.Time
	Action, Package, ImportPath, Test, Output string
	Elapsed                                   float64 // seconds
}

// name is the test, or the package that is built or tested.
func (e event) name() string {
	return strings.TrimSpace(cmp.Or(e.Package, e.ImportPath) + " " + e.Test)
}

// timed is how long a test took.
type timed struct {
	name    string
	seconds float64
}

// log is what has been read so far.
type log struct {
	w           io.Writer
	said        map[string][]string // what tests and packages printed that have not ended
	times       []timed
	first, last time.Time
	failed      int
	packages    int
}

func run(r io.Reader, w io.Writer) error {
	l := &log{w: w, said: map[string][]string{}}
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadString('\n')
		if line != "" {
			l.add(line)
		}
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
	}
	l.table()
	switch {
	case l.failed > 0:
		return fmt.Errorf("%d tests and packages failed", l.failed)
	case l.packages == 0:
		return fmt.Errorf("no package was tested")
	}
	return nil
}

func (l *log) add(line string) {
	var e event
	if json.Unmarshal([]byte(line), &e) != nil || e.Action == "" {
		fmt.Fprint(l.w, line) // of the go command itself
		return
	}
	if l.first.IsZero() {
		l.first = e.Time
	}
	if !e.Time.IsZero() {
		l.last = e.Time
	}
	switch e.Action {
	case "output", "build-output":
		l.said[e.name()] = append(l.said[e.name()], e.Output)
	case "build-fail":
		l.failed++
		l.dump(e)
	case "fail":
		l.failed++
		l.dump(e)
		l.ended(e, "FAIL")
	case "pass", "skip":
		delete(l.said, e.name())
		l.ended(e, map[string]string{"pass": "ok", "skip": "skip"}[e.Action])
	}
}

// dump shows what a failed test printed.
func (l *log) dump(e event) {
	for _, text := range l.said[e.name()] {
		fmt.Fprint(l.w, text)
	}
	delete(l.said, e.name())
}

// ended counts a test or a package that has ended, and shows it when it is to be seen.
func (l *log) ended(e event, how string) {
	if e.Test == "" {
		if how != "skip" { // without tests
			l.packages++
			fmt.Fprintf(l.w, "%-4s %6.1f s  %s\n", how, e.Elapsed, e.Package)
		}
		return
	}
	l.times = append(l.times, timed{e.name(), e.Elapsed})
	if how == "FAIL" || e.Elapsed >= long {
		fmt.Fprintf(l.w, "%-4s %6.1f s  %s\n", how, e.Elapsed, e.name())
	}
}

// table shows what took the longest; subtests count, too.
func (l *log) table() {
	slices.SortStableFunc(l.times, func(a, b timed) int { return cmp.Compare(b.seconds, a.seconds) })
	fmt.Fprintf(l.w, "\n%d packages and %d tests in %.0f s; the longest:\n", l.packages, len(l.times), l.last.Sub(l.first).Seconds())
	for _, t := range l.times[:min(shown, len(l.times))] {
		fmt.Fprintf(l.w, "     %6.1f s  %s\n", t.seconds, t.name)
	}
}
