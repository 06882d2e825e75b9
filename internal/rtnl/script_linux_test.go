package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// script is a kernel in memory: it answers each send with what answer makes of it.
type script struct {
	answer func(requests []Message) []reply
	queue  []reply
	sends  [][]Message
	closed bool
}

// reply is one datagram, or an error of recvmsg.
type reply struct {
	messages []Message
	err      error
	foreign  bool // not from the kernel
	size     int  // what it would have been, if more than the receiver's buffer
}

func (s *script) send(b []byte) error {
	var requests []Message
	for m, err := range split(slices.Clone(b)) {
		if err != nil {
			return err
		}
		requests = append(requests, m)
	}
	s.sends = append(s.sends, requests)
	s.queue = append(s.queue, s.answer(requests)...)
	return nil
}

func (s *script) receive(b []byte) (n int, whole, fromKernel bool, err error) {
	if len(s.queue) == 0 {
		return 0, true, true, unix.EAGAIN
	}
	r := s.queue[0]
	s.queue = s.queue[1:]
	var data []byte
	for _, m := range r.messages {
		data = m.appendTo(data)
	}
	n = copy(b, data)
	if r.size > len(b) {
		return r.size, false, !r.foreign, r.err
	}
	return n, true, !r.foreign, r.err
}

func (s *script) drain() {} // answers may come later than any draining

func (s *script) close() error {
	s.closed = true
	return nil
}

func newScript(answer func(requests []Message) []reply) (*script, *Conn) {
	s := &script{answer: answer}
	c := newConn(s)
	c.backOff = 0
	return s, c
}

// says is the kernel's NLMSG_ERROR; errno 0 acknowledges.
func says(request Message, errno unix.Errno, text string) Message {
	n := binary.NativeEndian
	body := n.AppendUint32(nil, uint32(-int32(errno)))
	body = n.AppendUint32(body, uint32(headerLen+len(request.Body)))
	body = n.AppendUint16(body, request.Type)
	body = n.AppendUint16(body, request.Flags)
	body = n.AppendUint32(body, request.Seq)
	body = n.AppendUint32(body, 77)
	m := Message{Type: unix.NLMSG_ERROR, Flags: unix.NLM_F_CAPPED, Seq: request.Seq}
	if text != "" {
		m.Flags |= unix.NLM_F_ACK_TLVS
		body = n.AppendUint16(body, uint16(4+len(text)+1))
		body = n.AppendUint16(body, 1) // NLMSGERR_ATTR_MSG
		body = append(append(body, text...), 0)
	}
	m.Body = body
	return m
}

func done(request Message, flags uint16) Message {
	return Message{Type: unix.NLMSG_DONE, Flags: unix.NLM_F_MULTI | flags, Seq: request.Seq, Body: make([]byte, 4)}
}

func item(request Message, flags uint16, text string) Message {
	return Message{Type: unix.RTM_NEWROUTE, Flags: unix.NLM_F_MULTI | flags, Seq: request.Seq, Body: []byte(text)}
}

// obedient acknowledges what asks for it.
func obedient(requests []Message) (replies []reply) {
	for _, r := range requests {
		if r.Flags&unix.NLM_F_ACK != 0 {
			replies = append(replies, reply{messages: []Message{says(r, 0, "")}})
		}
	}
	return replies
}

// Every send keeps within the bounds of kernel.md V6, and only its last request asks for an acknowledgement.
func TestSendsKeepWithinBounds(t *testing.T) {
	s, c := newScript(obedient)
	c.maxSend = 8000
	var requests []Message
	for i := range 1000 {
		requests = append(requests, Message{Type: unix.RTM_NEWROUTE, Body: make([]byte, 4*(i%30))})
	}
	requests = append(requests, Message{Type: unix.RTM_NEWROUTE, Body: make([]byte, 9000)}, Message{Type: unix.RTM_NEWROUTE})
	for i, r := range c.Do(requests...) {
		if r.Err != nil {
			t.Fatalf("request %d: %v", i, r.Err)
		}
	}
	total := 0
	for i, send := range s.sends {
		size := 0
		for j, m := range send {
			size += headerLen + len(m.Body)
			if last := j == len(send)-1; (m.Flags&unix.NLM_F_ACK != 0) != last || m.Flags&unix.NLM_F_REQUEST == 0 {
				t.Errorf("send %d, request %d of %d has flags %#x", i, j, len(send), m.Flags)
			}
		}
		if len(send) > maxRequests || size > c.maxSend && len(send) > 1 {
			t.Errorf("send %d has %d requests, %d bytes", i, len(send), size)
		}
		total += len(send)
	}
	if total != len(requests) {
		t.Errorf("%d requests were sent, want %d", total, len(requests))
	}
}

// Answers find their requests by sequence number, also where that wraps around.
func TestAnswersAreMatched(t *testing.T) {
	_, c := newScript(func(requests []Message) []reply {
		var messages []Message
		for i, r := range requests {
			switch {
			case i%3 == 1:
				messages = append(messages, says(r, unix.EEXIST, fmt.Sprint("text ", r.Seq)))
			case i%3 == 2:
				messages = append(messages, item(r, 0, "answer"))
			}
		}
		return append([]reply{{messages: messages}}, obedient(requests)...)
	})
	c.seq = ^uint32(0) - 5
	for round := range 3 {
		first := c.seq + 1
		for i, r := range c.Do(make([]Message, 13)...) {
			switch refused := (*Error)(nil); {
			case i%3 == 1:
				if !errors.As(r.Err, &refused) || refused.Errno != unix.EEXIST || refused.Text != fmt.Sprint("text ", first+uint32(i)) || len(r.Answers) != 0 {
					t.Errorf("round %d, request %d: %v %v", round, i, r.Err, r.Answers)
				}
			case r.Err != nil || len(r.Answers) != min(i%3, 1):
				t.Errorf("round %d, request %d: %v %v", round, i, r.Err, r.Answers)
			}
		}
	}
}

// When answers are lost the outcome is unknown: nothing more is sent, what was answered counts, and what comes late is not
// taken for the answer to another request (kernel.md V6).
func TestLostAnswers(t *testing.T) {
	overrun := true
	s, c := newScript(func(requests []Message) []reply {
		if !overrun {
			return obedient(requests)
		}
		return []reply{
			{messages: []Message{says(requests[3], unix.EEXIST, "")}},
			{err: unix.ENOBUFS},
			{messages: []Message{says(requests[5], unix.EPERM, ""), item(requests[6], 0, "late")}},
			{messages: []Message{says(requests[len(requests)-1], unix.ENODEV, "")}},
		}
	})
	results := c.Do(make([]Message, 2*maxRequests)...)
	for i, r := range results {
		want := ErrUnknown
		if i == 3 {
			want = unix.EEXIST
		}
		if !errors.Is(r.Err, want) {
			t.Fatalf("request %d: %v, want %v", i, r.Err, want)
		}
	}
	if len(s.sends) != 1 {
		t.Errorf("%d sends, want 1", len(s.sends))
	}
	overrun = false
	for i, r := range c.Do(make([]Message, 10)...) {
		if r.Err != nil || len(r.Answers) != 0 {
			t.Errorf("the next, request %d: %v %v", i, r.Err, r.Answers)
		}
	}
	overrun = true
	c.Do(make([]Message, 10)...)
	s.answer = func(requests []Message) []reply {
		return []reply{{messages: []Message{item(requests[0], 0, "new"), done(requests[0], 0)}}}
	}
	if all, err := c.Dump(Message{}); err != nil || len(all) != 1 || string(all[0].Body) != "new" {
		t.Errorf("a dump after lost answers: %v, %v", all, err)
	}
}

// No answer at all, one longer than the buffer, or nonsense, is an unknown outcome too; another sender is not heard.
func TestBadAnswers(t *testing.T) {
	nonsense := Message{Type: unix.NLMSG_ERROR, Body: []byte{1}}
	for name, replies := range map[string][]reply{
		"none":    nil,
		"long":    {{size: 1 << 20}},
		"error":   {{err: unix.EIO}},
		"foreign": {{foreign: true, messages: []Message{says(Message{Seq: 1}, 0, "")}}},
	} {
		_, c := newScript(func([]Message) []reply { return replies })
		if err := c.Do(Message{})[0].Err; !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %v, want ErrUnknown", name, err)
		}
		if name == "long" && len(c.buf) < 1<<20 {
			t.Errorf("the buffer has %d bytes after a datagram of %d", len(c.buf), 1<<20)
		}
	}
	_, c := newScript(func(requests []Message) []reply {
		nonsense.Seq = requests[0].Seq
		return []reply{{err: unix.EINTR}, {messages: []Message{nonsense}}}
	})
	if err := c.Do(Message{})[0].Err; !errors.Is(err, ErrMalformed) || !errors.Is(err, ErrUnknown) {
		t.Errorf("nonsense: %v, want ErrUnknown and ErrMalformed", err)
	}
}

// An interrupted dump is repeated, and given up after a while (kernel.md A5). One whose messages were lost is read to its end
// before: the kernel refuses another meanwhile.
func TestInterruptedDump(t *testing.T) {
	for _, test := range []struct {
		name  string
		times int // that it goes wrong
		err   error
		bad   func(request Message) []reply
	}{
		{"interrupted", 19, nil, func(r Message) []reply {
			return []reply{{messages: []Message{item(r, 0, "stale")}}, {messages: []Message{item(r, unix.NLM_F_DUMP_INTR, "stale"), done(r, unix.NLM_F_DUMP_INTR)}}}
		}},
		{"interrupted at its end", 20, ErrInterrupted, func(r Message) []reply {
			return []reply{{messages: []Message{item(r, 0, "stale")}}, {messages: []Message{done(r, unix.NLM_F_DUMP_INTR)}}}
		}},
		{"overrun", 19, nil, func(r Message) []reply {
			return []reply{{err: unix.ENOBUFS}, {messages: []Message{item(r, 0, "stale")}}, {messages: []Message{done(r, 0)}}}
		}},
		{"busy", 19, nil, func(r Message) []reply { return []reply{{messages: []Message{says(r, unix.EBUSY, "")}}} }},
		{"busy for ever", 20, unix.EBUSY, func(r Message) []reply { return []reply{{messages: []Message{says(r, unix.EBUSY, "")}}} }},
		{"refused", 1, unix.EPERM, func(r Message) []reply { return []reply{{messages: []Message{says(r, unix.EPERM, "")}}} }},
		{"malformed", 1, ErrMalformed, func(r Message) []reply {
			return []reply{{messages: []Message{{Type: unix.NLMSG_ERROR, Seq: r.Seq}}}}
		}},
	} {
		s, c := newScript(nil)
		left := test.times
		s.answer = func(requests []Message) []reply {
			if left--; left >= 0 {
				return test.bad(requests[0])
			}
			return []reply{{messages: []Message{item(requests[0], 0, "a")}}, {messages: []Message{item(requests[0], 0, "b"), done(requests[0], 0)}}}
		}
		all, err := c.Dump(Message{Type: unix.RTM_GETROUTE})
		if !errors.Is(err, test.err) || err == nil && (len(all) != 2 || string(all[0].Body)+string(all[1].Body) != "ab") {
			t.Errorf("%s: %v, %v; want %v", test.name, all, err, test.err)
		}
		if flags := s.sends[0][0].Flags; flags != unix.NLM_F_REQUEST|unix.NLM_F_DUMP {
			t.Errorf("%s: flags %#x", test.name, flags)
		}
	}
}

// After Close there are no answers, and nobody else's descriptor is touched.
func TestClosedConn(t *testing.T) {
	s, c := newScript(obedient)
	if err := errors.Join(c.Close(), c.Close()); err != nil || !s.closed {
		t.Errorf("close: %v, %v", err, s.closed)
	}
	for _, r := range c.Do(make([]Message, 3)...) {
		if !errors.Is(r.Err, os.ErrClosed) {
			t.Errorf("Do: %v", r.Err)
		}
	}
	if _, err := c.Dump(Message{}); !errors.Is(err, os.ErrClosed) || len(s.sends) != 0 {
		t.Errorf("Dump: %v, %d sends", err, len(s.sends))
	}
}
