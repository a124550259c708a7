package schemas_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

func parseTemplate(t *testing.T, text string) schemas.Template {
	t.Helper()
	got, err := schemas.ParseTemplate([]byte(text), schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestATemplateIsASpecAndMore(t *testing.T) {
	got := parseTemplate(t, `{"image": "busybox", "user": "image", "ttl": "10m", "max_ttl": "1h", "extensions": 0, "description": "a", "prepull": true,
		"ports": [{"name": "sh", "port": 9, "protocol": "tcp"}], "connection": "ssh -p {port} ctf@{sh.host}",
		"values": {"flag": {"env": "FLAG"}, "key": {"path": "keys/key", "optional": true}}, "secrets": [{"env": "ADMIN", "value": "hunter2"}]}`)
	if got.MaxTTL.Std() != time.Hour || got.Extensions == nil || *got.Extensions != 0 || !got.Prepull || got.Spec.Resources.Pids != 256 || got.Spec.OnLost != schemas.OnLostWait {
		t.Errorf("%+v", got)
	}
	spec, of, err := got.Make("pwn", "ada", schemas.InstanceRequest{Values: map[string]string{"flag": "x"}, TTL: schemas.Duration(time.Minute)}, schemas.DefaultPolicy())
	if err != nil {
		t.Fatal(err)
	}
	if len(spec.Secrets) != 2 || spec.Secrets[1].Env != "FLAG" || spec.Secrets[1].Value != "x" || spec.TTL.Std() != time.Minute ||
		spec.Labels["owner"] != "ada" || of.Key() != schemas.InstanceKey("pwn", "ada") || *of.Most != 0 {
		t.Errorf("%+v %+v", spec, of)
	}
	if len(got.Spec.Secrets) != 1 || len(got.Spec.Labels) != 0 {
		t.Error("an instance has changed its template")
	}
	if shown := encode(t, got.Public()); strings.Contains(shown, "hunter2") || !strings.Contains(shown, "ADMIN") {
		t.Error(shown)
	}
}

func TestTemplatesThatAreRefused(t *testing.T) {
	for name, c := range map[string]struct {
		text, field string
		code        schemas.Code
	}{
		"no image":                       {`{}`, "image", schemas.CodeInvalidValue},
		"an unknown field":               {`{"image": "a", "extension": 3}`, "extension", schemas.CodeUnknownField},
		"an unknown field of a value":    {`{"image": "a", "values": {"f": {"envv": "F"}}}`, "values.f.envv", schemas.CodeUnknownField},
		"a wrong type":                   {`{"image": "a", "extensions": "3"}`, "extensions", schemas.CodeInvalidType},
		"a max_ttl below the ttl":        {`{"image": "a", "ttl": "2h", "max_ttl": "1h"}`, "max_ttl", schemas.CodeInvalidValue},
		"a max_ttl above the site's":     {`{"image": "a", "max_ttl": "48h"}`, "max_ttl", schemas.CodeInvalidValue},
		"extensions below 0":             {`{"image": "a", "extensions": -1}`, "extensions", schemas.CodeInvalidValue},
		"values of a shared one":         {`{"image": "a", "shared": true, "values": {"f": {"env": "F"}}}`, "values", schemas.CodeInvalidValue},
		"a value that goes nowhere":      {`{"image": "a", "values": {"f": {}}}`, "values.f", schemas.CodeInvalidValue},
		"a value that goes to two":       {`{"image": "a", "values": {"f": {"env": "F", "path": "f"}}}`, "values.f", schemas.CodeInvalidValue},
		"a value in env already":         {`{"image": "a", "env": {"F": "1"}, "values": {"f": {"env": "F"}}}`, "values.f.env", schemas.CodeInvalidValue},
		"a value in secrets already":     {`{"image": "a", "secrets": [{"env": "F", "value": "1"}], "values": {"f": {"env": "F"}}}`, "values.f.env", schemas.CodeInvalidValue},
		"a value in another value":       {`{"image": "a", "values": {"f": {"path": "x"}, "g": {"path": "x/y"}}}`, "values.g.path", schemas.CodeInvalidValue},
		"a path that leads out":          {`{"image": "a", "values": {"f": {"path": "../x"}}}`, "values.f.path", schemas.CodeInvalidValue},
		"a name of a value with a space": {`{"image": "a", "values": {"f g": {"env": "F"}}}`, "values", schemas.CodeInvalidValue},
		"a label of dayfly's own":        {`{"image": "a", "labels": {"owner": "x"}}`, "labels.owner", schemas.CodeInvalidValue},
		"a connection to no port":        {`{"image": "a", "ports": [{"name": "web", "port": 80}], "connection": "nc {db.host}"}`, "connection", schemas.CodeInvalidValue},
		"a connection with other words":  {`{"image": "a", "connection": "nc {owner}"}`, "connection", schemas.CodeInvalidValue},
		"a connection that is not ended": {`{"image": "a", "connection": "nc {host"}`, "connection", schemas.CodeInvalidValue},
		"a connection with a brace":      {`{"image": "a", "connection": "nc host}"}`, "connection", schemas.CodeInvalidValue},
		"a connection of two lines":      {`{"image": "a", "connection": "nc\n{host}"}`, "connection", schemas.CodeInvalidValue},
		"no JSON object":                 {`null`, "", schemas.CodeInvalidType},
		"a field twice":                  {`{"image": "a", "image": "b"}`, "image", schemas.CodeDuplicateField},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := schemas.ParseTemplate([]byte(c.text), schemas.DefaultPolicy())
			var e *schemas.Error
			if !errors.As(err, &e) || e.Code != c.code || e.Field != c.field {
				t.Errorf("%+v", err)
			}
		})
	}
}

func TestSecretsThatAreRefused(t *testing.T) {
	for name, c := range map[string]struct{ fields, field string }{
		"nowhere":            {`"secrets": [{"value": "v"}]`, "secrets.0"},
		"two places":         {`"secrets": [{"env": "A", "path": "a", "value": "v"}]`, "secrets.0"},
		"a bad name":         {`"secrets": [{"env": "A B", "value": "v"}]`, "secrets.0.env"},
		"a newline":          {`"secrets": [{"env": "A", "value": "hunter\n2"}]`, "secrets.0.value"},
		"a name of env":      {`"env": {"A": "1"}, "secrets": [{"env": "A", "value": "v"}]`, "secrets.0.env"},
		"twice":              {`"secrets": [{"env": "A", "value": "v"}, {"env": "A", "value": "v"}]`, "secrets.1.env"},
		"a path of files":    {`"files": [{"path": "a", "content": "1"}], "secrets": [{"path": "a", "value": "v"}]`, "secrets.0.path"},
		"below a file":       {`"files": [{"path": "a", "content": "1"}], "secrets": [{"path": "a/b", "value": "v"}]`, "secrets.0.path"},
		"a file below it":    {`"files": [{"path": "a/b", "content": "1"}], "secrets": [{"path": "a", "value": "v"}]`, "files.0.path"},
		"out of the folder":  {`"secrets": [{"path": "/etc/passwd", "value": "v"}]`, "secrets.0.path"},
		"larger than a spec": {`"secrets": [{"path": "a", "value": "` + strings.Repeat("x", 64<<10) + `"}]`, "secrets"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := schemas.ParseSpec([]byte(`{"image": "a", `+c.fields+`}`), schemas.DefaultPolicy())
			var e *schemas.Error
			if !errors.As(err, &e) || e.Field != c.field || strings.Contains(e.Error(), "hunter") {
				t.Errorf("%+v", err)
			}
		})
	}
}

func TestAnIDAfterAnotherIsGreater(t *testing.T) {
	now := time.Now()
	random := strings.NewReader(strings.Repeat("\x00", 100))
	ahead, err := schemas.NewTaskID(now.Add(time.Hour), strings.NewReader(strings.Repeat("\xff", 10)))
	if err != nil {
		t.Fatal(err)
	}
	for _, before := range []schemas.TaskID{"", ahead, "nonsense"} {
		next, err := schemas.NewTaskIDAfter(before, now, random)
		if err != nil || before != "nonsense" && next <= before {
			t.Errorf("%s after %s (%v)", next, before, err)
		}
	}
}
