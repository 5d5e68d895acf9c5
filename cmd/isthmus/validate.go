package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/validate"
)

// errInvalid says what was printed already: the objects are not valid.
var errInvalid = errors.New("not valid")

func validateCommand(o *options) *cobra.Command {
	var paths []string
	var strict bool
	cmd := &cobra.Command{
		Use: "validate -f FILE", Short: "Check objects in files, without a cluster", Args: cobra.ArbitraryArgs,
		Long: `Check Kubernetes and Istio objects in files, without a cluster and with the code that isthmusd uses.

An error is about an object that is wrong by itself, or there twice: isthmusd would leave it out. A warning is about what
has no effect (it is not supported yet), or what may be right once other objects are there: an unknown host, subset or
gateway, two objects for one host, a rule that an earlier one hides.

The exit code is 0 when there are no errors, else 1. With --strict warnings count, too.`,
		Example: `  isthmus validate -f reviews.yaml
  isthmus validate -f config/ -o json
  helm template . | isthmus validate -f -`,
		RunE: func(cmd *cobra.Command, args []string) error {
			files, err := validate.Read(append(paths, args...), cmd.InOrStdin())
			if err != nil {
				return err
			}
			r := validate.Check(files)
			if o.output == "json" {
				if err := printJSON(cmd.OutOrStdout(), r); err != nil {
					return err
				}
			} else {
				for _, f := range r.Findings {
					fmt.Fprintln(cmd.OutOrStdout(), f)
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s, %s\n", count(r.Files, "file"), count(r.Errors, "error"), count(r.Warnings, "warning"))
			}
			if r.Errors > 0 || strict && r.Warnings > 0 {
				return errInvalid
			}
			return nil
		},
	}
	cmd.Flags().StringSliceVarP(&paths, "filename", "f", nil, "file, folder, or - for standard input; repeatable")
	cmd.Flags().BoolVar(&strict, "strict", false, "exit 1 for warnings, too")
	_ = cmd.MarkFlagFilename("filename", "yaml", "yml", "json")
	return cmd
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
