{{/* Labels that select a component's pods: component name. */}}
{{- define "agentic.selector" -}}
app.kubernetes.io/name: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* Labels of a component's objects. */}}
{{- define "agentic.labels" -}}
{{ include "agentic.selector" . }}
app.kubernetes.io/part-of: agentic-operator
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Reference of an image: root and image. */}}
{{- define "agentic.image" -}}
{{- $repository := .image.repository -}}
{{- with .root.Values.image.registry }}{{ $repository = printf "%s/%s" (trimSuffix "/" .) $repository }}{{ end -}}
{{- if .image.digest -}}
{{ $repository }}@{{ .image.digest }}
{{- else -}}
{{ $repository }}:{{ coalesce .image.tag .root.Values.image.tag .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* Security context of a pod that writes no volume. */}}
{{- define "agentic.podSecurity" -}}
runAsNonRoot: true
{{- if not (kindIs "invalid" .Values.runAsUser) }}
runAsUser: {{ int64 .Values.runAsUser }}
runAsGroup: {{ int64 .Values.runAsUser }}
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Security context of a container, by Pod Security's `restricted`. */}}
{{- define "agentic.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Where a pod may run: the component's values. */}}
{{- define "agentic.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "agentic.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Binds a ClusterRole in the cluster, or in the watched namespace: root, role (and account), labels, annotations. */}}
{{- define "agentic.bindings" -}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ ternary "RoleBinding" "ClusterRoleBinding" (ne .root.Values.watchNamespace "") }}
metadata:
  name: {{ .role }}
  {{- with .root.Values.watchNamespace }}
  namespace: {{ . }}
  {{- end }}
  labels:
    {{- .labels | nindent 4 }}
  {{- with .annotations }}
  annotations:
    {{- . | nindent 4 }}
  {{- end }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ .role }}
subjects:
  - kind: ServiceAccount
    name: {{ .role }}
    namespace: {{ .root.Release.Namespace }}
{{- end }}

{{- define "agentic.hook" -}}
helm.sh/hook: pre-delete
helm.sh/hook-weight: {{ .weight | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* The database of the event log. */}}
{{- define "agentic.database" -}}
- name: DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ .database.secretName }}
      key: {{ .database.secretKey | quote }}
{{- if .database.caKey }}
- name: GATEWAY_DATABASE_CA
  value: /etc/agentic/database/ca.pem
{{- end }}
{{- end }}

{{/* Where the authorities of its certificate are. */}}
{{- define "agentic.databaseAuthorities" -}}
- name: database-ca
  mountPath: /etc/agentic/database
  readOnly: true
{{- end }}

{{/* What the pods of sessions may reach: rules of a NetworkPolicy's spec.egress. */}}
{{- define "agentic.sessionEgress" -}}
{{- $policy := .Values.networkPolicy -}}
{{- $rules := list (dict "to" $policy.dns.to "ports" $policy.dns.ports) -}}
{{- if .Values.gateway.enabled -}}
{{- $namespace := dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace) -}}
{{- $pods := dict "matchLabels" (include "agentic.selector" (dict "root" . "component" "agentic-gateway") | fromYaml) -}}
{{- $gateway := dict "namespaceSelector" $namespace "podSelector" $pods -}}
{{- $rules = append $rules (dict "to" (list $gateway) "ports" (list (dict "protocol" "TCP" "port" 8080))) -}}
{{- end -}}
{{- $four := list -}}
{{- $six := list -}}
{{- range $policy.blocked -}}
{{- if contains ":" . }}{{ $six = append $six . }}{{ else }}{{ $four = append $four . }}{{ end -}}
{{- end -}}
{{- $public := list (dict "ipBlock" (dict "cidr" "0.0.0.0/0" "except" $four)) (dict "ipBlock" (dict "cidr" "::/0" "except" $six)) -}}
{{- $rules = append $rules (dict "to" $public) -}}
{{- toJson (concat $rules $policy.egress) -}}
{{- end }}
