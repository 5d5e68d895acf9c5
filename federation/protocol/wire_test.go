package protocol

import (
	"bytes"
	"encoding/base64"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

var update = flag.Bool("update", false, "write the wire corpus anew")

// The corpus: every message between clusters as a version wrote it, base64 of the bytes, one a line. n-1.txt and the
// descriptor n-1.binpb are of the version before this one, and are never written by this one.
const (
	corpusNow  = "testdata/wire/n.txt"
	corpusLast = "testdata/wire/n-1.txt"
	wireLast   = "testdata/wire/n-1.binpb"
)

// sample is one message of each kind, with every field set.
func sample() map[string]proto.Message {
	cluster := &federationv1.Cluster{}
	fill(cluster.ProtoReflect(), 0)
	cluster.TrustDomain, cluster.FederationKey = "birch.mesh", testPublic("birch")
	service, ends := &federationv1.Service{}, &federationv1.Endpoints{}
	fill(service.ProtoReflect(), 0)
	fill(ends.ProtoReflect(), 0)
	service.ExportTo, ends.ExportTo = []string{"amber"}, []string{"amber"}
	out := map[string]proto.Message{
		"record-cluster":   signed("birch", KindCluster, "", 1, 2, must(cluster)),
		"record-member":    signed("birch", KindMember, "cedar", 1, 3, must(testMember("cedar"))),
		"record-service":   signed("birch", KindService, "default/pay", 1, 4, must(service)),
		"record-endpoints": signed("birch", KindEndpoints, "default/pay", 1, 5, must(ends)),
		"record-tombstone": signed("birch", KindTombstone, "service/default/old", 1, 6, nil),
	}
	for name, m := range map[string]proto.Message{
		"digest": &federationv1.Digest{}, "join-request": &federationv1.JoinRequest{}, "join-reply": &federationv1.JoinReply{},
		"join-result": &federationv1.JoinResult{}, "cluster-join": &federationv1.ClusterJoin{}, "machine-join": &federationv1.MachineJoin{},
	} {
		fill(m.ProtoReflect(), 0)
		out[name] = m
	}
	return out
}

// fill sets every field.
func fill(m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if depth > 3 {
			return
		}
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(scalar(f.MapKey()).MapKey(), scalar(f.MapValue()))
		case f.Kind() == protoreflect.MessageKind && f.IsList():
			fill(m.Mutable(f).List().AppendMutable().Message(), depth+1)
		case f.Kind() == protoreflect.MessageKind:
			fill(m.Mutable(f).Message(), depth+1)
		case f.IsList():
			m.Mutable(f).List().Append(scalar(f))
		default:
			m.Set(f, scalar(f))
		}
	}
}

func scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(string(f.Name()))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(f.Name()))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(f.Number()) + 1)
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(f.Number()) + 1)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(int64(f.Number()) + 1)
	}
	panic(fmt.Sprintf("no sample of a %s", f.Kind()))
}

func readCorpus(t *testing.T, path string) map[string][]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for line := range strings.Lines(string(data)) {
		name, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		b, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			t.Fatalf("%s: %s: %v", path, name, err)
		}
		out[name] = b
	}
	return out
}

func writeCorpus(t *testing.T, path string, all map[string][]byte) {
	t.Helper()
	var b strings.Builder
	var names []string
	for name := range all {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintln(&b, name, base64.StdEncoding.EncodeToString(all[name]))
	}
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// last returns the messages of the version before this one.
func last(t *testing.T) func(name protoreflect.Name) *dynamicpb.Message {
	t.Helper()
	data, err := os.ReadFile(wireLast)
	if err != nil {
		t.Fatal(err)
	}
	fd := &descriptorpb.FileDescriptorProto{}
	if err := proto.Unmarshal(data, fd); err != nil {
		t.Fatal(err)
	}
	file, err := protodesc.NewFile(fd, new(protoregistry.Files))
	if err != nil {
		t.Fatal(err)
	}
	return func(name protoreflect.Name) *dynamicpb.Message {
		return dynamicpb.NewMessage(file.Messages().ByName(name))
	}
}

// bodyOf is the message in a record's body, by kind.
func bodyOf(kind string) proto.Message {
	switch kind {
	case KindCluster:
		return &federationv1.Cluster{}
	case KindMember:
		return &federationv1.Member{}
	case KindEndpoints:
		return &federationv1.Endpoints{}
	}
	return &federationv1.Service{}
}

// TestWireCorpus: this version writes what it wrote, and reads what it and the version before it wrote.
func TestWireCorpus(t *testing.T) {
	now := map[string][]byte{}
	for name, m := range sample() {
		now[name] = must(m)
	}
	if *update {
		writeCorpus(t, corpusNow, now)
		if _, err := os.Stat(corpusLast); err != nil { // once, when a version is left behind
			old, older := last(t), map[string][]byte{}
			for name, m := range sample() {
				x := old(m.ProtoReflect().Descriptor().Name())
				if r, ok := m.(*federationv1.Record); ok {
					body := old(bodyOf(r.Kind).ProtoReflect().Descriptor().Name())
					if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(r.Body, body); err != nil {
						t.Fatal(err)
					}
					r.Body = must(body)
					Sign(r, signer(testKey(r.Origin)))
				}
				if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(must(m), x); err != nil {
					t.Fatal(err)
				}
				older[name] = must(x)
			}
			writeCorpus(t, corpusLast, older)
		}
	}
	written := readCorpus(t, corpusNow)
	for name, b := range now {
		if !bytes.Equal(written[name], b) {
			t.Errorf("%s is written in another way than it was: members of this version would differ. If a field was added: go test ./federation/protocol -run TestWireCorpus -update", name)
		}
	}
	for _, path := range []string{corpusNow, corpusLast} {
		all := readCorpus(t, path)
		if len(all) != len(now) {
			t.Errorf("%s has %d messages, want %d", path, len(all), len(now))
		}
		core := amberWith(t, "birch")
		for _, name := range []string{"record-cluster", "record-member", "record-service", "record-endpoints", "record-tombstone"} {
			r, err := Decode(all[name])
			if err != nil {
				t.Fatalf("%s: %s: %v", path, name, err)
			}
			if got := core.Step(0, Received{From: "birch", Way: Stream, Record: r}); len(got) == 0 || !strings.HasPrefix(show(got), "persist "+ResourceName(r)) {
				t.Errorf("%s: %s: %s", path, name, show(got))
			}
		}
		for name, m := range sample() {
			got := m.ProtoReflect().New().Interface()
			if err := proto.Unmarshal(all[name], got); err != nil || len(got.ProtoReflect().GetUnknown()) > 0 {
				t.Errorf("%s: %s: %v, unknown %x", path, name, err, got.ProtoReflect().GetUnknown())
			}
		}
	}
}

// TestRelayOfAnotherVersion: what this version says goes through a member of the version before it, and what a later one
// will say goes through this one, to the bit, fields that nobody on the way knows included.
func TestRelayOfAnotherVersion(t *testing.T) {
	old := last(t)
	for name, m := range sample() {
		r, ok := m.(*federationv1.Record)
		if !ok {
			continue
		}
		x := old("Record")
		if err := proto.Unmarshal(must(r), x); err != nil {
			t.Fatal(err)
		}
		if r.Body != nil { // the old version reads of the body what it knows
			if err := proto.Unmarshal(r.Body, old(bodyOf(r.Kind).ProtoReflect().Descriptor().Name())); err != nil {
				t.Errorf("%s: an older version cannot read the body: %v", name, err)
			}
		}
		back, err := Decode(must(x))
		if err != nil || !proto.Equal(back, r) || Verify(back, testPublic("birch")) != nil {
			t.Errorf("%s comes back from an older version as %v, %v", name, back, err)
		}
	}

	// A later version adds fields to everything.
	relay := amberWith(t, "birch", "cedar")
	for i, kind := range []string{KindCluster, KindService, KindEndpoints, KindMember} {
		key, body := "default/next", must(bodyOf(kind))
		switch kind {
		case KindCluster:
			key, body = "", must(testCluster("birch"))
		case KindMember:
			key, body = "dune", must(testMember("dune"))
		}
		body = protowire.AppendString(protowire.AppendTag(body, 1000, protowire.BytesType), "of the next version")
		r := signed("birch", kind, key, 1, uint64(10+i), body)
		if got := relay.Step(0, Received{From: "birch", Way: Stream, Record: r}); len(got) == 0 || strings.Contains(show(got), "reject") {
			t.Errorf("%s: %s", kind, show(got))
		}
		at := slices.IndexFunc(relay.RecordsFor("cedar"), func(x *federationv1.Record) bool { return ResourceName(x) == ResourceName(r) })
		if at < 0 {
			t.Errorf("%s is not relayed", kind)
			continue
		}
		passed := relay.RecordsFor("cedar")[at]
		if !bytes.Equal(must(passed), must(r)) || Verify(passed, testPublic("birch")) != nil {
			t.Errorf("%s is relayed as %v", kind, passed)
		}
	}
	// A kind that this version does not know is refused by name, and nothing else is.
	wantActions(t, "a kind of the next version", relay.Step(0, Received{From: "birch", Way: Stream, Record: signed("birch", "weather", "default/x", 1, 20, nil)}), "reject birch/weather/default/x from birch: UnknownKind")
}
