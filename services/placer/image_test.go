package placer

import (
	"strings"
	"testing"

	"dayfly.dev/schemas"
)

// A worker that has the image goes before its equals, whatever form the image is named in,
// and once an image was resolved its digest counts and its tag no more.
func TestWorkersWithTheImageGoFirst(t *testing.T) {
	digest := "sha256:" + strings.Repeat("ab", 32)
	for name, c := range map[string]struct{ image, digest, has, want string }{
		"no tag":                      {"busybox", "", "busybox:latest", "b"},
		"the whole name":              {"docker.io/library/busybox:1", "", "busybox:1", "b"},
		"another tag":                 {"busybox:2", "", "busybox:1", "a"},
		"a digest":                    {"r.lan/x@" + digest, "", schemas.ImageName("r.lan/x@" + digest), "b"},
		"a tag that was resolved":     {"r.lan/x:1", digest, schemas.ImageName("r.lan/x@" + digest), "b"},
		"a tag that may have moved":   {"r.lan/x:1", digest, "r.lan/x:1", "a"},
		"a digest of another's image": {"r.lan/x@" + digest, "", schemas.ImageName("r.lan/y@" + digest), "a"},
	} {
		t.Run(name, func(t *testing.T) {
			b := testBook(Weighted)
			b.fleet.beat(beat("a", host(2, 4*gib, 0)), t0)
			holder := beat("b", host(2, 4*gib, 0))
			holder.Images = []string{"other:1", c.has}
			b.fleet.beat(holder, t0)
			id, s := ask(1)
			s.queued.image = imageOf(c.image, c.digest)
			b.changed(id, s, 1, t0)
			if got := place(b, t0); len(got) != 1 || string(got[0].worker) != c.want {
				t.Errorf("chose %v, want %s", got, c.want)
			}
		})
	}
}
