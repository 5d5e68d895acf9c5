package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus/internal/install"
)

func dnsCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "dns", Short: "Lead the mesh's names in a cluster's own DNS to Isthmus"}
	cmd.AddCommand(dnsStubCommand(o))
	return cmd
}

func dnsStubCommand(o *options) *cobra.Command {
	var t target
	var show, add, remove, yes bool
	cmd := &cobra.Command{
		Use: "stub (--show | --add | --remove)", Short: "Show, add or remove the stub zones in the cluster's DNS", Args: cobra.NoArgs,
		Long: `The cluster's DNS (the ConfigMap kube-system/coredns, or kube-dns where that is what runs) sends questions below global and
clusterset.local to the Service isthmus-dns. "isthmus install" adds these zones and "isthmus uninstall" removes them; this
command does it alone. What others have written stays byte for byte.`,
		Example: "  isthmus dns stub --show --context amber\n  isthmus dns stub --remove --context amber",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			c, err := install.Connect(ctx, t.Target)
			if err != nil {
				return refused(err)
			}
			zones, err := c.Zones(ctx, t.namespace)
			if err != nil {
				return refused(err)
			}
			change := c.StubAdd
			if remove {
				change = func(ctx context.Context, _ string, zones []string) (*install.Stub, error) {
					return c.StubRemove(ctx, zones)
				}
			}
			s, err := change(ctx, t.namespace, zones)
			if err != nil {
				return refused(err)
			}
			if show {
				if !s.Changes() {
					fmt.Fprintf(cmd.OutOrStdout(), "nothing to change in ConfigMap kube-system/%s\n", s.ConfigMap)
					return nil
				}
				fmt.Fprint(cmd.OutOrStdout(), s.Diff())
				return nil
			}
			_, err = writeStub(ctx, cmd, c, s, yes, sayer(cmd, o))
			return err
		},
	}
	t.flags(cmd)
	cmd.Flags().BoolVar(&show, "show", false, "show what --add would change")
	cmd.Flags().BoolVar(&add, "add", false, "add the zones, or correct their address")
	cmd.Flags().BoolVar(&remove, "remove", false, "remove the zones")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	cmd.MarkFlagsMutuallyExclusive("show", "add", "remove")
	cmd.MarkFlagsOneRequired("show", "add", "remove")
	return cmd
}

// writeStub shows the change, asks, and writes it. It reports whether it did.
func writeStub(ctx context.Context, cmd *cobra.Command, c *install.Cluster, s *install.Stub, yes bool, say func(string)) (bool, error) {
	if !s.Changes() {
		say(fmt.Sprintf("dns: ConfigMap kube-system/%s is as it should be", s.ConfigMap))
		return false, nil
	}
	say("dns: " + fmt.Sprintf("change of ConfigMap kube-system/%s:\n%s", s.ConfigMap, s.Diff()))
	if !yes {
		ok, err := confirmed(cmd, "Change the cluster's DNS?")
		if err != nil {
			return false, err
		}
		if !ok {
			say("dns: left as it is; isthmus dns stub --add --yes changes it")
			return false, nil
		}
	}
	if err := c.WriteStub(ctx, s); err != nil {
		return false, err
	}
	if !s.Reloads {
		say("dns: the Corefile has no plugin reload: restart the pods of CoreDNS")
	}
	say(fmt.Sprintf("dns: changed ConfigMap kube-system/%s", s.ConfigMap))
	return true, nil
}
