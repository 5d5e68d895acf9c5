// Package peer is the commands about one other cluster.
package peer

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Config is what the commands need of their program.
type Config struct {
	// Call asks isthmusd.
	Call func(ctx context.Context, method, path string, in, out any) error
	// Print shows v as JSON where that is asked for, else the lines.
	Print func(cmd *cobra.Command, v any, lines []string) error
	// JSON writes v.
	JSON func(w io.Writer, v any) error
	// Complete offers the names of clusters.
	Complete func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective)
}

// Command returns isthmus peer.
func Command(c Config) *cobra.Command {
	cmd := &cobra.Command{Use: "peer", Short: "Approve, evict, drain and show other clusters"}
	approve := c.act("approve", "approved", "is a member")
	approve.Short = "Make a pending cluster a member"
	evict := c.act("evict", "evicted", "is evicted")
	evict.Short = "Put a cluster out of the mesh, as far as this cluster goes"
	evict.Long = `Put a cluster out of the mesh: from now on this cluster refuses its certificates, names and endpoints, and the tokens with which it joined
here; so do all that know it from here. Where another member let it in, too, run it there as well. Open connections are closed. A new token from here lets it in again: "isthmus token create --for NAME" here, "isthmus join" there.`
	cmd.AddCommand(approve, evict, c.show(), c.drain())
	return cmd
}

func (c Config) show() *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show all that is known of one cluster", Args: cobra.ExactArgs(1), ValidArgsFunction: c.Complete,
		RunE: func(cmd *cobra.Command, args []string) error {
			var peers []admin.Peer
			if err := c.Call(cmd.Context(), http.MethodGet, "/v1/peers", nil, &peers); err != nil {
				return err
			}
			for _, p := range peers {
				if p.Name == args[0] {
					return c.JSON(cmd.OutOrStdout(), p)
				}
			}
			return diag.Hint(fmt.Errorf("no cluster %q is known here", args[0]), "isthmus peers lists those that are")
		},
	}
}

// act asks for something to be done with a peer, whose state is then the one given.
func (c Config) act(verb, state, text string) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME", Args: cobra.ExactArgs(1), ValidArgsFunction: c.Complete,
		RunE: func(cmd *cobra.Command, args []string) error {
			var done admin.EvictReply
			if err := c.Call(cmd.Context(), http.MethodPost, "/v1/peers/"+url.PathEscape(args[0])+"/"+verb, nil, &done); err != nil {
				return err
			}
			done.Cluster, done.State = args[0], state
			lines := []string{fmt.Sprintf("cluster %s %s", args[0], text)}
			for _, by := range done.Elsewhere {
				lines = append(lines, fmt.Sprintf("cluster %s let it in, too: run isthmus peer evict %s there", by, args[0]))
			}
			for _, name := range done.Also {
				lines = append(lines, fmt.Sprintf("cluster %s is out, too: only %s had let it in", name, args[0]))
			}
			return c.Print(cmd, done, lines)
		},
	}
}
