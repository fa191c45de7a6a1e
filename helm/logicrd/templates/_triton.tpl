{{/*
The start of Triton. A shell, because the key of the restricted calls comes from a file or from chance and Triton takes
it as an argument only: it shows in this pod's own list of processes, and nowhere else.

With strict readiness a server would call itself not ready while a version is tried, and for good after one that fails.
Of traces it makes those that the workers ask for: one request in so many by itself is none.
gRPC serves inference, by TLS. HTTP has no TLS in Triton, so that it answers health checks and nothing else.
*/}}
{{- define "logicrd.tritonScript" -}}
{{- $triton := .Values.triton -}}
KEY=$(cat /etc/triton/admin/key 2>/dev/null || head -c 32 /dev/urandom | base64 | tr -d '=+/')
exec tritonserver \
  --model-repository={{ include "logicrd.models" . }} \
  --model-control-mode=explicit \
  --strict-readiness=false \
  {{- range $triton.models }}
  {{ printf "--load-model=%s" . | squote }} \
  {{- end }}
  --disable-auto-complete-config \
  --exit-timeout-secs={{ $triton.exitTimeoutSeconds }} \
  --grpc-port=8001 \
  --http-port=8000 \
  --metrics-port=8002 \
  {{- if $triton.tls.enabled }}
  --grpc-use-ssl=true \
  --grpc-server-cert=/etc/triton/tls/tls.crt \
  --grpc-server-key=/etc/triton/tls/tls.key \
  {{- end }}
  --grpc-restricted-protocol="model-repository,shared-memory,logging,trace:logicrd=$KEY" \
  --http-restricted-api="inference,metadata,model-config,statistics,model-repository,shared-memory,logging,trace:logicrd=$KEY" \
  --metrics-config=histogram_latencies=true \
  --backend-config=python,shm-default-byte-size=16777216
  {{- with .Values.tracing.tritonUrl }} \
  --trace-config=mode=opentelemetry \
  --trace-config=level=TIMESTAMPS \
  --trace-config=rate=2147483647 \
  {{ printf "--trace-config=opentelemetry,url=%s" . | squote }}
  {{- end }}
  {{- range $triton.extraArgs }} \
  {{ squote . }}
  {{- end }}
{{- end -}}
