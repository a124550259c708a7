package gateway

import (
	"context"
	"net/http"
	"time"

	"github.com/rs/zerolog"

	"dayfly.dev/schemas"
	"dayfly.dev/services/gateway/kinds"
	"dayfly.dev/services/gateway/presets"
)

// kindsEvery is how often the folder of kinds is looked at.
const kindsEvery = 2 * time.Second

// followKinds reads the kinds again whenever their folder changes, until ctx ends. One that
// is not right changes nothing.
func followKinds(ctx context.Context, f *kinds.Folder, log zerolog.Logger) {
	f.Follow(ctx, kindsEvery, func(names []string, faults []presets.Fault) {
		for _, fault := range faults {
			log.Error().Str("fault", fault.String()).Msg("a kind is not read; that of before stays")
		}
		log.Info().Strs("kinds", names).Msg("kinds read")
	})
}

// listKinds is GET /v1/kinds.
func (g *Gateway) listKinds(w *response, r *http.Request) error {
	if _, err := parseQuery(w, r); err != nil {
		return err
	}
	list := schemas.KindList{Items: []schemas.Kind{}, Only: g.cfg.KindsOnly}
	if g.cfg.Kinds != nil {
		list.Items = append(list.Items, g.cfg.Kinds.List()...)
	}
	return answer(w, http.StatusOK, list)
}
