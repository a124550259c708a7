package schemas_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"dayfly.dev/schemas"
)

func repeat(n int, item func(int) string) string {
	items := make([]string, n)
	for i := range items {
		items[i] = item(i)
	}
	return strings.Join(items, ",")
}

func TestParseSpecRefuses(t *testing.T) {
	duration := `must be a duration such as "90s", "15m" or "1h30m"`
	size := `must be a size such as "64MiB" or "1GiB", or a whole number of bytes`
	for name, c := range map[string]struct {
		body   string
		status int
		code   schemas.Code
		field  string
		detail string // "" if the words do not matter
	}{
		"an empty body":               {"", 400, "invalid_json", "", ""},
		"white space only":            {" \n", 400, "invalid_json", "", ""},
		"no JSON":                     {"image: busybox", 400, "invalid_json", "", ""},
		"half an object":              {`{"image":"a"`, 400, "invalid_json", "", ""},
		"a comma too much":            {`{"image":"a",}`, 400, "invalid_json", "", ""},
		"a comment":                   {`{"image":"a"/* x */}`, 400, "invalid_json", "", ""},
		"trailing bytes":              {`{"image":"a"} x`, 400, "invalid_json", "", ""},
		"a second value":              {`{"image":"a"}{}`, 400, "invalid_json", "", ""},
		"bad UTF-8 in a value":        {"{\"image\":\"a\xff\"}", 400, "invalid_json", "", ""},
		"bad UTF-8 in a name":         {"{\"imag\xff\":\"a\"}", 400, "invalid_json", "", ""},
		"half a surrogate pair":       {`{"image":"\ud800"}`, 400, "invalid_json", "", ""},
		"a raw control character":     {"{\"image\":\"a\x01\"}", 400, "invalid_json", "", ""},
		"NaN":                         {`{"image":"a","resources":{"cpus":NaN}}`, 400, "invalid_json", "", ""},
		"too deep":                    {`{"image":"a","x":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`, 400, "invalid_json", "", ""},
		"far too deep":                {strings.Repeat(`{"a":`, 100_000), 400, "invalid_json", "", ""},
		"a body above 1 MiB":          {`{"image":"` + strings.Repeat("a", 1<<20) + `"}`, 413, "too_large", "", ""},
		"a field twice":               {`{"image":"a","image":"b"}`, 400, "duplicate_field", "image", ""},
		"a field twice, escaped":      {`{"image":"a","im\u0061ge":"b"}`, 400, "duplicate_field", "image", ""},
		"a nested field twice":        {`{"image":"a","resources":{"cpus":1,"cpus":2}}`, 400, "duplicate_field", "resources.cpus", ""},
		"a map key twice":             {`{"image":"a","env":{"A":"1","A":"2"}}`, 400, "duplicate_field", "env.A", ""},
		"a tmpfs path twice":          {`{"image":"a","tmpfs":{"/a":"1MiB","/a":"2MiB"}}`, 400, "duplicate_field", "tmpfs./a", ""},
		"a list":                      {`[]`, 422, "invalid_type", "", "must be an object"},
		"a string":                    {`"x"`, 422, "invalid_type", "", "must be an object"},
		"null":                        {` null `, 422, "invalid_type", "", "must be an object"},
		"an unknown field":            {`{"image":"a","immage":{"x":1}}`, 422, "unknown_field", "immage", ""},
		"a field in other case":       {`{"Image":"a"}`, 422, "unknown_field", "Image", ""},
		"our own Unknown":             {`{"image":"a","Unknown":{"x":1}}`, 422, "unknown_field", "Unknown", ""},
		"an unknown resource":         {`{"image":"a","resources":{"cores":1}}`, 422, "unknown_field", "resources.cores", ""},
		"an unknown timeout":          {`{"image":"a","timeouts":{"run":"1s"}}`, 422, "unknown_field", "timeouts.run", ""},
		"an unknown field of a file":  {`{"image":"a","files":[{"path":"a"},{"path":"b","mode":7}]}`, 422, "unknown_field", "files.1.mode", ""},
		"an unknown field of a check": {`{"image":"a","health":{"http":{"url":""}}}`, 422, "unknown_field", "health.http.url", ""},
		"a long unknown field":        {`{"image":"a","` + strings.Repeat("y", 1000) + `":1}`, 422, "unknown_field", strings.Repeat("y", 64) + "…", ""},
		"image of another type":       {`{"image":5}`, 422, "invalid_type", "image", "must be a string"},
		"command of another type":     {`{"image":"a","command":"ls"}`, 422, "invalid_type", "command", "must be a list"},
		"a word of another type":      {`{"image":"a","command":["ls",1]}`, 422, "invalid_type", "command.1", "must be a string"},
		"env of another type":         {`{"image":"a","env":[]}`, 422, "invalid_type", "env", "must be an object"},
		"an env value of another":     {`{"image":"a","env":{"A":1}}`, 422, "invalid_type", "env.A", "must be a string"},
		"a name with dots":            {`{"image":"a","labels":{"a.b/c~d":1}}`, 422, "invalid_type", "labels.a.b/c~d", "must be a string"},
		"files of another type":       {`{"image":"a","files":{}}`, 422, "invalid_type", "files", "must be a list"},
		"a file of another type":      {`{"image":"a","files":["x"]}`, 422, "invalid_type", "files.0", "must be an object"},
		"resources of another type":   {`{"image":"a","resources":"big"}`, 422, "invalid_type", "resources", "must be an object"},
		"cpus as a string":            {`{"image":"a","resources":{"cpus":"1"}}`, 422, "invalid_type", "resources.cpus", "must be a number"},
		"cpus beyond a float":         {`{"image":"a","resources":{"cpus":1e400}}`, 422, "invalid_type", "resources.cpus", "must be a number"},
		"pids with a fraction":        {`{"image":"a","resources":{"pids":1.5}}`, 422, "invalid_type", "resources.pids", "must be a whole number"},
		"pids beyond an int":          {`{"image":"a","resources":{"pids":99999999999999999999}}`, 422, "invalid_type", "resources.pids", "must be a whole number"},
		"read_only of another type":   {`{"image":"a","read_only":"yes"}`, 422, "invalid_type", "read_only", "must be true or false"},
		"network of another type":     {`{"image":"a","network":5}`, 422, "invalid_type", "network", "must be a string"},
		"on_lost of another type":     {`{"image":"a","on_lost":{}}`, 422, "invalid_type", "on_lost", "must be a string"},
		"health of another type":      {`{"image":"a","health":{"http":5}}`, 422, "invalid_type", "health.http", "must be an object"},
		"a duration in words":         {`{"image":"a","ttl":"forever"}`, 422, "invalid_type", "ttl", duration},
		"a duration without unit":     {`{"image":"a","timeouts":{"pull":"1h1"}}`, 422, "invalid_type", "timeouts.pull", duration},
		"a duration as a number":      {`{"image":"a","ttl":60}`, 422, "invalid_type", "ttl", duration},
		"an endless duration":         {`{"image":"a","ttl":"99999999h"}`, 422, "invalid_type", "ttl", duration},
		"a size in words":             {`{"image":"a","resources":{"memory":"lots"}}`, 422, "invalid_type", "resources.memory", size},
		"a size with a fraction":      {`{"image":"a","resources":{"memory":1e9}}`, 422, "invalid_type", "resources.memory", size},
		"a size as an object":         {`{"image":"a","resources":{"memory":{"a":[1]}}}`, 422, "invalid_type", "resources.memory", size},
		"a size of null":              {`{"image":"a","resources":{"disk":null}}`, 422, "invalid_type", "resources.disk", size},
		"a negative size":             {`{"image":"a","resources":{"memory":"-1g"}}`, 422, "invalid_type", "resources.memory", size},
		"a size with an odd unit":     {`{"image":"a","tmpfs":{"/a":"1XB"}}`, 422, "invalid_type", "tmpfs./a", size},

		"no image":                {`{}`, 422, "invalid_value", "image", ""},
		"an empty image":          {`{"image":""}`, 422, "invalid_value", "image", ""},
		"an image in capitals":    {`{"image":"BusyBox"}`, 422, "invalid_value", "image", ""},
		"an image with spaces":    {`{"image":"busy box"}`, 422, "invalid_value", "image", ""},
		"an image of a URL":       {`{"image":"https://registry.lan/a"}`, 422, "invalid_value", "image", ""},
		"an image with a bad tag": {`{"image":"busybox:"}`, 422, "invalid_value", "image", ""},
		"a bare image id":         {`{"image":"` + strings.Repeat("0123", 16) + `"}`, 422, "invalid_value", "image", ""},
		"a long image":            {`{"image":"` + strings.Repeat("a/", 400) + `a"}`, 422, "invalid_value", "image", ""},
		"cpus of 0":               {`{"image":"a","resources":{"cpus":0}}`, 422, "invalid_value", "resources.cpus", ""},
		"cpus of null":            {`{"image":"a","resources":{"cpus":null}}`, 422, "invalid_value", "resources.cpus", ""},
		"cpus below 0":            {`{"image":"a","resources":{"cpus":-1}}`, 422, "invalid_value", "resources.cpus", ""},
		"cpus of 1e300":           {`{"image":"a","resources":{"cpus":1e300}}`, 422, "invalid_value", "resources.cpus", ""},
		"memory of 0":             {`{"image":"a","resources":{"memory":0}}`, 422, "invalid_value", "resources.memory", ""},
		"memory below 0":          {`{"image":"a","resources":{"memory":-5}}`, 422, "invalid_value", "resources.memory", ""},
		"memory below Docker's":   {`{"image":"a","resources":{"memory":"5MiB"}}`, 422, "invalid_value", "resources.memory", ""},
		"memory of exabytes":      {`{"image":"a","resources":{"memory":"9999999PiB"}}`, 422, "invalid_value", "resources.memory", ""},
		"pids of 0":               {`{"image":"a","resources":{"pids":0}}`, 422, "invalid_value", "resources.pids", ""},
		"pids of a million":       {`{"image":"a","resources":{"pids":1000000}}`, 422, "invalid_value", "resources.pids", ""},
		"disk of 0":               {`{"image":"a","resources":{"disk":"0"}}`, 422, "invalid_value", "resources.disk", ""},
		"gpus below 0":            {`{"image":"a","resources":{"gpus":-1}}`, 422, "invalid_value", "resources.gpus", ""},
		"ttl of 0":                {`{"image":"a","ttl":"0s"}`, 422, "invalid_value", "ttl", ""},
		"ttl of null":             {`{"image":"a","ttl":null}`, 422, "invalid_value", "ttl", ""},
		"ttl below 0":             {`{"image":"a","ttl":"-1h"}`, 422, "invalid_value", "ttl", ""},
		"ttl below a second":      {`{"image":"a","ttl":"999ms"}`, 422, "invalid_value", "ttl", ""},
		"ttl above the site's":    {`{"image":"a","ttl":"24h1s"}`, 422, "invalid_value", "ttl", "must be at most 24h here"},
		"a queue timeout of 0":    {`{"image":"a","timeouts":{"queue":"0s"}}`, 422, "invalid_value", "timeouts.queue", ""},
		"a pull timeout of days":  {`{"image":"a","timeouts":{"pull":"25h"}}`, 422, "invalid_value", "timeouts.pull", ""},
		"a start timeout of 0":    {`{"image":"a","timeouts":{"start":"0s"}}`, 422, "invalid_value", "timeouts.start", ""},
		"a grace below 0":         {`{"image":"a","timeouts":{"stop":"-1s"}}`, 422, "invalid_value", "timeouts.stop", ""},
		"10,000 env entries":      {`{"image":"a","env":{` + repeat(10_000, func(i int) string { return fmt.Sprintf(`"E%d":""`, i) }) + `}}`, 422, "invalid_value", "env", ""},
		"a NUL in env":            {`{"image":"a","env":{"A":"x\u0000y"}}`, 422, "invalid_value", "env.A", ""},
		"a newline in env":        {`{"image":"a","env":{"A":"x\ny"}}`, 422, "invalid_value", "env.A", ""},
		"an empty env name":       {`{"image":"a","env":{"":"x"}}`, 422, "invalid_value", "env", ""},
		"an env name with =":      {`{"image":"a","env":{"A=B":"x"}}`, 422, "invalid_value", "env", ""},
		"an env name with NUL":    {`{"image":"a","env":{"A\u0000":"x"}}`, 422, "invalid_value", "env", ""},
		"a NUL in the command":    {`{"image":"a","command":["sh","a\u0000b"]}`, 422, "invalid_value", "command.1", ""},
		"an empty program":        {`{"image":"a","command":[""]}`, 422, "invalid_value", "command.0", ""},
		"2,000 words":             {`{"image":"a","command":[` + repeat(2000, func(int) string { return `"x"` }) + `]}`, 422, "invalid_value", "command", ""},
		"a relative workdir":      {`{"image":"a","workdir":"home"}`, 422, "invalid_value", "workdir", ""},
		"a workdir with ..":       {`{"image":"a","workdir":"/a/../b"}`, 422, "invalid_value", "workdir", ""},
		"user root":               {`{"image":"a","user":"root"}`, 422, "invalid_value", "user", ""},
		"user 0":                  {`{"image":"a","user":"0:0"}`, 422, "invalid_value", "user", ""},
		"user 0 with zeros":       {`{"image":"a","user":"` + strings.Repeat("0", 1000) + `1:1"}`, 422, "invalid_value", "user", ""},
		"user beyond 16 bits":     {`{"image":"a","user":"70000:1000"}`, 422, "invalid_value", "user", ""},
		"user without group":      {`{"image":"a","user":"1000"}`, 422, "invalid_value", "user", ""},
		"an empty user":           {`{"image":"a","user":""}`, 422, "invalid_value", "user", ""},
		"a file without path":     {`{"image":"a","files":[{"content":"x"}]}`, 422, "invalid_value", "files.0.path", ""},
		"an absolute file":        {`{"image":"a","files":[{"path":"/etc/passwd"}]}`, 422, "invalid_value", "files.0.path", ""},
		"a file outside":          {`{"image":"a","files":[{"path":"a"},{"path":"../b"}]}`, 422, "invalid_value", "files.1.path", ""},
		"a file that goes up":     {`{"image":"a","files":[{"path":"a/../../b"}]}`, 422, "invalid_value", "files.0.path", ""},
		"the parent as a file":    {`{"image":"a","files":[{"path":".."}]}`, 422, "invalid_value", "files.0.path", ""},
		"the folder as a file":    {`{"image":"a","files":[{"path":"."}]}`, 422, "invalid_value", "files.0.path", ""},
		"a file with a NUL":       {`{"image":"a","files":[{"path":"a\u0000"}]}`, 422, "invalid_value", "files.0.path", ""},
		"a file ending in /":      {`{"image":"a","files":[{"path":"a/"}]}`, 422, "invalid_value", "files.0.path", ""},
		"a file twice":            {`{"image":"a","files":[{"path":"a"},{"path":"a"}]}`, 422, "invalid_value", "files.1.path", "stands there twice"},
		"a file below a file":     {`{"image":"a","files":[{"path":"a/b/c"},{"path":"a"}]}`, 422, "invalid_value", "files.0.path", "lies below another file"},
		"300 files":               {`{"image":"a","files":[` + repeat(300, func(i int) string { return fmt.Sprintf(`{"path":"%d"}`, i) }) + `]}`, 422, "invalid_value", "files", ""},
		"content and base64":      {`{"image":"a","files":[{"path":"a","content":"x","base64":"eA=="}]}`, 422, "invalid_value", "files.0", ""},
		"bad base64":              {`{"image":"a","files":[{"path":"a","base64":"!"}]}`, 422, "invalid_value", "files.0.base64", ""},
		"a restart policy":        {`{"image":"a","restart":{"policy":"sometimes"}}`, 422, "invalid_value", "restart.policy", ""},
		"restarts without policy": {`{"image":"a","restart":{"max":3}}`, 422, "invalid_value", "restart.policy", ""},
		"restarts below 0":        {`{"image":"a","restart":{"policy":"always","max":-1}}`, 422, "invalid_value", "restart.max", ""},
		"a short backoff":         {`{"image":"a","restart":{"policy":"always","backoff":"1ms"}}`, 422, "invalid_value", "restart.backoff", ""},
		"a long backoff":          {`{"image":"a","restart":{"policy":"always","backoff":"2m"}}`, 422, "invalid_value", "restart.backoff", ""},
		"health of no kind":       {`{"image":"a","health":{"interval":"1s"}}`, 422, "invalid_value", "health", ""},
		"health of two kinds":     {`{"image":"a","health":{"tcp":{"port":1},"exec":["true"]}}`, 422, "invalid_value", "health", ""},
		"health of port 0":        {`{"image":"a","health":{"tcp":{"port":0}}}`, 422, "invalid_value", "health.tcp.port", ""},
		"a path with a newline":   {`{"image":"a","health":{"http":{"port":80,"path":"/\r\nX: y"}}}`, 422, "invalid_value", "health.http.path", ""},
		"a relative path":         {`{"image":"a","health":{"http":{"port":80,"path":"up"}}}`, 422, "invalid_value", "health.http.path", ""},
		"an empty check":          {`{"image":"a","health":{"exec":[]}}`, 422, "invalid_value", "health.exec", ""},
		"a check each 1ms":        {`{"image":"a","health":{"tcp":{"port":1},"interval":"1ms"}}`, 422, "invalid_value", "health.interval", ""},
		"a check for a day":       {`{"image":"a","health":{"tcp":{"port":1},"timeout":"24h"}}`, 422, "invalid_value", "health.timeout", ""},
		"1,000 retries":           {`{"image":"a","health":{"tcp":{"port":1},"retries":1000}}`, 422, "invalid_value", "health.retries", ""},
		"100 gpus":                {`{"image":"a","resources":{"gpus":100}}`, 422, "invalid_value", "resources.gpus", ""},
		"a relative tmpfs":        {`{"image":"a","tmpfs":{"var":"1MiB"}}`, 422, "invalid_value", "tmpfs", ""},
		"tmpfs over everything":   {`{"image":"a","tmpfs":{"/":"1MiB"}}`, 422, "invalid_value", "tmpfs", ""},
		"tmpfs in /task":          {`{"image":"a","tmpfs":{"/task/input":"1MiB"}}`, 422, "invalid_value", "tmpfs", ""},
		"tmpfs over init":         {`{"image":"a","tmpfs":{"/.dayfly":"1MiB"}}`, 422, "invalid_value", "tmpfs", ""},
		"tmpfs in /proc":          {`{"image":"a","tmpfs":{"/proc":"1MiB"}}`, 422, "invalid_value", "tmpfs", ""},
		"tmpfs with options":      {`{"image":"a","tmpfs":{"/a:exec":"1MiB"}}`, 422, "invalid_value", "tmpfs", ""},
		"tmpfs with ..":           {`{"image":"a","tmpfs":{"/a/../task":"1MiB"}}`, 422, "invalid_value", "tmpfs", ""},
		"tmpfs of 0":              {`{"image":"a","tmpfs":{"/a":0}}`, 422, "invalid_value", "tmpfs./a", ""},
		"tmpfs of exabytes":       {`{"image":"a","tmpfs":{"/a":"5000PiB"}}`, 422, "invalid_value", "tmpfs./a", ""},
		"nine tmpfs":              {`{"image":"a","tmpfs":{` + repeat(9, func(i int) string { return fmt.Sprintf(`"/%d":4096`, i) }) + `}}`, 422, "invalid_value", "tmpfs", ""},
		"pull sometimes":          {`{"image":"a","pull":"sometimes"}`, 422, "invalid_value", "pull", ""},
		"no attempts":             {`{"image":"a","max_attempts":0}`, 422, "invalid_value", "max_attempts", ""},
		"1,000 attempts":          {`{"image":"a","max_attempts":1000}`, 422, "invalid_value", "max_attempts", ""},
		"on_lost cry":             {`{"image":"a","on_lost":"cry"}`, 422, "invalid_value", "on_lost", ""},
		"priority 0":              {`{"image":"a","priority":0}`, 422, "invalid_value", "priority", ""},
		"priority 10":             {`{"image":"a","priority":10}`, 422, "invalid_value", "priority", ""},
		"network host":            {`{"image":"a","network":"host"}`, 422, "invalid_value", "network", ""},
		"100 labels":              {`{"image":"a","labels":{` + repeat(100, func(i int) string { return fmt.Sprintf(`"l%d":""`, i) }) + `}}`, 422, "invalid_value", "labels", ""},
		"a label with a space":    {`{"image":"a","labels":{"a b":""}}`, 422, "invalid_value", "labels", ""},
		"a label with a newline":  {`{"image":"a","labels":{"a":"x\n"}}`, 422, "invalid_value", "labels.a", ""},
		"a long constraint":       {`{"image":"a","constraints":{"zone":"` + strings.Repeat("z", 257) + `"}}`, 422, "invalid_value", "constraints.zone", ""},

		"a writable root":       {`{"image":"a","read_only":false}`, 422, "not_allowed", "read_only", ""},
		"cap_add":               {`{"image":"a","cap_add":["NET_RAW"]}`, 422, "not_allowed", "cap_add.0", ""},
		"no capability":         {`{"image":"a","cap_add":["SYS_ADMIN"]}`, 422, "invalid_value", "cap_add.0", ""},
		"one with its prefix":   {`{"image":"a","cap_add":["CAP_CHOWN"]}`, 422, "invalid_value", "cap_add.0", ""},
		"mounts":                {`{"image":"a","mounts":{"input":"/in"}}`, 422, "not_allowed", "mounts", ""},
		"a port that is none":   {`{"image":"a","ports":[{"port":65536}]}`, 422, "invalid_value", "ports.0.port", ""},
		"a port without number": {`{"image":"a","ports":[{"name":"web"}]}`, 422, "invalid_value", "ports.0.port", ""},
		"a port's name":         {`{"image":"a","ports":[{"name":"Web_1","port":80}]}`, 422, "invalid_value", "ports.0.name", ""},
		"a port's name twice":   {`{"image":"a","ports":[{"port":80},{"name":"80","port":81}]}`, 422, "invalid_value", "ports.1.name", ""},
		"a port's protocol":     {`{"image":"a","ports":[{"port":80,"protocol":"udp"}]}`, 422, "invalid_value", "ports.0.protocol", ""},
		"too many ports":        {`{"image":"a","ports":[` + strings.Repeat(`{"port":80},`, 16) + `{"port":80}]}`, 422, "invalid_value", "ports", ""},
		"network egress":        {`{"image":"a","network":"egress"}`, 422, "not_available", "network", ""},
		"network internal":      {`{"image":"a","network":"internal"}`, 422, "not_available", "network", ""},
		"a runtime":             {`{"image":"a","runtime":"runsc"}`, 422, "not_available", "runtime", ""},
		"a kind":                {`{"image":"a","kind":"judge"}`, 422, "invalid_value", "kind", ""},
		"a payload":             {`{"image":"a","payload":{}}`, 422, "invalid_value", "payload", ""},
		"a blob that is none":   {`{"image":"a","files":[{"path":"a","blob":"sha256:00"}]}`, 422, "invalid_value", "files.0.blob", ""},
		"a blob in capitals":    {`{"image":"a","stdin_blob":"sha256:` + strings.Repeat("A", 64) + `"}`, 422, "invalid_value", "stdin_blob", ""},
		"stdin twice":           {`{"image":"a","stdin":"a","stdin_blob":"sha256:` + strings.Repeat("a", 64) + `"}`, 422, "invalid_value", "stdin_blob", ""},
		"a blob and content":    {`{"image":"a","files":[{"path":"a","content":"a","blob":"sha256:` + strings.Repeat("a", 64) + `"}]}`, 422, "invalid_value", "files.0", ""},
		"too many blobs":        {`{"image":"a","files":[` + manyBlobs(schemas.MaxBlobs+1) + `]}`, 422, "invalid_value", "files", ""},
		"the image's own user":  {`{"image":"a","user":"image"}`, 422, "not_allowed", "user", ""},
		"big labels and files":  {`{"image":"a","files":[{"path":"a","content":"` + strings.Repeat("x", 100_000) + `"}],"command":["` + strings.Repeat("x", 50_000) + `"]}`, 413, "too_large", "command", ""},
		"a big command":         {`{"image":"a","command":["` + strings.Repeat(`\u0001`, 10_000) + `"]}`, 413, "too_large", "command", ""},
		"stdin and stdin_open":  {`{"image":"a","stdin":"x","stdin_open":true}`, 422, "invalid_value", "stdin", ""},
		"a window of nothing":   {`{"image":"a","stdin_open":true,"window":{"rows":24,"cols":80}}`, 422, "invalid_value", "window", ""},
		"a window of no rows":   {`{"image":"a","tty":true,"window":{"rows":0,"cols":80}}`, 422, "invalid_value", "window", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, err := schemas.ParseSpec([]byte(c.body), schemas.DefaultPolicy())
			var e *schemas.Error
			if !errors.As(err, &e) {
				t.Fatalf("taken: %s", encode(t, s))
			}
			if e.Status != c.status || e.Code != c.code || e.Field != c.field || c.detail != "" && e.Detail != c.detail {
				t.Errorf("got %d %s", e.Status, e)
			}
			if !reflect.DeepEqual(s, schemas.Spec{}) {
				t.Error("a refused spec came back")
			}
			if strings.Count(e.Detail, "%!") > 0 || e.Detail == "" {
				t.Errorf("detail %q", e.Detail)
			}
		})
	}
}

// manyBlobs are so many files of different blobs.
func manyBlobs(n int) string {
	files := make([]string, n)
	for i := range files {
		files[i] = fmt.Sprintf(`{"path":"f%d","blob":"sha256:%064x"}`, i, i)
	}
	return strings.Join(files, ",")
}

func TestPolicyForbids(t *testing.T) {
	closed := schemas.Policy{MaxTTL: schemas.Duration(time.Hour)}
	for field, body := range map[string]string{
		"entrypoint": `{"image":"a","entrypoint":["sh"]}`,
		"tmpfs":      `{"image":"a","tmpfs":{"/a":"1MiB"}}`,
		"user":       `{"image":"a","user":"image"}`,
		"read_only":  `{"image":"a","read_only":false}`,
	} {
		_, err := schemas.ParseSpec([]byte(body), closed)
		var e *schemas.Error
		if !errors.As(err, &e) || e.Code != schemas.CodeNotAllowed || e.Field != field {
			t.Errorf("%s: %v", field, err)
		}
		open := schemas.Policy{MaxTTL: closed.MaxTTL, AllowEntrypoint: true, AllowTmpfs: true, AllowImageUser: true, AllowWritableRoot: true}
		if _, err := schemas.ParseSpec([]byte(body), open); err != nil {
			t.Errorf("%s where it is allowed: %v", field, err)
		}
	}
}

func TestCapabilities(t *testing.T) {
	p := schemas.DefaultPolicy()
	p.AllowImageUser, p.AllowCaps = true, []string{"CHOWN", "SETUID"}
	for body, want := range map[string]string{
		`"user":"image","cap_add":["SETUID","CHOWN"]`: "",
		`"user":"image","cap_add":[]`:                 "",
		`"user":"image","cap_add":["CHOWN","SETGID"]`: "cap_add.1 not_allowed",
		`"user":"image","cap_add":["CHOWN","CHOWN"]`:  "cap_add.1 invalid_value",
		`"user":"image","cap_add":["chown"]`:          "cap_add.0 invalid_value",
		`"user":"image","cap_add":["ALL"]`:            "cap_add.0 invalid_value",
		`"cap_add":["CHOWN"]`:                         "cap_add invalid_value",
	} {
		_, err := schemas.ParseSpec([]byte(`{"image":"a",`+body+`}`), p)
		var e *schemas.Error
		got := ""
		if errors.As(err, &e) {
			got = e.Field + " " + string(e.Code)
		}
		if got != want {
			t.Errorf("%s: %v", body, err)
		}
	}
}

func TestParseSpecFillsDefaults(t *testing.T) {
	s, err := schemas.ParseSpec([]byte(` {"image":"busybox","resources":{"cpus":2},"timeouts":{"stop":"0s"},"entrypoint":null,
		"env":{},"restart":{"policy":"never","max":0}}`), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	want := schemas.DefaultSpec()
	want.Image, want.Resources.CPUs, want.Timeouts.Stop, want.OnLost = "busybox", 2, 0, schemas.OnLostRequeue
	want.Env, want.Restart = map[string]string{}, &schemas.Restart{Policy: "never"}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got  %s\nwant %s", encode(t, s), encode(t, want))
	}
	s, err = schemas.ParseSpec([]byte(`{"image":"busybox","restart":{"policy":"always"},"health":{"http":{"port":80}}}`), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := encode(t, s.Restart)+encode(t, s.Health),
		`{"policy":"always","backoff":"1s"}{"http":{"port":80,"path":"/"},"interval":"10s","timeout":"5s","retries":3}`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestSizesAndDurations(t *testing.T) {
	for text, want := range map[string]schemas.Size{
		`"256MiB"`: 256 << 20, `"64m"`: 64 << 20, `"1g"`: 1 << 30, `"1.5KiB"`: 1536, `"512"`: 512, `1024`: 1024, `"\u0036MiB"`: 6 << 20,
	} {
		var s schemas.Size
		if err := schemas.Decode([]byte(text), &s); err != nil || s != want {
			t.Errorf("%s: %d %v", text, s, err)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0s", time.Hour: "1h", 10 * time.Minute: "10m", 90 * time.Minute: "1h30m", 70*time.Minute + time.Second: "1h10m1s",
		100 * time.Millisecond: "100ms", time.Hour + time.Second: "1h0m1s", -time.Minute: "-1m", 20 * time.Hour: "20h",
	} {
		if got := schemas.Duration(d).String(); got != want {
			t.Errorf("%v: %s, not %s", d, got, want)
		}
	}
	if got := schemas.Size(256 << 20).String(); got != "256MiB" {
		t.Error(got)
	}
}

// One answer to a hostile body stays small, however much is wrong with it.
func TestFaultsAreBounded(t *testing.T) {
	body := `{"image":"a","files":[` + repeat(60_000, func(int) string { return `{"path":""}` }) + `]}`
	_, err := schemas.ParseSpec([]byte(body), schemas.DefaultPolicy())
	if b := encode(t, err); len(b) > 16<<10 {
		t.Errorf("the error takes %d bytes", len(b))
	}
}

// The faults and their order are the same each time.
func TestFaultsAreInOrder(t *testing.T) {
	body := []byte(`{"image":"a","labels":{"e":"\n","d":"\n","c":"\n","b":"\n","a":"\n"},"max_attempts":-1}`)
	_, first := schemas.ParseSpec(body, schemas.DefaultPolicy())
	for range 20 {
		if _, err := schemas.ParseSpec(body, schemas.DefaultPolicy()); encode(t, err) != encode(t, first) {
			t.Fatalf("%s\n%s", encode(t, first), encode(t, err))
		}
	}
}

func drawSpec(t *rapid.T) schemas.Spec {
	text := rapid.StringN(0, 40, 400)
	arg := rapid.Custom(func(t *rapid.T) string { return "x" + strings.ReplaceAll(text.Draw(t, "arg"), "\x00", "") })
	value := rapid.Custom(func(t *rapid.T) string {
		return strings.Map(func(r rune) rune {
			if r < ' ' || r >= 0x7f && r < 0xa0 {
				return -1
			}
			return r
		}, rapid.StringN(0, 40, 200).Draw(t, "value"))
	})
	duration := func(least, most time.Duration) schemas.Duration {
		return schemas.Duration(rapid.Int64Range(int64(least), int64(most)).Draw(t, "duration"))
	}
	s := schemas.Spec{
		Image: rapid.SampledFrom([]string{"a", "busybox:1.36", "registry.lan:5000/x/y@sha256:" + strings.Repeat("0a", 32)}).Draw(t, "image"),
		Env:   rapid.MapOfN(rapid.StringMatching(`[A-Za-z_][A-Za-z0-9_]{0,9}`), value, -1, 5).Draw(t, "env"),
		User:  rapid.SampledFrom([]string{"1000:1000", "image", "1:65533"}).Draw(t, "user"),
		Stdin: text.Draw(t, "stdin"), Workdir: rapid.SampledFrom([]string{"", "/", "/a b/ü"}).Draw(t, "workdir"),
		Resources: schemas.Resources{
			CPUs: schemas.CPUs(rapid.Float64Range(0.01, 1024).Draw(t, "cpus")), Pids: rapid.IntRange(1, schemas.MaxPids).Draw(t, "pids"),
			Memory: schemas.Size(rapid.Int64Range(schemas.MinMemory, 1<<46).Draw(t, "memory")), Disk: schemas.Size(rapid.Int64Range(4096, 1<<46).Draw(t, "disk")),
		},
		TTL: duration(time.Second, 24*time.Hour),
		Timeouts: schemas.Timeouts{
			Queue: duration(time.Second, 24*time.Hour), Pull: duration(time.Second, 24*time.Hour),
			Start: duration(time.Second, 24*time.Hour), Stop: duration(0, 24*time.Hour),
		},
		Network:     schemas.NetworkNone,
		Pull:        rapid.SampledFrom([]schemas.ImagePolicy{"missing", "always", "never"}).Draw(t, "pull"),
		MaxAttempts: rapid.IntRange(1, 100).Draw(t, "attempts"),
		OnLost:      rapid.SampledFrom([]schemas.OnLost{"requeue", "fail", "wait"}).Draw(t, "lost"),
		Priority:    rapid.IntRange(1, 9).Draw(t, "priority"),
		Labels:      rapid.MapOfN(rapid.StringMatching(`[A-Za-z0-9_./-]{1,9}`), value, -1, 5).Draw(t, "labels"),
	}
	s.Tmpfs = rapid.SampledFrom([]map[string]schemas.Size{nil, {"/tmp": 4096, "/var/cache": 1 << 30}}).Draw(t, "tmpfs")
	for _, list := range []*[]string{&s.Command, &s.Entrypoint} {
		if rapid.Bool().Draw(t, "given") {
			*list = rapid.SliceOfN(arg, 0, 4).Draw(t, "args")
		}
	}
	for i := range rapid.IntRange(0, 3).Draw(t, "files") {
		s.Files = append(s.Files, schemas.File{Path: fmt.Sprintf("d/%d", i), Content: text.Draw(t, "content")})
	}
	return s
}

func TestParseSpecReadsWhatEncodeWrites(t *testing.T) {
	open := schemas.DefaultPolicy()
	open.AllowImageUser = true
	rapid.Check(t, func(t *rapid.T) {
		s := drawSpec(t)
		b, err := schemas.Encode(s)
		if err != nil {
			t.Fatal(err)
		}
		back, err := schemas.ParseSpec(b, open)
		if err != nil {
			t.Fatalf("%v in %s", err, b)
		}
		if !reflect.DeepEqual(s, back) {
			again, _ := schemas.Encode(back)
			t.Fatalf("wrote %s\nread  %s", b, again)
		}
	})
}

// Whatever is wrong with a body, what the client put into it as a value never comes
// back: it may be a password in the wrong place.
func TestErrorsNeverRepeatAValue(t *testing.T) {
	const marker = "987123654" // may stand in a string and be a number
	const base = `{"image":#,"entrypoint":#,"command":[#,#],"env":{"A":#},"workdir":#,"user":#,"stdin":#,"stdin_open":#,"tty":#,"window":{"rows":#,"cols":#},
		"files":[{"path":#,"content":#},{"path":"b","base64":#},{"blob":#}],"resources":{"cpus":#,"memory":#,"pids":#,"disk":#,"gpus":#},
		"tmpfs":{"/a":#},"read_only":#,"cap_add":[#],"mounts":{"input":#},"ports":[{"name":#,"port":#}],"network":#,"runtime":#,"ttl":#,
		"timeouts":{"queue":#,"pull":#,"start":#,"stop":#},"pull":#,"restart":{"policy":#},"health":{"http":{"port":#,"path":#},"exec":#},
		"max_attempts":#,"on_lost":#,"priority":#,"constraints":{"z":#},"kind":#,"callback":{"url":#,"secret":#},"labels":{"l":#},"nope":#}`
	forms := []string{
		`"` + marker + `"`, `"\n` + marker + `"`, `"/../` + marker + `\u0000"`, `" ` + marker + `%s"`, `-` + marker, marker + `.5`, marker + `e399`,
		`["` + marker + `"]`, `{"a":"` + marker + `"}`, `"` + marker, `"` + marker + "\xff\"", `"` + marker + `\ud800"`, marker + `x`,
		`"` + marker + `MiB"`, `"` + marker + `h"`, `"` + strings.Repeat(marker, 200) + `"`, `null`, `"a"`, `["a"]`, `1`, `"1s"`, `true`,
	}
	fields := strings.Split(base, "#")
	rapid.Check(t, func(t *rapid.T) {
		// Few fields at a time, so that the later checks are reached as well.
		var b strings.Builder
		b.WriteString(`{"image":"a"`)
		if rapid.Bool().Draw(t, "whole") {
			b.Reset()
			for i, part := range fields {
				b.WriteString(part)
				if i < len(fields)-1 {
					b.WriteString(rapid.SampledFrom(forms).Draw(t, "form"))
				}
			}
		} else {
			for _, name := range rapid.SliceOfNDistinct(rapid.SampledFrom([]string{
				`"env":{"A":#}`, `"command":[#]`, `"workdir":#`, `"user":#`, `"files":[{"path":#,"base64":#},{"path":#}]`, `"tmpfs":{"/x":#}`,
				`"network":#`, `"ttl":#`, `"pull":#`, `"labels":{"l":#}`, `"kind":#`, `"callback":{"url":#}`, `"resources":{"memory":#,"cpus":#}`,
				`"on_lost":#`, `"timeouts":{"stop":#}`, `"nope":#`,
			}), 1, 3, rapid.ID[string]).Draw(t, "fields") {
				for strings.Contains(name, "#") {
					name = strings.Replace(name, "#", rapid.SampledFrom(forms).Draw(t, "form"), 1)
				}
				b.WriteString("," + name)
			}
			b.WriteString("}")
		}
		body := b.String()
		if rapid.Float64Range(0, 1).Draw(t, "cut?") < 0.1 {
			body = body[:rapid.IntRange(0, len(body)).Draw(t, "cut")]
		}
		_, err := schemas.ParseSpec([]byte(body), schemas.DefaultPolicy())
		if err == nil {
			return
		}
		text, encErr := schemas.Encode(err)
		if encErr != nil {
			t.Fatal(encErr)
		}
		if strings.Contains(err.Error()+string(text), marker) {
			t.Fatalf("%s\ngives %s", body, text)
		}
	})
	for _, err := range []error{second(schemas.ParseTaskID("t-" + marker)), second(schemas.ParseWorkerID(marker + "!")), second(schemas.ParseSize(marker + "x"))} {
		if err == nil || strings.Contains(err.Error(), marker) {
			t.Error(err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func FuzzParseSpec(f *testing.F) {
	for _, seed := range []string{
		`{"image":"a"}`, `{"image":"a","env":{"A":"1","A":"2"}}`, `null`, `[[[[`, `{"image":"a","x":{"y":[1]}}`, "{\"image\":\"\xff\"}",
		`{"image":"a","files":[{"path":"../x","base64":"!"}],"tmpfs":{"/a":"1e9"},"resources":{"cpus":1e400,"memory":"99999999999999999999g"}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := schemas.ParseSpec(body, schemas.DefaultPolicy())
		if err != nil {
			var e *schemas.Error
			if !errors.As(err, &e) || e.Status < 400 || e.Status >= 500 || e.Code == "" || e.Detail == "" {
				t.Fatalf("%#v", err)
			}
			encode(t, e)
			return
		}
		if b := encode(t, s); len(b) > schemas.MaxSpecBytes {
			t.Fatalf("a spec of %d bytes was taken", len(b))
		}
		back, err := schemas.ParseSpec([]byte(encode(t, s)), schemas.DefaultPolicy())
		if err != nil || !reflect.DeepEqual(s, back) {
			t.Fatalf("%s\nbecame %s %v", encode(t, s), encode(t, back), err)
		}
	})
}

func FuzzDecodeStrict(f *testing.F) {
	for _, seed := range []string{`{"ttl":"1h"}`, `{"ttl":1}`, `{"ttl":"1h","ttl":"2h"}`, `{"ttl":"1h","x":1}`, "", " null", `{"ttl":"x"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var v schemas.ExtendRequest
		if err := schemas.DecodeStrict(body, &v); err != nil {
			encode(t, err)
			return
		}
		var back schemas.ExtendRequest
		if err := schemas.DecodeStrict([]byte(encode(t, v)), &back); err != nil || back != v {
			t.Fatalf("%v became %v: %v", v, back, err)
		}
	})
}
