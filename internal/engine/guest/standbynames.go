package guest

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pgark/terraform-provider-pgark/internal/engine/postgres"
)

// standbyNames is a value of synchronous_standby_names (syncrep_gram.y, syncrep_scanner.l).
type standbyNames struct {
	quorum bool // ANY, where any so many will do; else FIRST, where the order counts
	number int
	names  []string // "*" is everybody; none: commits wait for nobody
}

// parseStandbyNames reads "", "a, b", "2 (a, b)", "FIRST 2 (a, b)" and "ANY 2 (a, b)".
func parseStandbyNames(value string) (standbyNames, error) {
	tokens, err := standbyTokens(value)
	if err != nil || len(tokens) == 0 {
		return standbyNames{}, err
	}
	s := standbyNames{number: 1}
	if len(tokens) > 1 && !tokens[0].quoted && (strings.EqualFold(tokens[0].text, "any") || strings.EqualFold(tokens[0].text, "first")) && tokens[1].text != "," {
		s.quorum = strings.EqualFold(tokens[0].text, "any")
		tokens = tokens[1:]
	}
	if len(tokens) > 1 && tokens[1].is("(") {
		if s.number, err = strconv.Atoi(tokens[0].text); err != nil || s.number < 1 || !tokens[len(tokens)-1].is(")") {
			return standbyNames{}, errStandbyNames
		}
		tokens = tokens[2 : len(tokens)-1]
	}
	for i, t := range tokens {
		switch comma := i%2 == 1; {
		case comma != t.is(","), t.is("("), t.is(")"):
			return standbyNames{}, errStandbyNames
		case !comma:
			s.names = append(s.names, t.text)
		}
	}
	if len(tokens)%2 == 0 {
		return standbyNames{}, errStandbyNames
	}
	return s, nil
}

var errStandbyNames = errors.New("is no list of standbys")

type standbyToken struct {
	text   string
	quoted bool
}

func (t standbyToken) is(sign string) bool { return !t.quoted && t.text == sign }

func standbyTokens(value string) ([]standbyToken, error) {
	var tokens []standbyToken
	for i := 0; i < len(value); {
		switch c := value[i]; {
		case strings.IndexByte(" \t\n\r\f\v", c) >= 0:
			i++
		case strings.IndexByte("(),*", c) >= 0:
			tokens = append(tokens, standbyToken{text: string(c)})
			i++
		case c == '"':
			var name strings.Builder
			closed := false
			for i++; i < len(value) && !closed; i++ {
				switch {
				case value[i] != '"':
					name.WriteByte(value[i])
				case i+1 < len(value) && value[i+1] == '"':
					name.WriteByte('"')
					i++
				default:
					closed = true
				}
			}
			if !closed {
				return nil, errStandbyNames
			}
			tokens = append(tokens, standbyToken{name.String(), true})
		default:
			n := i
			for n < len(value) && (value[n] == '_' || value[n] == '$' || isAlphanumeric(value[n])) {
				n++
			}
			if n == i {
				return nil, errStandbyNames
			}
			tokens = append(tokens, standbyToken{text: value[i:n]})
			i = n
		}
	}
	return tokens, nil
}

// has tells whether pgark's stream is among those that commits may wait for. Names are compared without regard to case
// (syncrep.c, SyncRepGetStandbyPriority).
func (s standbyNames) has() bool { return s.place() >= 0 }

func (s standbyNames) place() int {
	return slices.IndexFunc(s.names, func(n string) bool { return n == "*" || strings.EqualFold(n, postgres.ApplicationName) })
}

// NamesPgark tells whether commits may wait for pgark with this value of synchronous_standby_names.
func NamesPgark(value string) bool {
	s, err := parseStandbyNames(value)
	return err == nil && s.has()
}

// everyCommit tells whether no commit can do without pgark, however many standbys there are.
func (s standbyNames) everyCommit() bool {
	switch at := s.place(); {
	case at < 0, s.names[at] == "*":
		return false
	case s.quorum:
		return s.number >= len(s.names) && !slices.Contains(s.names, "*")
	default:
		return at < s.number && !slices.Contains(s.names[:at], "*")
	}
}

// beside is the value with pgark as the last that commits wait for: those that are there are waited for as before.
func (s standbyNames) beside() string {
	with := s
	with.names = append(slices.Clone(s.names), postgres.ApplicationName)
	return with.String()
}

// always is the value with which every commit waits for pgark, and for as many of the others as before.
func (s standbyNames) always() string {
	return standbyNames{number: s.number + 1, names: append([]string{postgres.ApplicationName}, s.names...)}.String()
}

func (s standbyNames) String() string {
	if len(s.names) == 0 {
		return ""
	}
	method := "FIRST"
	if s.quorum {
		method = "ANY"
	}
	quoted := make([]string, len(s.names))
	for i, n := range s.names {
		quoted[i] = n
		plain := n != "" && (n[0] < '0' || n[0] > '9') && strings.IndexFunc(n, func(r rune) bool { return r != '_' && (r >= 0x80 || !isAlphanumeric(byte(r))) }) < 0
		if n != "*" && (!plain || strings.EqualFold(n, "first") || strings.EqualFold(n, "any")) {
			quoted[i] = `"` + strings.ReplaceAll(n, `"`, `""`) + `"`
		}
	}
	return fmt.Sprintf("%s %d (%s)", method, s.number, strings.Join(quoted, ", "))
}
