package integration

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/dockway/dockway/integration/lab"
)

// TestDockerfile: the image of the Dockerfile is the file that `make plugin` makes, byte for byte, and nothing
// else. The image that it begins with is made of this machine's compiler, as the lab reaches no registry.
func TestDockerfile(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	h := onHost(t, shared.hosts[lab.Debian])
	dir := filepath.Join(shared.lab.Dir(), "dockerfile")
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	local := func(script string) string {
		t.Helper()
		c := exec.Command("sh", "-ec", script)
		c.Dir, c.Env = root, append(os.Environ(), "dir="+dir)
		var out, said bytes.Buffer
		c.Stdout, c.Stderr = &out, &said
		if err := c.Run(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, said.String())
		}
		return strings.TrimSpace(out.String())
	}

	file, err := os.ReadFile(filepath.Join(root, "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	from := regexp.MustCompile(`FROM (golang:\S+) AS build`).FindSubmatch(file)
	if from == nil {
		t.Fatal("the Dockerfile does not begin with an image of Go")
	}
	local(`mkdir -p $dir/usr/local/go $dir/bin $dir/tmp
cp /bin/busybox $dir/bin/sh
(cd $(go env GOROOT) && cp -a VERSION go.env bin pkg src $dir/usr/local/go)
GOMODCACHE=$dir/modules GOPROXY=file://$(go env GOMODCACHE)/cache/download,$(go env GOPROXY) go mod download
find $dir/modules -mindepth 1 -maxdepth 1 ! -name cache -exec chmod -R u+w {} + -exec rm -r {} +`)
	h.must(`tar -C ` + dir + ` -c . | docker import --change 'ENV PATH=/usr/local/go/bin:/bin GOPATH=/go GOTOOLCHAIN=local GOPROXY=file:///modules/cache/download GOSUMDB=off' - ` + string(from[1]))

	plugin := filepath.Join(shared.built, "rootfs", "dockway")
	version := strings.Fields(local(plugin + " version"))[1]
	h.must("DOCKER_BUILDKIT=0 docker build --network none --build-arg VERSION=" + version + " -t dockerfile " + root)
	h.must(`mkdir ` + dir + `/image; docker save dockerfile | tar -x -C ` + dir + `/image`)
	if list := local(`for layer in $dir/image/*/layer.tar; do tar -tf $layer; done`); list != "dockway" {
		t.Errorf("the image has %s, want /dockway alone", list)
	}
	local(`tar -xf $dir/image/*/layer.tar -C $dir && cmp $dir/dockway ` + plugin)
}
