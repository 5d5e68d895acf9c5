package inject

import (
	"regexp"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// cronJob matches the name of a Job that a CronJob made: the time of its run in minutes is at the end.
var cronJob = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// ownerOf finds the workload behind a Pod by its controller's name alone: a Deployment behind a ReplicaSet, a CronJob
// behind a Job.
func ownerOf(pod *corev1.Pod) Owner {
	self := Owner{"v1", "Pod", first(pod.Name, strings.TrimSuffix(pod.GenerateName, "-"))}
	for _, r := range pod.OwnerReferences {
		if r.Controller == nil || !*r.Controller {
			continue
		}
		o := Owner{r.APIVersion, r.Kind, r.Name}
		switch hash := pod.Labels["pod-template-hash"]; {
		case r.Kind == "ReplicaSet" && hash != "" && strings.HasSuffix(r.Name, "-"+hash):
			o.Kind, o.Name = "Deployment", strings.TrimSuffix(r.Name, "-"+hash)
		case r.Kind == "Job" && cronJob.MatchString(r.Name):
			o.Kind, o.Name = "CronJob", cronJob.FindStringSubmatch(r.Name)[1]
		}
		return o
	}
	return self
}

// meta is the form of ISTIO_META_OWNER.
func (o Owner) meta(namespace string) string {
	return "kubernetes://apis/" + o.APIVersion + "/namespaces/" + namespace + "/" + strings.ToLower(o.Kind) + "s/" + o.Name
}
