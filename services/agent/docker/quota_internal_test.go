package docker

import "testing"

func TestProjectQuota(t *testing.T) {
	const root = "25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
	on := func(at string) string {
		return "30 25 8:2 / " + at + " rw,relatime shared:5 - xfs /dev/sdb rw,attr2,prjquota\n"
	}
	for name, c := range map[string]struct {
		mountinfo string
		want      bool
	}{
		"on the root's file system": {root, false},
		"on an xfs with quotas":     {root + on("/var/lib/docker"), true},
		"below one":                 {root + on("/var"), true},
		"the root itself is one":    {on("/"), true},
		"beside one":                {root + on("/var/lib/dock"), false},
		"on an xfs without quotas":  {root + "30 25 8:2 / /var rw shared:5 - xfs /dev/sdb rw,noquota\n", false},
		"another lies over it":      {root + on("/var") + "31 30 8:3 / /var/lib rw - ext4 /dev/sdc rw,prjquota\n", false},
		"another lies at the same":  {root + on("/var") + "31 30 8:3 / /var rw - ext4 /dev/sdc rw\n", false},
		"what nobody expects":       {"x\n\n1 2 3 4 - \n", false},
	} {
		if got := projectQuota(c.mountinfo, "/var/lib/docker"); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
