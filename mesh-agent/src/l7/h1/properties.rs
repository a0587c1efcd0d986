//! What must hold of the codec for any bytes: it answers, its answer does not depend on how the bytes were cut, and
//! what it lets through reads the same to the next reader.

use proptest::prelude::*;

use super::{
    body::Incoming,
    chunk::{ChunkDecoder, fuzz_chunks, write_chunk},
    codec::{Framing, RequestHead, RequestView, fuzz_request, fuzz_response, parse_request, parse_response},
    write::write_request,
};
use crate::l7::{Forward, Limits};
use mesh_api::request::Request;

fn header() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-zA-Z-]{1,12}: ?[ -~]{0,20}",
        1 => "(content-length|Content-Length): ?[0-9]{0,3}",
        1 => "(transfer-encoding|Transfer-Encoding): ?(chunked|gzip|, ?){0,3}",
        1 => "[hH]ost: ?[a-z.]{0,8}(:[0-9]{1,4})?",
        1 => "[cC]onnection: ?(close|keep-alive|x-[a-z]{1,3}|, ?){0,4}",
        1 => Just(" folded".to_owned()),
        1 => "[ -~\\t\\x00\\r\\n]{0,20}",
    ]
}

/// Requests that are nearly right.
fn request() -> impl Strategy<Value = String> {
    let line = prop_oneof![
        8 => "(GET|POST|HEAD|OPTIONS|X-Y) (/[a-z/?%.]{0,12}|http://[a-z]{1,5}/?|\\*) HTTP/1.[01]",
        1 => "[ -~\\t]{0,30}",
    ];
    let end = prop_oneof![8 => Just("\r\n"), 1 => Just("\n"), 1 => Just("\r")];
    (line, prop::collection::vec((header(), end), 0..6), any::<bool>()).prop_map(|(line, headers, host)| {
        let mut text = format!("{line}\r\n{}", if host { "host: a\r\n" } else { "" });
        for (header, end) in headers {
            text.push_str(&header);
            text.push_str(end);
        }
        text + "\r\n"
    })
}

fn seen(head: &RequestHead, bytes: &[u8]) -> (String, String, Option<String>, Option<String>, Framing, bool) {
    let view = RequestView { head, bytes };
    (
        view.method().to_owned(),
        view.path().to_owned(),
        view.query().map(str::to_owned),
        view.authority().map(str::to_owned),
        head.framing,
        head.te_trailers,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), near in request(), split: usize) {
        fuzz_request(&bytes);
        fuzz_response(&bytes);
        fuzz_chunks(&bytes, split % 200);
        fuzz_request(near.as_bytes());
        let answer = near.split_once("\r\n").map(|(_, rest)| format!("HTTP/1.1 200 OK\r\n{rest}")).unwrap_or_default();
        fuzz_response(answer.as_bytes());
    }

    /// A head is complete when its empty line is there, and not before.
    #[test]
    fn cuts_make_no_difference(text in request(), behind in "[ -~\r\n]{0,20}") {
        let limits = Limits::default();
        if let Ok(Some(head)) = parse_request(text.as_bytes(), &limits) {
            for end in 0..head.bytes {
                prop_assert!(matches!(parse_request(&text.as_bytes()[..end], &limits), Ok(None)), "cut at {end}");
            }
            let more = parse_request((text + &behind).as_bytes(), &limits).unwrap().unwrap();
            prop_assert_eq!(more.bytes, head.bytes);
        }
    }

    /// What we write is what we read: the next reader sees the same request, and no other length.
    #[test]
    fn what_is_forwarded_reads_the_same(text in request()) {
        let limits = Limits::default();
        if let Ok(Some(head)) = parse_request(text.as_bytes(), &limits) {
            let mut out = Vec::new();
            write_request(&head, text.as_bytes(), &Forward::default(), &mut out);
            let again = parse_request(&out, &limits);
            let Ok(Some(again)) = again else {
                return Err(TestCaseError::fail(format!("{}: {again:?}", String::from_utf8_lossy(&out))));
            };
            prop_assert_eq!(again.bytes, out.len());
            let (mut before, after) = (seen(&head, text.as_bytes()), seen(&again, &out));
            // (A request without an authority is sent with an empty one.)
            before.3 = before.3.or(Some(String::new()));
            prop_assert_eq!(before, after);
        }
    }

    /// Near-right chunks: split anywhere they mean the same, and never panic.
    #[test]
    fn chunks_are_survived(text in "([0-9a-fA-F]{0,2}(;[a-z\"=]{0,3})?\r?\n?[a-z]{0,4}\r\n){0,4}(0\r\n)?(x: y\r\n)?(\r\n)?", split in 0usize..40) {
        fuzz_chunks(text.as_bytes(), split);
    }

    /// Any body in any chunks comes out whole, as other chunks, however it is cut.
    #[test]
    fn bodies_come_out_whole(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..8), cut in 1usize..30, behind in "[a-z]{0,5}",
    ) {
        let mut coded = Vec::new();
        pieces.iter().for_each(|piece| write_chunk(piece, &mut coded));
        coded.extend_from_slice(b"0\r\nx: y\r\n\r\n");
        let end = coded.len();
        coded.extend_from_slice(behind.as_bytes());
        let (mut body, mut passed, mut used, mut bytes) = (Incoming::new(Framing::Chunked), Vec::new(), 0, 0);
        for part in coded.chunks(cut) {
            let (taken, count) = body.take(part, true, &mut passed).unwrap();
            used += taken;
            bytes += count;
        }
        prop_assert!(body.is_done());
        prop_assert_eq!(used, end, "what is behind belongs to the next request");
        let whole = pieces.concat();
        prop_assert_eq!(bytes, whole.len());
        let (mut decoder, mut data, mut rest) = (ChunkDecoder::default(), Vec::new(), &passed[..]);
        while !decoder.is_done() {
            let step = decoder.step(rest).unwrap();
            data.extend_from_slice(&rest[step.skipped..step.skipped + step.data]);
            rest = &rest[step.skipped + step.data..];
        }
        prop_assert!(rest.is_empty());
        prop_assert_eq!(data, whole);
        prop_assert!(passed.ends_with(b"0\r\nx: y\r\n\r\n"));
    }

    #[test]
    fn responses_are_cut_at_their_end(status in 100u16..600, length in 0u64..1000, to_head: bool) {
        let text = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n");
        let head = parse_response(text.as_bytes(), to_head, &Limits::default()).unwrap().unwrap();
        let bodiless = to_head || status < 200 || status == 204 || status == 304;
        prop_assert_eq!(head.framing, if bodiless { Framing::None } else { Framing::Length(length) });
        prop_assert_eq!(head.length_without_body.is_some(), to_head || status == 304);
    }
}
