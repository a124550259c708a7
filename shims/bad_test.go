package shims_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"dayfly.dev/client"
	"dayfly.dev/client/clienttest"
	"dayfly.dev/schemas"
	"dayfly.dev/shims"
)

const token = "a-token-that-nobody-guesses"

// What callers do wrong is answered in each protocol's own form, and makes no task.
func TestBadRequests(t *testing.T) {
	const large = `{"x": "LARGE"}`
	for name, p := range map[string]struct {
		header, fault string // where the token is, "" for the body; what an answer that refuses has
		requests      []string
	}{
		"gridx": {"Authorization: Bearer ", `"error"`, []string{
			"POST /jobs 400 {", "POST /jobs 413 " + large, "POST /jobs 422 []", `POST /jobs 422 {"kind": "python", "payload": null}`,
			`POST /jobs 422 {"kind": "python", "payload": {"script_text": 1}}`, `POST /jobs 422 {"kind": "python", "payload": {"script_text": "1"}, "limits": {"cpus": -1}}`,
			"PUT /jobs 405 {}", "DELETE /jobs/1 405", "GET /jobs/.. 404", "GET /jobs/..%2f..%2fv1%2ftasks 404", "GET /jobs/t-00000000000000000000000000 404", "GET /other 404",
		}},
		"hub": {"Authorization: Bearer ", `"Error"`, []string{
			"POST /create 400 {", "POST /create 413 " + large, `POST /create 422 {"image": 1}`, `POST /create 422 {"image": "busybox", "cpu": "NaN"}`, `POST /create 422 {"image": "busybox", "mem": -1}`,
			`POST /create 422 {"image": "busybox", "files": {"../../etc/passwd": ""}}`, `POST /create 422 {"image": "busybox", "files": {"/work/../../etc": ""}}`,
			`POST /create 422 {"image": "busybox", "files": {"a\u0000b": ""}}`, `POST /create 422 {"image": "busybox", "port": 70000}`,
			"GET /create 405", "PUT /delete?id=x 405", "GET /get 404", "GET /get?id=../x 404", `PUT /files 404 {"id": "t-00000000000000000000000000", "files": {"a": ""}}`, `POST /run 404 {"id": "x"}`,
		}},
		"judge0": {"X-Auth-Token: ", `":`, []string{
			"POST /submissions 400 {", "POST /submissions 413 " + large, "POST /submissions 422 {}", `POST /submissions 422 {"source_code": 1}`,
			`POST /submissions 422 {"source_code": "x", "language_id": -46}`, `POST /submissions 422 {"source_code": "x", "language_id": 1e300}`, `POST /submissions 422 {"source_code": "x", "language_id": 4.5}`,
			`POST /submissions?base64_encoded=true 422 {"source_code": "@", "language_id": 46}`, `POST /submissions?base64_encoded=true 422 {"source_code": "/g==", "language_id": 46}`,
			`POST /submissions 422 {"source_code": "x", "language_id": 46, "additional_files": "@"}`, `POST /submissions 422 {"source_code": "x", "language_id": 46, "memory_limit": 1}`,
			`POST /submissions/batch 400 {"submissions": null}`, `POST /submissions/batch 400 {"submissions": [` + strings.Repeat("{},", 20) + `{}]}`, `POST /submissions/batch 422 {"submissions": [{}]}`,
			"GET /submissions/batch 400", "GET /submissions/x 404", "GET /submissions/..%2fx 404", "GET /submissions/x?fields=id 400", "DELETE /submissions/x 400", "GET /submissions 403", "PUT /submissions 405",
		}},
		"mhs20": {"Authorization: Bearer ", `"HTTPStatusCode"`, []string{
			"POST /tasks 400 {", "POST /tasks 400 " + large, "POST /tasks 400 {}", `POST /tasks 400 {"Task": {"ID": "../x"}}`, `POST /tasks 400 {"Task": 1}`,
			"PUT /tasks 405 {}", "DELETE /tasks/x 400", "DELETE /tasks/21b23589-5d2d-4731-b5c9-a97e9832d021 404", "POST /nodes 405",
		}},
		"poseidon": {"Authorization: Bearer ", `"success":false`, []string{
			"POST /start 400 {", "POST /start 413 " + large, "POST /start 422 {}", `POST /start 422 {"user_id": "a\nb", "challenge_id": "x"}`, `POST /start 422 {"user_id": "a", "challenge_id": "../x"}`,
			`POST /start 422 {"user_id": "a", "challenge_id": "x", "mem_limit": -1}`, `POST /start 422 {"user_id": "a", "challenge_id": "x", "nano_cpus": 0}`, `POST /start 422 {"user_id": 1, "challenge_id": "x"}`,
			"GET /start 405", `POST /stop 404 {"user_id": "a", "challenge_id": "x"}`, "POST /stop 422 {}", "POST /stop 400",
		}},
		"rctf": {"", `"kind":"instancerError"`, []string{
			"PUT /v1/instances/ 400 {", "PUT /v1/instances/ 413 " + large, `POST /v1/instances/ 422 {"rctfAuthToken": "TOKEN"}`, `POST /v1/instances/ 422 {"rctfAuthToken": 1}`,
			`PUT /v1/instances/ 422 {"rctfAuthToken": "TOKEN", "teamId": "a", "challengeIntegrationId": "b", "timeoutMilliseconds": 60000}`,
			`PUT /v1/instances/ 422 {"rctfAuthToken": "TOKEN", "teamId": "a", "challengeIntegrationId": "b", "timeoutMilliseconds": -1, "config": {"services": {"app": {"image": "x"}}}}`,
			`PUT /v1/instances/ 422 {"rctfAuthToken": "TOKEN", "teamId": "a", "challengeIntegrationId": "b", "timeoutMilliseconds": 60000, "config": {"services": {"app": {"image": "x", "volumes": ["/:/host"]}}}}`,
			`PATCH /v1/instances/ 404 {"rctfAuthToken": "TOKEN", "teamId": "a", "challengeIntegrationId": "b", "timeoutMilliseconds": 60000}`,
			`DELETE /v1/instances/ 404 {"rctfAuthToken": "TOKEN", "teamId": "a", "challengeIntegrationId": "b"}`, "GET /v1/instances/ 405", "POST /v1/instances/x 404 {}",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dayfly := clienttest.Start(t)
			c, err := client.New(dayfly.URL, client.WithRetryFor(0))
			if err != nil {
				t.Fatal(err)
			}
			h, err := shims.New(name, c, shims.Config{Token: token})
			if err != nil {
				t.Fatal(err)
			}
			server := httptest.NewServer(h)
			t.Cleanup(server.Close)
			ask := func(request, token string) (have, want, body string) {
				t.Helper()
				parts := strings.SplitN(request, " ", 4)
				text := strings.NewReplacer("TOKEN", token, "LARGE", strings.Repeat("x", schemas.MaxBodyBytes)).Replace(strings.Join(parts[3:], ""))
				req, err := http.NewRequestWithContext(t.Context(), parts[0], server.URL+parts[1], strings.NewReader(text))
				if err != nil {
					t.Fatal(err)
				}
				if field, before, ok := strings.Cut(p.header, ": "); ok && token != "" {
					req.Header.Set(field, before+token)
				}
				res, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				b, err := io.ReadAll(res.Body)
				if err != nil {
					t.Fatal(err)
				}
				return res.Status[:3], parts[2], string(b)
			}
			for _, request := range p.requests {
				if have, want, body := ask(request, token); have != want || !strings.Contains(body, p.fault) {
					t.Errorf("%.200s: %s %s", request, have, body)
				}
				if p.header == "" {
					continue
				}
				for _, wrong := range []string{"", "wrong"} {
					if have, _, body := ask(request, wrong); have != "401" || !strings.Contains(body, p.fault) {
						t.Errorf("%.200s with the token %q: %s %s", request, wrong, have, body)
					}
				}
			}
			for task, err := range c.All(t.Context(), client.ListOptions{}) {
				t.Errorf("there is a task: %v (%v)", task.Spec, err)
			}
		})
	}
}
