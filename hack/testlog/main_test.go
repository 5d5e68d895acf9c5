package main

import (
	"strings"
	"testing"
)

const passed = `{"Time":"2026-01-02T03:04:05Z","Action":"start","Package":"a"}
{"Time":"2026-01-02T03:04:05Z","Action":"output","Package":"a","Test":"TestLoud","Output":"not to be seen\n"}
{"Time":"2026-01-02T03:04:06Z","Action":"pass","Package":"a","Test":"TestLoud","Elapsed":1}
{"Time":"2026-01-02T03:04:35Z","Action":"pass","Package":"a","Test":"TestStory/one","Elapsed":30}
{"Time":"2026-01-02T03:04:36Z","Action":"pass","Package":"a","Elapsed":31}
{"Time":"2026-01-02T03:04:36Z","Action":"skip","Package":"without","Elapsed":0}
`

func TestRun(t *testing.T) {
	for _, c := range []struct{ name, in, out, err string }{
		{"passed", passed, `ok     30.0 s  a TestStory/one
ok     31.0 s  a

1 packages and 2 tests in 31 s; the longest:
       30.0 s  a TestStory/one
        1.0 s  a TestLoud
`, ""},
		{"failed", `go: downloading something
{"Action":"output","Package":"a","Test":"TestBad","Output":"bad_test.go:7: why\n"}
{"Action":"fail","Package":"a","Test":"TestBad","Elapsed":0.5}
{"Action":"output","Package":"a","Output":"exit status 1\n"}
{"Action":"fail","Package":"a","Elapsed":0.6}
`, `go: downloading something
bad_test.go:7: why
FAIL    0.5 s  a TestBad
exit status 1
FAIL    0.6 s  a

1 packages and 1 tests in 0 s; the longest:
        0.5 s  a TestBad
`, "2 tests and packages failed"},
		{"not built", `{"ImportPath":"a [a.test]","Action":"build-output","Output":"a.go:1: undefined: x\n"}
{"ImportPath":"a [a.test]","Action":"build-fail"}
`, "a.go:1: undefined: x\n\n0 packages and 0 tests in 0 s; the longest:\n", "1 tests and packages failed"},
		{"nothing", "", "\n0 packages and 0 tests in 0 s; the longest:\n", "no package was tested"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			err := run(strings.NewReader(c.in), &out)
			if out.String() != c.out {
				t.Errorf("got\n%s\nwant\n%s", out.String(), c.out)
			}
			if got := ""; c.err != "" || err != nil {
				if err != nil {
					got = err.Error()
				}
				if got != c.err {
					t.Errorf("error %q, want %q", got, c.err)
				}
			}
		})
	}
}
