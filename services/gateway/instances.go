package gateway

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"

	"dayfly.dev/bus"
	"dayfly.dev/ops/tracing"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/presets"
)

// instancePath takes template and owner from the path.
func instancePath(r *http.Request) (template, owner string, err error) {
	template, owner = r.PathValue("template"), r.PathValue("owner")
	if !presets.ValidName(template) {
		return "", "", noTemplate()
	}
	if e := schemas.CheckOwner(owner); e != nil {
		return "", "", e
	}
	return template, owner, nil
}

func noInstance() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Detail: "the owner has no instance of this template; PUT starts one"}
}

// instanceWait reads what a request waits for.
func (g *Gateway) instanceWait(w *response, r *http.Request) (patience, error) {
	q, err := parseQuery(w, r)
	if err != nil {
		return patience{}, err
	}
	if q.get("wait") == "done" {
		return patience{}, badQuery("wait", "must be running or ready")
	}
	return g.parsePatience(q)
}

// readOptional reads a body that may be left out.
func readOptional(w *response, r *http.Request, ask any) error {
	if r.ContentLength == 0 {
		return nil
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	return schemas.DecodeStrict(body, ask)
}

// putInstance is PUT /v1/instances/{template}/{owner}: 201 if it made the instance, 200 if
// there was one. One that is still ending is waited for, and is 409 if that takes too
// long.
func (g *Gateway) putInstance(w *response, r *http.Request) error {
	template, owner, err := instancePath(r)
	if err != nil {
		return err
	}
	wait, err := g.instanceWait(w, r)
	if err != nil {
		return err
	}
	var ask schemas.InstanceRequest
	if err := readOptional(w, r, &ask); err != nil {
		return err
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	preset, missing := g.template(template)
	want := wanted{template: template, owner: owner, trace: w.trace}
	if preset.Value.Shared {
		want.owner = ""
	}
	if missing != nil {
		want.refused = missing
	} else {
		want.spec, want.of, want.refused = preset.Value.Make(template, want.owner, ask, g.cfg.Policy)
		want.maxTTL = preset.Value.MaxTTL
	}
	began := time.Now()
	patient, enough := context.WithTimeout(r.Context(), max(wait.timeout, endingWait))
	defer enough()
	e, how, err := g.instances.ensure(patient, want)
	if err != nil {
		return err
	}
	g.metrics.instances.WithLabelValues(how).Inc()
	if wait.until != "" && how != instanceExists || wait.until != "" && !wait.satisfied(e.Value.State, e.Value.Ready) {
		w.route += "?wait"
		wait.timeout = max(time.Second, wait.timeout-time.Since(began))
		span := g.tracer.Start(w.trace, "wait", tracing.Inner)
		if later, err := g.await(r, schemas.TaskID(e.Key), wait); err == nil {
			e = later
		}
		span.End(nil)
	}
	status := http.StatusOK
	if how != instanceExists {
		status = http.StatusCreated
		w.Header().Set("Location", "/v1/instances/"+url.PathEscape(template)+"/"+escapeOwner(owner))
	}
	return g.showInstance(w, status, e, owner)
}

// escapeOwner is an owner in a path: dots alone would mean a folder.
func escapeOwner(owner string) string {
	if strings.Trim(owner, ".") == "" {
		return strings.ReplaceAll(owner, ".", "%2E")
	}
	return url.PathEscape(owner)
}

// endingWait is how long a PUT waits at the least for the end of the instance before.
const endingWait = 15 * time.Second

func (g *Gateway) showInstance(w *response, status int, e bus.Entry[record], owner string) error {
	t := g.present(e.Value.Record, e.Revision, time.Now())
	if t.Instance == nil {
		return noInstance()
	}
	return answer(w, status, t.AsInstance(owner))
}

// getInstance is GET /v1/instances/{template}/{owner}.
func (g *Gateway) getInstance(w *response, r *http.Request) error {
	template, owner, err := instancePath(r)
	if err != nil {
		return err
	}
	wait, err := g.instanceWait(w, r)
	if err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.instances.find(ctx, template, owner)
	if err != nil {
		return err
	}
	if e, err = g.asWanted(w, r, e, wait); err != nil {
		return err
	}
	return g.showInstance(w, http.StatusOK, e, owner)
}

// renewInstance is PATCH /v1/instances/{template}/{owner}.
func (g *Gateway) renewInstance(w *response, r *http.Request) error {
	template, owner, err := instancePath(r)
	if err != nil {
		return err
	}
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	body, err := readBody(w, r)
	if err != nil {
		return err
	}
	var ask schemas.RenewRequest
	if err := schemas.DecodeStrict(body, &ask); err != nil {
		return err
	}
	if ask.Renew == (ask.TTL != 0) {
		return &schemas.Error{Status: http.StatusUnprocessableEntity, Code: schemas.CodeInvalidValue, Field: "renew", Detail: "give one of renew: true and ttl"}
	}
	ctx, cancel := g.onBus(r)
	e, err := g.instances.find(ctx, template, owner)
	cancel()
	if err != nil {
		return err
	}
	extend := schemas.AskExtend{TTL: ask.TTL, Renewal: true}
	if ask.Renew {
		extend.TTL = e.Value.Spec.TTL
	}
	e, status, err := g.extendTask(r, schemas.TaskID(e.Key), nil, extend)
	var refused *schemas.Error
	if errors.As(err, &refused) {
		g.metrics.renewals.WithLabelValues(string(refused.Code)).Inc()
	}
	if err != nil {
		return err
	}
	g.metrics.renewals.WithLabelValues("ok").Inc()
	return g.showInstance(w, status, e, owner)
}

// endInstance is DELETE /v1/instances/{template}/{owner}.
func (g *Gateway) endInstance(w *response, r *http.Request) error {
	template, owner, err := instancePath(r)
	if err != nil {
		return err
	}
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	grace, err := q.duration("grace", -1, 24*time.Hour)
	if err != nil {
		return err
	}
	ctx, cancel := g.onBus(r)
	defer cancel()
	e, err := g.instances.find(ctx, template, owner)
	if err != nil {
		return err
	}
	if e.Value.Instance.Owner == "" {
		return &schemas.Error{Status: http.StatusConflict, Code: schemas.CodeShared, Task: e.Value.ID, State: e.Value.State,
			Detail: "all owners share this instance, so none of them ends it; DELETE of its task does, for all"}
	}
	if e, err = g.cancelTask(ctx, e.Value.ID, nil, grace); err != nil {
		return err
	}
	return g.showInstance(w, http.StatusOK, e, owner)
}

// listInstances is GET /v1/instances: in an order of its own, from the view.
func (g *Gateway) listInstances(w *response, r *http.Request) error {
	q, err := parseQuery(w, r)
	if err != nil {
		return err
	}
	limit, err := q.number("limit", listDefault, 1, listMax)
	if err != nil {
		return err
	}
	if q.has("owner") {
		if e := schemas.CheckOwner(q.get("owner")); e != nil {
			return badQuery("owner", e.Detail)
		}
	}
	after := ""
	if q.has("cursor") {
		b, err := base64.RawURLEncoding.Strict().DecodeString(q.get("cursor"))
		if err != nil || len(b) == 0 || len(b) > 256 {
			return badQuery("cursor", "must be next_cursor of the page before")
		}
		after = string(b)
	}
	if err := g.upToDate(r.Context()); err != nil {
		return err
	}
	page := schemas.InstanceList{Items: []schemas.Instance{}}
	now := time.Now()
	for looked := 0; ; {
		keys := g.instances.index.before(after, min(256, g.cfg.ListLook))
		for _, key := range keys {
			if len(page.Items) == limit {
				page.NextCursor = base64.RawURLEncoding.EncodeToString([]byte(after))
				return answer(w, http.StatusOK, page)
			}
			after = key
			e, _, ok := g.instances.view.Get(key)
			if !ok || q.has("template") && e.Template != q.get("template") || q.has("owner") && e.Owner != q.get("owner") {
				continue
			}
			if t, ok, err := g.listed(string(e.Task), filter{}, now); err != nil {
				return err
			} else if ok && t.Instance != nil {
				page.Items = append(page.Items, t.AsInstance(e.Owner))
			}
		}
		if looked += len(keys); len(keys) == 0 || r.Context().Err() != nil {
			return answer(w, http.StatusOK, page)
		}
		if looked >= g.cfg.ListLook {
			page.NextCursor = base64.RawURLEncoding.EncodeToString([]byte(after))
			return answer(w, http.StatusOK, page)
		}
	}
}
