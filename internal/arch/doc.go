// Package arch holds the repository to its own rules, as tests: who may import what, how large files and packages grow,
// what code may not do, how metrics are named. The rules and their exceptions are data in rules_test.go; nothing of
// this is linked into a program.
package arch
