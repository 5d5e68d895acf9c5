package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
)

// linear serves the endpoints of n services out of a LinearCache, says where, and changes one for each line it reads.
func linear(n int) error {
	all := map[string]types.Resource{}
	for i := range n {
		all[clusterName(i)] = assignment(i, 0)
	}
	c := cache.NewLinearCache(endpointType, cache.WithInitialResources(all))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(srv, server.NewServer(context.Background(), c, nil))
	go func() {
		in := bufio.NewScanner(os.Stdin)
		for change := 1; in.Scan(); change++ {
			i := change * 7 % n
			if err := c.UpdateResource(clusterName(i), assignment(i, change)); err != nil {
				fmt.Fprintln(os.Stderr, "change:", err)
			}
		}
		srv.Stop()
	}()
	fmt.Println(l.Addr())
	return srv.Serve(l)
}

func assignment(i, change int) *endpointv3.ClusterLoadAssignment {
	group := &endpointv3.LocalityLbEndpoints{}
	for j := range 10 {
		if j == 0 && change > 0 {
			continue
		}
		group.LbEndpoints = append(group.LbEndpoints, &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
			Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
				Address: fmt.Sprintf("10.%d.%d.%d", 16+j, i/250, i%250+1), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 8080}}}},
		}}})
	}
	return &endpointv3.ClusterLoadAssignment{ClusterName: clusterName(i), Endpoints: []*endpointv3.LocalityLbEndpoints{group}}
}
