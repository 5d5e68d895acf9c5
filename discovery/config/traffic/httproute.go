//lint:file-ignore SA1019 Folders still hold the older fields and kinds; they are converted here.

package traffic

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
)

// maxBody bounds what a directResponse answers; it is sent to every proxy.
const maxBody = 1 << 20

// checkDuration refuses what is shorter than least, and negative ones.
func (o *object) checkDuration(at string, d *durationpb.Duration, least time.Duration) {
	if d == nil {
		return
	}
	if err := d.CheckValid(); err != nil || d.AsDuration() < 0 {
		o.Invalid(at, "the duration is negative or too long", "write 0s or more")
	} else if d.AsDuration() > 0 && d.AsDuration() < time.Millisecond && least < time.Millisecond {
		o.Invalid(at, d.AsDuration().String()+" is shorter than 1ms, which is Envoy's unit", "write 1ms or more, or 0s")
	} else if d.AsDuration() < least {
		o.Invalid(at, fmt.Sprintf("%s is shorter than %s", d.AsDuration(), least), "write "+least.String()+" or more")
	}
}

func (o *object) redirect(at string, r *networking.HTTPRedirect) {
	if r == nil {
		return
	}
	if c := r.RedirectCode; c != 0 && !slices.Contains([]uint32{301, 302, 303, 307, 308}, c) {
		o.Invalid(at+".redirectCode", fmt.Sprintf("%d is not a redirect", c), "write 301, 302, 303, 307 or 308")
	}
	if r.Scheme != "" && r.Scheme != "http" && r.Scheme != "https" {
		o.Invalid(at+".scheme", written.Show(r.Scheme)+" is not a scheme", "write http or https")
	}
	o.checkLine(at+".uri", r.Uri)
	o.checkLine(at+".prefixRewrite", r.PrefixRewrite)
	o.checkLine(at+".authority", r.Authority)
	if p, ok := r.RedirectPort.(*networking.HTTPRedirect_Port); ok {
		o.CheckPort(at+".port", int64(p.Port))
	}
	if r.Uri != "" && r.PrefixRewrite != "" {
		o.Reject(at+".uri", written.ReasonConflict, "stands beside prefixRewrite", "keep one of the two")
	}
	if r.Uri == "" && r.PrefixRewrite == "" && r.Authority == "" && r.Scheme == "" && r.RedirectPort == nil {
		o.Reject(at, written.ReasonMissing, "changes neither path, host, port nor scheme", "say where it leads")
	}
}

// checkLine refuses what would end a line of HTTP.
func (o *object) checkLine(at, text string) {
	if strings.ContainsAny(text, "\r\n\x00") {
		o.Invalid(at, "the value has a line break", "write one line")
	}
}

// checkSubstitution refuses references to groups that the expression does not have, and a lone backslash.
func (o *object) checkSubstitution(at, match, text string) {
	re, err := regexp.Compile(match)
	if err != nil {
		return
	}
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' {
			continue
		}
		i++
		switch {
		case i == len(text) || text[i] != '\\' && (text[i] < '0' || text[i] > '9'):
			o.Invalid(at, "a backslash stands before no digit", `write \\1 for the first group, or two backslashes for one`)
			return
		case text[i] != '\\' && int(text[i]-'0') > re.NumSubexp():
			o.Invalid(at, fmt.Sprintf(`\%c names a group that the expression does not have`, text[i]), "put the part to keep into parentheses")
			return
		}
	}
}

func (o *object) directResponse(at string, r *networking.HTTPDirectResponse) {
	if r == nil {
		return
	}
	if r.Status < 200 || r.Status > 599 {
		o.Invalid(at+".status", fmt.Sprintf("%d is not a status", r.Status), "write a number from 200 to 599")
	}
	if len(r.Body.GetString_())+len(r.Body.GetBytes()) > maxBody {
		o.Invalid(at+".body", "the body is over 1 MiB", "serve it by a program")
	}
}

func (o *object) rewrite(at string, r *networking.HTTPRoute) {
	w := r.Rewrite
	if w == nil {
		return
	}
	if len(r.Route) == 0 {
		o.Reject(at, written.ReasonConflict, "stands beside no route", "remove it")
	}
	if w.UriRegexRewrite != nil {
		o.CheckRegex(at+".uriRegexRewrite.match", w.UriRegexRewrite.Match)
		o.checkSubstitution(at+".uriRegexRewrite.rewrite", w.UriRegexRewrite.Match, w.UriRegexRewrite.Rewrite)
		o.checkLine(at+".uriRegexRewrite.rewrite", w.UriRegexRewrite.Rewrite)
		if w.Uri != "" {
			o.Reject(at+".uri", written.ReasonConflict, "stands beside uriRegexRewrite", "keep one of the two")
		}
	}
	o.checkLine(at+".uri", w.Uri)
	o.checkLine(at+".authority", w.Authority)
	if w.Uri == "" && w.Authority == "" && w.UriRegexRewrite == nil {
		o.Reject(at, written.ReasonMissing, "changes neither path nor host", "add uri, uriRegexRewrite or authority")
	}
}

func (o *object) retries(at string, r *networking.HTTPRetry) {
	if r == nil {
		return
	}
	if r.Attempts < 0 {
		o.Invalid(at+".attempts", fmt.Sprintf("%d is not a number of attempts", r.Attempts), "write 0 or more")
	}
	if r.Attempts == 0 && (r.PerTryTimeout != nil || r.RetryOn != "") {
		o.Reject(at+".attempts", written.ReasonConflict, "nothing is retried, yet perTryTimeout or retryOn is given", "write attempts above 0 or remove the others")
	}
	o.checkDuration(at+".perTryTimeout", r.PerTryTimeout, 0)
	o.checkDuration(at+".backoff", r.Backoff, time.Millisecond)
	for on := range strings.SplitSeq(r.RetryOn, ",") {
		if on = strings.TrimSpace(on); on == "" || slices.Contains(retryConditions(), on) {
			continue
		}
		if code, err := strconv.Atoi(on); err != nil || code < 100 || code > 599 {
			o.Invalid(at+".retryOn", written.Show(on)+" is not a condition", "write Envoy's conditions or status codes with commas between them")
		}
	}
}

// retryConditions are those of Envoy's router, for HTTP and gRPC.
func retryConditions() []string {
	return []string{"5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "envoy-ratelimited", "retriable-4xx",
		"refused-stream", "retriable-status-codes", "retriable-headers", "http3-post-connect-failure",
		"cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable"}
}

func (o *object) fault(at string, f *networking.HTTPFaultInjection) {
	if f == nil {
		return
	}
	if d := f.Delay; d != nil {
		if d.Percent != 0 { // the older field
			if d.Percentage == nil {
				d.Percentage = &networking.Percent{Value: float64(d.Percent)}
			}
			d.Percent = 0
		}
		o.CheckPercent(at+".delay.percentage", d.Percentage.GetValue())
		switch t := d.HttpDelayType.(type) {
		case *networking.HTTPFaultInjection_Delay_FixedDelay:
			o.checkDuration(at+".delay.fixedDelay", t.FixedDelay, time.Millisecond)
		case *networking.HTTPFaultInjection_Delay_ExponentialDelay:
			o.Unsupported(at+".delay.exponentialDelay", "there is no delay")
			f.Delay = nil
		default:
			o.Reject(at+".delay.fixedDelay", written.ReasonMissing, "the delay is missing", "write one")
		}
	}
	if a := f.Abort; a != nil {
		o.CheckPercent(at+".abort.percentage", a.Percentage.GetValue())
		switch t := a.ErrorType.(type) {
		case *networking.HTTPFaultInjection_Abort_HttpStatus:
			if t.HttpStatus < 200 || t.HttpStatus > 599 {
				o.Invalid(at+".abort.httpStatus", fmt.Sprintf("%d is not a status", t.HttpStatus), "write a number from 200 to 599")
			}
		case *networking.HTTPFaultInjection_Abort_GrpcStatus:
			if !slices.Contains(grpcCodes(), t.GrpcStatus) {
				o.Invalid(at+".abort.grpcStatus", written.Show(t.GrpcStatus)+" is not a gRPC status", `write its name, for example "UNAVAILABLE"`)
			}
		case *networking.HTTPFaultInjection_Abort_Http2Error:
			o.Unsupported(at+".abort.http2Error", "nothing is aborted")
			f.Abort = nil
		default:
			o.Reject(at+".abort.httpStatus", written.ReasonMissing, "the status is missing", "write one")
		}
	}
}

func grpcCodes() []string {
	return []string{"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED",
		"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"}
}

// mirror validates mirrors and brings the older percentage to the newer.
func (o *object) mirror(at string, r *networking.HTTPRoute) {
	if r.MirrorPercentage == nil && r.MirrorPercent != nil { // the older field
		r.MirrorPercentage = &networking.Percent{Value: float64(r.MirrorPercent.GetValue())}
	}
	r.MirrorPercent = nil
	for i, m := range r.Mirrors {
		to := fmt.Sprintf("%s.mirrors[%d]", at, i)
		o.destination(to+".destination", m.GetDestination())
		o.CheckPercent(to+".percentage.value", m.GetPercentage().GetValue())
	}
	switch {
	case r.Mirror != nil && len(r.Mirrors) > 0:
		o.Reject(at+".mirrors", written.ReasonConflict, "stands beside mirror", "keep one of the two")
	case r.Mirror != nil:
		o.destination(at+".mirror", r.Mirror)
		o.CheckPercent(at+".mirrorPercentage.value", r.MirrorPercentage.GetValue())
	case r.MirrorPercentage != nil:
		o.Reject(at+".mirror", written.ReasonMissing, "there is a percentage and no mirror", "name a destination")
	}
}

func (o *object) cors(at string, c *networking.CorsPolicy) {
	if c == nil {
		return
	}
	for _, origin := range c.AllowOrigin { // the older field
		m := &networking.StringMatch{MatchType: &networking.StringMatch_Exact{Exact: origin}}
		if origin == "*" {
			m.MatchType = &networking.StringMatch_Regex{Regex: ".*"}
		}
		c.AllowOrigins = append(c.AllowOrigins, m)
	}
	c.AllowOrigin = nil
	for i, m := range c.AllowOrigins {
		o.CheckMatch(fmt.Sprintf("%s.allowOrigins[%d]", at, i), m, false)
	}
	for i, m := range c.AllowMethods {
		if m != "*" {
			o.CheckHeader(fmt.Sprintf("%s.allowMethods[%d]", at, i), m)
		}
	}
	for i, h := range c.AllowHeaders {
		if h != "*" {
			o.CheckHeader(fmt.Sprintf("%s.allowHeaders[%d]", at, i), h)
		}
	}
	for i, h := range c.ExposeHeaders {
		if h != "*" {
			o.CheckHeader(fmt.Sprintf("%s.exposeHeaders[%d]", at, i), h)
		}
	}
	o.checkDuration(at+".maxAge", c.MaxAge, 0)
}
