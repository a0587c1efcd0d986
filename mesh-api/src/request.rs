//! What a decision may see of a request: the seam between the policy and whatever parsed the bytes.

/// One HTTP request's head as the decisions see it. Implemented by the HTTP/1 and HTTP/2 engines and by `explain`.
pub trait Request {
    /// The method, as sent (methods are case-sensitive, RFC 9110 §9.1).
    fn method(&self) -> &str;
    /// The path, as sent, without the query.
    fn path(&self) -> &str;
    /// The query, without the question mark.
    fn query(&self) -> Option<&str>;
    /// The authority: `Host` or `:authority`.
    fn authority(&self) -> Option<&str>;
    /// The first value of a header that is valid UTF-8; `name` is lower case.
    fn header(&self, name: &str) -> Option<&str>;
    /// Tells every value of a header in order, each line by itself; what is no UTF-8 is replaced, not left out.
    /// Authorization asks for all of them, since the application may look at another line than the first.
    fn each_header_value(&self, name: &str, tell: &mut dyn FnMut(&str));
}

/// The host of an authority, without its port; an IPv6 literal keeps its brackets.
pub fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port))
            if port.bytes().all(|b| b.is_ascii_digit()) && (!host.contains(':') || host.ends_with(']')) =>
        {
            host
        }
        _ => authority,
    }
}
