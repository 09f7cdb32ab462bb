// Command dockway is the plugin itself (dockway serve) and the command line that shows what it
// does. It wires the packages together and decides nothing else.
package main

import (
	"fmt"
	"os"
)

// version is set when dockway is built: -ldflags "-X main.version=…".
var version = "dev"

func main() {
	if err := root(os.Getenv).Execute(); err != nil {
		fmt.Fprintf(os.Stderr, "dockway: %v\n", err)
		os.Exit(1)
	}
}
