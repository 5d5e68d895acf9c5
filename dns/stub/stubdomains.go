package stub

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// AddDomains returns kube-dns's stubDomains with the zones led to the address of Isthmus's DNS. The text is the value of
// the key in kube-dns's ConfigMap: a JSON object of zones and lists of servers, or empty. It is an error when a zone
// is led elsewhere.
func AddDomains(text string, zones []string, to netip.Addr) (string, error) {
	domains, err := domains(text)
	if err != nil {
		return "", err
	}
	for _, z := range zones {
		if there, ok := domains[z]; ok && !slices.Equal(there, []string{to.String()}) {
			return "", diag.Hint(fmt.Errorf("stubDomains: %s is led to %v already", z, there), "remove that entry, or leave the zone to it: install --skip-dns")
		}
		domains[z] = []string{to.String()}
	}
	data, err := json.Marshal(domains)
	return string(data), err
}

// RemoveDomains returns stubDomains without the zones; "" when nothing is left.
func RemoveDomains(text string, zones []string) (string, error) {
	domains, err := domains(text)
	if err != nil {
		return "", err
	}
	for _, z := range zones {
		delete(domains, z)
	}
	if len(domains) == 0 {
		return "", nil
	}
	data, err := json.Marshal(domains)
	return string(data), err
}

func domains(text string) (map[string][]string, error) {
	out := map[string][]string{}
	if text == "" {
		return out, nil
	}
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		return nil, diag.Hint(fmt.Errorf("stubDomains is not a JSON object of lists: %w", err), "correct the ConfigMap kube-system/kube-dns")
	}
	if out == nil {
		out = map[string][]string{}
	}
	return out, nil
}
