{{- define "triptych.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end -}}

{{- define "triptych.labels" -}}
app.kubernetes.io/name: triptych
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "triptych.cache" -}}
{{- if .Values.cache.claim -}}
persistentVolumeClaim: {claimName: {{ .Values.cache.claim }}}
{{- else -}}
emptyDir: {}
{{- end -}}
{{- end -}}

{{- define "triptych.probes" -}}
# a model may take long to come, but a process that does not answer is started again
startupProbe:
  httpGet: {path: /ready, port: http}
  periodSeconds: 10
  failureThreshold: 360
readinessProbe:
  httpGet: {path: /ready, port: http}
  periodSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /live, port: http}
  periodSeconds: 10
  failureThreshold: 6
{{- end -}}
