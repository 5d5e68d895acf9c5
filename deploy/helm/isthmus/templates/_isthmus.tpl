{{- define "isthmus.name" -}}
{{- required "cluster.name is required: --set cluster.name=NAME" .Values.cluster.name -}}
{{- end }}

{{- define "isthmus.trustDomain" -}}
{{- .Values.cluster.trustDomain | default (printf "%s.mesh" (include "isthmus.name" .)) -}}
{{- end }}

{{- define "isthmus.network" -}}
{{- .Values.cluster.network | default (include "isthmus.name" .) -}}
{{- end }}

{{- /* Labels of every object. Call with (dict "root" $ "app" NAME). */ -}}
{{- define "isthmus.labels" -}}
app.kubernetes.io/name: {{ .app }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/part-of: isthmus
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- /* Image of a program. Call with (dict "root" $ "image" NAME). */ -}}
{{- define "isthmus.image" -}}
{{- $v := .root.Values.image -}}
{{- with $v.registry }}{{ . }}/{{ end }}isthmus/{{ .image }}:{{ $v.tag | default .root.Chart.AppVersion -}}
{{- end }}

{{- define "isthmus.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* Where the pods of this cluster find the control plane. */ -}}
{{- define "isthmus.discoveryAddress" -}}
isthmusd.{{ .Release.Namespace }}.svc:15012
{{- end }}

{{- /* Where a pod may run. Call with a group of values. */ -}}
{{- define "isthmus.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Replicas prefer different nodes. Call with the label app. */ -}}
{{- define "isthmus.apart" -}}
podAntiAffinity:
  preferredDuringSchedulingIgnoredDuringExecution:
    - weight: 100
      podAffinityTerm:
        topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            app: {{ . }}
{{- end }}

{{- /* A HorizontalPodAutoscaler. Call with (dict "root" $ "app" NAME "auto" VALUES). */ -}}
{{- define "isthmus.autoscaler" -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .app }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "isthmus.labels" . | nindent 4 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ .app }}
  minReplicas: {{ .auto.minReplicas }}
  maxReplicas: {{ .auto.maxReplicas }}
  metrics:
    - type: Resource
      resource:
        name: cpu
        target:
          type: Utilization
          averageUtilization: {{ .auto.targetCPUPercent }}
{{- end }}

{{- /* A PodDisruptionBudget that keeps one. Call with (dict "root" $ "app" NAME). */ -}}
{{- define "isthmus.budget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .app }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "isthmus.labels" . | nindent 4 }}
spec:
  minAvailable: 1
  selector:
    matchLabels:
      app: {{ .app }}
{{- end }}

{{- /* Name of the injector's ConfigMap and webhook configuration. */ -}}
{{- define "isthmus.injector" -}}
istio-sidecar-injector{{ if ne .Values.injection.revision "default" }}-{{ .Values.injection.revision }}{{ end }}
{{- end }}

{{- /* Name of the ValidatingWebhookConfiguration. */ -}}
{{- define "isthmus.validator" -}}
istio-validator{{ if ne .Values.injection.revision "default" }}-{{ .Values.injection.revision }}{{ end }}-{{ .Release.Namespace }}
{{- end }}
