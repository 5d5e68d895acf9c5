package config

import "fmt"

// Pod is what an agent in a Pod knows beyond what a file can say.
type Pod struct {
	Domain   string         // of the node id, for example default.svc.cluster.local
	Metadata map[string]any // node metadata beyond the keys that every proxy has
	// TokenAlways asks for each certificate with the token; otherwise the certificate in hand is used while it is good.
	TokenAlways bool

	StatusPort       int              // probes and merged metrics; 0: not served
	AppProbes        map[string]Probe // by the path they are asked for under
	AppScrape        *Scrape          // where the application's metrics are
	ApplicationPorts []uint16         // must be listened on before the Pod is ready
}

// Probe is one probe of the application, as ISTIO_KUBE_APP_PROBERS has it.
type Probe struct {
	HTTPGet *struct {
		Path        string `json:"path"`
		Port        uint16 `json:"port"`
		Scheme      string `json:"scheme"` // HTTP (default) or HTTPS
		HTTPHeaders []struct {
			Name  string `json:"name"`
			Value string `json:"value"`
		} `json:"httpHeaders"`
	} `json:"httpGet"`
	TCPSocket *struct {
		Port uint16 `json:"port"`
	} `json:"tcpSocket"`
	GRPC *struct {
		Port    uint16 `json:"port"`
		Service string `json:"service"`
	} `json:"grpc"`
	TimeoutSeconds int `json:"timeoutSeconds"` // 0: 1
}

// Scrape is ISTIO_PROMETHEUS_ANNOTATIONS.
type Scrape struct {
	Scrape string `json:"scrape"`
	Path   string `json:"path"`
	Port   string `json:"port"`
}

// Complete fills in defaults and checks a Config that comes from no file. Its error names the field.
func (c *Config) Complete() error {
	c.setDefaults()
	if path, err := c.check(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
