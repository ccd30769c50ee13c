package control

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"lunshift/conf"
)

// FuzzRequests: whatever comes over the control socket, no handler panics, and every answer
// of one is JSON; a failure has a kind and a message of one line.
func FuzzRequests(f *testing.F) {
	_, s := serveFakes(f, newFake("db01"))
	s.cfg.Groups = []conf.Group{{Name: "erp", Volumes: []string{"db01", "db02"}}, {Name: "web", Volumes: []string{"db01"}}}
	h := s.handler()
	for _, seed := range []struct{ method, path, body string }{
		{"GET", "/v1/volumes", ""}, {"GET", "/v1/volumes/db01", ""}, {"GET", "/v1/volumes/%2e%2e", ""},
		{"GET", "/v1/records", ""}, {"POST", "/v1/volumes/db01/start", ""}, {"POST", "/v1/volumes/db01/throttle", `{"rate":1048576}`},
		{"POST", "/v1/volumes/db01/throttle", `{"rate":-1}`}, {"POST", "/v1/volumes/db01/throttle", `{"rate":1e400,"x":[[[[`},
		{"POST", "/v1/volumes/db01/cutover", `{"accept_loss":true}`}, {"POST", "/v1/volumes/db01/verify", `{}`},
		{"GET", "/v1/volumes/db01/wait?for=synced", ""}, {"GET", "/v1/volumes/db01/check", ""}, {"DELETE", "/v1/volumes/db01", ""},
		{"POST", "/v1/volumes/other/start", "{"}, {"POST", "/v1/volumes/db01/rollback?alone=true", `{"accept_unreadable":true}`},
		{"POST", "/v1/volumes/db01/mirror", `{}`}, {"POST", "/v1/volumes/db01/mirror", `{"on":true}`}, {"GET", "/v1/groups/erp", ""},
		{"POST", "/v1/groups/erp/cutover", ""}, {"POST", "/v1/groups/web/rollback", ""}, {"POST", "/v1/groups/web/start", `{"reuse":true}`},
	} {
		f.Add(seed.method, seed.path, []byte(seed.body))
	}
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, method, "http://lunshift"+path, bytes.NewReader(body))
		if err != nil {
			return // not HTTP
		}
		if r.URL.Path == "/v1/service" {
			return // these volumes have no service around them that could tell of itself
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Header().Get("Content-Type") != "application/json" {
			if w.Code < 300 {
				t.Errorf("%s %q: %d with %q", method, path, w.Code, w.Body)
			}
			return // the multiplexer's own refusal of a path or a method
		}
		if !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s %q: %d with %q", method, path, w.Code, w.Body)
		}
	})
}
