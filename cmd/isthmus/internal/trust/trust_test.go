package trust

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

// TestRotate: it says who is waited for and ends when the new root signs; an end of the waiting says how to go on.
func TestRotate(t *testing.T) {
	old := admin.TrustRoot{Fingerprint: strings.Repeat("a", 64), State: "signs", NotAfter: time.Unix(1<<31, 0)}
	next := admin.TrustRoot{Fingerprint: strings.Repeat("b", 64), State: "next", NotAfter: time.Unix(1<<31, 0)}
	asked := 0
	var lastOut string
	run := func(ctx context.Context, signs bool, args ...string) error {
		var out bytes.Buffer
		cmd := Command(Config{
			Call: func(_ context.Context, method, path string, in, v any) error {
				asked++
				now := admin.Trust{TrustDomain: "amber.mesh", Phase: "telling", Roots: []admin.TrustRoot{old, next}, Lagging: []admin.TrustLag{{Kind: "peer", Name: "birch", Why: "has not said so"}}}
				if signs && method == "GET" {
					now = admin.Trust{TrustDomain: "amber.mesh", Phase: "overlap", Roots: []admin.TrustRoot{next, old}}
				}
				*v.(*admin.Trust) = now
				return nil
			},
			Print: func(cmd *cobra.Command, _ any, lines []string) error {
				_, err := out.WriteString(strings.Join(lines, "\n"))
				return err
			},
		})
		cmd.SetArgs(args)
		cmd.SetErr(&out)
		cmd.SetOut(&out)
		cmd.SilenceUsage, cmd.SilenceErrors = true, true
		err := cmd.ExecuteContext(ctx)
		lastOut = out.String()
		return err
	}
	if err := run(t.Context(), true, "rotate"); err != nil || asked != 2 || !strings.Contains(lastOut, "waiting for 1, first peer birch: has not said so") || !strings.Contains(lastOut, "amber.mesh: overlap") {
		t.Errorf("%v after %d calls:\n%s", err, asked, lastOut)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := run(ctx, false, "rotate"); err == nil || !strings.Contains(err.Error(), "the rotation goes on") {
		t.Errorf("interrupted: %v", err)
	}
	if err := run(t.Context(), false, "show"); err != nil || !strings.Contains(lastOut, "waiting for peer birch") || !strings.Contains(lastOut, "next  bbbbbbbbbbbbbbbb") {
		t.Errorf("show: %v\n%s", err, lastOut)
	}
}
