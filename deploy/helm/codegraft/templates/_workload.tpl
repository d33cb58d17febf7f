{{/*
A Deployment with its ServiceAccount and disruption budget, and for what is called by others a Service.

(dict "root" . "component" "scanner-worker" "image" "scanner" "module" "services.scanner" "port" 50052
      "values" .Values.scannerWorker "called" false …) and, where it applies:
  scaled         KEDA decides about the replicas
  stores         it uses NATS and S3 (all but the gateway do)
  settings       settings that the component is made by; values.settings are laid over them
  threads        setting that takes the processor limit: Python counts the node's cores, not the container's
  readyService   gRPC service whose health makes it ready; the whole server's otherwise
  secrets        further variables out of its Secret, where their keys are CODEGRAFT_INGEST_SEED_KEYS -> seed-keys
  jobs           the trainer's values.jobs
*/}}
{{- define "codegraft.workload" -}}
{{- $root := .root }}
{{- $values := .values }}
{{- $name := printf "%s-%s" (include "codegraft.fullname" $root) .component }}
{{- $settings := merge (dict) $values.settings (default (dict) .settings) }}
{{- $gpus := int (default 0 $values.gpus) }}
{{- $tls := $root.Values.tls.existingSecret }}
{{- $jobs := and .jobs .jobs.enabled }}
{{- $http := eq .component "gateway" }}
{{- $https := default "" $values.tlsSecret }}
{{- $of := .image }}
{{- $secrets := dict }}
{{- if .stores }}{{ $secrets = dict "CODEGRAFT_NATS_PASSWORD" "nats-password" "CODEGRAFT_S3_ACCESS_KEY" "s3-access-key" "CODEGRAFT_S3_SECRET_KEY" "s3-secret-key" }}{{ end }}
{{- range .secrets }}{{ $secrets = merge $secrets (dict . (. | trimPrefix "CODEGRAFT_" | trimPrefix (printf "%s_" (upper $of)) | lower | replace "_" "-")) }}{{ end }}
apiVersion: v1
kind: ServiceAccount
metadata: {{- include "codegraft.metadata" . | nindent 2 }}
automountServiceAccountToken: false
---
apiVersion: apps/v1
kind: Deployment
metadata: {{- include "codegraft.metadata" . | nindent 2 }}
spec:
  {{- if not .scaled }}
  replicas: {{ $values.replicas }}
  {{- end }}
  selector:
    matchLabels: {{- include "codegraft.selector" . | nindent 6 }}
  # A base model may have to be fetched first.
  progressDeadlineSeconds: 1800
  strategy:
    # A worker gives its job back and needs no successor first, for whom there may be no GPU; what is called does.
    rollingUpdate:
      maxSurge: {{ if hasKey $values "maxSurge" }}{{ $values.maxSurge }}{{ else }}{{ ternary 1 0 .called }}{{ end }}
      maxUnavailable: {{ if hasKey $values "maxUnavailable" }}{{ $values.maxUnavailable }}{{ else }}{{ ternary 0 1 .called }}{{ end }}
  template:
    metadata:
      labels: {{- include "codegraft.labels" . | nindent 8 }}
      annotations:
        # New settings need new processes.
        {{- if and $root.Values.metrics.enabled (not $root.Values.metrics.podMonitor) }}
        prometheus.io/scrape: "true"
        prometheus.io/port: {{ include "codegraft.metricsPort" $root | quote }}
        prometheus.io/path: /metrics
        {{- end }}
        codegraft.dev/config: {{ include (print $root.Template.BasePath "/config.yaml") $root | sha256sum }}
    spec:
      serviceAccountName: {{ $name }}
      automountServiceAccountToken: {{ if $jobs }}true{{ else }}false{{ end }}
      enableServiceLinks: false
      {{- with $root.Values.imagePullSecrets }}
      imagePullSecrets: {{- toYaml . | nindent 8 }}
      {{- end }}
      # preStop, the drain of running calls, and what a job needs to be given back (at most 10 s) with some room.
      terminationGracePeriodSeconds: {{ add $root.Values.preStopSeconds $values.drainSeconds 15 }}
      securityContext: {{- include "codegraft.podSecurity" 10001 | nindent 8 }}
      topologySpreadConstraints: {{- include "codegraft.spread" . | nindent 8 }}
      {{- with $values.nodeSelector }}
      nodeSelector: {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if or $values.tolerations $gpus }}
      tolerations:
        {{- if $gpus }}
        - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
        {{- end }}
        {{- with $values.tolerations }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- end }}
      containers:
        - name: {{ .component }}
          image: {{ include "codegraft.image" . }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          ports:
            - {name: {{ ternary "http" "grpc" $http }}, containerPort: {{ .port }}}
            {{- if $root.Values.metrics.enabled }}
            - {name: metrics, containerPort: {{ include "codegraft.metricsPort" $root }}}
            {{- end }}
          envFrom:
            - configMapRef: {name: {{ include "codegraft.fullname" $root }}-addresses}
            {{- if .stores }}
            - configMapRef: {name: {{ include "codegraft.fullname" $root }}-stores}
            {{- end }}
          env:
            - {name: CODEGRAFT_LISTEN, value: "0.0.0.0:{{ .port }}"}
            - {name: CODEGRAFT_DRAIN_SECONDS, value: {{ $values.drainSeconds | quote }}}
            - {name: CODEGRAFT_CACHE_DIR, value: {{ ternary "/var/lib/codegraft" "/cache" (not (not $jobs)) }}}
            {{- if .stores }}
            # A service is a user of its own name at NATS, which lets it do what it has to and no more.
            - {name: CODEGRAFT_NATS_USER, value: {{ .image }}}
            {{- end }}
            {{- range $variable, $key := $secrets }}
            {{- include "codegraft.secret" (dict "root" $root "of" $of "variable" $variable "key" $key) | nindent 12 }}
            {{- end }}
            {{- if $https }}
            - {name: CODEGRAFT_GATEWAY_CERT_FILE, value: /etc/codegraft/https/tls.crt}
            - {name: CODEGRAFT_GATEWAY_KEY_FILE, value: /etc/codegraft/https/tls.key}
            {{- end }}
            {{- if $tls }}
            - {name: CODEGRAFT_TLS_CA_FILE, value: /etc/codegraft/tls/ca.crt}
            {{- if not $http }}
            - {name: CODEGRAFT_TLS_CERT_FILE, value: /etc/codegraft/tls/tls.crt}
            - {name: CODEGRAFT_TLS_KEY_FILE, value: /etc/codegraft/tls/tls.key}
            {{- if $root.Values.tls.mutual }}
            - {name: CODEGRAFT_TLS_CLIENT_CA_FILE, value: /etc/codegraft/tls/ca.crt}
            {{- end }}
            {{- else if $root.Values.tls.mutual }}
            - {name: CODEGRAFT_TLS_CERT_FILE, value: /etc/codegraft/tls/tls.crt}
            - {name: CODEGRAFT_TLS_KEY_FILE, value: /etc/codegraft/tls/tls.key}
            {{- end }}
            {{- end }}
            {{- if and .threads (not (hasKey $settings .threads)) }}
            - name: CODEGRAFT_{{ upper .threads }}
              valueFrom:
                resourceFieldRef: {resource: limits.cpu, divisor: "1"}
            {{- end }}
            {{- include "codegraft.settings" $settings | trim | nindent 12 }}
            {{- with $values.extraEnv }}{{ toYaml . | nindent 12 }}{{ end }}
          resources:
            requests: {{- toYaml $values.resources.requests | nindent 14 }}
            limits: {{- toYaml $values.resources.limits | nindent 14 }}
              {{- if $gpus }}
              nvidia.com/gpu: {{ $gpus }}
              {{- end }}
          # It waits for NATS and S3 for a minute, and ends with a reason when they are not there.
          startupProbe:
            {{- include "codegraft.probe" . | trim | nindent 12 }}
            periodSeconds: 2
            timeoutSeconds: 5
            failureThreshold: 60
          readinessProbe:
            {{- include "codegraft.probe" (merge (dict "service" .readyService) .) | trim | nindent 12 }}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 2
          livenessProbe:
            {{- include "codegraft.probe" . | trim | nindent 12 }}
            periodSeconds: 20
            timeoutSeconds: 10
            failureThreshold: 6
          lifecycle:
            # SIGTERM ends listening at once, but for a moment others still find the pod in DNS.
            preStop:
              exec: {command: [sleep, {{ $root.Values.preStopSeconds | quote }}]}
          securityContext: {{- include "codegraft.containerSecurity" $root | nindent 12 }}
          volumeMounts:
            - {name: cache, mountPath: /cache}
            - {name: tmp, mountPath: /tmp}
            {{- if $values.sharedMemory }}
            - {name: memory, mountPath: /dev/shm}
            {{- end }}
            {{- if $jobs }}
            - {name: shared, mountPath: /var/lib/codegraft}
            {{- end }}
            {{- if $tls }}
            - {name: tls, mountPath: /etc/codegraft/tls, readOnly: true}
            {{- end }}
            {{- if $https }}
            - {name: https, mountPath: /etc/codegraft/https, readOnly: true}
            {{- end }}
      volumes:
        - name: cache
          {{- if $values.cache.claim }}
          persistentVolumeClaim: {claimName: {{ $values.cache.claim }}}
          {{- else }}
          emptyDir: {sizeLimit: {{ $values.cache.sizeLimit }}}
          {{- end }}
        - name: tmp
          emptyDir: {sizeLimit: 10Gi}
        {{- with $values.sharedMemory }}
        # Processes of one run, and NCCL, talk through it; the default of 64 MiB is too little. Counts as memory.
        - name: memory
          emptyDir: {medium: Memory, sizeLimit: {{ . }}}
        {{- end }}
        {{- if $jobs }}
        - name: shared
          persistentVolumeClaim: {claimName: {{ required "trainerWorker.jobs.enabled needs trainerWorker.jobs.claim" .jobs.claim }}}
        {{- end }}
        {{- with $tls }}
        - name: tls
          secret: {secretName: {{ . }}, defaultMode: 0440}
        {{- end }}
        {{- with $https }}
        - name: https
          secret: {secretName: {{ . }}, defaultMode: 0440}
        {{- end }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {{- include "codegraft.metadata" . | nindent 2 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {{- include "codegraft.selector" . | nindent 6 }}
{{- if .called }}
---
apiVersion: v1
kind: Service
metadata: {{- include "codegraft.metadata" . | nindent 2 }}
spec:
  {{- if not $http }}
  # Headless: gRPC keeps its connections, so a virtual address would tie each client to one replica.
  clusterIP: None
  {{- end }}
  selector: {{- include "codegraft.selector" . | nindent 4 }}
  ports:
    - {name: {{ ternary "http" "grpc" $http }}, port: {{ .port }}, targetPort: {{ .port }}, appProtocol: {{ if $https }}https{{ else if $http }}http{{ else if $tls }}https{{ else }}kubernetes.io/h2c{{ end }}}
{{- end }}
{{- end }}

{{/* Kubernetes' own gRPC probe knows no TLS: with it the probe is ours, run in the container. */}}
{{- define "codegraft.probe" -}}
{{- if eq .component "gateway" }}
httpGet: {path: /health, port: {{ .port }}{{ if .values.tlsSecret }}, scheme: HTTPS{{ end }}}
{{- else if .root.Values.tls.existingSecret }}
exec:
  command: [python, -m, services.core.rpc.probe, --name, {{ include "codegraft.fullname" .root }}-{{ .image }}.{{ .root.Release.Namespace }}.svc{{ with .service }}, --service, {{ . }}{{ end }}]
{{- else }}
grpc:
  port: {{ .port }}
  {{- with .service }}
  service: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
