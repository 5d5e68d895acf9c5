// Package plugin is the CNI plugin: chained after the one that connects a Pod, it makes the capture rules in the Pod's
// network namespace, so that no container of the Pod needs CAP_NET_ADMIN. It speaks the CNI specification 1.1 and
// asks the API server for the Pod's annotations.
package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/ns"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-cni/internal/chain"
	"github.com/isthmus-mesh/isthmus/internal/capture"
)

// How long the API server is asked for a Pod: it may be a moment behind, or away.
const (
	lookupFor   = 20 * time.Second
	lookupEvery = 250 * time.Millisecond
	requestFor  = 5 * time.Second
)

// Config is the plugin's entry in the list, with what the runtime adds.
type Config struct {
	types.NetConf
	LogLevel   string           `json:"log_level,omitempty"`
	Kubernetes chain.Kubernetes `json:"kubernetes"`
}

// podArgs are CNI_ARGS as Kubernetes' runtimes give them.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAME      types.UnmarshallableString //nolint:revive // the names are those of the arguments
	K8S_POD_NAMESPACE types.UnmarshallableString //nolint:revive
}

// Plugin does the commands of the specification.
type Plugin struct {
	log io.Writer
	// look returns the Pod; tests replace it.
	look func(ctx context.Context, c *Config, namespace, name string) (*corev1.Pod, error)
}

// New returns a Plugin that writes its log lines to w.
func New(w io.Writer) *Plugin { return &Plugin{log: w, look: lookup} }

// Funcs are the plugin's answers to the commands.
func (p *Plugin) Funcs() skel.CNIFuncs {
	return skel.CNIFuncs{Add: p.Add, Check: p.Check, Del: p.Del, GC: none, Status: p.Status}
}

// Versions of the specification that are spoken: those with lists of plugins and a prevResult.
var Versions = version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

func none(*skel.CmdArgs) error { return nil }

func (p *Plugin) parse(args *skel.CmdArgs) (*Config, *slog.Logger, error) {
	c := &Config{}
	if len(args.StdinData) > chain.MaxSize {
		return nil, nil, fmt.Errorf("network configuration of %d bytes; at most %d are read", len(args.StdinData), chain.MaxSize)
	}
	if err := json.Unmarshal(args.StdinData, c); err != nil {
		return nil, nil, fmt.Errorf("network configuration: %w", err)
	}
	if err := version.ParsePrevResult(&c.NetConf); err != nil {
		return nil, nil, fmt.Errorf("prevResult: %w", err)
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		level = slog.LevelInfo
	}
	return c, slog.New(slog.NewJSONHandler(p.log, &slog.HandlerOptions{Level: level})).With("container", args.ContainerID), nil
}

// plan looks the Pod up and decides; c is nil when nothing is to be done.
func (p *Plugin) plan(conf *Config, args *skel.CmdArgs, log *slog.Logger) (*capture.Config, error) {
	var pa podArgs
	if err := types.LoadArgs(args.Args, &pa); err != nil {
		return nil, fmt.Errorf("CNI_ARGS: %w", err)
	}
	name, namespace := string(pa.K8S_POD_NAME), string(pa.K8S_POD_NAMESPACE)
	if name == "" || namespace == "" {
		log.Debug("not a Pod of Kubernetes")
		return nil, nil
	}
	log = log.With("namespace", namespace, "pod", name)
	for _, ns := range conf.Kubernetes.ExcludeNamespaces { // no need to ask, and none to wait for the API server
		if ns == namespace {
			log.Debug("nothing is captured", "reason", "its namespace is excluded")
			return nil, nil
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupFor)
	defer cancel()
	pod, err := p.look(ctx, conf, namespace, name)
	if err != nil {
		return nil, fmt.Errorf("pod %s/%s: %w", namespace, name, err)
	}
	c, skip, err := Decide(pod, conf.Kubernetes.ExcludeNamespaces)
	if err != nil {
		return nil, fmt.Errorf("pod %s/%s: %w", namespace, name, err)
	}
	if skip != "" {
		log.Info("nothing is captured", "reason", skip)
		return nil, nil
	}
	return &c, nil
}

// Add makes the rules and passes on what the plugin before said.
func (p *Plugin) Add(args *skel.CmdArgs) error {
	conf, log, err := p.parse(args)
	if err != nil {
		return err
	}
	if conf.PrevResult == nil {
		return errors.New("no prevResult: isthmus-cni works behind the plugin that connects Pods, never first or alone")
	}
	c, err := p.plan(conf, args, log)
	if err != nil {
		return err
	}
	if c != nil {
		if err := ns.WithNetNSPath(args.Netns, func(ns.NetNS) error { return capture.Apply(*c) }); err != nil {
			return err
		}
		log.Info("capture rules are in place", "mode", string(c.Mode))
	}
	result, err := current.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return fmt.Errorf("prevResult: %w", err)
	}
	return types.PrintResult(result, conf.CNIVersion)
}

// Check fails when the rules that the Pod should have are not in place.
func (p *Plugin) Check(args *skel.CmdArgs) error {
	conf, log, err := p.parse(args)
	if err != nil {
		return err
	}
	if conf.PrevResult == nil {
		return errors.New("no prevResult: CHECK needs what ADD returned")
	}
	c, err := p.plan(conf, args, log)
	if err != nil || c == nil {
		return err
	}
	return ns.WithNetNSPath(args.Netns, func(ns.NetNS) error {
		have, err := capture.Installed()
		if err != nil {
			return err
		}
		if got, want := capture.Text(have), capture.Text(capture.Plan(*c)); got != want {
			return fmt.Errorf("the capture rules in %s are not those of the Pod: delete the Pod to have them made anew", args.Netns)
		}
		return nil
	})
}

// Del does nothing: the rules go with the namespace.
func (p *Plugin) Del(*skel.CmdArgs) error { return nil }

// Status fails when Pods could not be looked up.
func (p *Plugin) Status(args *skel.CmdArgs) error {
	conf, _, err := p.parse(args)
	if err != nil {
		return err
	}
	if _, err := client(conf); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "isthmus-cni cannot ask for Pods", err.Error())
	}
	return nil
}

func client(c *Config) (*kubernetes.Clientset, error) {
	rest, err := clientcmd.BuildConfigFromFlags("", c.Kubernetes.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w; the DaemonSet isthmus-cni writes it: is its Pod on this node running?", c.Kubernetes.Kubeconfig, err)
	}
	rest.Timeout = requestFor
	return kubernetes.NewForConfig(rest)
}

// lookup asks until the API server answers for sure or ctx ends.
func lookup(ctx context.Context, c *Config, namespace, name string) (*corev1.Pod, error) {
	cs, err := client(c)
	if err != nil {
		return nil, err
	}
	for {
		pod, err := cs.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		switch {
		case err == nil:
			return pod, nil
		case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
			return nil, fmt.Errorf("%w; the service account of DaemonSet isthmus-cni must be allowed to get pods", err)
		}
		select {
		case <-time.After(lookupEvery):
		case <-ctx.Done():
			return nil, fmt.Errorf("the API server did not show it in %s: %w", lookupFor, err)
		}
	}
}
