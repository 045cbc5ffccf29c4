package stream

import (
	"time"

	"golang.org/x/time/rate"
)

// budget bounds the tails stored in any hour. nil: no bound.
type budget struct{ limiter *rate.Limiter }

// newBudget allows perHour requests in any hour; 0 is as many as it takes.
//
// A minute's worth may be used at once, so that a server which commits now and then has its commits stored at once.
// That burst comes out of the hour's sum.
func newBudget(perHour int64) *budget {
	if perHour == 0 {
		return nil
	}
	burst := max(1, perHour/60)
	// One request an hour is all burst, and comes back after an hour.
	refill := max(perHour-burst, 1)
	return &budget{limiter: rate.NewLimiter(rate.Limit(float64(refill)/time.Hour.Seconds()), int(burst))}
}

// take takes one request, or says when there will be one.
func (b *budget) take(now time.Time) (ok bool, at time.Time) {
	if b == nil {
		return true, now
	}
	r := b.limiter.ReserveN(now, 1)
	if wait := r.DelayFrom(now); wait > 0 {
		r.CancelAt(now)
		return false, now.Add(wait)
	}
	return true, now
}
