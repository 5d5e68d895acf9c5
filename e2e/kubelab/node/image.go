package node

import (
	"fmt"
	"path"
	"strings"
)

// program finds what an image holds.
func (n *Node) program(image string) (Program, error) {
	name := imageName(image)
	last := path.Base(name)
	for _, key := range []string{name, last} {
		if p, ok := n.cfg.Images[key]; ok {
			return p, nil
		}
	}
	best := ""
	for key := range n.cfg.Images {
		if len(key) > len(best) && (strings.HasPrefix(name, key) || strings.HasPrefix(last, key)) {
			best = key
		}
	}
	if best == "" {
		return Program{}, fmt.Errorf("failed to pull image %q: the lab maps it to no program", image)
	}
	return n.cfg.Images[best], nil
}

// imageName drops tag and digest.
func imageName(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		image = image[:i]
	}
	return image
}
