package peer

import (
	"fmt"
	"net/http"
	"net/url"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

func (c Config) drain() *cobra.Command {
	var req admin.DrainRequest
	cmd := &cobra.Command{
		Use: "drain NAME", Short: "Take this cluster's traffic to another one away, bit by bit", Args: cobra.ExactArgs(1), ValidArgsFunction: c.Complete,
		Long: `Take the traffic of this cluster to another one away in twenty equal steps, for example before that one is serviced. In the end its endpoints
are left out where another cluster, or this one, serves the same host; where nobody else does they are used still. It stays a member, and
a restart of isthmusd changes nothing. --undo gives all back at once. Each cluster drains for itself: others go on as before.`,
		Example: "  isthmus peer drain birch --over 10m\n  isthmus peer drain birch --undo",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := c.Call(cmd.Context(), http.MethodPost, "/v1/peers/"+url.PathEscape(args[0])+"/drain", req, nil); err != nil {
				return err
			}
			done, line := "draining", fmt.Sprintf("cluster %s is drained over %s", args[0], req.Over)
			if req.Undo {
				done, line = "undrained", fmt.Sprintf("cluster %s has its share again", args[0])
			}
			return c.Print(cmd, struct {
				Cluster string `json:"cluster"`
				State   string `json:"state"`
			}{args[0], done}, []string{line})
		},
	}
	cmd.Flags().StringVar(&req.Over, "over", "10m", "how long it takes until nothing goes there")
	cmd.Flags().BoolVar(&req.Undo, "undo", false, "give all back at once")
	return cmd
}
