package dns

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	mdns "github.com/miekg/dns"
)

// forwardWithin is how long one name server may take. Clients ask again after five seconds.
const forwardWithin = 2 * time.Second

var (
	errCase  = errors.New("the answer repeats the question in other letters")
	errOther = errors.New("the answer is to another question")
)

// forward asks the name servers in turn. Each question goes from a port of its own (the kernel's choice), with an id and
// letters (0x20) drawn anew, and an answer must repeat all of them: who does not see the question has to guess them.
func (s *Server) forward(q *mdns.Msg, tcp bool) *mdns.Msg {
	ask, err := disguised(q)
	if err != nil {
		s.c.Log.Debug("question not passed on", "err", err)
		return nil
	}
	for _, server := range s.c.Upstream {
		network := "udp"
		if tcp {
			network = "tcp"
		}
		reply, err := s.exchange(network, server, ask)
		if errors.Is(err, errCase) {
			// A name server that changes letters, or someone who guesses: over TCP nobody can answer in its place.
			if reply, err = s.exchange("tcp", server, ask); reply != nil && !tcp {
				reply.Truncate(Size(q, false))
			}
		}
		if err != nil {
			s.c.Log.Debug("name server does not answer", "server", server, "err", err)
			continue
		}
		return undisguised(q, ask, reply)
	}
	return nil
}

// disguised returns q with an id and letters that nobody can know.
func disguised(q *mdns.Msg) (*mdns.Msg, error) {
	var drawn [2 + 32]byte
	if _, err := rand.Read(drawn[:]); err != nil {
		return nil, err
	}
	ask := q.Copy()
	ask.Id = binary.BigEndian.Uint16(drawn[:])
	name := []byte(q.Question[0].Name)
	for i, c := range name {
		if lower := c | 0x20; lower >= 'a' && lower <= 'z' && !(i > 0 && name[i-1] == '\\') {
			name[i] = lower &^ (drawn[2+i/8%32] >> (i % 8) & 1 << 5)
		}
	}
	ask.Question[0].Name = string(name)
	return ask, nil
}

// undisguised makes a reply to ask one to q. Names that repeat the question get its letters back, as some resolvers compare them.
func undisguised(q, ask, reply *mdns.Msg) *mdns.Msg {
	reply.Id, reply.Question = q.Id, q.Question
	for _, rr := range reply.Answer {
		if h := rr.Header(); h.Name == ask.Question[0].Name || strings.EqualFold(h.Name, q.Question[0].Name) {
			h.Name = q.Question[0].Name
		}
	}
	return reply
}

// exchange asks one name server. Over UDP what is no answer to the question is passed over, and the wait for the right one goes on.
func (s *Server) exchange(network, server string, ask *mdns.Msg) (*mdns.Msg, error) {
	ctx, cancel := context.WithTimeout(context.Background(), forwardWithin)
	defer cancel()
	dialer := s.c.Dialer()
	dialer.Timeout = forwardWithin
	raw, err := dialer.DialContext(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	deadline, _ := ctx.Deadline()
	if err := raw.SetDeadline(deadline); err != nil {
		return nil, err
	}
	conn := &mdns.Conn{Conn: raw, UDPSize: mdns.MaxMsgSize}
	if err := conn.WriteMsg(ask); err != nil {
		return nil, err
	}
	var seen error
	for tries := 0; tries < maxWrong; tries++ {
		reply, err := conn.ReadMsg()
		if err == nil {
			if err = answers(ask, reply); err == nil {
				return reply, nil
			}
		}
		if network == "tcp" || errors.Is(err, errCase) || isNetError(err) {
			return nil, errors.Join(err, seen)
		}
		seen = err
	}
	return nil, fmt.Errorf("%d wrong answers: %w", maxWrong, seen)
}

// maxWrong is how many wrong answers to one question are read: more is a flood.
const maxWrong = 64

func isNetError(err error) bool {
	var n net.Error
	return errors.As(err, &n)
}

// answers reports whether reply is the answer to ask.
func answers(ask, reply *mdns.Msg) error {
	if !reply.Response || reply.Id != ask.Id || reply.Opcode != ask.Opcode || len(reply.Question) != 1 {
		return errOther
	}
	got, want := reply.Question[0], ask.Question[0]
	switch {
	case got == want:
		return nil
	case got.Qtype == want.Qtype && got.Qclass == want.Qclass && strings.EqualFold(got.Name, want.Name):
		return errCase
	}
	return errOther
}
