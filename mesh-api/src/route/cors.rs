//! Cross-origin resource sharing: what a preflight is answered, and what a response to another origin's page gets.
//!
//! By the Fetch standard. What is not said in these headers a browser refuses, so an origin that is not allowed gets
//! none of them. A star is never said to a page that may send credentials; what it asked for is repeated instead.

use super::HeaderEdit;
use crate::{policy::Cors, request::Request};

/// Whether the request asks for leave to make another one.
pub fn is_preflight(request: &dyn Request) -> bool {
    request.method() == "OPTIONS"
        && request.header("origin").is_some()
        && request.header("access-control-request-method").is_some()
}

/// The headers that answer a preflight; none for an origin that is not allowed.
pub fn preflight_headers(cors: &Cors, request: &dyn Request) -> Vec<(&'static str, String)> {
    let Some(origin) = allowed_origin(cors, request) else {
        return Vec::new();
    };
    let mut headers = origin_headers(cors, origin);
    let lists = [
        (
            "access-control-allow-methods",
            &cors.allow_methods,
            "access-control-request-method",
        ),
        (
            "access-control-allow-headers",
            &cors.allow_headers,
            "access-control-request-headers",
        ),
    ];
    for (name, allowed, asked) in lists {
        let star = allowed.iter().any(|word| word == "*");
        let value = match (star && cors.allow_credentials, allowed.is_empty()) {
            (true, _) => request.header(asked).filter(|asked| is_list(asked)).map(str::to_owned),
            (false, true) => None,
            (false, false) => Some(allowed.join(", ")),
        };
        headers.extend(value.map(|value| (name, value)));
    }
    headers.push(("access-control-max-age", cors.max_age.to_string()));
    headers
}

/// What the response to a request gets; nothing for one of the same origin or of one that is not allowed.
pub fn cors_headers(cors: &Cors, request: &dyn Request) -> HeaderEdit {
    let Some(origin) = allowed_origin(cors, request) else {
        return HeaderEdit::default();
    };
    let mut headers = origin_headers(cors, origin);
    let exposed: Vec<&str> = cors
        .expose_headers
        .iter()
        .map(String::as_str)
        .filter(|word| *word != "*" || !cors.allow_credentials)
        .collect();
    if !exposed.is_empty() {
        headers.push(("access-control-expose-headers", exposed.join(", ")));
    }
    let (vary, set): (Vec<_>, Vec<_>) = headers
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .partition(|(name, _)| name == "vary");
    HeaderEdit {
        set,
        add: vary,
        remove: Vec::new(),
    }
}

fn allowed_origin<'a>(cors: &Cors, request: &'a dyn Request) -> Option<&'a str> {
    let origin = request.header("origin")?;
    // It goes into a header of ours: nothing but what an origin is made of.
    let plain = origin.bytes().all(|byte| byte.is_ascii_graphic());
    (plain && cors.allow_origins.iter().any(|allowed| allowed.matches(origin))).then_some(origin)
}

fn origin_headers(cors: &Cors, origin: &str) -> Vec<(&'static str, String)> {
    let mut headers = vec![
        ("access-control-allow-origin", origin.to_owned()),
        // The answer hangs on who asks: no cache may give it to another origin.
        ("vary", "origin".to_owned()),
    ];
    if cors.allow_credentials {
        headers.push(("access-control-allow-credentials", "true".to_owned()));
    }
    headers
}

/// Whether a text is a list of tokens, as we would write one.
fn is_list(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~, ".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explain::PlainRequest;

    fn cors(json: &str) -> Cors {
        let route = format!(
            r#"{{"parentRefs": [{{"kind": "Service", "name": "a"}}], "rules": [{{"filters": [{{"type": "CORS", "cors": {json}}}]}}]}}"#
        );
        let route: crate::policy::HttpRoute = serde_json::from_str(&route).unwrap();
        match &route.rules[0].filters[0] {
            crate::policy::HttpRouteFilter::Cors(cors) => cors.clone(),
            other => panic!("{other:?}"),
        }
    }

    fn text(headers: &[(&'static str, String)]) -> String {
        let short = |name: &str| name.trim_start_matches("access-control-").to_owned();
        let lines: Vec<String> = headers
            .iter()
            .map(|(name, value)| format!("{}: {value}", short(name)))
            .collect();
        lines.join("; ")
    }

    fn preflight(origin: &str) -> PlainRequest {
        PlainRequest::new("OPTIONS", "/", "cart")
            .with_header("origin", origin)
            .with_header("access-control-request-method", "PUT")
            .with_header("access-control-request-headers", "x-a, x-b")
    }

    #[test]
    fn preflights_are_answered() {
        let cases = [
            (
                r#"{"allowOrigins": ["https://a.example"], "allowMethods": ["PUT", "DELETE"], "allowHeaders": ["X-A"], "maxAge": 60}"#,
                "https://a.example",
                "allow-origin: https://a.example; vary: origin; allow-methods: PUT, DELETE; allow-headers: x-a; max-age: 60",
            ),
            (
                r#"{"allowOrigins": ["https://a.example"], "allowMethods": ["PUT"]}"#,
                "https://b.example",
                "",
            ),
            (r#"{"allowMethods": ["PUT"]}"#, "https://b.example", ""),
            (
                r#"{"allowOrigins": ["*"], "allowMethods": ["*"], "allowHeaders": ["*"]}"#,
                "https://b.example",
                "allow-origin: https://b.example; vary: origin; allow-methods: *; allow-headers: *; max-age: 5",
            ),
            (
                r#"{"allowOrigins": ["*"], "allowMethods": ["*"], "allowHeaders": ["*"], "allowCredentials": true}"#,
                "https://b.example",
                "allow-origin: https://b.example; vary: origin; allow-credentials: true; allow-methods: PUT; \
                 allow-headers: x-a, x-b; max-age: 5",
            ),
        ];
        for (json, origin, wanted) in cases {
            let request = preflight(origin);
            assert!(is_preflight(&request));
            assert_eq!(text(&preflight_headers(&cors(json), &request)), wanted, "{json}");
        }
        // What a page asks for is repeated only if it is a list of names.
        let odd = preflight("https://b.example").with_header("access-control-request-headers", "a\tb");
        let open = cors(r#"{"allowOrigins": ["*"], "allowHeaders": ["*"], "allowCredentials": true}"#);
        assert!(!text(&preflight_headers(&open, &odd)).contains('\t'));
    }

    #[test]
    fn what_is_no_preflight_goes_on() {
        let plain = PlainRequest::new("OPTIONS", "/", "cart").with_header("origin", "https://a.example");
        assert!(!is_preflight(&plain));
        let get = PlainRequest::new("GET", "/", "cart")
            .with_header("origin", "https://a.example")
            .with_header("access-control-request-method", "PUT");
        assert!(!is_preflight(&get));
    }

    #[test]
    fn responses_say_who_may_read_them() {
        let get = |origin: &str| PlainRequest::new("GET", "/", "cart").with_header("origin", origin);
        let open = cors(r#"{"allowOrigins": ["https://a.example"], "exposeHeaders": ["X-A", "x-b"]}"#);
        let edit = cors_headers(&open, &get("https://a.example"));
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            edit.set,
            [
                pair("access-control-allow-origin", "https://a.example"),
                pair("access-control-expose-headers", "x-a, x-b"),
            ]
        );
        assert_eq!(edit.add, [pair("vary", "origin")]);
        assert!(cors_headers(&open, &get("https://b.example")).is_empty());
        assert!(cors_headers(&open, &PlainRequest::new("GET", "/", "cart")).is_empty());
        let guarded = cors(r#"{"allowOrigins": ["*"], "exposeHeaders": ["*"], "allowCredentials": true}"#);
        let edit = cors_headers(&guarded, &get("https://a.example"));
        assert!(
            !edit.set.iter().any(|(name, _)| name == "access-control-expose-headers"),
            "{edit:?}"
        );
    }
}
