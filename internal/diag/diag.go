// Package diag carries what an operator can do about an error beside the error itself.
package diag

import (
	"errors"
	"fmt"
	"io"
)

type hinted struct {
	error
	hint string
}

// Unwrap gives the error without its hint.
func (h hinted) Unwrap() error { return h.error }

// Hint attaches a remedy to err; nil stays nil.
func Hint(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return hinted{err, fmt.Sprintf(format, args...)}
}

// HintOf returns the remedy that was attached last, or "".
func HintOf(err error) string {
	var h hinted
	if errors.As(err, &h) {
		return h.hint
	}
	return ""
}

// Print writes "PROGRAM: error" and, when there is one, "  hint: remedy" on a line of its own.
func Print(w io.Writer, program string, err error) {
	fmt.Fprintf(w, "%s: %v\n", program, err)
	if h := HintOf(err); h != "" {
		fmt.Fprintf(w, "  hint: %s\n", h)
	}
}
