package reaper

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"dayfly.dev/schemas"
)

func TestMayReach(t *testing.T) {
	for address, want := range map[string]bool{
		"8.8.8.8": true, "1.1.1.1": true, "2606:4700:4700::1111": true, "172.32.0.1": true, "100.128.0.1": true,
		"127.0.0.1": false, "127.9.9.9": false, "10.1.2.3": false, "172.16.0.1": false, "172.31.255.255": false, "192.168.1.1": false,
		"169.254.169.254": false, "100.100.100.200": false, "168.63.129.16": false, "0.0.0.0": false, "0.1.2.3": false,
		"255.255.255.255": false, "224.0.0.1": false, "198.18.0.1": false, "240.0.0.1": false, "192.0.0.8": false,
		"::1": false, "::": false, "fe80::1%eth0": false, "fd00:ec2::254": false, "fc00::1": false, "ff02::1": false,
		"::ffff:10.0.0.1": false, "::ffff:8.8.8.8": true, "::10.0.0.1": false, "64:ff9b::a00:1": false, "2002:a00:1::": false, "2001:0:1::": false,
		"10.9.0.1": true, "::ffff:10.9.0.1": true, "fd12::7": true,
	} {
		allow := []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("fd12::/64")}
		if got := mayReach(netip.MustParseAddr(address), allow); got != want {
			t.Errorf("%s: %v", address, got)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 21, 8, 0, 0, 0, time.UTC)
	date := func(d time.Duration) string { return now.Add(d).Format(http.TimeFormat) }
	for name, c := range map[string]struct {
		after, date string
		want        time.Duration
	}{
		"nothing":                     {"", "", 0},
		"seconds":                     {"120", date(time.Hour), 2 * time.Minute},
		"more seconds than fit":       {"99999999999999999999", "", 0},
		"negative":                    {"-1", "", 0},
		"a word":                      {"soon", "", 0},
		"a date":                      {date(90 * time.Second), "", 90 * time.Second},
		"a date of a clock that errs": {date(time.Hour + 90*time.Second), date(time.Hour), 90 * time.Second},
		"a date that is past":         {date(-time.Hour), date(0), 0},
		"an older form of date":       {now.Add(time.Minute).Format(time.RFC850), date(0), time.Minute},
	} {
		h := http.Header{"Retry-After": {c.after}, "Date": {c.date}}
		if got := retryAfterOf(h, now); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// What the receiver asks for counts, up to the longest pause; no less than our own pause.
func TestTheReceiverSaysWhenToTryAgain(t *testing.T) {
	now := time.Date(2026, 11, 21, 8, 0, 0, 0, time.UTC)
	c := courier{cfg: defaultCallbacks(), retention: 24 * time.Hour}
	for name, test := range map[string]struct {
		after       time.Duration
		tries       int
		least, most time.Duration
	}{
		"nothing said":            {0, 1, c.cfg.First / 2, c.cfg.First},
		"two minutes":             {2 * time.Minute, 1, 2 * time.Minute, 2 * time.Minute},
		"a week":                  {7 * 24 * time.Hour, 1, c.cfg.Most, c.cfg.Most},
		"less than our own pause": {time.Second, 30, c.cfg.Most / 2, c.cfg.Most},
	} {
		d, word := c.judge(schemas.Delivery{State: schemas.DeliveryPending, Tries: test.tries}, outcome{status: 503, word: "status 503", after: test.after}, now, now)
		if pause := d.NextAt.Sub(now); word != "retry" || pause < test.least || pause > test.most {
			t.Errorf("%s: %s after %s", name, word, pause)
		}
	}
	d, word := c.judge(schemas.Delivery{State: schemas.DeliveryPending, Tries: 1}, outcome{status: 503, word: "status 503", after: time.Hour}, now.Add(-c.cfg.For+time.Minute), now)
	if d.State != schemas.DeliveryGaveUp || word != "gave_up" {
		t.Errorf("a pause beyond the last moment: %+v", d)
	}
}

func TestLanes(t *testing.T) {
	l := newLanes(2, 3)
	var began []string
	for i := range 4 {
		began = append(began, l.add(fmt.Sprintf("a%d", i), "a")...)
	}
	began = append(began, l.add("a1", "a")...) // again
	for i := range 2 {
		began = append(began, l.add(fmt.Sprintf("b%d", i), "b")...)
	}
	if want := []string{"a0", "a1", "b0"}; !slices.Equal(began, want) {
		t.Fatalf("%v, want %v", began, want)
	}
	for len(began) > 0 {
		id := began[0]
		began = append(began[1:], l.done(id)...)
	}
	if l.working != 0 || len(l.hosts)+len(l.ids)+len(l.turn) != 0 {
		t.Errorf("left behind: %+v", l)
	}
}
