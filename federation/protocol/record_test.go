package protocol

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/federation/protocol/audience"
	"google.golang.org/protobuf/proto"
)

func testPrivate(b byte) ed25519.PrivateKey {
	return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{b}, ed25519.SeedSize))
}

func signer(k ed25519.PrivateKey) func([]byte) []byte {
	return func(msg []byte) []byte { return ed25519.Sign(k, msg) }
}

func TestSignedBytesAreTheWire(t *testing.T) {
	r := &federationv1.Record{Origin: "birch", Kind: KindService, Key: "default/reviews", Epoch: 1, Seq: 258, TtlSeconds: 600, Body: []byte{0x0a, 0x00}}
	want := hex.EncodeToString([]byte("isthmus-record-v1")) +
		"00000005" + hex.EncodeToString([]byte("birch")) +
		"00000007" + hex.EncodeToString([]byte("service")) +
		"0000000f" + hex.EncodeToString([]byte("default/reviews")) +
		"00000008" + "0000000000000001" + "00000008" + "0000000000000102" + "00000004" + "00000258" + "00000002" + "0a00"
	if got := hex.EncodeToString(SignedBytes(r)); got != want {
		t.Errorf("signed bytes are\n%s, want\n%s", got, want)
	}
	key := testPrivate(7)
	Sign(r, signer(key))
	pub := key.Public().(ed25519.PublicKey)
	if err := Verify(r, pub); err != nil {
		t.Fatal(err)
	}
	if got, want := Version(r), "1.258"; got != want {
		t.Errorf("version is %s, want %s", got, want)
	}
	for name, change := range map[string]func(*federationv1.Record){
		"origin": func(r *federationv1.Record) { r.Origin = "cedar" },
		"kind":   func(r *federationv1.Record) { r.Kind = KindEndpoints },
		"key":    func(r *federationv1.Record) { r.Key = "default/ratings" },
		"epoch":  func(r *federationv1.Record) { r.Epoch++ },
		"seq":    func(r *federationv1.Record) { r.Seq++ },
		"ttl":    func(r *federationv1.Record) { r.TtlSeconds++ },
		"body":   func(r *federationv1.Record) { r.Body = []byte{1} },
		"split":  func(r *federationv1.Record) { r.Origin, r.Kind = "birchs", "ervice" },
	} {
		changed := proto.CloneOf(r)
		change(changed)
		if err := Verify(changed, pub); !errors.Is(err, ErrSignature) {
			t.Errorf("changed %s: got %v, want ErrSignature", name, err)
		}
	}
}

func TestValidate(t *testing.T) {
	good := func() *federationv1.Record {
		return &federationv1.Record{Origin: "birch", Kind: KindService, Key: "default/reviews", Epoch: 1, Seq: 1, Signature: make([]byte, 64)}
	}
	for _, c := range []struct {
		name   string
		change func(*federationv1.Record)
		want   string // reason; empty: taken
	}{
		{"service", func(*federationv1.Record) {}, ""},
		{"tombstone", func(r *federationv1.Record) { r.Kind, r.Key = KindTombstone, "service/default/reviews" }, ""},
		{"member tombstone", func(r *federationv1.Record) { r.Kind, r.Key = KindTombstone, "member/cedar" }, ""},
		{"cluster", func(r *federationv1.Record) { r.Kind, r.Key = KindCluster, "" }, ""},
		{"cluster with key", func(r *federationv1.Record) { r.Kind = KindCluster }, ReasonBadName},
		{"cluster tombstone", func(r *federationv1.Record) { r.Kind, r.Key = KindTombstone, "cluster/" }, ReasonBadName},
		{"tombstone of tombstone", func(r *federationv1.Record) { r.Kind, r.Key = KindTombstone, "tombstone/member/a" }, ReasonBadName},
		{"no origin", func(r *federationv1.Record) { r.Origin = "" }, ReasonBadName},
		{"upper case", func(r *federationv1.Record) { r.Origin = "Birch" }, ReasonBadName},
		{"homograph", func(r *federationv1.Record) { r.Origin = "bіrch" }, ReasonBadName},
		{"wildcard", func(r *federationv1.Record) { r.Key = "default/*" }, ReasonBadName},
		{"no namespace", func(r *federationv1.Record) { r.Key = "reviews" }, ReasonBadName},
		{"three parts", func(r *federationv1.Record) { r.Key = "a/b/c" }, ReasonBadName},
		{"long key", func(r *federationv1.Record) { r.Key = "default/" + strings.Repeat("a", 300) }, ReasonBadName},
		{"kind", func(r *federationv1.Record) { r.Kind = "gift" }, ReasonUnknownKind},
		{"pending", func(r *federationv1.Record) { r.Kind, r.Key = KindPending, "cedar" }, ReasonUnknownKind},
		{"body", func(r *federationv1.Record) { r.Body = make([]byte, MaxBody+1) }, ReasonTooLarge},
		{"signature", func(r *federationv1.Record) { r.Signature = r.Signature[1:] }, ReasonBadSignature},
		{"seq 0", func(r *federationv1.Record) { r.Seq = 0 }, ReasonBadSequence},
		{"seq 2^64-1", func(r *federationv1.Record) { r.Seq = 1<<64 - 1 }, ReasonBadSequence},
		{"epoch 2^64-1", func(r *federationv1.Record) { r.Epoch = 1<<64 - 1 }, ReasonBadSequence},
	} {
		r := good()
		c.change(r)
		got := ""
		var ref *Refusal
		if err := Validate(r); errors.As(err, &ref) {
			got = ref.Reason
		} else if err != nil {
			t.Errorf("%s: %v is not a Refusal", c.name, err)
		}
		if got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
	if err := Validate(nil); err == nil {
		t.Error("a missing record is taken")
	}
}

func TestResourceName(t *testing.T) {
	for _, name := range []string{"amber/cluster/", "amber/member/birch", "amber/service/default/reviews", "amber/tombstone/endpoints/default/reviews"} {
		origin, kind, key, err := ParseResourceName(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := ResourceName(&federationv1.Record{Origin: string(origin), Kind: kind, Key: key}); got != name {
			t.Errorf("%s comes back as %s", name, got)
		}
	}
	for _, name := range []string{"", "amber", "amber/service", "Amber/cluster/", "amber/service/reviews", "amber/gift/x"} {
		if _, _, _, err := ParseResourceName(name); err == nil {
			t.Errorf("%q is taken", name)
		}
	}
}

func TestVisible(t *testing.T) {
	only, _ := proto.Marshal(&federationv1.Service{Vips: []string{"240.0.0.1"}, ExportTo: []string{"cedar", "amber"}})
	all, _ := proto.Marshal(&federationv1.Service{Vips: []string{"240.0.0.1"}})
	ends, _ := proto.Marshal(&federationv1.Endpoints{ExportTo: []string{"amber"}})
	for _, c := range []struct {
		rec  *federationv1.Record
		to   string
		want bool
	}{
		{&federationv1.Record{Origin: "birch", Kind: KindService, Body: only}, "amber", true},
		{&federationv1.Record{Origin: "birch", Kind: KindService, Body: only}, "dune", false},
		{&federationv1.Record{Origin: "birch", Kind: KindService, Body: only}, "birch", true},
		{&federationv1.Record{Origin: "birch", Kind: KindService, Body: all}, "dune", true},
		{&federationv1.Record{Origin: "birch", Kind: KindEndpoints, Body: ends}, "amber", true},
		{&federationv1.Record{Origin: "birch", Kind: KindEndpoints, Body: ends}, "cedar", false},
		{&federationv1.Record{Origin: "birch", Kind: KindTombstone, Body: audience.Set{"amber"}.Body()}, "amber", true},
		{&federationv1.Record{Origin: "birch", Kind: KindTombstone, Body: audience.Set{"amber"}.Body()}, "cedar", false},
		{&federationv1.Record{Origin: "birch", Kind: KindTombstone}, "cedar", true},
		{&federationv1.Record{Origin: "birch", Kind: KindMember, Body: []byte{0xff}}, "cedar", true},
		{&federationv1.Record{Origin: "birch", Kind: KindService, Body: []byte{0xff}}, "cedar", false},
		{&federationv1.Record{Origin: "birch", Kind: KindPending}, "birch", false},
	} {
		if got := Visible(c.rec, "x"); got && c.want == false {
			t.Errorf("%v is visible to x", c.rec)
		}
		if got := Visible(c.rec, meshID(c.to)); got != c.want {
			t.Errorf("%v visible to %s: got %v, want %v", c.rec, c.to, got, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	key := testPrivate(1)
	for _, r := range []*federationv1.Record{
		{Origin: "birch", Kind: KindService, Key: "default/reviews", Epoch: 1, Seq: 2, TtlSeconds: 600, Body: []byte{0x22, 0x01, 0x61}},
		{Origin: "birch", Kind: KindTombstone, Key: "service/default/reviews", Epoch: 1, Seq: 3},
		{Origin: "birch", Kind: KindMember, Key: "cedar", Epoch: 1, Seq: 4, Body: []byte{0x0a, 0x05, 'c', 'e', 'd', 'a', 'r'}},
		{Origin: "birch", Kind: KindCluster, Epoch: 1 << 32, Seq: 1 << 48},
	} {
		Sign(r, signer(key))
		data, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		f.Add(data[:len(data)/2])
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Decode(data)
		if err != nil {
			return
		}
		origin, kind, name, err := ParseResourceName(ResourceName(r))
		if err != nil || string(origin) != r.Origin || kind != r.Kind || name != r.Key {
			t.Fatalf("%q does not come back: %v", ResourceName(r), err)
		}
		Visible(r, "amber")
		// A core takes nothing of it, whatever it is: nobody vouches for its origin.
		c := New(testConfig("amber"), State{})
		for _, a := range c.Step(0, Received{From: "birch", Way: Stream, Record: r}) {
			if p, ok := a.(Persist); ok {
				t.Fatalf("took %s", ResourceName(p.Record))
			}
		}
	})
}
