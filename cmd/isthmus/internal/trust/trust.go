// Package trust is the commands about the roots of a cluster.
package trust

import (
	"context"
	"fmt"
	"net/http"
	"time"

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
}

// Command returns isthmus trust.
func Command(c Config) *cobra.Command {
	cmd := &cobra.Command{Use: "trust", Short: "Show and rotate the root certificates of this cluster"}
	cmd.AddCommand(showCommand(c), rotateCommand(c))
	return cmd
}

func showCommand(c Config) *cobra.Command {
	return &cobra.Command{
		Use: "show", Short: "Show which roots are trusted, and who is waited for", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var t admin.Trust
			if err := c.Call(cmd.Context(), http.MethodGet, "/v1/trust", nil, &t); err != nil {
				return err
			}
			return c.Print(cmd, t, lines(t))
		},
	}
}

func rotateCommand(c Config) *cobra.Command {
	var req admin.RotateRequest
	var wait bool
	cmd := &cobra.Command{
		Use: "rotate", Short: "Give this cluster another root, while everything runs", Args: cobra.NoArgs,
		Long: `Make a new root, tell it to every proxy and to every cluster that is heard, and have it sign when all of them have it. What the old root
signed is trusted until no certificate under it can be in use. Ctrl-C ends the waiting of this command, not the rotation: the same
command shows it again. --now has the new root sign at once, for when the old one's key is known to others.`,
		Example: "  isthmus trust rotate\n  isthmus trust rotate --now --overlap 30s\n  isthmus trust rotate --cancel",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var t admin.Trust
			if err := c.Call(cmd.Context(), http.MethodPost, "/v1/trust", req, &t); err != nil {
				return err
			}
			last := ""
			for wait && t.Phase == "telling" {
				if len(t.Lagging) > 0 {
					if now := fmt.Sprintf("waiting for %d, first %s %s: %s", len(t.Lagging), t.Lagging[0].Kind, t.Lagging[0].Name, t.Lagging[0].Why); now != last {
						fmt.Fprintln(cmd.ErrOrStderr(), now)
						last = now
					}
				}
				select {
				case <-cmd.Context().Done():
					return diag.Hint(fmt.Errorf("the new root does not sign yet; the rotation goes on"), "isthmus trust show; to give it up: isthmus trust rotate --cancel")
				case <-time.After(300 * time.Millisecond):
				}
				if err := c.Call(cmd.Context(), http.MethodGet, "/v1/trust", nil, &t); err != nil {
					return err
				}
			}
			return c.Print(cmd, t, lines(t))
		},
	}
	f := cmd.Flags()
	f.BoolVar(&req.Now, "now", false, "the new root signs at once; the old one is trusted for a minute, or as --overlap says")
	f.StringVar(&req.Overlap, "overlap", "", "how long the old root is trusted after the new one signs; as configured unless given")
	f.BoolVar(&req.Cancel, "cancel", false, "give up a rotation whose root does not sign yet")
	f.BoolVar(&wait, "wait", true, "wait until the new root signs")
	return cmd
}

// lines is where the roots stand, for people.
func lines(t admin.Trust) []string {
	out := []string{fmt.Sprintf("trust domain %s: %s", t.TrustDomain, t.Phase)}
	if t.Given != "" {
		out = append(out, "the CA is given "+t.Given)
	}
	for _, r := range t.Roots {
		line := fmt.Sprintf("  %-5s %s  %s, valid until %s", r.State, r.Fingerprint[:16], r.Subject, r.NotAfter.Format("2006-01-02"))
		if !r.Until.IsZero() {
			line += ", trusted until " + r.Until.Local().Format("2006-01-02 15:04:05")
		}
		out = append(out, line)
	}
	for _, l := range t.Lagging {
		out = append(out, fmt.Sprintf("  waiting for %s %s: %s", l.Kind, l.Name, l.Why))
	}
	for _, d := range t.Domains {
		out = append(out, fmt.Sprintf("trust domain %s of cluster %s: %d roots", d.Name, d.Cluster, len(d.Roots)))
	}
	return out
}
