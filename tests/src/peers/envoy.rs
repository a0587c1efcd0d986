//! Envoy as a pair: HTTP/1.1 on both sides, the source's identity checked by an RBAC filter, one route.

use super::{End, WORKERS};

/// Its command line.
pub fn arguments(file: String, source: bool) -> Vec<String> {
    let words = [
        "-c",
        &file,
        "--concurrency",
        &WORKERS.to_string(),
        "--log-level",
        "error",
        "--disable-hot-restart",
        "--base-id",
        if source { "1" } else { "2" },
    ];
    words.map(str::to_string).to_vec()
}

/// Its configuration. No access log: the others have none either.
pub fn configuration(end: &End<'_>) -> String {
    let tls = |kind: &str, more: &str| {
        format!(
            r#"
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}
        {more}
        common_tls_context:
          tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
          tls_certificates:
          - certificate_chain: {{filename: "{}"}}
            private_key: {{filename: "{}"}}
          validation_context:
            trusted_ca: {{filename: "{}"}}
            match_typed_subject_alt_names: [{{san_type: DNS, matcher: {{exact: {}}}}}]"#,
            end.own.certificate.display(),
            end.own.key.display(),
            end.ca.display(),
            end.other
        )
    };
    let (inbound, outbound, permit) = if end.source {
        let outbound = tls("UpstreamTlsContext", &format!("sni: {}", end.other));
        (
            String::new(),
            format!("    transport_socket:{outbound}\n"),
            String::new(),
        )
    } else {
        let inbound = tls("DownstreamTlsContext", "require_client_certificate: true");
        let permit = format!(
            r#"
          - name: envoy.filters.http.rbac
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
              rules:
                action: ALLOW
                policies:
                  source:
                    permissions: [{{header: {{name: ":method", string_match: {{exact: GET}}}}}}]
                    principals: [{{authenticated: {{principal_name: {{exact: {}}}}}}}]"#,
            end.other
        );
        (
            format!("      transport_socket:{}\n", inbound.replace("\n", "\n  ")),
            String::new(),
            permit,
        )
    };
    format!(
        r#"static_resources:
  listeners:
  - name: in
    address: {{socket_address: {{address: {listen_ip}, port_value: {listen_port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          codec_type: HTTP1
          generate_request_id: false
          http_filters:{permit}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: /}}, route: {{cluster: next, timeout: 0s}}}}]
{inbound}
  clusters:
  - name: next
    type: STATIC
    connect_timeout: 5s
    circuit_breakers:
      thresholds: [{{max_connections: 20000, max_pending_requests: 20000, max_requests: 20000}}]
    load_assignment:
      cluster_name: next
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {next_ip}, port_value: {next_port}}}}}}}}}]}}]
{outbound}"#,
        listen_ip = end.listen.ip(),
        listen_port = end.listen.port(),
        next_ip = end.next.ip(),
        next_port = end.next.port(),
    )
}
