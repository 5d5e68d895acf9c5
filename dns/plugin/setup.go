package plugin

import (
	"fmt"
	"strconv"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"

	"github.com/isthmus-mesh/isthmus/dns/zone"
)

const name = "isthmus"

var log = clog.NewWithPlugin(name)

// CoreDNS finds plugins by their registration; there is no other way in.
func init() { plugin.Register(name, setup) }

func setup(c *caddy.Controller) error {
	cfg, err := parse(c)
	if err != nil {
		return plugin.Error(name, err)
	}
	x := New(cfg)
	c.OnStartup(x.start)
	c.OnShutdown(x.stop)
	dnsserver.GetConfig(c).AddPlugin(func(next plugin.Handler) plugin.Handler {
		x.Next = next
		return x
	})
	return nil
}

// Config is what a Corefile says.
type Config struct {
	// Zones are answered here and nowhere else.
	Zones []string
	// Servers are the addresses of isthmusd, host:port, tried in turn.
	Servers []string
	// ServerName is the name that isthmusd's certificate must carry.
	ServerName string
	// Root is the file with the cluster's root certificate.
	Root string
	// Token is the file with the service-account token to authenticate with.
	Token string
	// Cluster is the name of the cluster.
	Cluster string
	// Cache is the file that keeps the last good data; empty: none is kept.
	Cache string
	// TTL of answers in seconds.
	TTL uint32
}

func parse(c *caddy.Controller) (Config, error) {
	cfg := Config{TTL: zone.DefaultTTL}
	for i := 0; c.Next(); i++ {
		if i > 0 {
			return cfg, plugin.ErrOnce
		}
		cfg.Zones = plugin.OriginsFromArgsOrServerBlock(c.RemainingArgs(), c.ServerBlockKeys)
		for c.NextBlock() {
			args := func(n int) ([]string, error) {
				option, got := c.Val(), c.RemainingArgs()
				if len(got) == 0 || n > 0 && len(got) != n {
					return nil, c.Errf("%s: %d arguments, see the plugin's README", option, len(got))
				}
				return got, nil
			}
			one := map[string]*string{"server_name": &cfg.ServerName, "root": &cfg.Root, "token": &cfg.Token, "cluster": &cfg.Cluster, "cache": &cfg.Cache}
			switch option := c.Val(); {
			case option == "server":
				got, err := args(0)
				if err != nil {
					return cfg, err
				}
				cfg.Servers = append(cfg.Servers, got...)
			case one[option] != nil:
				got, err := args(1)
				if err != nil {
					return cfg, err
				}
				*one[option] = got[0]
			case option == "ttl":
				got, err := args(1)
				if err != nil {
					return cfg, err
				}
				ttl, err := strconv.ParseUint(got[0], 10, 32)
				if err != nil || ttl < 1 || ttl > 3600 {
					return cfg, c.Errf("ttl %s: seconds from 1 to 3600 are wanted", got[0])
				}
				cfg.TTL = uint32(ttl)
			default:
				return cfg, c.Errf("unknown property %q", option)
			}
		}
	}
	return cfg, cfg.validate()
}

func (c Config) validate() error {
	for _, x := range []struct{ option, value string }{{"server_name", c.ServerName}, {"root", c.Root}, {"token", c.Token}, {"cluster", c.Cluster}} {
		if x.value == "" {
			return fmt.Errorf("%s is missing", x.option)
		}
	}
	if len(c.Servers) == 0 {
		return fmt.Errorf("server is missing: name at least one address of isthmusd")
	}
	return nil
}
