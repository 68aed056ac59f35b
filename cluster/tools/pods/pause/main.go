// Pause holds a pod's network namespace open: it waits to be told to end. The kubelet needs such an image before it
// can start any pod, and the local cluster has no registry to pull the usual one from.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	<-end
}
