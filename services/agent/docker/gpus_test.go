package docker

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"

	"dayfly.dev/schemas"
)

func TestDeviceRequest(t *testing.T) {
	b := &box{spec: schemas.DefaultSpec(), image: image{env: []string{"NVIDIA_VISIBLE_DEVICES=all", "LANG=C"}}}
	o := b.options()
	if len(o.HostConfig.DeviceRequests) > 0 || !slices.Contains(o.Config.Env, "NVIDIA_VISIBLE_DEVICES=void") {
		t.Errorf("without GPUs: %+v, %v", o.HostConfig.DeviceRequests, o.Config.Env)
	}
	b.gpus = []int{1, 3}
	want := []container.DeviceRequest{{DeviceIDs: []string{"1", "3"}, Capabilities: [][]string{{"gpu", "compute", "utility"}}}}
	if diff := cmp.Diff(want, b.options().HostConfig.DeviceRequests); diff != "" {
		t.Error(diff)
	}
}

func TestCountGPUs(t *testing.T) {
	dir := t.TempDir()
	for _, device := range []string{"0000:01:00.0", "0000:02:00.0"} {
		if err := os.Mkdir(filepath.Join(dir, device), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if n, none := countGPUs(dir), countGPUs(filepath.Join(dir, "nothing")); n != 2 || none != 0 {
		t.Errorf("%d and %d", n, none)
	}
}
