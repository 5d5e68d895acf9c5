package token

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func testConfig() IssueConfig {
	return IssueConfig{
		Kind: Cluster, TrustDomain: "amber.mesh", Key: ed25519.NewKeyFromSeed(make([]byte, 32)), Pins: []Pin{{1}},
		Endpoints: []string{"203.0.113.7:15443"}, Subject: "birch", Now: time.Unix(1_800_000_000, 0),
	}
}

func TestIssueParse(t *testing.T) {
	cases := map[string]func(*IssueConfig){
		"cluster": func(*IssueConfig) {},
		"everything": func(c *IssueConfig) {
			c.Pins = []Pin{{1}, {2}}
			c.Endpoints = []string{"203.0.113.7:15443", "[2001:db8::7]:15443", "gw.example.com:443"}
			c.Scopes, c.Lifetime = []string{ScopeImports, ScopeExports, ScopeImports}, 24*time.Hour
		},
		"machine": func(c *IssueConfig) {
			c.Kind, c.Uses, c.Machine = VM, 7, &Machine{Name: "ratings", Namespace: "default", ServiceAccount: "ratings"}
		},
	}
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			c := testConfig()
			change(&c)
			token, grant, err := Issue(c)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%d characters", len(token))
			p, err := Parse("  " + token + "\n")
			if err != nil {
				t.Fatal(err)
			}
			if p.Issuer != c.TrustDomain || p.ID != grant.ID || p.Subject != grant.Subject || len(p.Endpoints) != len(c.Endpoints) || p.Uses != max(c.Uses, 1) {
				t.Errorf("payload %+v does not say what was asked for", p)
			}
			if !p.Seed.key().Public().(ed25519.PublicKey).Equal(grant.SeedPublic) {
				t.Error("the grant does not hold the public half of the seed")
			}
			if _, err := parseReference(p.Reference()); err != nil {
				t.Errorf("reference: %v", err)
			}
			if _, err := Parse(p.Reference()); err == nil {
				t.Error("the reference passes for a token")
			}
			if _, err := parseReference(token); err == nil {
				t.Error("the token passes for a reference")
			}
			for at, want := range map[time.Duration]error{-time.Second: ErrNotYetValid, 0: nil, p.Expires.Sub(p.NotBefore): ErrExpired} {
				if err := p.CheckTime(p.NotBefore.Add(at)); !errors.Is(err, want) {
					t.Errorf("CheckTime at %s: %v, want %v", at, err, want)
				}
			}
		})
	}
}

func TestIssueRefuses(t *testing.T) {
	cases := map[string]struct {
		change func(*IssueConfig)
		want   string
	}{
		"name":        {func(c *IssueConfig) { c.Subject = "Birch" }, "DNS label"},
		"no name":     {func(c *IssueConfig) { c.Subject = "" }, "DNS label"},
		"kind":        {func(c *IssueConfig) { c.Kind = "pod" }, "neither"},
		"key":         {func(c *IssueConfig) { c.Key = nil }, "Ed25519"},
		"too long":    {func(c *IssueConfig) { c.Lifetime = 25 * time.Hour }, "lifetime"},
		"negative":    {func(c *IssueConfig) { c.Lifetime = -1 }, "lifetime"},
		"uses":        {func(c *IssueConfig) { c.Uses = 2 }, "good once"},
		"no address":  {func(c *IssueConfig) { c.Endpoints = nil }, "gateway"},
		"addresses":   {func(c *IssueConfig) { c.Endpoints = make([]string, 5) }, "at most 4"},
		"bad address": {func(c *IssueConfig) { c.Endpoints = []string{"amber"} }, "HOST:PORT"},
		"port 0":      {func(c *IssueConfig) { c.Endpoints = []string{"amber:0"} }, "HOST:PORT"},
		"pins":        {func(c *IssueConfig) { c.Pins = nil }, "pins"},
		"domain":      {func(c *IssueConfig) { c.TrustDomain = "Amber Mesh" }, "trust domain"},
		"scope":       {func(c *IssueConfig) { c.Scopes = []string{"all"} }, "scope"},
		"machine":     {func(c *IssueConfig) { c.Kind = VM }, "service account"},
		"too large": {func(c *IssueConfig) {
			c.Endpoints = []string{strings.Repeat("a", 250) + ":1", strings.Repeat("b", 250) + ":1", strings.Repeat("c", 250) + ":1"}
		}, "fewer or shorter"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			config := testConfig()
			c.change(&config)
			if _, _, err := Issue(config); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// forge signs any payload with the key that the payload names, as an attacker would.
func forge(raw string) string {
	return join([]byte(raw), ed25519.Sign(ed25519.NewKeyFromSeed(make([]byte, 32)), []byte(raw)))
}

func TestParseRefuses(t *testing.T) {
	token, _, err := Issue(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	raw, _, err := split(token)
	if err != nil {
		t.Fatal(err)
	}
	edit := func(old, new string) string {
		if !strings.Contains(string(raw), old) {
			t.Fatalf("payload %s has no %s", raw, old)
		}
		return forge(strings.Replace(string(raw), old, new, 1))
	}
	flip := func(at int) string {
		b := []byte(token)
		if b[at] = 'A'; token[at] == 'A' {
			b[at] = 'B'
		}
		return string(b)
	}
	cases := map[string]struct {
		token string
		want  error
	}{
		"empty":           {"", ErrMalformed},
		"word":            {"birch", ErrMalformed},
		"prefix only":     {"isth", ErrCut},
		"cut in payload":  {token[:100], ErrCut},
		"cut in sig":      {token[:len(token)-1], ErrCut},
		"head missing":    {token[20:], ErrMalformed},
		"longer":          {token + "AA", ErrMalformed},
		"line break":      {token[:50] + "\n" + token[50:], ErrMalformed},
		"edited sig":      {flip(len(token) - 20), ErrSignature},
		"edited payload":  {join([]byte(strings.Replace(string(raw), "birch", "cedar", 1)), make([]byte, 64)), ErrSignature},
		"isth2":           {"isth2_" + token[6:], ErrVersion},
		"v":               {edit(`"v":1`, `"v":2`), ErrVersion},
		"unknown key":     {edit(`"v":1`, `"v":1,"admin":true`), ErrUnknownKey},
		"key in capitals": {edit(`"sub"`, `"SUB"`), ErrUnknownKey},
		"duplicate key":   {edit(`"v":1`, `"v":1,"v":1`), ErrDuplicateKey},
		"white space":     {edit(`"v":1`, `"v": 1`), ErrMalformed},
		"order":           {edit(`"v":1,"k":"cluster"`, `"k":"cluster","v":1`), ErrMalformed},
		"trailing":        {forge(string(raw) + "{}"), ErrMalformed},
		"null":            {edit(`"sub":"birch"`, `"sub":null`), ErrMalformed},
		"escape":          {edit(`"birch"`, `"\u0062irch"`), ErrMalformed},
		"not UTF-8":       {edit(`birch`, "\xff"), ErrMalformed},
		"array":           {forge("[]"), ErrMalformed},
		"nothing":         {forge(""), ErrMalformed},
		"kind":            {edit(`"k":"cluster"`, `"k":"root"`), ErrMalformed},
		"name":            {edit(`"birch"`, `"birch.cedar"`), ErrMalformed},
		"uses":            {edit(`"n":1`, `"n":1000`), ErrMalformed},
		"years":           {edit(`"exp":1800000900`, `"exp":1900000000`), ErrMalformed},
		"backwards":       {edit(`"exp":1800000900`, `"exp":1700000000`), ErrMalformed},
		"no pin":          {edit(`"pin":["AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"]`, `"pin":[]`), ErrMalformed},
		"short pin":       {edit(`"AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"`, `"AQAA"`), ErrMalformed},
		"endpoint":        {edit(`203.0.113.7:15443`, `203.0.113.7`), ErrMalformed},
		"domain":          {edit(`amber.mesh`, `amber mesh`), ErrMalformed},
		"oversized":       {"isth1_" + strings.Repeat("A", 2000) + token[len(token)-87:], ErrTooLarge},
		"big payload":     {join(bytes.Repeat([]byte("x"), MaxPayload+1), make([]byte, 64)), ErrTooLarge},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			p, err := Parse(c.token)
			if !errors.Is(err, c.want) {
				t.Errorf("got %v (%+v), want %v", err, p, c.want)
			}
			if err != nil && !strings.Contains(err.Error(), "isthmus token create") {
				t.Errorf("no remedy in %q", err)
			}
		})
	}
}

// forms of a secret that must not be found in what is printed or sent.
func forms(secret []byte) []string {
	return []string{string(secret), hex.EncodeToString(secret), b64.EncodeToString(secret), base64.StdEncoding.EncodeToString(secret), fmt.Sprint(secret), strings.Trim(fmt.Sprintf("%#v", secret), "[]byte{}"), string(secret[:16])}
}

func TestSeedIsNeverPrinted(t *testing.T) {
	token, grant, err := Issue(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	p, err := Parse(token)
	if err != nil {
		t.Fatal(err)
	}
	hidden := struct{ inner Payload }{p}
	var log bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(h).Info("m", "payload", p, "pointer", &p, "seed", p.Seed, "grant", grant, "hidden", hidden)
	}
	for _, v := range []any{p, &p, p.Seed, &p.Seed, hidden, &hidden, []Seed{p.Seed}, grant} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&log, verb+"\n", v)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		log.Write(b)
	}
	for _, form := range forms(p.Seed.bytes()) {
		if strings.Contains(log.String(), form) {
			t.Fatalf("the seed is printed as %q", form)
		}
	}
	if !strings.Contains(log.String(), redacted) {
		t.Error("nothing says that it was left out")
	}
}

func TestGrants(t *testing.T) {
	g := NewGrants(new(Memory))
	_, grant, err := Issue(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Get(grant.ID); !errors.Is(err, ErrNoGrant) {
		t.Errorf("get before put: %v", err)
	}
	if err := g.Put(grant); err != nil {
		t.Fatal(err)
	}
	if err := g.Put(grant); !errors.Is(err, ErrExists) {
		t.Errorf("second put: %v", err)
	}
	if list, err := g.List(); err != nil || len(list) != 1 || list[0].State(grant.NotBefore) != Issued || list[0].State(grant.Expires) != Expired {
		t.Errorf("list: %+v, %v", list, err)
	}
	if got, err := g.Revoke(t.Context(), grant.ID, "ann", grant.NotBefore); err != nil || got.State(grant.NotBefore) != Revoked || got.RevokedBy != "ann" {
		t.Errorf("revoke: %+v, %v", got, err)
	}
	if got, err := g.Revoke(t.Context(), grant.ID, "bob", grant.NotBefore); err != nil || got.RevokedBy != "ann" {
		t.Errorf("second revoke: %+v, %v", got, err)
	}
	if err := g.Delete(grant.ID); err != nil {
		t.Error(err)
	}
	if _, err := g.Revoke(t.Context(), grant.ID, "ann", grant.NotBefore); !errors.Is(err, ErrNoGrant) {
		t.Errorf("revoke after delete: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	token, _, err := Issue(testConfig())
	if err != nil {
		f.Fatal(err)
	}
	raw, _, _ := split(token)
	f.Add(token)
	f.Add(token[:60])
	f.Add(forge(string(raw)))
	f.Add(forge(`{"v":1,"v":1}`))
	f.Fuzz(func(t *testing.T, s string) {
		p, err := Parse(s)
		if err != nil {
			return
		}
		if what := p.check(); what != "" {
			t.Errorf("accepted with %s", what)
		}
		if _, err := parseReference(p.Reference()); err != nil {
			t.Errorf("reference: %v", err)
		}
	})
}

// FuzzPayload reaches behind the signature.
func FuzzPayload(f *testing.F) {
	token, _, err := Issue(testConfig())
	if err != nil {
		f.Fatal(err)
	}
	raw, _, _ := split(token)
	f.Add(raw)
	f.Add([]byte(`{"v":1,"sc":["exports"]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		j, err := decode(raw)
		if err != nil {
			return
		}
		if again, err := j.encode(); err != nil || !bytes.Equal(again, raw) {
			t.Errorf("%q is not canonical: %q, %v", raw, again, err)
		}
		_, _ = j.payload(true)
		_, _ = j.payload(false)
	})
}
