package schemas_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

func TestCallbacksOfASpec(t *testing.T) {
	long := strings.Repeat("x", 3000)
	for name, c := range map[string]struct{ callback, field string }{
		"https":            {`{"url":"https://a.example/x?y=1","secret":"0123456789abcdef"}`, ""},
		"without a secret": {`{"url":"http://a.example:8080"}`, ""},
		"no url":           {`{}`, "callback.url"},
		"another scheme":   {`{"url":"ftp://a"}`, "callback.url"},
		"no host":          {`{"url":"http:///x"}`, "callback.url"},
		"a path":           {`{"url":"/x"}`, "callback.url"},
		"a bad port":       {`{"url":"http://a:99999"}`, "callback.url"},
		"a user":           {`{"url":"http://me:word@a"}`, "callback.url"},
		"a fragment":       {`{"url":"http://a#x"}`, "callback.url"},
		"a newline":        {`{"url":"http://a/\nx"}`, "callback.url"},
		"a long url":       {`{"url":"http://a/` + long + `"}`, "callback.url"},
		"a short secret":   {`{"url":"http://a","secret":"short"}`, "callback.secret"},
		"a long secret":    {`{"url":"http://a","secret":"` + long + `"}`, "callback.secret"},
		"another field":    {`{"url":"http://a","method":"PUT"}`, "callback.method"},
	} {
		_, err := schemas.ParseSpec([]byte(`{"image":"a","callback":`+c.callback+`}`), schemas.DefaultPolicy())
		var e *schemas.Error
		switch {
		case c.field == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.field != "" && (!errors.As(err, &e) || e.Field != c.field):
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTheSecretOfACallbackStaysInside(t *testing.T) {
	const secret = "0123456789abcdef"
	r := filled[schemas.Record]()
	r.State = schemas.Running
	r.Spec.Callback = &schemas.Callback{URL: "http://a.example/x", Secret: secret}
	view := encode(t, r.View(7, t0))
	if strings.Contains(view, secret) || !strings.Contains(view, "http://a.example/x") {
		t.Errorf("shown: %s", view)
	}
	r.Cancel, r.ExpiresAt = nil, t0.Add(time.Hour)
	if o := encode(t, schemas.NewOrder(r, 7, r.Assignment(), t0)); strings.Contains(o, "a.example") {
		t.Errorf("its worker hears of it: %s", o)
	}
	if r.Spec.Callback == nil || r.Spec.Callback.Secret != secret {
		t.Error("lost from the record")
	}
}

func TestOnlyAFinalRecordIsAnnounced(t *testing.T) {
	r := schemas.NewRecord("t-1", schemas.Spec{Callback: &schemas.Callback{URL: "https://a.example:8443/x"}}, schemas.DefaultPolicy(), schemas.Meta{At: t0})
	if h := r.Headers(); h[schemas.HeaderCallback] != nil {
		t.Error(h)
	}
	r, err := schemas.Next(r, schemas.AskCancel{Meta: schemas.Meta{At: t0.Add(time.Minute)}})
	if err != nil {
		t.Fatal(err)
	}
	since, host, ok := schemas.ParseCallbackHeader(r.Headers()[schemas.HeaderCallback][0])
	if !ok || host != "a.example:8443" || !since.Equal(t0.Add(time.Minute).Truncate(time.Second)) {
		t.Error(since, host, ok)
	}
	r.Spec.Callback = nil
	if h := r.Headers(); h[schemas.HeaderCallback] != nil {
		t.Error(h)
	}
}

// The signature as other programs compute it:
// printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac 0123456789abcdef
func TestSignature(t *testing.T) {
	b := schemas.Callback{Secret: "0123456789abcdef"}
	const want = "t=1700000000,v1=9eb18f493f8ec135d9eb2dad817c369bb4e9cbfa818657897a7437c1cd8c3a23"
	if got := b.Signature(time.Unix(1_700_000_000, 0), []byte(`{"a":1}`)); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
