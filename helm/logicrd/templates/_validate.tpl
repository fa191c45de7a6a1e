{{/*
Values that the schema cannot judge: each wrong one ends the render with a sentence that says which and what to do.
*/}}
{{- define "logicrd.validate" -}}
{{- $values := .Values -}}
{{- include "logicrd.validateSecrets" (list "" $values) -}}
{{- if not $values.config.line -}}
{{- fail "config.line is empty: name the production line, it is the first half of every Kafka key" -}}
{{- end -}}
{{- include "logicrd.validatePools" . -}}
{{- include "logicrd.validateImages" . -}}
{{- include "logicrd.validateModels" . -}}
{{- include "logicrd.validateServers" . -}}
{{- include "logicrd.validateAutoscaling" . -}}
{{- include "logicrd.validatePeers" . -}}
{{- end -}}

{{/* No password in an address, and none under a name that stands for one. Takes (list path value). */}}
{{- define "logicrd.validateSecrets" -}}
{{- $path := index . 0 -}}
{{- $value := index . 1 -}}
{{- if kindIs "map" $value -}}
{{- range $key, $each := $value -}}
{{- $here := trimPrefix "." (printf "%s.%s" $path $key) -}}
{{- if and (regexMatch "(?i)^(password|passwd|secret|token|access_?key|secret_?key|api_?key)$" $key) $each -}}
{{- fail (printf "%s holds a secret in plain text: put it into a Secret and name that (existingSecret, password_file)" $here) -}}
{{- end -}}
{{- include "logicrd.validateSecrets" (list $here $each) -}}
{{- end -}}
{{- else if kindIs "slice" $value -}}
{{- range $i, $each := $value -}}
{{- include "logicrd.validateSecrets" (list (printf "%s[%d]" $path $i) $each) -}}
{{- end -}}
{{- else if kindIs "string" $value -}}
{{- if regexMatch "://[^/@]*@" $value -}}
{{- fail (printf "%s has credentials in its address: put the password into a Secret and name that (existingSecret, password_file)" $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "logicrd.validatePools" -}}
{{- if not .Values.pools -}}
{{- fail "pools is empty: no cameras, no line. Give at least one pool with its cameras" -}}
{{- end -}}
{{- $names := list -}}
{{- $ids := list -}}
{{- range .Values.pools -}}
{{- $pool := include "logicrd.pool" . | fromJson -}}
{{- if has $pool.name $names -}}{{- fail (printf "pools: two pools are called %q" $pool.name) -}}{{- end -}}
{{- $names = append $names $pool.name -}}
{{- if and (not $pool.cameras) (not (and $pool.shared $pool.camerasElsewhere)) -}}
{{- fail (printf "pool %q has no cameras: list them, or say camerasElsewhere for a shared pool that `logicrd cameras apply` fills" $pool.name) -}}
{{- end -}}
{{- if and $pool.cameras $pool.shared $pool.camerasElsewhere -}}
{{- fail (printf "pool %q lists cameras and says camerasElsewhere: one of the two fills a pool" $pool.name) -}}
{{- end -}}
{{- if and (not $pool.shared) (gt (int $pool.replicas) 1) -}}
{{- fail (printf "pool %q is not shared and has %d replicas: each would read every camera. Take one replica, or share the pool" $pool.name (int $pool.replicas)) -}}
{{- end -}}
{{- if and $pool.shared (gt (len $pool.cameras) (mul (int $pool.replicas) (int $pool.capacity) | int)) -}}
{{- fail (printf "pool %q has %d cameras and room for %d: give it more replicas or capacity" $pool.name (len $pool.cameras) (mul (int $pool.replicas) (int $pool.capacity))) -}}
{{- end -}}
{{- range $pool.cameras -}}
{{- if has .id $ids -}}{{- fail (printf "pools: two cameras are called %q; ids are unique on a line" .id) -}}{{- end -}}
{{- $ids = append $ids .id -}}
{{- if .password_file -}}
{{- $parts := splitList "/" .password_file -}}
{{- if not (and (eq (len $parts) 3) (eq (first $parts) "cameras") (has (index $parts 1) $pool.cameraSecrets)) -}}
{{- fail (printf "camera %q: password_file %q is no file here; write cameras/<secret>/<key> and list the secret in the pool's cameraSecrets" .id .password_file) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Takes (list name settings). */}}
{{- define "logicrd.validateImage" -}}
{{- if not (index . 1).digest -}}
{{- fail (printf "%s.digest is empty: images are named by digest (sha256:...), since a tag may move" (index . 0)) -}}
{{- end -}}
{{- end -}}

{{- define "logicrd.validateImages" -}}
{{- include "logicrd.validateImage" (list "worker.image" .Values.worker.image) -}}
{{- if .Values.triton.enabled -}}
{{- include "logicrd.validateImage" (list "triton.image" .Values.triton.image) -}}
{{- end -}}
{{- end -}}

{{- define "logicrd.validateModels" -}}
{{- $source := .Values.triton.modelRepository -}}
{{- $given := list -}}
{{- if $source.pvc.claimName -}}{{- $given = append $given "pvc" -}}{{- end -}}
{{- if $source.image.repository -}}{{- $given = append $given "image" -}}{{- end -}}
{{- if $source.s3.bucket -}}{{- $given = append $given "s3" -}}{{- end -}}
{{- if ne (len $given) 1 -}}
{{- fail (printf "triton.modelRepository names %d places (%s): give one of pvc.claimName, image.repository and s3.bucket" (len $given) (join ", " $given)) -}}
{{- end -}}
{{- if $source.image.repository -}}
{{- include "logicrd.validateImage" (list "triton.modelRepository.image" $source.image) -}}
{{- end -}}
{{- if and $source.s3.direct (not $source.s3.bucket) -}}
{{- fail "triton.modelRepository.s3.direct without s3.bucket: name the bucket that Triton and the workers read" -}}
{{- end -}}
{{- if $source.s3.bucket -}}
{{- if not $source.s3.direct -}}
{{- include "logicrd.validateImage" (list "triton.modelRepository.s3.image" $source.s3.image) -}}
{{- else if not (regexMatch "^https://[A-Za-z0-9.-]+:[0-9]+/?$" $source.s3.endpoint) -}}
{{- fail (printf "triton.modelRepository.s3.endpoint %q is not https://host:port: Triton reads a bucket with a port alone" $source.s3.endpoint) -}}
{{- end -}}
{{- if and $source.s3.direct (not (regexMatch "^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*/?$" $source.s3.prefix)) -}}
{{- fail (printf "triton.modelRepository.s3.prefix %q: with s3.direct give one of letters, digits and ._-/, for pushed versions lie beside it" $source.s3.prefix) -}}
{{- end -}}
{{- if not (hasPrefix "https://" $source.s3.endpoint) -}}
{{- fail (printf "triton.modelRepository.s3.endpoint %q is not https://..." $source.s3.endpoint) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "logicrd.validateServers" -}}
{{- $triton := .Values.triton -}}
{{- if and (not $triton.enabled) (not $triton.externalAddresses) -}}
{{- fail "triton.enabled is false and triton.externalAddresses is empty: say where Triton is" -}}
{{- end -}}
{{- if and $triton.tls.enabled (not $triton.tls.existingSecret) -}}
{{- fail "triton.tls.existingSecret is empty: name the secret with Triton's certificate, or send pictures in plain text by triton.tls.enabled=false" -}}
{{- end -}}
{{- if and $triton.signer.configMap $triton.signer.existingSecret -}}
{{- fail "triton.signer names a ConfigMap and a Secret: the public keys are in one of them" -}}
{{- end -}}
{{- if eq (toString .Values.config.kafka.required_at_start) "false" -}}
{{- range .Values.pools -}}
{{- $pool := include "logicrd.pool" . | fromJson -}}
{{- if $pool.shared -}}
{{- fail (printf "config.kafka.required_at_start is false and pool %q is shared: its workers have their cameras from Kafka. Say shared: false, or leave it true" $pool.name) -}}
{{- end -}}
{{- range $pool.stations -}}
{{- if eq (.trigger | default "") "message" -}}
{{- fail (printf "config.kafka.required_at_start is false and station %q triggers by message, from Kafka: choose another trigger, or leave it true" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (not .Values.strimzi.enabled) (not .Values.kafka.bootstrap) -}}
{{- fail "kafka.bootstrap is empty: give the brokers, or let Strimzi make them by strimzi.enabled=true" -}}
{{- end -}}
{{- if and .Values.strimzi.enabled .Values.kafka.bootstrap -}}
{{- fail "kafka.bootstrap and strimzi.enabled: the brokers are those of Strimzi, or those that are given" -}}
{{- end -}}
{{- if and .Values.strimzi.enabled (gt (int .Values.kafka.topics.copies) (int .Values.strimzi.replicas)) -}}
{{- fail (printf "kafka.topics.copies is %d and strimzi.replicas %d: a broker holds one copy" (int .Values.kafka.topics.copies) (int .Values.strimzi.replicas)) -}}
{{- end -}}
{{- $sasl := .Values.kafka.sasl -}}
{{- if ne (empty $sasl.username) (empty $sasl.existingSecret) -}}
{{- fail "kafka.sasl: username and existingSecret go together" -}}
{{- end -}}
{{- if and $sasl.username (eq $sasl.mechanism "PLAIN") (not .Values.kafka.tls.enabled) -}}
{{- fail "kafka.sasl.mechanism PLAIN sends the password as it is: leave kafka.tls.enabled true, or take SCRAM-SHA-512" -}}
{{- end -}}
{{- if not .Values.redis.url -}}
{{- fail "redis.url is empty: give the server for thresholds, rediss://host:6379/0" -}}
{{- end -}}
{{- if and .Values.redis.tls.enabled (not (hasPrefix "rediss://" .Values.redis.url)) -}}
{{- fail (printf "redis.url %q is plain text: write rediss://, or say redis.tls.enabled=false" .Values.redis.url) -}}
{{- end -}}
{{- if and (not .Values.redis.tls.enabled) (hasPrefix "rediss://" .Values.redis.url) -}}
{{- fail "redis.url is rediss:// and redis.tls.enabled false: one of them is wrong" -}}
{{- end -}}
{{- end -}}

{{- define "logicrd.validateAutoscaling" -}}
{{- $scaling := .Values.triton.autoscaling -}}
{{- if ne $scaling.mode "none" -}}
{{- if not .Values.triton.enabled -}}
{{- fail "triton.autoscaling.mode is set and triton.enabled false: nothing here can be scaled" -}}
{{- end -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail (printf "triton.autoscaling: minReplicas %d is above maxReplicas %d" (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- end -}}
{{- if not (and .Values.serviceMonitor.enabled .Values.prometheusRule.enabled) -}}
{{- fail (printf "triton.autoscaling.mode is %s without a metric source: the queue time is scraped by serviceMonitor and recorded by prometheusRule, enable both" $scaling.mode) -}}
{{- end -}}
{{- if and (eq $scaling.mode "hpa") (not $scaling.hpa.metric) -}}
{{- fail "triton.autoscaling.mode is hpa without a metric source: add files/prometheus-adapter.yaml to prometheus-adapter and name its metric in triton.autoscaling.hpa.metric" -}}
{{- end -}}
{{- if and (eq $scaling.mode "keda") (not $scaling.keda.prometheusAddress) -}}
{{- fail "triton.autoscaling.mode is keda without a metric source: give triton.autoscaling.keda.prometheusAddress" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "logicrd.validatePeers" -}}
{{- $policy := .Values.networkPolicy -}}
{{- if $policy.enabled -}}
{{- $needed := dict "networkPolicy.redis" $policy.redis "networkPolicy.cameras.peers" $policy.cameras.peers "networkPolicy.dns" $policy.dns -}}
{{- if not .Values.strimzi.enabled -}}{{- $_ := set $needed "networkPolicy.kafka" $policy.kafka -}}{{- end -}}
{{- if not .Values.triton.enabled -}}{{- $_ := set $needed "networkPolicy.triton" $policy.triton -}}{{- end -}}
{{- if .Values.triton.modelRepository.s3.bucket -}}{{- $_ := set $needed "networkPolicy.s3" $policy.s3 -}}{{- end -}}
{{- if or .Values.tracing.address .Values.tracing.tritonUrl -}}{{- $_ := set $needed "networkPolicy.tracing" $policy.tracing -}}{{- end -}}
{{- if .Values.serviceMonitor.enabled -}}{{- $_ := set $needed "networkPolicy.prometheus" $policy.prometheus -}}{{- end -}}
{{- range $name, $peers := $needed -}}
{{- if not $peers -}}
{{- fail (printf "%s is empty: the policy would let nothing through. Name the peers, or say networkPolicy.enabled=false" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
