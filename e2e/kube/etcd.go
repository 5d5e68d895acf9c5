package main

import (
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcd runs one member until SIGINT or SIGTERM.
func etcd(args []string) int {
	f := flag.NewFlagSet("kube etcd", flag.ContinueOnError)
	dir := f.String("data-dir", "", "folder of the data, made when it is missing; needed")
	listen := f.String("listen-client-url", "http://127.0.0.1:2379", "where clients connect; port 0 takes a free one, unix://FILE a socket")
	peer := f.String("listen-peer-url", "http://127.0.0.1:0", "where other members would connect")
	level := f.String("log-level", "warn", "debug, info, warn or error")
	quota := f.Int64("quota-backend-bytes", 256<<20, "size of the data at which writes are refused")
	if err := f.Parse(args); err != nil {
		return 2
	}
	if *dir == "" || f.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "kube etcd: give --data-dir and nothing but flags")
		return 2
	}
	if err := serve(*dir, *listen, *peer, *level, *quota); err != nil {
		fmt.Fprintln(os.Stderr, "kube etcd:", err)
		return 1
	}
	return 0
}

func serve(dir, listen, peer, level string, quota int64) error {
	client, err := url.Parse(listen)
	if err != nil {
		return err
	}
	peers, err := url.Parse(peer)
	if err != nil {
		return err
	}
	c := embed.NewConfig()
	c.Name, c.Dir, c.LogLevel = "lab", dir, level
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{*peers}, []url.URL{*peers}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	// A lab's data lives as long as its machine: nothing waits for the disk, and little history is kept in memory.
	c.UnsafeNoFsync = true
	c.SnapshotCount, c.SnapshotCatchUpEntries = 2000, 500
	c.QuotaBackendBytes = quota
	c.TickMs, c.ElectionMs = 100, 1000
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	e, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	select {
	case <-e.Server.ReadyNotify():
	case <-signals:
		e.Server.Stop() // the start is given up
		return nil
	case <-time.After(time.Minute):
		e.Close()
		return fmt.Errorf("not ready within a minute: is %s of another cluster?", dir)
	}
	for _, l := range e.Clients {
		fmt.Println("etcd: ready at", l.Addr())
	}
	select {
	case <-signals:
		e.Close()
		return nil
	case err := <-e.Err():
		e.Close()
		return err
	}
}
