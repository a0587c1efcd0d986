//! nginx's stream module as a pair: bytes, one TLS connection for each flow, sessions resumed.

use std::path::Path;

use anyhow::{Context, Result};

use super::{End, WORKERS};

/// Where Debian puts the module, unless it is compiled in.
const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// Fails if the module is missing.
pub fn stream_module() -> Result<&'static str> {
    let there = Path::new(MODULE).exists().then_some(MODULE);
    there.with_context(|| format!("nginx has no stream module ({MODULE})"))
}

/// Its configuration.
pub fn configuration(end: &End<'_>) -> Result<String> {
    let (listen, next, directory) = (end.listen, end.next, end.directory.display());
    let (certificate, key) = (end.own.certificate.display(), end.own.key.display());
    let (ca, other, module) = (end.ca.display(), end.other, stream_module()?);
    let side = if end.source {
        format!(
            "    listen {listen} backlog=4096;
    proxy_ssl on;
    proxy_ssl_certificate {certificate};
    proxy_ssl_certificate_key {key};
    proxy_ssl_trusted_certificate {ca};
    proxy_ssl_verify on;
    proxy_ssl_name {other};
    proxy_ssl_server_name on;
    proxy_ssl_protocols TLSv1.3;
    proxy_ssl_session_reuse on;"
        )
    } else {
        format!(
            "    listen {listen} ssl backlog=4096;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_client_certificate {ca};
    ssl_verify_client on;
    ssl_protocols TLSv1.3;
    ssl_session_cache shared:pair:1m;"
        )
    };
    Ok(format!(
        "load_module {module};
daemon off;
user root;
worker_processes {WORKERS};
pid {directory}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 20000; }}
stream {{
  server {{
{side}
    proxy_pass {next};
    proxy_timeout 1h;
    tcp_nodelay on;
  }}
}}
"
    ))
}
