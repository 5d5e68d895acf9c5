// Package leave is the command that takes a cluster out of the mesh.
package leave

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Config is what the command needs of its program.
type Config struct {
	// Call asks isthmusd: POST path with in, the answer goes into out.
	Call func(ctx context.Context, path string, in, out any) error
	// Print shows v as JSON where that is asked for, else the lines.
	Print func(cmd *cobra.Command, v any, lines []string) error
	// Confirm asks the operator; false also where there is none.
	Confirm func(cmd *cobra.Command, question string) (bool, error)
}

// Command returns isthmus leave.
func Command(c Config) *cobra.Command {
	var req admin.LeaveRequest
	var yes bool
	cmd := &cobra.Command{
		Use:   "leave",
		Short: "Take this cluster out of the mesh",
		Long: `Take this cluster out of the mesh: what it exports ends at all other clusters at once, what it imports ends here, and both sides stop to trust
each other's certificates. Nothing in the cluster is deleted, and its own services go on. The others keep each other, also those that this
cluster let in. Nobody bans it: with a new token it joins again.

It asks before it does so; --yes answers for you. Members have ten seconds to hear it. One that is away hears it from the others.`,
		Example: "  isthmus leave --dry-run\n  isthmus leave --yes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var plan admin.LeaveReply
			if err := c.Call(cmd.Context(), "/v1/leave", admin.LeaveRequest{DryRun: true}, &plan); err != nil {
				return err
			}
			if req.DryRun {
				return c.Print(cmd, plan, []string{leaving(plan)})
			}
			if !yes {
				fmt.Fprintln(cmd.ErrOrStderr(), leaving(plan))
				sure, err := c.Confirm(cmd, "Leave the mesh?")
				if err != nil {
					return err
				}
				if !sure {
					return diag.Hint(fmt.Errorf("cluster %s does not leave: it was not confirmed", plan.Cluster), "isthmus leave --yes")
				}
			}
			var reply admin.LeaveReply
			if err := c.Call(cmd.Context(), "/v1/leave", req, &reply); err != nil {
				return err
			}
			lines := []string{fmt.Sprintf("cluster %s has left the mesh", reply.Cluster)}
			if len(reply.Heard) > 0 {
				lines = append(lines, "heard by "+strings.Join(reply.Heard, ", "))
			}
			if len(reply.Unheard) > 0 {
				lines = append(lines, fmt.Sprintf("not reached: %s; if the others do not tell them, run there: isthmus peer evict %s", strings.Join(reply.Unheard, ", "), reply.Cluster))
			}
			return c.Print(cmd, reply, lines)
		},
	}
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "say what would end, change nothing")
	cmd.Flags().BoolVar(&yes, "yes", false, "leave without asking")
	return cmd
}

// leaving says what a cluster leaves.
func leaving(p admin.LeaveReply) string {
	list := func(names []string) string {
		if len(names) == 0 {
			return "nothing"
		}
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("cluster %s would leave %s\nends there: %s\nends here, or loses its endpoints of others: %s", p.Cluster, list(p.Members), list(p.Exports), list(p.Imports))
}
