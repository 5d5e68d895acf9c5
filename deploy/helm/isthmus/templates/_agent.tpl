{{- /* Environment of an agent that the chart runs. Call with (dict "root" $ "name" DEPLOYMENT "env" MAP "relay" BOOL). */ -}}
{{- define "isthmus.agentEnv" -}}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: INSTANCE_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: HOST_IP
  valueFrom: {fieldRef: {fieldPath: status.hostIP}}
- name: SERVICE_ACCOUNT
  valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}
- name: TRUST_DOMAIN
  value: {{ include "isthmus.trustDomain" .root }}
- name: CA_ADDR
  value: {{ include "isthmus.discoveryAddress" .root }}
- name: PROXY_CONFIG
  value: {{ dict "discoveryAddress" (include "isthmus.discoveryAddress" .root) | toJson | quote }}
- name: ISTIO_META_CLUSTER_ID
  value: {{ include "isthmus.name" .root }}
- name: ISTIO_META_NETWORK
  value: {{ include "isthmus.network" .root }}
- name: ISTIO_META_WORKLOAD_NAME
  value: {{ .name }}
- name: ISTIO_META_OWNER
  value: kubernetes://apis/apps/v1/namespaces/{{ .root.Release.Namespace }}/deployments/{{ .name }}
{{- if .relay }}
- name: ISTHMUS_GATEWAY_KIND
  value: relay
{{- end }}
{{- range $name, $value := .env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "isthmus.agentMounts" -}}
- {name: istio-token, mountPath: /var/run/secrets/tokens, readOnly: true}
- {name: istiod-ca-cert, mountPath: /var/run/secrets/istio, readOnly: true}
- {name: istio-podinfo, mountPath: /etc/istio/pod, readOnly: true}
- {name: istio-envoy, mountPath: /etc/istio/proxy}
- {name: istio-data, mountPath: /var/lib/istio/data}
{{- end }}

{{- define "isthmus.agentVolumes" -}}
- name: istio-token
  projected:
    sources:
      - serviceAccountToken:
          path: istio-token
          audience: istio-ca
          expirationSeconds: 43200
- name: istiod-ca-cert
  configMap:
    name: istio-ca-root-cert
- name: istio-podinfo
  downwardAPI:
    items:
      - path: labels
        fieldRef: {fieldPath: metadata.labels}
      - path: annotations
        fieldRef: {fieldPath: metadata.annotations}
- name: istio-envoy
  emptyDir:
    medium: Memory
- name: istio-data
  emptyDir: {}
{{- end }}
