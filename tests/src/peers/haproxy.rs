//! HAProxy as a pair: HTTP on both sides, connections to the other end shared between requests; and as the floor: two
//! hops that only copy bytes.

use super::{End, WORKERS};

/// Its configuration.
pub fn configuration(end: &End<'_>) -> String {
    let (listen, next, own, ca, other) = (
        end.listen,
        end.next,
        end.own.both.display(),
        end.ca.display(),
        end.other,
    );
    let (bind, permit, server) = if end.source {
        (
            String::new(),
            String::new(),
            format!("ssl crt {own} ca-file {ca} verify required verifyhost {other} sni str({other}) alpn http/1.1"),
        )
    } else {
        (
            format!("ssl crt {own} ca-file {ca} verify required alpn http/1.1"),
            format!("http-request deny unless {{ ssl_c_s_dn(CN) -m str {other} }}\n  "),
            String::new(),
        )
    };
    format!(
        "global
  nbthread {WORKERS}
  maxconn 4500
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  http-reuse always
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  timeout http-keep-alive 1h
frontend in
  bind {listen} {bind}
  {permit}http-request set-header x-bench-end {side}
  default_backend out
backend out
  server next {next} {server}
",
        side = if end.source { "source" } else { "destination" },
    )
}

/// Its configuration where it only copies bytes, a connection for a connection.
pub fn floor(end: &End<'_>) -> String {
    format!(
        "global
  nbthread {WORKERS}
  maxconn 4500
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend in
  bind {listen}
  default_backend out
backend out
  server next {next}
",
        listen = end.listen,
        next = end.next,
    )
}
