// Package inspect is the command that shows what a join token says.
package inspect

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/federation/token"
)

// Command returns isthmus token inspect; show writes a value as JSON.
func Command(show func(io.Writer, any) error) *cobra.Command {
	return &cobra.Command{
		Use: "inspect TOKEN", Short: "Show what a token says, without its secret; needs no isthmusd", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := token.Parse(args[0])
			if err != nil {
				return fmt.Errorf("read the token: %w", err)
			}
			return show(cmd.OutOrStdout(), p)
		},
	}
}
