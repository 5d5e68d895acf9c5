package docs_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	inPackage = regexp.MustCompile("`([a-z][a-z0-9/]+)` ((?:(?:Test|Fuzz)[A-Za-z0-9]+(?:, )?)+)")
	testName  = regexp.MustCompile(`\b(?:Test|Fuzz)[A-Z][A-Za-z0-9]*`)
)

// TestPromises looks for every test that the threat model names, in the package it names.
func TestPromises(t *testing.T) {
	page := read(t, "security.md")
	found := 0
	for _, line := range strings.Split(page, "\n") {
		named := testName.FindAllString(line, -1)
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| promise |") {
			if len(named) > 0 {
				t.Errorf("a test is named outside of a table: %s", line)
			}
			continue
		}
		placed := 0
		for _, m := range inPackage.FindAllStringSubmatch(line, -1) {
			source := tests(t, m[1])
			for _, name := range testName.FindAllString(m[2], -1) {
				placed++
				if !strings.Contains(source, "\nfunc "+name+"(") {
					t.Errorf("%s has no test %s", m[1], name)
				}
			}
		}
		if placed != len(named) {
			t.Errorf("%d of the %d tests are named without their package: %s", len(named)-placed, len(named), line)
		}
		found += placed
	}
	// Each row of a table of promises names a test.
	table := false
	for _, line := range strings.Split(page, "\n") {
		switch {
		case strings.HasPrefix(line, "| promise | test |"):
			table = true
		case !strings.HasPrefix(line, "|"):
			table = false
		case table && !strings.HasPrefix(line, "|---") && !testName.MatchString(line):
			t.Errorf("a promise without a test: %s", line)
		}
	}
	if found < 30 {
		t.Errorf("%d tests are named: too few to be true", found)
	}
}

// tests returns the test files of a package.
func tests(t *testing.T, pkg string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", filepath.FromSlash(pkg), "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("package %s has no tests: %v", pkg, err)
	}
	var all strings.Builder
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(data)
	}
	return all.String()
}
