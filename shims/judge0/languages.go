package judge0

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"dayfly.dev/shims/shim"
)

// Language is a language that submissions may be in.
type Language struct {
	ID         int    `json:"id"`
	Name       string `json:"name"`
	IsArchived bool   `json:"is_archived"`
}

// delivered are the kinds of dayfly's own judges, with Judge0's ids of the same languages,
// whatever the version.
var delivered = []struct {
	kind, name string
	ids        []int
}{
	{"judge-sh", "Bash", []int{46}},
	{"judge-c", "C (GCC)", []int{50, 48, 49, 103}},
	{"judge-python", "Python (3)", []int{71, 92, 100, 109, 113}},
}

// ownKind begins the name of a site's own kind for the language with the id that follows.
const ownKind = "judge0-"

// kindOf is the kind for a language.
func kindOf(id int) string {
	for _, d := range delivered {
		if slices.Contains(d.ids, id) {
			return d.kind
		}
	}
	return ownKind + strconv.Itoa(id)
}

// nameOf is the name of a language, without asking for the site's own.
func nameOf(id int) string {
	for _, d := range delivered {
		if slices.Contains(d.ids, id) {
			return d.name
		}
	}
	return kindOf(id)
}

// spoken are the languages whose kinds the site has, by id.
func (h handler) spoken(ctx context.Context) ([]Language, error) {
	kinds, err := h.Client.Kinds(ctx)
	if err != nil {
		return nil, err
	}
	list := []Language{}
	for _, k := range kinds.Items {
		if !k.Judge {
			continue
		}
		for _, d := range delivered {
			if d.kind == k.Name {
				for _, id := range d.ids {
					list = append(list, Language{ID: id, Name: d.name})
				}
			}
		}
		number, own := strings.CutPrefix(k.Name, ownKind)
		if id, err := strconv.Atoi(number); own && err == nil && kindOf(id) == k.Name {
			list = append(list, Language{ID: id, Name: cmp.Or(k.About, k.Name)})
		}
	}
	slices.SortFunc(list, func(a, b Language) int { return a.ID - b.ID })
	return list, nil
}

func (h handler) languages(w http.ResponseWriter, r *http.Request) error {
	list, err := h.spoken(r.Context())
	if err != nil {
		return err
	}
	return shim.Answer(w, http.StatusOK, list)
}

func (h handler) language(w http.ResponseWriter, r *http.Request) error {
	list, err := h.spoken(r.Context())
	if err != nil {
		return err
	}
	for _, l := range list {
		if strconv.Itoa(l.ID) == r.PathValue("id") {
			return shim.Answer(w, http.StatusOK, l)
		}
	}
	return shim.Refuse(http.StatusNotFound, "there is no such language")
}
