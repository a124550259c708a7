// Generate writes the dashboards, one file each.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"dayfly.dev/deploy/grafana"
)

func main() {
	for _, d := range grafana.All() {
		b, err := d.JSON()
		if err == nil {
			err = os.WriteFile(filepath.Join("dashboards", d.UID+".json"), b, 0o644)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}
