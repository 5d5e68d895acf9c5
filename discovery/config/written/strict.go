package written

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kjson "sigs.k8s.io/json"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Into decodes the object into a Kubernetes type, refusing fields it does not have.
func (o *Object) Into(v any) bool {
	if o.Typed != nil {
		reflect.ValueOf(v).Elem().Set(reflect.ValueOf(o.Typed).Elem())
		return true
	}
	strict, err := kjson.UnmarshalStrict(o.Raw, v)
	if err != nil {
		field := ""
		if t := (*json.UnmarshalTypeError)(nil); errors.As(err, &t) {
			field = pathAt(o.Raw, int(t.Offset))
		}
		o.Invalid(field, TypeMessage(err), "give the field a value of its type")
		return false
	}
	for _, e := range strict {
		path := ""
		if f := kjson.FieldError(nil); errors.As(e, &f) {
			path = f.FieldPath()
		}
		if o.Lenient {
			o.Note(path, ReasonUnknownField, "unknown field: it has no effect", "remove it so that nobody relies on it")
			continue
		}
		o.UnknownField(path, nil)
	}
	return !o.Failed
}

// TypeMessage shortens what encoding/json says about a value of the wrong type.
func TypeMessage(err error) string {
	if t := (*json.UnmarshalTypeError)(nil); errors.As(err, &t) {
		return fmt.Sprintf("a %s stands where a %s must", t.Value, t.Type.Kind())
	}
	return Clip(err.Error(), 200)
}

// UnknownField rejects a field that the kind does not have; fields are those it has, to guess what was meant.
func (o *Object) UnknownField(path string, fields []string) {
	_, name, _ := CutLast("."+path, ".")
	remedy := "correct the spelling or remove the field"
	if near := Closest(name, fields); near != "" {
		remedy = "did you mean " + near + "?"
	}
	o.Reject(path, ReasonUnknownField, "unknown field "+Show(name), remedy)
}

// Envelope is an Istio object whose spec is decoded by itself.
type Envelope struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              json.RawMessage `json:"spec,omitempty"`
	Status            json.RawMessage `json:"status,omitempty"`
}

// Spec decodes the object's metadata and its spec, by the rules of protobuf's JSON but for durations, which may be
// written as Go's ("1m30s"), and refusing fields that the message does not have.
func (o *Object) Spec(m proto.Message) (status []byte, ok bool) {
	var e Envelope
	if !o.Into(&e) {
		return nil, false
	}
	o.Meta = e.ObjectMeta
	if len(e.Spec) == 0 || string(e.Spec) == "null" {
		o.Reject("spec", ReasonMissing, "the object has no spec", "write one")
		return nil, false
	}
	return e.Status, o.Message("spec", e.Spec, nil, m)
}

// Message decodes JSON that stands at the path into m. What it does not say is as in defaults, which may be nil.
func (o *Object) Message(path string, raw []byte, defaults map[string]any, m proto.Message) bool {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		o.Invalid(path, Clip(err.Error(), 200), "correct it")
		return false
	}
	v = o.strict(path, v, m.ProtoReflect().Descriptor())
	if o.Failed {
		return false
	}
	if said, ok := v.(map[string]any); ok && defaults != nil {
		v = Overlay(defaults, said)
	}
	raw, err := json.Marshal(v)
	if err == nil {
		err = protojson.Unmarshal(raw, m)
	}
	if err != nil {
		field, message := protoError(path, raw, err)
		o.Invalid(field, message, "give the field a value of its type")
		return false
	}
	return true
}

// Overlay returns base with what over says instead; maps in it are joined, lists replaced.
func Overlay(base, over map[string]any) map[string]any {
	out := maps.Clone(base)
	for k, v := range over {
		under, nested := out[k].(map[string]any)
		if on, ok := v.(map[string]any); ok && nested {
			v = Overlay(under, on)
		}
		out[k] = v
	}
	return out
}

// strict finds the fields in v that the message does not have and writes durations as protobuf wants them.
func (o *Object) strict(path string, v any, md protoreflect.MessageDescriptor) any {
	if md.FullName() == "google.protobuf.Duration" {
		return o.duration(path, v)
	}
	fields, ok := v.(map[string]any)
	if !ok || md.FullName().Parent() == "google.protobuf" {
		return v
	}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		if older(md, fields, key) {
			continue
		}
		fd := md.Fields().ByJSONName(key)
		if fd == nil {
			fd = md.Fields().ByTextName(key)
		}
		at := path + "." + key
		switch {
		case fd == nil && o.Lenient:
			o.Note(at, ReasonUnknownField, "unknown field "+Show(key)+": it has no effect", "remove it so that nobody relies on it")
			delete(fields, key)
		case fd == nil:
			o.UnknownField(at, fieldNames(md))
		case fd.IsMap():
			entries, _ := fields[key].(map[string]any)
			for _, k := range slices.Sorted(maps.Keys(entries)) {
				if em := fd.MapValue().Message(); em != nil {
					entries[k] = o.strict(at+"["+k+"]", entries[k], em)
				}
			}
		case fd.Enum() != nil:
			o.checkEnum(at, fields[key], fd)
		case fd.Message() == nil:
		case fd.IsList():
			items, _ := fields[key].([]any)
			for i := range items {
				items[i] = o.strict(fmt.Sprintf("%s[%d]", at, i), items[i], fd.Message())
			}
		default:
			fields[key] = o.strict(at, fields[key], fd.Message())
		}
	}
	return fields
}

// checkEnum refuses numbers that stand for no value; names are checked when they are decoded.
func (o *Object) checkEnum(path string, v any, fd protoreflect.FieldDescriptor) {
	list, many := v.([]any)
	if !many {
		list = []any{v}
	}
	for i, x := range list {
		n, ok := x.(json.Number)
		if !ok {
			continue
		}
		if number, err := n.Int64(); err == nil && fd.Enum().Values().ByNumber(protoreflect.EnumNumber(number)) != nil && int64(int32(number)) == number {
			continue
		}
		if many {
			path = fmt.Sprintf("%s[%d]", path, i)
		}
		var names []string
		for j := range fd.Enum().Values().Len() {
			names = append(names, string(fd.Enum().Values().Get(j).Name()))
		}
		o.Invalid(path, n.String()+" is not a value of "+string(fd.Enum().Name()), "write one of "+strings.Join(names, ", "))
	}
}

func (o *Object) duration(path string, v any) any {
	s, ok := v.(string)
	if !ok {
		if v != nil {
			o.Invalid(path, "a duration is a number with a unit", `write for example "10s"`)
		}
		return v
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		o.Invalid(path, Show(s)+" is not a duration", `write for example "10s", "1m30s" or "250ms"`)
		return v
	}
	return strconv.FormatFloat(d.Seconds(), 'f', 9, 64) + "s"
}

func fieldNames(md protoreflect.MessageDescriptor) []string {
	var out []string
	for i := range md.Fields().Len() {
		out = append(out, md.Fields().Get(i).JSONName())
	}
	return out
}

// protoError finds the field that protojson complains about by the column it names.
func protoError(path string, raw []byte, err error) (field, message string) {
	message = strings.ReplaceAll(err.Error(), "\u00a0", " ")
	message = strings.TrimSpace(strings.TrimPrefix(message, "proto:"))
	if m := regexp.MustCompile(`^(?:syntax error )?\(line (\d+):(\d+)\): `).FindStringSubmatch(message); m != nil {
		message = message[len(m[0]):]
		column, _ := strconv.Atoi(m[2])
		off := 0 // the JSON has one line; columns count runes
		for ; column > 1 && off < len(raw); column-- {
			_, n := utf8.DecodeRune(raw[off:])
			off += n
		}
		field = path + pathOf(raw, off+1)
	}
	return field, Clip(message, 200)
}

// pathAt returns the path of the value that ends at or after the byte offset.
func pathAt(raw []byte, off int) string { return strings.TrimPrefix(pathOf(raw, off), ".") }

func pathOf(raw []byte, off int) string {
	type frame struct {
		array, value bool
		key          string
		index        int
	}
	var stack []frame
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	for {
		tok, err := dec.Token()
		if err != nil {
			break
		}
		delim, isDelim := tok.(json.Delim)
		if n := len(stack); n > 0 && !stack[n-1].array && !stack[n-1].value && !(isDelim && delim == '}') {
			stack[n-1].key, _ = tok.(string)
			stack[n-1].value = true
			if dec.InputOffset() >= int64(off) {
				break
			}
			continue
		}
		if isDelim && (delim == '}' || delim == ']') {
			stack = stack[:len(stack)-1]
		}
		if dec.InputOffset() >= int64(off) {
			break
		}
		if isDelim && (delim == '{' || delim == '[') {
			stack = append(stack, frame{array: delim == '['})
			continue
		}
		if n := len(stack); n > 0 {
			stack[n-1].index++
			stack[n-1].value = false
		}
	}
	var path strings.Builder
	for _, f := range stack {
		switch {
		case f.array:
			fmt.Fprintf(&path, "[%d]", f.index)
		case f.value:
			path.WriteString("." + f.key)
		}
	}
	return path.String()
}

// Closest returns the candidate that name was probably meant to be, or "".
func Closest(name string, candidates []string) string {
	best, least := "", 3
	for _, c := range candidates {
		if d := diag.Distance(strings.ToLower(name), strings.ToLower(c)); d < least && d*2 < len(c) {
			best, least = c, d
		}
	}
	return best
}
