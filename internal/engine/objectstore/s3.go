package objectstore

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go/logging"
	"golang.org/x/sync/errgroup"
)

const (
	maxPut      = 5 << 30  // bytes; S3's limit for one PUT
	minPart     = 5 << 20  // bytes; S3's least size of a part that is not the last
	defaultPart = 64 << 20 // bytes; one part is what a broken connection costs
	maxParts    = 10_000

	deleteBatch     = 1000 // keys; S3's limit for one DeleteObjects
	parallelDeletes = 8    // where the store has no DeleteObjects

	firstWait = 50 * time.Millisecond // before the first retry; doubles from there
	maxWait   = 5 * time.Second

	// maxResumes bounds how often one reader asks again for the rest of its object. A connection that breaks so often
	// is of no use, even if each attempt brings a few bytes.
	maxResumes = 100

	cleanUpTimeout = 30 * time.Second // for removing an upload that failed, when the caller's context may be done

	defaultRegion = "us-east-1"
)

// s3Store keeps objects in an S3 bucket, under a prefix.
//
// The SDK's own retries are off: what may be retried depends on what the call means. After a 412 the stored object is
// compared with the one offered, because the first request may have been carried out and only its answer lost; a 412
// for an object that is not there is retried. Time-outs are for lack of progress, so that slow transfers live.
type s3Store struct {
	client *s3.Client
	bucket string
	prefix string // "" or ending in a slash
	class  types.StorageClass
	o      Options

	reached         atomic.Bool // some request has succeeded: the bucket exists and the host name is right
	singleDeletes   atomic.Bool // the store has refused DeleteObjects
	checksumOnWrite atomic.Bool // the store has refused a PUT without one, as buckets under Object Lock do
}

var _ Store = (*s3Store)(nil)

func openS3(ctx context.Context, loc Location, bucket, prefix string, o Options) (Store, error) {
	if loc.Endpoint != "" {
		u, err := url.Parse(loc.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("repository %q: endpoint %q: expected a form like https://s3.example.com", loc.URL, loc.Endpoint)
		}
	}
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.MaxIdleConnsPerHost = 64 // one host takes all requests: as many as run at once, not the default of 10
	})
	options := []func(*config.LoadOptions) error{
		config.WithHTTPClient(client),
		config.WithLogger(logging.Nop{}),
		config.WithDefaultRegion(defaultRegion),
	}
	if loc.Region != "" {
		options = append(options, config.WithRegion(loc.Region))
	}
	if loc.Profile != "" {
		options = append(options, config.WithSharedConfigProfile(loc.Profile))
	}
	if c := loc.Credentials; c != nil {
		options = append(options, config.WithCredentialsProvider(
			credentials.NewStaticCredentialsProvider(c.AccessKeyID, c.SecretAccessKey, c.SessionToken)))
	}
	cfg, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("repository %q: read the AWS configuration: %w", loc.URL, err)
	}
	if cfg.Credentials != nil {
		cfg.Credentials = aws.NewCredentialsCache(&namedCredentials{cfg.Credentials})
	}
	s := &s3Store{bucket: bucket, class: types.StorageClass(loc.StorageClass), o: o}
	if prefix != "" {
		s.prefix = prefix + "/"
	}
	s.client = s3.NewFromConfig(cfg, func(so *s3.Options) {
		so.Retryer = aws.NopRetryer{}
		so.UsePathStyle = loc.UsePathStyle
		if loc.Endpoint != "" {
			so.BaseEndpoint = &loc.Endpoint
		}
		// S3 servers other than Amazon's often know none of the newer checksums, or get them wrong.
		so.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
		so.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
		so.DisableLogOutputChecksumValidationSkipped = true
	})
	return s, nil
}

func (s *s3Store) URL() string {
	return "s3://" + s.bucket + strings.TrimSuffix("/"+s.prefix, "/")
}

// full is the key in the bucket.
func (s *s3Store) full(key string) *string { return aws.String(s.prefix + key) }

// watchdog ends an attempt that makes no progress.
type watchdog struct {
	ctx     context.Context // for the attempt's requests
	cancel  context.CancelCauseFunc
	timer   *time.Timer
	timeout time.Duration
}

func watch(ctx context.Context, timeout time.Duration) *watchdog {
	w := &watchdog{timeout: timeout}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	w.timer = time.AfterFunc(timeout, func() {
		w.cancel(&stalledError{timeout})
	})
	return w
}

// progress gives the attempt the full time again; pause stops the clock until then; stop ends the attempt.
func (w *watchdog) progress() { w.timer.Reset(w.timeout) }
func (w *watchdog) pause()    { w.timer.Stop() }
func (w *watchdog) stop()     { w.timer.Stop(); w.cancel(nil) }

type stalledError struct{ after time.Duration }

func (e *stalledError) Error() string { return fmt.Sprintf("no progress for %v", e.after) }

// do calls attempt until it succeeds, fails for good, or the budget or ctx ends. The watchdog is stopped after a failed
// attempt; one that succeeds stops it itself, or hands it on.
func (s *s3Store) do(ctx context.Context, op, key string, attempt func(*watchdog) error) error {
	start := time.Now()
	for n := 1; ; n++ {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		w := watch(ctx, s.o.AttemptTimeout)
		err := attempt(w)
		if err == nil {
			s.reached.Store(true)
			return nil
		}
		err = s.fail(w, op, key, err)
		w.stop()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !isTransient(err) {
			return err
		}
		wait := backoff(n)
		if elapsed := time.Since(start); elapsed+wait > s.o.MaxElapsed {
			if e, ok := errors.AsType[*Error](err); ok {
				e.Err = fmt.Errorf("%w (%d attempts in %v)", e.Err, n, elapsed.Round(time.Millisecond))
			}
			return err
		}
		if ended := sleep(ctx, wait); ended != nil {
			// Who gave up wants to know what the store had to say; what may be retried is no question any more.
			return fmt.Errorf("%w; before that: %s", ended, err.Error())
		}
	}
}

// backoff is the wait after the nth failed attempt: doubling, the upper half of it random, so that many clients of a
// store that comes back do not come back together.
func backoff(n int) time.Duration {
	wait := maxWait
	if n < 8 {
		wait = min(maxWait, firstWait<<(n-1))
	}
	return wait/2 + rand.N(wait/2)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *s3Store) Create(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	if err := checkKey(key); err != nil {
		return err
	}
	if end, err := body.Seek(0, io.SeekEnd); err != nil {
		return fmt.Errorf("create %s in %s: %w", key, s.URL(), err)
	} else if end < size {
		return fmt.Errorf("create %s in %s: %w (%d bytes, expected %d)", key, s.URL(), errShortBody, end, size)
	}
	put := s.put
	if size > s.o.PartThreshold {
		put = s.putParts
	}
	start := time.Now()
	for n := 1; ; n++ {
		err := put(ctx, key, body, size)
		if !errors.Is(err, errTaken) {
			return err
		}
		if _, err := body.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("create %s in %s: %w", key, s.URL(), err)
		}
		// The object may be our own: the request was carried out and its answer lost.
		if err := compare(ctx, s, key, body, size); !errors.Is(err, ErrNotExist) {
			return err
		}
		// Nothing is there: the refusal was about an object that is being deleted, or not about the object at all.
		// It says nothing of ours, so we must try again.
		wait := backoff(n)
		if time.Since(start)+wait > s.o.MaxElapsed {
			e := &Error{Op: "create", Key: key, Store: s.URL(), Err: fmt.Errorf("the store answers that the object exists, but has none (%d attempts): %w", n, err)}
			return e.busy()
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
	}
}

var ifAbsent = aws.String("*")

// put stores an object with one request. errTaken: some object has the name.
func (s *s3Store) put(ctx context.Context, key string, body io.ReadSeeker, size int64) error {
	return s.do(ctx, "create", key, func(w *watchdog) error {
		defer w.stop()
		in := &s3.PutObjectInput{
			Bucket: &s.bucket, Key: s.full(key), ContentLength: &size, IfNoneMatch: ifAbsent, StorageClass: s.class,
		}
		if s.checksumOnWrite.Load() {
			sum, err := checksum(ctx, body, size)
			if err != nil {
				return &bodyError{err}
			}
			in.ChecksumCRC32 = &sum
		}
		b := &attemptBody{r: body, size: size, progress: w.progress}
		defer func() { _ = b.detach() }() // where it matters its error was taken before
		in.Body = b
		_, err := s.client.PutObject(w.ctx, in, unsignedOverTLS)
		if failed := b.detach(); failed != nil {
			return &bodyError{failed}
		}
		if status, code := httpStatus(err); status == http.StatusBadRequest && code == "InvalidRequest" && s.checksumOnWrite.CompareAndSwap(false, true) {
			return &Error{Op: "create", Key: key, Store: s.URL(), Err: err, transient: true}
		}
		return err
	})
}

// unsignedOverTLS leaves out the SHA-256 of a body that TLS protects: it would cost a second pass over the body.
func unsignedOverTLS(o *s3.Options) {
	o.APIOptions = append(o.APIOptions, v4.UseDynamicPayloadSigningMiddleware)
}

// checksum is the CRC-32 of a body as S3 wants it.
func checksum(ctx context.Context, body io.ReadSeeker, size int64) (string, error) {
	if _, err := body.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	h := crc32.NewIEEE()
	if _, err := io.Copy(h, &contextReader{ctx, &exactReader{r: body, n: size}}); err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, h.Sum32())), nil
}

// putParts stores an object in parts. errTaken as put; also if the upload is gone or another writer was at it, which
// compare settles like a lost answer.
func (s *s3Store) putParts(ctx context.Context, key string, body io.ReadSeeker, size int64) (err error) {
	// So much is not sent again if the object is there.
	if _, err := s.Stat(ctx, key); err == nil {
		return errTaken
	} else if !errors.Is(err, ErrNotExist) {
		return err
	}
	part := max(min(defaultPart, s.o.PartThreshold), minPart, (size+maxParts-1)/maxParts)

	var id *string
	err = s.do(ctx, "create", key, func(w *watchdog) error {
		defer w.stop()
		out, err := s.client.CreateMultipartUpload(w.ctx, &s3.CreateMultipartUploadInput{
			Bucket: &s.bucket, Key: s.full(key), StorageClass: s.class,
		})
		if err == nil {
			id = out.UploadId
		}
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		// Parts of a failed upload are invisible and cost money until somebody removes them.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTimeout)
		defer cancel()
		aborted := s.do(ctx, "abort upload of", key, func(w *watchdog) error {
			defer w.stop()
			_, err := s.client.AbortMultipartUpload(w.ctx, &s3.AbortMultipartUploadInput{Bucket: &s.bucket, Key: s.full(key), UploadId: id})
			return err
		})
		if aborted != nil && !errors.Is(aborted, errTaken) && !errors.Is(err, errTaken) {
			err = errors.Join(err, aborted)
		}
	}()

	var parts []types.CompletedPart
	for offset := int64(0); offset < size; offset += part {
		n := min(part, size-offset)
		number := int32(len(parts) + 1)
		var etag *string
		err := s.do(ctx, "create", key, func(w *watchdog) error {
			defer w.stop()
			b := &attemptBody{r: body, base: offset, size: n, progress: w.progress}
			defer func() { _ = b.detach() }() // where it matters its error was taken before
			out, err := s.client.UploadPart(w.ctx, &s3.UploadPartInput{
				Bucket: &s.bucket, Key: s.full(key), UploadId: id, PartNumber: &number, Body: b, ContentLength: &n,
			}, unsignedOverTLS)
			if failed := b.detach(); failed != nil {
				return &bodyError{failed}
			}
			if err == nil {
				etag = out.ETag
			}
			return err
		})
		if err != nil {
			return err
		}
		parts = append(parts, types.CompletedPart{ETag: etag, PartNumber: &number})
	}
	return s.do(ctx, "create", key, func(w *watchdog) error {
		defer w.stop()
		_, err := s.client.CompleteMultipartUpload(w.ctx, &s3.CompleteMultipartUploadInput{
			Bucket: &s.bucket, Key: s.full(key), UploadId: id, IfNoneMatch: ifAbsent,
			MultipartUpload: &types.CompletedMultipartUpload{Parts: parts},
		})
		if status, _ := httpStatus(err); status == http.StatusConflict {
			return errTaken // other than after a PUT, the upload itself must be made anew
		}
		return err
	})
}

func (s *s3Store) Stat(ctx context.Context, key string) (Object, error) {
	if err := checkKey(key); err != nil {
		return Object{}, err
	}
	var o Object
	err := s.do(ctx, "stat", key, func(w *watchdog) error {
		defer w.stop()
		out, err := s.client.HeadObject(w.ctx, &s3.HeadObjectInput{Bucket: &s.bucket, Key: s.full(key)})
		if err == nil {
			o = Object{Key: key, Size: aws.ToInt64(out.ContentLength), Modified: aws.ToTime(out.LastModified)}
		}
		return err
	})
	unclear := errors.Is(err, ErrNotExist) && !s.reached.Load() || err != nil && !errors.Is(err, ErrNotExist) && !isTransient(err)
	if unclear && ctx.Err() == nil {
		// The answer to a HEAD has no body that would tell a missing object from a missing bucket or a wrong region.
		for _, why := range s.pages(ctx, key, "", nil) {
			if e, ok := errors.AsType[*Error](why); ok {
				e.Op, e.Key = "stat", key
			}
			if why != nil {
				return Object{}, why
			}
			break
		}
	}
	return o, err
}

// pages walks the pages of ListObjectsV2.
func (s *s3Store) pages(ctx context.Context, prefix, startAfter string, delimiter *string) iter.Seq2[*s3.ListObjectsV2Output, error] {
	return func(yield func(*s3.ListObjectsV2Output, error) bool) {
		in := &s3.ListObjectsV2Input{Bucket: &s.bucket, Prefix: s.full(prefix), Delimiter: delimiter}
		if startAfter != "" {
			in.StartAfter = s.full(startAfter)
		}
		for {
			var page *s3.ListObjectsV2Output
			err := s.do(ctx, "list", prefix, func(w *watchdog) (err error) {
				defer w.stop()
				page, err = s.client.ListObjectsV2(w.ctx, in)
				return err
			})
			if err != nil {
				yield(nil, err)
				return
			}
			if !yield(page, nil) || !aws.ToBool(page.IsTruncated) {
				return
			}
			in.ContinuationToken = page.NextContinuationToken
		}
	}
}

func (s *s3Store) List(ctx context.Context, prefix, startAfter string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		last := startAfter
		for page, err := range s.pages(ctx, prefix, startAfter, nil) {
			if err != nil {
				yield(Object{}, err)
				return
			}
			for _, c := range page.Contents {
				key := strings.TrimPrefix(aws.ToString(c.Key), s.prefix)
				// Callers find the newest head and the gaps in WAL by order, so a wrong one must not pass for data.
				if key <= last {
					yield(Object{}, &Error{Op: "list", Key: prefix, Store: s.URL(),
						Err: fmt.Errorf("the store lists %q after %q: expected keys in ascending order", key, last)})
					return
				}
				last = key
				if !yield(Object{Key: key, Size: aws.ToInt64(c.Size), Modified: aws.ToTime(c.LastModified)}, nil) {
					return
				}
			}
		}
	}
}

func (s *s3Store) ListPrefixes(ctx context.Context, prefix string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if prefix != "" && !strings.HasSuffix(prefix, "/") {
			yield("", fmt.Errorf("list prefixes below %q in %s: expected a slash at the end", prefix, s.URL()))
			return
		}
		for page, err := range s.pages(ctx, prefix, "", aws.String("/")) {
			if err != nil {
				yield("", err)
				return
			}
			for _, p := range page.CommonPrefixes {
				element := strings.TrimPrefix(aws.ToString(p.Prefix), s.prefix+prefix)
				if !yield(strings.TrimSuffix(element, "/"), nil) {
					return
				}
			}
		}
	}
}

func (s *s3Store) Delete(ctx context.Context, keys ...string) error {
	for _, key := range keys {
		if err := checkKey(key); err != nil {
			return err
		}
	}
	for len(keys) > 0 {
		batch := keys[:min(deleteBatch, len(keys))]
		keys = keys[len(batch):]
		if len(batch) > 1 && !s.singleDeletes.Load() {
			err := s.deleteBatch(ctx, batch)
			if err == nil {
				continue
			}
			if !errors.Is(err, errRefusedBatch) {
				return err
			}
			s.singleDeletes.Store(true)
		}
		if err := s.deleteEach(ctx, batch); err != nil {
			return err
		}
	}
	return nil
}

// errRefusedBatch says that a store has no DeleteObjects, or wants it in some other form.
var errRefusedBatch = errors.New("the store refuses to delete several objects with one request")

func (s *s3Store) deleteBatch(ctx context.Context, keys []string) error {
	left := make([]types.ObjectIdentifier, len(keys))
	for i, key := range keys {
		left[i].Key = s.full(key)
	}
	return s.do(ctx, "delete", keys[0], func(w *watchdog) error {
		defer w.stop()
		out, err := s.client.DeleteObjects(w.ctx, &s3.DeleteObjectsInput{
			Bucket: &s.bucket, Delete: &types.Delete{Objects: left, Quiet: aws.Bool(true)},
		})
		if err != nil {
			switch _, code := httpStatus(err); code {
			case "NotImplemented", "MethodNotAllowed", "MalformedXML", "InvalidRequest", "InvalidArgument", "MissingContentMD5":
				return errRefusedBatch
			}
			return err
		}
		// What did not go is asked for again, unless one of the reasons is final.
		var again []types.ObjectIdentifier
		var reason error
		for _, e := range out.Errors {
			code := aws.ToString(e.Code)
			if code == "NoSuchKey" {
				continue
			}
			key := strings.TrimPrefix(aws.ToString(e.Key), s.prefix)
			err := s.serverError("delete", key, statusOfCode(code), code, aws.ToString(e.Message), "")
			if !err.transient {
				return err
			}
			again, reason = append(again, types.ObjectIdentifier{Key: e.Key}), err
		}
		left = again
		return reason
	})
}

func (s *s3Store) deleteEach(ctx context.Context, keys []string) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelDeletes)
	for _, key := range keys {
		g.Go(func() error {
			err := s.do(ctx, "delete", key, func(w *watchdog) error {
				defer w.stop()
				_, err := s.client.DeleteObject(w.ctx, &s3.DeleteObjectInput{Bucket: &s.bucket, Key: s.full(key)})
				return err
			})
			if errors.Is(err, ErrNotExist) {
				return nil
			}
			return err
		})
	}
	return g.Wait()
}
