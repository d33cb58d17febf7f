{{/* Names, labels and the pieces of a pod that all workloads share. */}}

{{- define "codegraft.fullname" -}}
{{- if contains "codegraft" .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-codegraft" .Release.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* What a selector names; (dict "root" . "component" "ingest"). */}}
{{- define "codegraft.selector" -}}
app.kubernetes.io/name: codegraft
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "codegraft.labels" -}}
{{ include "codegraft.selector" . }}
app.kubernetes.io/part-of: codegraft
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* Name and labels of an object of a component; (dict "root" . "component" "ingest"). */}}
{{- define "codegraft.metadata" -}}
name: {{ include "codegraft.fullname" .root }}-{{ .component }}
namespace: {{ .root.Release.Namespace }}
labels: {{- include "codegraft.labels" . | nindent 2 }}
{{- end }}

{{/* An image of ours: by digest where one is given, else by tag; (dict "root" . "image" "ingest"). */}}
{{- define "codegraft.image" -}}
{{- $settings := .root.Values.image }}
{{- $name := printf "codegraft-%s" .image }}
{{- if $settings.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" $settings.registry) $name }}{{ end }}
{{- with index $settings.digests .image }}{{ printf "%s@%s" $name . }}{{ else }}{{ printf "%s:%s" $name (default .root.Chart.AppVersion $settings.tag) }}{{ end }}
{{- end }}

{{/* Pod Security "restricted"; the argument is the user id. */}}
{{- define "codegraft.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "codegraft.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* On different nodes where that is possible: a node that is drained takes one replica along, not all. */}}
{{- define "codegraft.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "codegraft.selector" . | nindent 6 }}
{{- end }}

{{/* Settings of config.py as variables. Helm reads every number as a float: whole ones are written without exponent. */}}
{{- define "codegraft.settings" -}}
{{- range $name, $value := . }}
- name: CODEGRAFT_{{ upper $name }}
  {{- if kindIs "slice" $value }}
  value: {{ toJson $value | quote }}
  {{- else if and (kindIs "float64" $value) (eq $value (floor $value)) }}
  value: {{ int64 $value | quote }}
  {{- else }}
  value: {{ $value | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* A variable out of a service's Secret; (dict "root" . "of" "ingest" "variable" "CODEGRAFT_…" "key" "…"). */}}
{{- define "codegraft.secret" -}}
- name: {{ .variable }}
  valueFrom:
    secretKeyRef: {name: {{ index .root.Values.credentials .of }}, key: {{ .key }}}
{{- end }}

{{/* host:port of the four services, each over all its ready replicas; the argument is the root. */}}
{{- define "codegraft.addresses" -}}
{{- $root := . }}
{{- range $component, $port := include "codegraft.ports" . | fromYaml }}
CODEGRAFT_{{ upper $component }}_ADDRESS: dns:///{{ include "codegraft.fullname" $root }}-{{ $component }}.{{ $root.Release.Namespace }}.svc:{{ $port }}
{{- end }}
{{- end }}

{{/* Ports of the four services, as config.py has them by default. */}}
{{- define "codegraft.ports" -}}
ingest: 50051
scanner: 50052
trainer: 50053
inference: 50054
{{- end }}

{{/* Where every service serves its figures. */}}
{{- define "codegraft.metricsPort" -}}9464{{- end }}

{{- define "codegraft.natsUrl" -}}
{{- $name := include "codegraft.fullname" . }}
{{- if .Values.nats.enabled }}
{{- $urls := list }}
{{- range $ordinal := until (int .Values.nats.replicas) }}
{{- $urls = append $urls (printf "nats://%s-nats-%d.%s-nats.%s.svc:4222" $name $ordinal $name $.Release.Namespace) }}
{{- end }}
{{- join "," $urls }}
{{- else }}
{{- required "nats.enabled is false: set externalNats.url" .Values.externalNats.url }}
{{- end }}
{{- end }}

{{- define "codegraft.s3Endpoint" -}}
{{- if .Values.minio.enabled }}{{ include "codegraft.fullname" . }}-minio.{{ .Release.Namespace }}.svc:9000
{{- else }}{{ required "set s3.endpoint (host:port), or minio.enabled for a trial" .Values.s3.endpoint }}{{ end }}
{{- end }}
