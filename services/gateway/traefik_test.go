package gateway_test

import (
	"bytes"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"dayfly.dev/services/gateway"
)

// What the published schema of Traefik v3's dynamic configuration
// (https://json.schemastore.org/traefik-v3-file-provider.json) says of routers and load
// balancers: these fields and no others, and at least one server. Nothing is there and empty:
// Traefik refuses that as "cannot be a standalone element".
const traefikSchema = `{
	"type": "object", "additionalProperties": false, "properties": {"http": {
		"type": "object", "additionalProperties": false, "minProperties": 1, "properties": {
			"routers": {"type": "object", "minProperties": 1, "additionalProperties": {
				"type": "object", "additionalProperties": false, "required": ["rule", "service"], "properties": {
					"entryPoints": {"type": "array"}, "middlewares": {"type": "array"}, "tls": {"type": "object"},
					"rule": {"type": "string"}, "ruleSyntax": {"type": "string"}, "service": {"type": "string"}, "priority": {"type": "integer", "minimum": 0}}}},
			"services": {"type": "object", "minProperties": 1, "additionalProperties": {
				"type": "object", "additionalProperties": false, "properties": {"loadBalancer": {
					"type": "object", "additionalProperties": false, "required": ["servers"], "properties": {
						"servers": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["url"], "properties": {"url": {"type": "string"}}}},
						"passHostHeader": {"type": "boolean"}, "sticky": {"type": "object"}, "healthCheck": {"type": "object"},
						"responseForwarding": {"type": "object"}, "serversTransport": {"type": "string"}}}}}},
			"middlewares": {"type": "object", "minProperties": 1}, "serversTransports": {"type": "object"}}}}}`

func TestTraefikReadsWhatWeSay(t *testing.T) {
	text, err := jsonschema.UnmarshalJSON(bytes.NewReader([]byte(traefikSchema)))
	if err != nil {
		t.Fatal(err)
	}
	compiler := jsonschema.NewCompiler()
	if err := compiler.AddResource("traefik.json", text); err != nil {
		t.Fatal(err)
	}
	schema := compiler.MustCompile("traefik.json")
	w := newWorld(t, gateway.Config{IngressBackends: []string{"http://10.0.0.1:8081"}})
	for range 3 { // without any task too
		got, err := jsonschema.UnmarshalJSON(bytes.NewReader(w.get("/v1/ingress/traefik").body))
		if err == nil {
			err = schema.Validate(got)
		}
		if err != nil {
			t.Errorf("%+v: %v", got, err)
		}
		w.create(`{"image":"a","ports":[{"name":"web","port":80},{"name":"api","port":81,"protocol":"h2c"}]}`)
	}
}
