{{/* What pods have in common. */}}

{{/* The level `restricted` of Kubernetes' pod security standards. Takes the user's number. */}}
{{- define "logicrd.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "logicrd.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Account, pull secrets, and no token. */}}
{{- define "logicrd.podIdentity" -}}
serviceAccountName: {{ include "logicrd.serviceAccount" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Takes (list settings selector). */}}
{{- define "logicrd.spread" -}}
{{- $settings := index . 0 -}}
{{- if $settings.enabled }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ $settings.topologyKey }}
    whenUnsatisfiable: {{ $settings.whenUnsatisfiable }}
    labelSelector:
      matchLabels:
        {{- index . 1 | nindent 8 }}
{{- end }}
{{- end -}}

{{/* Where the models are: a folder of each pod, or the bucket itself, as Triton names it. */}}
{{- define "logicrd.models" -}}
{{- $s3 := .Values.triton.modelRepository.s3 -}}
{{- if and $s3.bucket $s3.direct -}}
s3://{{ trimSuffix "/" $s3.endpoint }}/{{ trimSuffix "/" (printf "%s/%s" $s3.bucket $s3.prefix) }}
{{- else -}}
/models
{{- end -}}
{{- end -}}

{{/* What a container needs that reads the bucket itself. */}}
{{- define "logicrd.modelsEnv" -}}
{{- $s3 := .Values.triton.modelRepository.s3 -}}
{{- if and $s3.bucket $s3.direct }}
{{- with $s3.region }}
- {name: AWS_REGION, value: {{ . | quote }}}
- {name: AWS_DEFAULT_REGION, value: {{ . | quote }}}
{{- end }}
{{- if $s3.credentialsSecret }}
- {name: AWS_SHARED_CREDENTIALS_FILE, value: /etc/s3/credentials}
{{- end }}
{{- if $s3.caSecret }}
- {name: AWS_CA_BUNDLE, value: /etc/s3-authority/ca.crt}
{{- end }}
{{- end }}
{{- end -}}

{{/* The model repository: a volume called `models`. */}}
{{- define "logicrd.modelsVolume" -}}
{{- $source := .Values.triton.modelRepository -}}
{{- if not (and $source.s3.bucket $source.s3.direct) }}
- name: models
  {{- if $source.pvc.claimName }}
  persistentVolumeClaim: {claimName: {{ $source.pvc.claimName }}, readOnly: true}
  {{- else if $source.image.repository }}
  image:
    reference: {{ include "logicrd.image" $source.image }}
    pullPolicy: {{ $source.image.pullPolicy }}
  {{- else }}
  emptyDir: {sizeLimit: {{ $source.s3.sizeLimit }}}
  {{- end }}
{{- end }}
{{- if and $source.s3.bucket $source.s3.credentialsSecret }}
- name: s3-credentials
  secret: {secretName: {{ $source.s3.credentialsSecret }}, defaultMode: 0440}
{{- end }}
{{- if and $source.s3.bucket $source.s3.caSecret }}
- name: s3-authority
  secret:
    secretName: {{ $source.s3.caSecret }}
    items:
      - {key: ca.crt, path: ca.crt}
{{- end }}
{{- end -}}

{{/* Key and authority of a bucket, for whoever reads it. Takes the block `s3`. */}}
{{- define "logicrd.s3Mounts" -}}
{{- if .credentialsSecret }}
- {name: s3-credentials, mountPath: /etc/s3, readOnly: true}
{{- end }}
{{- if .caSecret }}
- {name: s3-authority, mountPath: /etc/s3-authority, readOnly: true}
{{- end }}
{{- end -}}

{{- define "logicrd.modelsMount" -}}
{{- $source := .Values.triton.modelRepository -}}
{{- if and $source.s3.bucket $source.s3.direct }}
{{- include "logicrd.s3Mounts" $source.s3 }}
{{- else }}
- name: models
  mountPath: /models
  readOnly: true
  {{- with ternary $source.pvc.subPath $source.image.subPath (ne $source.pvc.claimName "") }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Copies the bucket before the pod's own container starts; nothing for the other kinds of repository. */}}
{{- define "logicrd.modelsCopy" -}}
{{- $s3 := .Values.triton.modelRepository.s3 -}}
{{- if and $s3.bucket (not $s3.direct) }}
- name: models
  image: {{ include "logicrd.image" $s3.image }}
  imagePullPolicy: {{ $s3.image.pullPolicy }}
  args: [copy, {{ printf ":s3:%s" (trimSuffix "/" (printf "%s/%s" $s3.bucket $s3.prefix)) | quote }}, /models, --checksum]
  env:
    - {name: RCLONE_S3_PROVIDER, value: Other}
    - {name: RCLONE_S3_ENV_AUTH, value: "true"}
    - {name: RCLONE_S3_ENDPOINT, value: {{ $s3.endpoint | quote }}}
    - {name: RCLONE_S3_REGION, value: {{ $s3.region | quote }}}
    - {name: RCLONE_CONFIG, value: /tmp/rclone.conf}
    {{- if $s3.credentialsSecret }}
    - {name: AWS_SHARED_CREDENTIALS_FILE, value: /etc/s3/credentials}
    {{- end }}
    {{- if $s3.caSecret }}
    - {name: RCLONE_CA_CERT, value: /etc/s3-authority/ca.crt}
    {{- end }}
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {cpu: "1", memory: 512Mi}
  securityContext:
    {{- include "logicrd.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
    {{- include "logicrd.s3Mounts" $s3 | nindent 4 }}
{{- end }}
{{- end -}}
