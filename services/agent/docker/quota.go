package docker

import (
	"os"
	"slices"
	"strings"
)

// bounds says whether a storage driver, with its files in the folder root, can bound
// what a container writes to its own root: overlay2 can by project quotas of xfs. Those
// of btrfs count the image too, and the others have none.
func bounds(driver, root string) bool {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	return driver == "overlay2" && projectQuota(string(b), root)
}

// projectQuota says whether a folder lies on an xfs that was mounted with project quotas,
// by /proc/self/mountinfo. Of several mounts at one place the last one counts.
func projectQuota(mountinfo, folder string) (on bool) {
	longest := -1
	for line := range strings.Lines(mountinfo) {
		mount, source, _ := strings.Cut(line, " - ")
		fields, of := strings.Fields(mount), strings.Fields(source)
		if len(fields) < 5 || len(of) < 3 {
			continue
		}
		at := strings.TrimSuffix(fields[4], "/")
		if len(at) >= longest && (folder == at || strings.HasPrefix(folder, at+"/")) {
			longest = len(at)
			options := strings.Split(of[2], ",")
			on = of[0] == "xfs" && (slices.Contains(options, "prjquota") || slices.Contains(options, "pquota"))
		}
	}
	return on
}
