package job

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // guests without a zoneinfo package must not fall back to another time

	"github.com/adhocore/gronx"
)

// schedule is a five-field cron expression.
//
// Its times are wall-clock times of its zone. Where the clock is put forward, a time that is left out is due at the moment
// of the jump; where it is put back, a time that comes twice is due the first time only. Schedules that name no hour
// ("*/20 * * * *") mean an interval, not a time of day: they follow the clock on the wall through both.
type schedule struct {
	expr      string
	namesHour bool // due at times of day, rather than at intervals
}

type cronField struct {
	name      string
	low, high int
	names     []string // for low, low+1, …
}

var cronFields = [...]cronField{
	{name: "minute", low: 0, high: 59},
	{name: "hour", low: 0, high: 23},
	{name: "day of month", low: 1, high: 31},
	{name: "month", low: 1, high: 12, names: []string{"jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}},
	{name: "day of week", low: 0, high: 7, names: []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}},
}

// parseSchedule checks the expression itself, rather than leave that to gronx: it takes more than five fields, and only
// says that an expression is wrong, not where.
func parseSchedule(expr string) (schedule, error) {
	fields := strings.Fields(expr)
	if len(fields) != len(cronFields) {
		return schedule{}, fmt.Errorf("found %d fields, expected five: minute, hour, day of month, month, day of week", len(fields))
	}
	for i, f := range fields {
		if err := cronFields[i].check(f); err != nil {
			return schedule{}, err
		}
	}
	s := schedule{expr: strings.Join(fields, " "), namesHour: !strings.HasPrefix(fields[1], "*")}
	if _, err := s.next(time.Date(2023, 1, 1, 0, 0, 0, 0, time.UTC)); err != nil {
		return schedule{}, err
	}
	return s, nil
}

func (c cronField) check(text string) error {
	for _, part := range strings.Split(text, ",") {
		span, step, stepped := strings.Cut(part, "/")
		if stepped {
			if n, err := strconv.Atoi(step); err != nil || n < 1 || n > c.high {
				return fmt.Errorf("%s %s: step %q is not in 1–%d", c.name, part, step, c.high)
			}
		}
		if span == "*" {
			continue
		}
		from, to, ranged := strings.Cut(span, "-")
		low, err := c.value(from)
		if err != nil {
			return err
		}
		if !ranged {
			if stepped {
				return fmt.Errorf("%s %s: a step needs a range or *", c.name, part)
			}
			continue
		}
		high, err := c.value(to)
		if err != nil {
			return err
		}
		if high < low {
			return fmt.Errorf("%s %s: the range ends before it begins", c.name, span)
		}
	}
	return nil
}

func (c cronField) value(text string) (int, error) {
	for i, name := range c.names {
		if strings.EqualFold(text, name) {
			return c.low + i, nil
		}
	}
	if strings.Trim(text, "0123456789") != "" || text == "" {
		return 0, fmt.Errorf("%s %q is no number", c.name, text)
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < c.low || n > c.high {
		return 0, fmt.Errorf("%s %s is not in %d–%d", c.name, text, c.low, c.high)
	}
	return n, nil
}

// next returns the first due time after t, in t's zone.
//
// It asks gronx only about a clock without jumps, the wall clock as if it were UTC, and goes from one stretch of constant
// offset to the next.
func (s schedule) next(t time.Time) (time.Time, error) {
	zone := t.Location()
	_, offset := t.Zone()
	begin, _ := t.ZoneBounds()
	end := stretchEnd(t)
	from, inclusive := wall(t, offset), false
	if s.namesHour && !begin.IsZero() {
		// Behind a clock put back, the wall shows times again that were due before it.
		_, before := begin.Add(-time.Nanosecond).In(zone).Zone()
		if shown := wall(begin, before); from.Before(shown) {
			from, inclusive = shown, true
		}
	}
	for {
		due, err := s.nextOnWall(from, inclusive)
		if err != nil {
			return time.Time{}, err
		}
		at := due.Add(-time.Duration(offset) * time.Second).In(zone)
		if end.IsZero() || at.Before(end) {
			return at, nil
		}
		// due is on the clock of a stretch that has ended by then.
		jumpFrom := wall(end, offset)
		_, offset = end.Zone()
		jumpTo := wall(end, offset)
		if s.namesHour && due.Before(jumpTo) {
			return end.In(zone), nil
		}
		from, inclusive = jumpTo, true
		if s.namesHour && jumpTo.Before(jumpFrom) {
			from = jumpFrom
		}
		end = stretchEnd(end)
	}
}

// stretchEnd returns a time up to which the offset at t holds; zero if it holds for ever. For a leap year that its
// tables do not reach, ZoneBounds leaves the last day out: on that day it gives an end that has passed (Go 1.26,
// time/zoneinfo.go, tzset counts 365 days).
func stretchEnd(t time.Time) time.Time {
	_, end := t.ZoneBounds()
	if !end.IsZero() && !end.After(t) {
		return t.Add(24 * time.Hour)
	}
	return end
}

// nextOnWall returns the first time after from, or at it, that the expression names.
func (s schedule) nextOnWall(from time.Time, inclusive bool) (time.Time, error) {
	// gronx gives up on 29 February when it is far away, so it gets a year at a time. Every date that exists comes within
	// 8 years: there is no 29 February from 2097 to 2103.
	for range 9 {
		if due, err := gronx.NextTickAfter(s.expr, from, inclusive); err == nil {
			return due, nil
		}
		from, inclusive = time.Date(from.Year()+1, 1, 1, 0, 0, 0, 0, time.UTC), true
	}
	return time.Time{}, errors.New("names a date that does not come")
}

// wall is what a clock at the offset shows at t, as a time in UTC.
func wall(t time.Time, offset int) time.Time {
	return t.UTC().Add(time.Duration(offset) * time.Second)
}

func loadTimezone(name string) (*time.Location, error) {
	if name == "" || name == "Local" {
		return nil, errors.New(`expected an IANA name, as in "Europe/Berlin"`)
	}
	zone, err := time.LoadLocation(name)
	if err != nil {
		return nil, errors.New(`no such time zone; expected an IANA name, as in "Europe/Berlin"`)
	}
	return zone, nil
}

// Next returns the first time after t that the image schedule names, in the schedule's time zone; the zero time if the
// schedule is empty.
func (i Image) Next(t time.Time) (time.Time, error) {
	if i.Schedule == "" {
		return time.Time{}, nil
	}
	s, err := parseSchedule(i.Schedule)
	if err != nil {
		return time.Time{}, fmt.Errorf("image.schedule %q: %w", i.Schedule, err)
	}
	zone, err := loadTimezone(i.Timezone)
	if err != nil {
		return time.Time{}, fmt.Errorf("image.timezone %q: %w", i.Timezone, err)
	}
	return s.next(t.In(zone))
}
