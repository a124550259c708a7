package kinds

import (
	"fmt"
	"slices"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	faults "github.com/santhosh-tekuri/jsonschema/v6/kind"

	"dayfly.dev/schemas"
)

// leaves gives the faults that are nobody's cause: those that a client can act on.
func leaves(e *jsonschema.ValidationError) (list []*jsonschema.ValidationError) {
	switch e.ErrorKind.(type) {
	case *faults.AnyOf, *faults.OneOf: // none of several fits: what is wrong with each says little
		return []*jsonschema.ValidationError{e}
	}
	if len(e.Causes) == 0 {
		return []*jsonschema.ValidationError{e}
	}
	for _, c := range e.Causes {
		list = append(list, leaves(c)...)
	}
	return list
}

// places gives where a fault is: at each field that should not be there.
func places(e *jsonschema.ValidationError) (list [][]string) {
	extra, ok := e.ErrorKind.(*faults.AdditionalProperties)
	if !ok {
		return [][]string{e.InstanceLocation}
	}
	for _, name := range extra.Properties[:min(len(extra.Properties), schemas.MaxFaults)] {
		list = append(list, append(slices.Clone(e.InstanceLocation), name))
	}
	return list
}

// field names a place in the payload. Names of members are the client's own words, so they
// are cut where they are long.
func field(at []string) string {
	parts := []string{"payload"}
	for _, p := range at {
		if len(p) > 64 {
			p = p[:64] + "…"
		}
		parts = append(parts, strings.ToValidUTF8(p, ""))
	}
	return strings.Join(parts, ".")
}

func code(e *jsonschema.ValidationError) schemas.Code {
	switch e.ErrorKind.(type) {
	case *faults.Type:
		return schemas.CodeInvalidType
	case *faults.AdditionalProperties:
		return schemas.CodeUnknownField
	}
	return schemas.CodeInvalidValue
}

// message says what a value must be, and never what it is.
func message(e *jsonschema.ValidationError) string {
	switch k := e.ErrorKind.(type) {
	case *faults.Type:
		return "must be of type " + strings.Join(k.Want, " or ")
	case *faults.Required:
		return "needs " + strings.Join(k.Missing, ", ")
	case *faults.AdditionalProperties:
		return "is no field of the kind's payload"
	case *faults.Enum:
		var words []string
		for _, v := range k.Want {
			words = append(words, fmt.Sprintf("%v", v))
		}
		return "must be one of " + strings.Join(words, ", ")
	case *faults.Const:
		return fmt.Sprintf("must be %v", k.Want)
	case *faults.Pattern:
		return "must match the pattern " + k.Want
	case *faults.Format:
		return "must have the format " + k.Want
	case *faults.MinLength:
		return fmt.Sprintf("must have at least %d characters", k.Want)
	case *faults.MaxLength:
		return fmt.Sprintf("must have at most %d characters", k.Want)
	case *faults.MinItems:
		return fmt.Sprintf("must have at least %d items", k.Want)
	case *faults.MaxItems:
		return fmt.Sprintf("must have at most %d items", k.Want)
	case *faults.UniqueItems:
		return "must not have the same item twice"
	case *faults.MinProperties:
		return fmt.Sprintf("must have at least %d fields", k.Want)
	case *faults.MaxProperties:
		return fmt.Sprintf("must have at most %d fields", k.Want)
	case *faults.Minimum:
		return "must be at least " + k.Want.RatString()
	case *faults.Maximum:
		return "must be at most " + k.Want.RatString()
	case *faults.ExclusiveMinimum:
		return "must be more than " + k.Want.RatString()
	case *faults.ExclusiveMaximum:
		return "must be less than " + k.Want.RatString()
	case *faults.MultipleOf:
		return "must be a multiple of " + k.Want.RatString()
	case *faults.OneOf:
		return "must fit exactly one of the forms that the kind takes"
	case *faults.AnyOf:
		return "must fit one of the forms that the kind takes"
	}
	return "does not fit the kind's schema"
}
