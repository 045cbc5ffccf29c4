package objectstore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// Answers of an S3 server that are part of a call's normal course.
var (
	errTaken = errors.New("an object of that name exists")       // 412, or an upload that somebody else ended
	errRange = errors.New("the object has no byte in the range") // 416
)

// bodyError is an error of the body that a caller gave, as against one of the store.
type bodyError struct{ err error }

func (e *bodyError) Error() string { return "read the body: " + e.err.Error() }
func (e *bodyError) Unwrap() error { return e.err }

// credentialsError says that no credentials could be had, as against refused ones.
type credentialsError struct{ err error }

func (e *credentialsError) Error() string { return e.err.Error() }
func (e *credentialsError) Unwrap() error { return e.err }

// namedCredentials marks the errors of a credentials provider, which the SDK wraps beyond recognition.
type namedCredentials struct{ aws.CredentialsProvider }

func (n *namedCredentials) Retrieve(ctx context.Context) (aws.Credentials, error) {
	c, err := n.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		err = &credentialsError{err}
	}
	return c, err
}

// transientCodes are S3's error codes for what may go well at the next attempt, whatever the status.
var transientCodes = []string{
	"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "RequestTimeoutException", "OperationAborted",
	"Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "RequestThrottledException",
	"TooManyRequests", "TooManyRequestsException", "RequestLimitExceeded", "BandwidthLimitExceeded", "Busy",
	"ConditionalRequestConflict",
	// The body was cut or changed on its way.
	"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
}

// expiredCodes and fullCodes are S3's, and other servers', error codes for ErrExpired and ErrFull.
var (
	expiredCodes = []string{"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
	fullCodes    = []string{"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
)

// httpStatus returns the status and S3 error code of an answer, 0 where err is none.
func httpStatus(err error) (status int, code string) {
	if re, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		status = re.HTTPStatusCode()
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		code = api.ErrorCode()
	}
	return status, code
}

// statusOfCode is the HTTP status that goes with a code inside the answer to DeleteObjects.
func statusOfCode(code string) int {
	switch {
	case slices.Contains(transientCodes, code):
		return http.StatusServiceUnavailable
	case code == "AccessDenied":
		return http.StatusForbidden
	}
	return http.StatusBadRequest
}

// fail makes the error of a failed attempt: what it means, whether it may be tried again, and what the user may do.
func (s *s3Store) fail(w *watchdog, op, key string, err error) error {
	if _, ok := errors.AsType[*Error](err); ok || errors.Is(err, errTaken) || errors.Is(err, errRefusedBatch) {
		return err
	}
	e := &Error{Op: op, Key: key, Store: s.URL(), Err: err}
	if stalled, ok := errors.AsType[*stalledError](context.Cause(w.ctx)); ok {
		e.Err, e.transient = stalled, true
		return e
	}
	if body, ok := errors.AsType[*bodyError](err); ok {
		e.Err = body
		return e
	}
	if missing, ok := errors.AsType[*credentialsError](err); ok {
		e.Err = fmt.Errorf("%w: no S3 credentials: %w", ErrAccess, missing)
		e.Hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine an instance profile"
		if _, code := httpStatus(missing); slices.Contains(expiredCodes, code) {
			e.Err, e.Hint = &kindError{ErrExpired, e.Err}, "renew the login that the credentials come from"
		}
		return e
	}
	var requestID string
	if re, ok := errors.AsType[*awshttp.ResponseError](err); ok {
		requestID = re.RequestID
	}
	if status, code := httpStatus(err); status != 0 && (status >= 300 || code != "") {
		message := ""
		if api, ok := errors.AsType[smithy.APIError](err); ok {
			message = api.ErrorMessage()
		}
		e := s.serverError(op, key, status, code, message, requestID)
		if errors.Is(e, ErrRegion) {
			re, _ := errors.AsType[*smithyhttp.ResponseError](err)
			if region := re.Response.Header.Get("x-amz-bucket-region"); region != "" {
				e.Hint = "set the repository's region to " + region
			}
		}
		return e
	}
	s.explainConnection(e)
	return e
}

// serverError makes the error of an answer with an error status.
func (s *s3Store) serverError(op, key string, status int, code, message, requestID string) *Error {
	// Where an answer has no body, the SDK makes code and message of its status.
	words := http.StatusText(status)
	text := fmt.Sprintf("%d %s", status, words)
	if code != "" && !strings.EqualFold(code, strings.ReplaceAll(words, " ", "")) {
		text = fmt.Sprintf("%d %s", status, code)
	}
	if message != "" && message != words {
		text += ": " + strings.TrimSuffix(message, ".")
	}
	if requestID != "" {
		text += " (request " + requestID + ")"
	}
	e := &Error{Op: op, Key: key, Store: s.URL(), Err: errors.New(text)}
	is := func(kind error, hint string) *Error {
		e.Err, e.Hint = fmt.Errorf("%w: %s", kind, text), hint
		return e
	}
	switch {
	case slices.Contains(expiredCodes, code):
		return is(&kindError{ErrExpired, ErrAccess}, "renew the session token")
	case slices.Contains(fullCodes, code), status == http.StatusInsufficientStorage:
		e.Err, e.Hint, e.transient = &kindError{ErrFull, e.Err}, "make room in the bucket "+s.bucket+", raise its quota, or keep less", true
		return e
	}
	switch code {
	case "NoSuchBucket":
		return is(ErrNoBucket, "create the bucket "+s.bucket+" first, or correct the repository's URL, endpoint or region")
	case "NoSuchUpload":
		return is(errTaken, "")
	case "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException":
		return is(ErrRegion, "set the repository's region to that of the bucket "+s.bucket)
	case "InvalidAccessKeyId", "XAdminUserNotFound": // the latter from versitygw
		return is(ErrAccess, "the store does not know the access key: check AWS_ACCESS_KEY_ID, and that the endpoint is the right one")
	case "SignatureDoesNotMatch":
		return is(ErrAccess, "the secret key does not belong to the access key: check AWS_SECRET_ACCESS_KEY")
	case "InvalidToken":
		return is(ErrAccess, "renew the session token")
	case "RequestTimeTooSkewed":
		return is(fmt.Errorf("%w: %w", ErrAccess, ErrClock), "this machine's clock differs too much from the store's: set it right")
	}
	switch {
	case slices.Contains(transientCodes, code):
		return e.busy()
	case status == http.StatusNotFound && slices.Contains([]string{"", "NoSuchKey", "NotFound"}, code): // any other is not about the object
		e.Err = ErrNotExist
	case status == http.StatusPreconditionFailed && op == "delete":
		return e.busy() // nothing was demanded of it that could have failed
	case status == http.StatusPreconditionFailed:
		return is(errTaken, "")
	case status == http.StatusRequestedRangeNotSatisfiable:
		return is(errRange, "")
	case status == http.StatusMovedPermanently || status == http.StatusTemporaryRedirect:
		return is(ErrRegion, "set the repository's region to that of the bucket "+s.bucket)
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return is(ErrAccess, "the keys must be allowed to list the bucket "+s.bucket+" and to get, put and (for retention) delete objects below "+s.URL())
	case status == http.StatusNotImplemented:
		return is(errNotImplemented, "")
	case status >= 500, status == http.StatusTooManyRequests, status == http.StatusRequestTimeout,
		status == http.StatusConflict: // another conditional request for the name is under way
		return e.busy()
	case status == http.StatusMethodNotAllowed && op == "create":
		e.Err, e.Hint = &kindError{ErrReadOnly, e.Err}, "the bucket "+s.bucket+" must take PUT requests"
	case status < 300: // an answer that could not be read to its end
		e.transient = true
	}
	return e
}

// busy marks an error that the store may not have next time.
func (e *Error) busy() *Error {
	e.Err, e.transient = &kindError{ErrBusy, e.Err}, true
	return e
}

// explainConnection judges an error without an answer.
func (s *s3Store) explainConnection(e *Error) {
	err := e.Err
	e.Err = shortCause(err)
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		// A name that once was known is missing because of the name server.
		e.transient = s.reached.Load()
		e.Hint = "is the endpoint spelt right? Where the store does not know buckets as host names, set use_path_style"
		return
	}
	if errors.Is(err, http.ErrSchemeMismatch) {
		e.Hint = "the endpoint answers without TLS: is it http:// rather than https://?"
		return
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		e.Hint = "let the machine trust the store's certificate, or name its authority in AWS_CA_BUNDLE"
		return
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return
	}
	if _, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		e.transient = true
		return
	}
	if _, ok := errors.AsType[*smithy.DeserializationError](err); ok {
		e.transient = true
		return
	}
	e.transient = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || transientCause(err)
}

// shortCause leaves the SDK's layers out of an error: they name its packages, not the user's things.
func shortCause(err error) error {
	if send, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		err = send.Err
	}
	if re, ok := errors.AsType[*smithyhttp.ResponseError](err); ok {
		return fmt.Errorf("%d %s", re.HTTPStatusCode(), http.StatusText(re.HTTPStatusCode()))
	}
	if op, ok := errors.AsType[*smithy.OperationError](err); ok {
		err = op.Err
	}
	return err
}
