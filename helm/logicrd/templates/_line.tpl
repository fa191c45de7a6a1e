{{/* The line file of a pool's workers, and the files that it names. */}}

{{/* A pool with the defaults filled in, as JSON. Not by `merge`, which takes a false for no answer. Takes the pool. */}}
{{- define "logicrd.pool" -}}
{{- $pool := deepCopy . -}}
{{- $defaults := dict "replicas" 1 "shared" true "capacity" 16 "cameras" list "cameraSecrets" list "camerasElsewhere" false "stations" list -}}
{{- range $key, $value := $defaults -}}
{{- if not (hasKey $pool $key) -}}{{- $_ := set $pool $key $value -}}{{- end -}}
{{- end -}}
{{- toJson $pool -}}
{{- end -}}

{{/* `tls` of the line file. Takes (list settings folder). */}}
{{- define "logicrd.tls" -}}
{{- $tls := index . 0 -}}
{{- $folder := index . 1 -}}
{{- $block := dict -}}
{{- if $tls.caSecret -}}{{- $_ := set $block "ca_file" (printf "%s/ca/ca.crt" $folder) -}}{{- end -}}
{{- if $tls.clientSecret -}}
{{- $_ := set $block "certificate_file" (printf "%s/client/tls.crt" $folder) -}}
{{- $_ := set $block "key_file" (printf "%s/client/tls.key" $folder) -}}
{{- end -}}
{{- toJson $block -}}
{{- end -}}

{{- define "logicrd.kafkaBlock" -}}
{{- $kafka := .Values.kafka -}}
{{- $block := merge (dict "bootstrap" (include "logicrd.kafkaBootstrap" . | fromJsonArray)) .Values.config.kafka -}}
{{- if .Values.strimzi.enabled -}}
{{- $_ := set $block "tls" (dict "ca_file" "kafka/ca/ca.crt" "certificate_file" "kafka/client/user.crt" "key_file" "kafka/client/user.key") -}}
{{- else if $kafka.tls.enabled -}}
{{- $_ := set $block "tls" (include "logicrd.tls" (list $kafka.tls "kafka") | fromJson) -}}
{{- end -}}
{{- if $kafka.sasl.username -}}
{{- $_ := set $block "sasl" (dict "mechanism" $kafka.sasl.mechanism "username" $kafka.sasl.username "password_file" "kafka/sasl/password") -}}
{{- end -}}
{{- toJson $block -}}
{{- end -}}

{{- define "logicrd.redisBlock" -}}
{{- $redis := .Values.redis -}}
{{- $block := merge (dict "url" $redis.url "snapshot" "/var/lib/logicrd/thresholds.json") .Values.config.redis -}}
{{- if $redis.tls.enabled -}}
{{- $block = merge $block (include "logicrd.tls" (list $redis.tls "redis") | fromJson) -}}
{{- end -}}
{{- with $redis.auth.username -}}{{- $_ := set $block "user" . -}}{{- end -}}
{{- if $redis.auth.existingSecret -}}{{- $_ := set $block "password_file" "redis/auth/password" -}}{{- end -}}
{{- toJson $block -}}
{{- end -}}

{{- define "logicrd.tritonBlock" -}}
{{- $triton := .Values.triton -}}
{{- $own := printf "%s:8001" (include "logicrd.tritonName" .) -}}
{{- $block := merge (dict "address" (ternary $own $triton.externalAddresses $triton.enabled) "models_repo" (include "logicrd.models" .)) .Values.config.triton -}}
{{- if $triton.tls.enabled -}}
{{- $_ := set $block "tls" (dict "ca_file" "triton/ca/ca.crt") -}}
{{- end -}}
{{- if or $triton.signer.configMap $triton.signer.existingSecret -}}
{{- $_ := set $block "signer_file" "triton/signer/signer.pem" -}}
{{- end -}}
{{- toJson $block -}}
{{- end -}}

{{- define "logicrd.tracingBlock" -}}
{{- $tracing := .Values.tracing -}}
{{- $block := dict "address" $tracing.address "share" $tracing.share -}}
{{- if $tracing.tls.enabled -}}
{{- $_ := set $block "tls" (include "logicrd.tls" (list $tracing.tls "tracing") | fromJson) -}}
{{- end -}}
{{- toJson $block -}}
{{- end -}}

{{/* Where cameras may be: as given, or else what the policy lets through where that is networks alone; as JSON. */}}
{{- define "logicrd.cameraNetworks" -}}
{{- $networks := .Values.config.camera_networks -}}
{{- if and (not $networks) .Values.networkPolicy.enabled -}}
{{- range .Values.networkPolicy.cameras.peers -}}{{- $networks = append $networks (dig "ipBlock" "cidr" "" .) -}}{{- end -}}
{{- if has "" $networks -}}{{- $networks = list -}}{{- end -}}
{{- end -}}
{{- toJson $networks -}}
{{- end -}}

{{/* Takes (list $ pool). */}}
{{- define "logicrd.lineFile" -}}
{{- $root := index . 0 -}}
{{- $pool := include "logicrd.pool" (index . 1) | fromJson -}}
{{- $config := $root.Values.config -}}
{{- $file := dict "site" $config.site "area" $config.area "line" $config.line "budget_ms" $config.budget_ms "drain_timeout_s" $config.drain_timeout_s -}}
{{- $_ := set $file "outbox" (merge (dict "dir" "/var/lib/logicrd/outbox") $config.outbox) -}}
{{- $_ := set $file "triton" (include "logicrd.tritonBlock" $root | fromJson) -}}
{{- $_ := set $file "kafka" (include "logicrd.kafkaBlock" $root | fromJson) -}}
{{- $_ := set $file "redis" (include "logicrd.redisBlock" $root | fromJson) -}}
{{- $_ := set $file "monitoring" (merge (dict "host" "0.0.0.0" "port" $root.Values.worker.monitoringPort) $config.monitoring) -}}
{{- with $config.batching -}}{{- $_ := set $file "batching" . -}}{{- end -}}
{{- if $root.Values.worker.evidence -}}
{{- $_ := set $file "evidence" (merge (dict "dir" "/var/lib/logicrd/evidence") $config.evidence) -}}
{{- end -}}
{{- with include "logicrd.cameraNetworks" $root | fromJsonArray -}}{{- $_ := set $file "camera_networks" . -}}{{- end -}}
{{- if $root.Values.tracing.address -}}{{- $_ := set $file "tracing" (include "logicrd.tracingBlock" $root | fromJson) -}}{{- end -}}
{{- with $pool.stations -}}{{- $_ := set $file "stations" . -}}{{- end -}}
{{- if $pool.shared -}}
{{- $_ := set $file "pool" (dict "name" $pool.name "capacity" $pool.capacity) -}}
{{- else -}}
{{- $_ := set $file "cameras" $pool.cameras -}}
{{- end -}}
{{- toYaml $file -}}
{{- end -}}

{{/* What the line file names files of, as (list {folder, secret or configMap, items}). Takes (list $ pool). */}}
{{- define "logicrd.lineSecrets" -}}
{{- $root := index . 0 -}}
{{- $pool := include "logicrd.pool" (index . 1) | fromJson -}}
{{- $values := $root.Values -}}
{{- $found := list -}}
{{- range $name := $pool.cameraSecrets -}}
{{- $found = append $found (dict "folder" (printf "cameras/%s" $name) "secret" $name) -}}
{{- end -}}
{{- if $values.triton.tls.enabled -}}
{{- $found = append $found (dict "folder" "triton/ca" "secret" $values.triton.tls.existingSecret "items" (dict "ca.crt" "ca.crt")) -}}
{{- end -}}
{{- with $values.triton.signer -}}
{{- $keys := dict "folder" "triton/signer" "items" (dict .key "signer.pem") -}}
{{- if .configMap -}}{{- $found = append $found (set $keys "configMap" .configMap) -}}{{- end -}}
{{- if .existingSecret -}}{{- $found = append $found (set $keys "secret" .existingSecret) -}}{{- end -}}
{{- end -}}
{{- if $values.strimzi.enabled -}}
{{- $name := include "logicrd.strimziName" $root -}}
{{- $found = append $found (dict "folder" "kafka/ca" "secret" (printf "%s-cluster-ca-cert" $name) "items" (dict "ca.crt" "ca.crt")) -}}
{{- $found = append $found (dict "folder" "kafka/client" "secret" (printf "%s-line" $name) "items" (dict "user.crt" "user.crt" "user.key" "user.key")) -}}
{{- else -}}
{{- $found = concat $found (include "logicrd.tlsSecrets" (list $values.kafka.tls "kafka") | fromJsonArray) -}}
{{- if $values.kafka.sasl.username -}}
{{- $found = append $found (dict "folder" "kafka/sasl" "secret" $values.kafka.sasl.existingSecret "items" (dict $values.kafka.sasl.key "password")) -}}
{{- end -}}
{{- end -}}
{{- $found = concat $found (include "logicrd.tlsSecrets" (list $values.redis.tls "redis") | fromJsonArray) -}}
{{- if $values.tracing.address -}}
{{- $found = concat $found (include "logicrd.tlsSecrets" (list $values.tracing.tls "tracing") | fromJsonArray) -}}
{{- end -}}
{{- if $values.redis.auth.existingSecret -}}
{{- $found = append $found (dict "folder" "redis/auth" "secret" $values.redis.auth.existingSecret "items" (dict $values.redis.auth.key "password")) -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{- define "logicrd.tlsSecrets" -}}
{{- $tls := index . 0 -}}
{{- $folder := index . 1 -}}
{{- $found := list -}}
{{- if $tls.enabled -}}
{{- with $tls.caSecret -}}{{- $found = append $found (dict "folder" (printf "%s/ca" $folder) "secret" . "items" (dict "ca.crt" "ca.crt")) -}}{{- end -}}
{{- with $tls.clientSecret -}}{{- $found = append $found (dict "folder" (printf "%s/client" $folder) "secret" .) -}}{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end -}}

{{/* Volumes of a pod that reads the line file, but for the one at /var/lib/logicrd. Takes (list $ pool). */}}
{{- define "logicrd.lineVolumes" -}}
{{- $root := index . 0 -}}
- name: line
  configMap: {name: {{ include "logicrd.fullname" $root }}-{{ (index . 1).name }}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
{{- range $i, $each := include "logicrd.lineSecrets" . | fromJsonArray }}
- name: secret-{{ $i }}
  {{- with $each.configMap }}
  configMap:
    name: {{ . }}
  {{- else }}
  secret:
    secretName: {{ $each.secret }}
  {{- end }}
    defaultMode: 0440
    {{- with $each.items }}
    items:
      {{- range $key, $path := . }}
      - {key: {{ $key }}, path: {{ $path }}}
      {{- end }}
    {{- end }}
{{- end }}
{{ include "logicrd.modelsVolume" $root }}
{{- end -}}

{{- define "logicrd.lineMounts" -}}
- {name: line, mountPath: /etc/logicrd/line.yaml, subPath: line.yaml, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: data, mountPath: /var/lib/logicrd}
{{- range $i, $each := include "logicrd.lineSecrets" . | fromJsonArray }}
- {name: secret-{{ $i }}, mountPath: /etc/logicrd/{{ $each.folder }}, readOnly: true}
{{- end }}
{{ include "logicrd.modelsMount" (index . 0) }}
{{- end -}}
