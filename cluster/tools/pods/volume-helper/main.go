// Volume-helper makes and removes the folders of local-path volumes.
//
// local-path-provisioner runs `/bin/sh /script/setup` or `/bin/sh /script/teardown` in a pod. Those are the only two
// things its image must do, so this program is that image's /bin/sh, and no distribution is needed inside.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "volume-helper:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	folder := os.Getenv("VOL_DIR")
	if !filepath.IsAbs(folder) || filepath.Clean(folder) == "/" {
		return fmt.Errorf("VOL_DIR is %q, not the folder of a volume", folder)
	}
	if len(arguments) < 2 {
		return fmt.Errorf("no script was given")
	}
	switch filepath.Base(arguments[1]) {
	case "setup":
		if err := os.MkdirAll(folder, 0o777); err != nil {
			return err
		}
		return os.Chmod(folder, 0o777) // whatever the umask
	case "teardown":
		return os.RemoveAll(folder)
	default:
		return fmt.Errorf("it can do setup and teardown, not %q", arguments[1])
	}
}
