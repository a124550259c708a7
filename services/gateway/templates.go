package gateway

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"dayfly.dev/ops"
	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/presets"
)

// Templates are those of a folder: presets of instances, by the names of their files.
type Templates = presets.Folder[schemas.Template]

// TemplateFault is a fault of a file of templates.
type TemplateFault = presets.Fault

// OpenTemplates reads a folder of templates. What is wrong with single files is in its
// Set, and no error.
func OpenTemplates(dir string, p schemas.Policy) (*Templates, error) {
	return presets.Open(dir, func(_ string, d presets.Document) (schemas.Template, []presets.Fault) {
		t, err := schemas.ParseTemplate(d.JSON, p)
		return t, d.Faults(err)
	})
}

// followTemplates reads the folder again and again until ctx ends.
func (g *Gateway) followTemplates(ctx context.Context) {
	if g.templates == nil {
		return
	}
	g.tellTemplates(g.templates.Set())
	g.templates.Follow(ctx, g.cfg.TemplatesEvery, g.tellTemplates)
}

// tellTemplates says in log and metrics what the folder says now.
func (g *Gateway) tellTemplates(s *presets.Set[schemas.Template]) {
	digest := g.templateDigest(s.Digest)
	g.log.Info().Int("templates", len(s.Presets)).Int("faults", len(s.Faults)).Str("digest", digest).Msg("templates read")
	for _, f := range s.Faults {
		g.log.Warn().Str("file", f.File).Int("line", f.Line).Int("column", f.Column).Str("field", f.Field).Str("error", f.Message).
			Msg("template is wrong; what it said before holds")
	}
	g.metrics.templates.Set(float64(len(s.Presets)))
	g.metrics.templateFaults.Set(float64(len(s.Faults)))
	if n, err := strconv.ParseUint(digest[:12], 16, 64); err == nil { // a float holds 48 bits exactly
		g.metrics.templateDigest.Set(float64(n))
	}
}

// templateDigest is what may be shown of the digest of files: they hold secrets, which
// whoever sees a plain one could guess and test. The site's key must be there.
func (g *Gateway) templateDigest(plain string) string {
	return g.endpoints.key.Digest("templates", plain)[:16]
}

// prepull lets workers hold the images of templates that say so, and no longer those of
// templates that are gone. It writes where its own templates have changed, so that
// gateways which differ do not write against each other for ever.
func (g *Gateway) prepull(ctx context.Context) {
	if g.templates == nil {
		return
	}
	s := g.templates.Set()
	if g.prepulled == s.Digest {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, g.cfg.OpTimeout)
	defer cancel()
	_, err := g.wantImages(ctx, func(all schemas.WantedImages) (schemas.WantedImages, error) {
		images := map[string][]schemas.WantedImage{} // by source: none, of those that want nothing more
		for _, i := range all.Items {
			if strings.HasPrefix(i.By, byTemplate) {
				images[i.By] = nil
			}
		}
		for _, p := range s.Presets {
			if t := p.Value; t.Prepull {
				images[byTemplate+p.Name] = []schemas.WantedImage{{Image: t.Spec.Image, Since: time.Now().UTC(),
					Constraints: t.Spec.Constraints, Credentials: t.Spec.Credentials}}
			}
		}
		changed := false
		for _, by := range slices.Sorted(maps.Keys(images)) {
			next, err := all.With(by, images[by])
			if err != nil && !errors.Is(err, schemas.ErrUnchanged) {
				return all, err
			}
			all, changed = next, changed || err == nil
		}
		if !changed {
			return all, schemas.ErrUnchanged
		}
		return all, nil
	})
	switch {
	case err == nil, errors.Is(err, schemas.ErrTooManyWanted):
		g.prepulled = s.Digest
	}
	if err != nil && ctx.Err() == nil {
		g.log.Warn().Err(err).Msg("workers cannot be asked to hold the images of templates")
	}
}

// byTemplate begins the sources of wanted images that are templates.
const byTemplate = "template:"

// templatesHealth lets /readyz tell of wrong files. They keep no gateway from working.
func (g *Gateway) templatesHealth(context.Context) error {
	s := g.templates.Set()
	said := fmt.Sprintf("%d templates", len(s.Presets))
	select {
	case <-g.endpoints.loaded:
		said += ", digest " + g.templateDigest(s.Digest)
	default:
	}
	if len(s.Faults) > 0 {
		said += fmt.Sprintf("; faults: %d, the first: %s", len(s.Faults), s.Faults[0])
	}
	return ops.Note(said)
}

// template finds one by its name.
func (g *Gateway) template(name string) (presets.Preset[schemas.Template], *schemas.Error) {
	if g.templates == nil {
		return presets.Preset[schemas.Template]{}, &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Field: "template",
			Detail: "this site has no templates; its operator gives them with --templates DIR"}
	}
	t, ok := g.templates.Set().Get(name)
	if !ok {
		return t, noTemplate()
	}
	return t, nil
}

func noTemplate() *schemas.Error {
	return &schemas.Error{Status: http.StatusNotFound, Code: schemas.CodeNotFound, Field: "template",
		Detail: "there is no such template; GET /v1/templates lists them"}
}

func (g *Gateway) viewTemplate(p presets.Preset[schemas.Template]) schemas.TemplateView {
	return schemas.TemplateView{Name: p.Name, Digest: g.templateDigest(p.Digest), ReadAt: p.ReadAt, Template: p.Value.Public()}
}

// listTemplates is GET /v1/templates.
func (g *Gateway) listTemplates(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	if err := g.awaited(r.Context(), g.endpoints.loaded); err != nil {
		return err
	}
	list := schemas.TemplateList{Items: []schemas.TemplateView{}}
	if g.templates != nil {
		s := g.templates.Set()
		list.Digest = g.templateDigest(s.Digest)
		for _, p := range s.Presets {
			list.Items = append(list.Items, g.viewTemplate(p))
		}
		for _, f := range s.Faults {
			list.Faults = append(list.Faults, schemas.TemplateFault(f))
		}
	}
	return answer(w, http.StatusOK, list)
}

// getTemplate is GET /v1/templates/{template}.
func (g *Gateway) getTemplate(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	t, refused := g.template(r.PathValue("template"))
	if refused != nil {
		return refused
	}
	if err := g.awaited(r.Context(), g.endpoints.loaded); err != nil {
		return err
	}
	return answer(w, http.StatusOK, g.viewTemplate(t))
}

const templatesEvery = 2 * time.Second
