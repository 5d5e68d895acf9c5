// Package audit writes down who changed tokens, peers and roots: one line of JSON for each change, and for each that was
// refused. Nothing secret is in a line.
package audit

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Config says where lines go.
type Config struct {
	// File is added to, one line each; empty: standard error, where the log is. It may be moved away or cut while isthmusd
	// runs: lines are added at its end.
	File string `yaml:"file"`
}

// Values of Line.Result where nothing more exact is known.
const (
	Done   = "done"
	Failed = "Failed"
)

// maxText bounds what comes from others in a line, in bytes.
const maxText = 256

// Line is one change, or one that was refused.
type Line struct {
	Time   time.Time `json:"time"`
	Action string    `json:"action"`           // WHAT.VERB, as in peer.evict
	Object string    `json:"object,omitempty"` // the token's ID, the cluster, the root
	Who    string    `json:"who,omitempty"`
	From   string    `json:"from,omitempty"` // socket, or an address
	Result string    `json:"result"`         // done, a state, or the reason of the refusal
	// Facts are more of the object: never a secret. Write changes the map.
	Facts map[string]string `json:"facts,omitempty"`
}

// Log writes lines. It is safe for concurrent use; nil writes nothing.
type Log struct {
	mu    sync.Mutex
	to    io.Writer
	close func() error
	log   *slog.Logger
	now   func() time.Time
}

// Open opens the file, which only its owner reads. What cannot be written later is an error in log.
func Open(c Config, log *slog.Logger) (*Log, error) {
	if c.File == "" {
		return New(os.Stderr, log), nil
	}
	f, err := os.OpenFile(c.File, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, diag.Hint(fmt.Errorf("audit.file: %w", err), "name a file in a folder that isthmusd may write to, or leave audit.file out")
	}
	l := New(f, log)
	l.close = f.Close
	return l, nil
}

// New writes to w.
func New(w io.Writer, log *slog.Logger) *Log { return &Log{to: w, log: log, now: time.Now} }

// Close gives the file free.
func (l *Log) Close() error {
	if l == nil || l.close == nil {
		return nil
	}
	return l.close()
}

// Write adds a line, with the time of now.
func (l *Log) Write(x Line) {
	if l == nil {
		return
	}
	x.Time = l.now().UTC()
	for _, s := range []*string{&x.Object, &x.Who, &x.From, &x.Result} {
		*s = clip(*s)
	}
	for k, v := range x.Facts {
		if x.Facts[k] = clip(v); v == "" {
			delete(x.Facts, k)
		}
	}
	data, err := json.Marshal(x)
	if err == nil {
		l.mu.Lock()
		_, err = l.to.Write(append(data, '\n')) // whole lines
		l.mu.Unlock()
	}
	if err != nil {
		l.log.Error("a change is not written down", "part", "audit", "action", x.Action, "object", x.Object, "who", x.Who, "result", x.Result, "err", err)
	}
}

// Result is how a line says that something ended with err.
func Result(err error) string {
	var refused *token.Refused
	var refusal *protocol.Refusal
	switch {
	case err == nil:
		return Done
	case errors.As(err, &refused):
		return refused.Reason
	case errors.As(err, &refusal):
		return refusal.Reason
	}
	return Failed
}

// Redeemed is for the joins that hold a token of ours.
func (l *Log) Redeemed(g token.Grant, by token.Redemption, pending bool, err error) {
	l.Write(Line{
		Action: "token.redeem", Object: g.ID, Who: string(g.Kind) + " " + by.Name, From: by.From, Result: Result(err),
		Facts: map[string]string{"for": g.Subject, "key": fmt.Sprintf("%.8x", by.Key), "pending": strconv.FormatBool(pending && err == nil)},
	})
}

// Trust is for the steps of a rotation. Those that somebody asked for are written with the call, which knows from where.
func (l *Log) Trust(verb, who string, facts map[string]string) {
	if verb == "rotate" || verb == "cancel" {
		return
	}
	if who == "" {
		who = "isthmusd"
	}
	l.Write(Line{Action: "trust." + verb, Object: facts["authority"], Who: who, Result: Done, Facts: map[string]string{"overlap": facts["overlap"]}})
}

// Standing is for clusters whose standing is another now, whoever brought it about: who is the cluster that said so.
func (l *Log) Standing(name mesh.ClusterID, was, now protocol.PeerState, by []mesh.ClusterID) {
	var who []string
	for _, id := range by {
		who = append(who, "cluster "+string(id))
	}
	if now == protocol.Gone {
		who = []string{"cluster " + string(name)}
	}
	if now == "" {
		now = "forgotten"
	}
	l.Write(Line{Action: "peer.standing", Object: string(name), Who: strings.Join(who, ", "), Result: string(now), Facts: map[string]string{"was": string(was)}})
}

// clip bounds a text and makes it one of UTF-8.
func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText] + "..."
	}
	return strings.ToValidUTF8(s, "?")
}
