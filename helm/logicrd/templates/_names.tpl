{{/* Names, labels and images. */}}

{{- define "logicrd.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects pods: never changes in the life of a release. Takes (list $ component). */}}
{{- define "logicrd.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Takes (list $ component). */}}
{{- define "logicrd.labels" -}}
{{- $root := index . 0 -}}
{{ include "logicrd.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods: nothing that changes with the chart's version, which would start every pod anew. */}}
{{- define "logicrd.podLabels" -}}
{{ include "logicrd.selector" . }}
{{- with (index . 0).Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An image by its digest. Takes a dictionary of `repository` and `digest`. */}}
{{- define "logicrd.image" -}}
{{ .repository }}@{{ .digest }}
{{- end -}}

{{- define "logicrd.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "logicrd.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* Where gRPC of Triton is: every address behind the headless name is a replica. */}}
{{- define "logicrd.tritonName" -}}
{{ include "logicrd.fullname" . }}-triton-headless
{{- end -}}

{{- define "logicrd.strimziName" -}}
{{ include "logicrd.fullname" . }}-kafka
{{- end -}}

{{- define "logicrd.kafkaBootstrap" -}}
{{- if .Values.strimzi.enabled -}}
{{- toJson (list (printf "%s-kafka-bootstrap:9093" (include "logicrd.strimziName" .))) -}}
{{- else -}}
{{- toJson .Values.kafka.bootstrap -}}
{{- end -}}
{{- end -}}
