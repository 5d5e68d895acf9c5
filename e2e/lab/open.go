package lab

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/google/nftables"
)

// This file lets other packages build networks of their own on the runs, namespaces and processes of a Lab: e2e/kubelab
// puts Kubernetes on them. A lab with an empty World has the node "wan" alone.

// WAN is the name of the node whose bridge, LinkWAN, all clusters' legs are plugged into.
const WAN = "wan"

// LinkWAN is the name of the bridge in node WAN and of every leg to it.
const LinkWAN = linkWAN

// NodeOptions describes a namespace to make.
type NodeOptions struct {
	// Nameserver and Search are written to the node's resolv.conf, if given.
	Nameserver netip.Addr
	Search     string
	// Forward makes the node a router.
	Forward bool
	// OwnFiles gives the node an /etc and a /var/lib of its own, as a machine has.
	OwnFiles bool
}

// AddNode makes a namespace with loopback up.
func (l *Lab) AddNode(name string, o NodeOptions) (*Node, error) {
	n, err := l.addNode(name, o.Nameserver, o.Search)
	if err != nil {
		return nil, err
	}
	if o.Forward {
		for _, s := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
			if err := n.sysctl(s, "1"); err != nil {
				return nil, err
			}
		}
	}
	if o.OwnFiles {
		return n, l.ownFiles(n)
	}
	return n, nil
}

// RemoveNode ends what runs in a node and takes its namespace away.
func (l *Lab) RemoveNode(n *Node) error { return l.removeNode(n) }

// Leg is how a node is attached to a bridge of another.
type Leg struct {
	Node      *Node
	Link      string // name of the interface in Node
	Parent    *Node
	Bridge    string // in Parent
	Addresses []netip.Prefix
	Gateways  []netip.Addr // default routes
}

// Attach joins a node to a bridge of another by a pair of virtual interfaces.
func (l *Lab) Attach(g Leg) error {
	if err := l.attach(leg{node: g.Node, link: g.Link, parent: g.Parent, bridge: g.Bridge, addrs: g.Addresses, gateway: g.Gateways}); err != nil {
		return err
	}
	for _, p := range g.Addresses {
		g.Node.Addresses = append(g.Node.Addresses, p.Addr())
	}
	return nil
}

// Bridge makes a bridge with addresses in the node.
func (n *Node) Bridge(name string, addrs ...netip.Prefix) error { return n.bridge(name, addrs...) }

// FD is the descriptor of the node's network namespace; it belongs to the lab.
func (n *Node) FD() int { return n.fd }

// Sysctl sets a value in the node's network namespace.
func (n *Node) Sysctl(name, value string) error { return n.sysctl(name, value) }

// NFTables opens a connection to the packet filter of the node's namespace.
func (n *Node) NFTables() (*nftables.Conn, error) { return nftables.New(nftables.WithNetNSFd(n.fd)) }

// Cut drops silently all packets on the node's leg to the WAN, in both directions. Cutting twice is cutting once.
func (n *Node) Cut() error { return n.cut() }

// Heal undoes Cut; it is no error when nothing is cut.
func (n *Node) Heal() error { return n.restore() }

// Spec is a program to start.
type Spec struct {
	Node *Node // nil: the lab's own namespaces
	Name string
	// Argv[0] is looked up in BinDir and PATH, unless it is a path.
	Argv []string
	Env  []string // NAME=VALUE
	// Dir is the working directory; default the lab's own.
	Dir string
	// Mounts are bound over existing files and folders, source and target, after those of the node.
	Mounts [][2]string
	// Log is the file that gets the output; default NODE-NAME.log in the folder of logs.
	Log string
}

// Launch starts a program and returns when it runs. A program that ends is not started again. Whatever it starts ends
// with the lab, too.
func (l *Lab) Launch(s Spec) (*Proc, error) { return l.launch(s) }

// Program finds a program as Launch does: a path as it is, else in BinDir, else in PATH.
func (l *Lab) Program(name string) (string, error) { return l.program(name) }

// Mark is the variable that every process of the run has in its environment, NAME=VALUE: what has it ends with the lab,
// whoever started it.
func (l *Lab) Mark() string { return envRun + "=" + l.Run }

// Stay marks the run as one that stays until "lab down", while this process serves it.
func (l *Lab) Stay() error { return l.journal.add(entry{Keep: true}) }

// Memory is the resident memory of the run's processes in bytes, what they share counted for each.
func (l *Lab) Memory() int64 {
	var pages int64
	for _, pid := range processes(nil, l.Run) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if f := strings.Fields(string(text)); err == nil && len(f) > 1 { // else it ended meanwhile
			n, _ := strconv.ParseInt(f[1], 10, 64)
			pages += n
		}
	}
	return pages * int64(os.Getpagesize())
}
