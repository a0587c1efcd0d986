//! HTTP/2 end to end.
