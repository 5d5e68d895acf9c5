package inject

import (
	"encoding/json"
	"errors"
	"fmt"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ErrReview is wrapped by every error about a body that is no review to answer.
var ErrReview = errors.New("not an AdmissionReview of admission.k8s.io/v1 with a request")

// DecodeReview reads the body of a call to an admission webhook.
func DecodeReview(body []byte) (*admissionv1.AdmissionRequest, error) {
	var r admissionv1.AdmissionReview
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrReview, err)
	}
	if r.APIVersion != admissionv1.SchemeGroupVersion.String() || r.Kind != "AdmissionReview" || r.Request == nil || r.Request.UID == "" {
		return nil, fmt.Errorf("%w: it has apiVersion %.64q and kind %.64q", ErrReview, r.APIVersion, r.Kind)
	}
	return r.Request, nil
}

// EncodeReview writes the answer to a request.
func EncodeReview(q *admissionv1.AdmissionRequest, a *admissionv1.AdmissionResponse) ([]byte, error) {
	a.UID = q.UID
	return json.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: admissionv1.SchemeGroupVersion.String(), Kind: "AdmissionReview"}, Response: a,
	})
}

// badRequest is HTTP's status. kubectl shows the message of this one, and not that of "invalid" (422).
const badRequest = 400

// Refuse is the answer that denies a request; kubectl shows the message.
func Refuse(format string, args ...any) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Result: &metav1.Status{
		Status: metav1.StatusFailure, Message: fmt.Sprintf(format, args...), Reason: metav1.StatusReasonBadRequest, Code: badRequest,
	}}
}

// DecodePod reads a Pod in JSON.
func DecodePod(data []byte) (*corev1.Pod, error) {
	pod := &corev1.Pod{}
	return pod, json.Unmarshal(data, pod)
}

// podResource is the one kind of object that is changed.
var podResource = metav1.GroupVersionResource{Version: "v1", Resource: "pods"}

// Review answers a request about a Pod: with a patch, without one, or, where an annotation is wrong, by refusing the
// Pod. The name and labels of r.Namespace are the caller's to find; what is not about the creation of a Pod is let pass.
func (c *Config) Review(q *admissionv1.AdmissionRequest, r Request) (*admissionv1.AdmissionResponse, Decision) {
	allow := &admissionv1.AdmissionResponse{Allowed: true}
	if q.Resource != podResource || q.SubResource != "" || q.Operation != admissionv1.Create {
		return allow, Decision{Reason: "NotAPod", Text: "it is not the creation of a pod"}
	}
	pod, err := DecodePod(q.Object.Raw)
	if err != nil {
		return Refuse("isthmus: read the pod: %v", err), Decision{Reason: "Unreadable"}
	}
	r.Namespace.Name = first(q.Namespace, pod.Namespace)
	result, err := c.Inject(pod, r)
	if err != nil {
		return Refuse("isthmus cannot inject its proxy: %v", err), Decision{Reason: "Refused", Text: err.Error()}
	}
	if result.Pod == nil {
		return allow, result.Decision
	}
	ops, err := Patch(pod, result.Pod)
	if err == nil && len(ops) > 0 {
		kind := admissionv1.PatchTypeJSONPatch
		allow.PatchType = &kind
		allow.Patch, err = json.Marshal(ops)
	}
	if err != nil {
		return Refuse("isthmus cannot inject its proxy: %v", err), Decision{Reason: "Refused", Text: err.Error()}
	}
	return allow, result.Decision
}
