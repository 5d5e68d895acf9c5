{{- /* isthmusd's configuration file. */ -}}
{{- define "isthmusd.config" -}}
{{- $v := .Values -}}
{{- $c := dict "cluster" (include "isthmus.name" .) "trustDomain" (include "isthmus.trustDomain" .) "network" (include "isthmus.network" .) -}}
{{- $_ := set $c "dataDir" "/var/lib/isthmus" -}}
{{- $_ := set $c "listen" "0.0.0.0:15012" -}}
{{- $_ := set $c "metrics" "0.0.0.0:15014" -}}
{{- $_ := set $c "admin" (dict "socket" "/run/isthmus/isthmusd.sock" "listen" "0.0.0.0:15015") -}}
{{- with $v.advertisedGateways }}{{ $_ := set $c "gateways" . }}{{ end -}}
{{- $_ := set $c "source" (dict "kube" (dict "enabled" true "namespace" .Release.Namespace "everySecret" $v.isthmusd.everySecret "deployGateways" $v.isthmusd.deployGateways)) -}}
{{- if $v.injection.enabled }}{{ $_ := set $c "webhook" (dict "listen" "0.0.0.0:15017" "revision" $v.injection.revision) }}{{ end -}}
{{- $_ := set $c "state" (dict "in" "kubernetes" "cache" (dict "directory" "/run/isthmus/lastknown")) -}}
{{- $_ := set $c "ca" (dict "maxTTL" $v.ca.maxTTL) -}}
{{- $_ := set $c "federation" (dict "autoApprove" $v.federation.autoApprove "lateAfter" $v.federation.lateAfter "lease" $v.federation.lease) -}}
{{- toYaml (mergeOverwrite $c (deepCopy $v.isthmusd.config)) -}}
{{- end }}

{{- /* Ports of the Services isthmusd and istiod. */ -}}
{{- define "isthmusd.ports" -}}
- {name: grpc-xds, port: 15012, targetPort: 15012, protocol: TCP}
- {name: https-webhook, port: 443, targetPort: 15017, protocol: TCP}
- {name: http-metrics, port: 15014, targetPort: 15014, protocol: TCP}
- {name: https-admin, port: 15015, targetPort: 15015, protocol: TCP}
{{- end }}
