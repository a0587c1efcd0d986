//! One TLS session without its socket: records in, plaintext and records out.
//!
//! Drives rustls' unbuffered state machine under [`super::TlsStream`]. Whole records never stay in the input between two
//! steps, so a step that only wants to write has nothing to open first; and a session that failed is never stepped
//! again.

use rustls::{
    HandshakeKind,
    client::{ClientConnectionData, UnbufferedClientConnection},
    pki_types::CertificateDer,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};

/// A session of either side.
pub(super) enum Session {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// Bytes that wait, with the memory given back as soon as they are gone.
#[derive(Default)]
pub(super) struct LeftOver {
    pub(super) bytes: Vec<u8>,
    at: usize,
}

impl LeftOver {
    pub(super) fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }
    pub(super) fn as_slice(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
    pub(super) fn push_front(&mut self, bytes: &[u8]) {
        let mut all = Vec::with_capacity(bytes.len() + self.as_slice().len());
        all.extend_from_slice(bytes);
        all.extend_from_slice(self.as_slice());
        *self = LeftOver { bytes: all, at: 0 };
    }
    pub(super) fn advance(&mut self, n: usize) {
        self.at += n;
        if self.is_empty() {
            *self = LeftOver::default();
        }
    }
}

/// The two kinds of session behind one door.
trait Records<Data> {
    fn has_more_to_say(&self) -> bool;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Data>;
}
impl Records<ClientConnectionData> for UnbufferedClientConnection {
    fn has_more_to_say(&self) -> bool {
        self.wants_write()
    }
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, ClientConnectionData> {
        self.process_tls_records(incoming)
    }
}
impl Records<ServerConnectionData> for UnbufferedServerConnection {
    fn has_more_to_say(&self) -> bool {
        self.wants_write()
    }
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, ServerConnectionData> {
        self.process_tls_records(incoming)
    }
}

/// What to do once all whole records were opened.
pub(super) enum Then<'a> {
    Nothing,
    Seal { data: &'a [u8], into: &'a mut [u8] },
    Close { into: &'a mut [u8] },
}

/// What came of a step.
#[derive(Default)]
pub(super) struct Stepped {
    /// Bytes of the input that are done with.
    pub(super) consumed: usize,
    /// Bytes that [`Then`] wrote.
    pub(super) sealed: usize,
    /// Whether [`Then`] was possible.
    pub(super) done: bool,
    pub(super) peer_closed: bool,
    pub(super) failed: Option<rustls::Error>,
}

/// Opens every whole record in `input`, hands plaintext to `plain`, appends what the session itself has to say to
/// `replies`, and then seals or closes. All ciphertext in `replies` comes before what [`Then`] sealed.
fn step<D>(
    session: &mut impl Records<D>,
    input: &mut [u8],
    mut plain: impl FnMut(&[u8]),
    replies: &mut LeftOver,
    mut then: Then<'_>,
) -> Stepped {
    let mut out = Stepped::default();
    loop {
        let rest = input.get_mut(out.consumed..).unwrap_or_default();
        let UnbufferedStatus { mut discard, state } = session.process(rest);
        let mut stop = false;
        match state {
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    match record {
                        Ok(record) => {
                            discard += record.discard;
                            plain(record.payload);
                        }
                        Err(error) => {
                            out.failed.get_or_insert(error);
                            break;
                        }
                    }
                }
            }
            Ok(ConnectionState::EncodeTlsData(mut encode)) => {
                let from = replies.bytes.len();
                if let Err(EncodeError::InsufficientSize(need)) = encode.encode(&mut []) {
                    replies.bytes.resize(from + need.required_size, 0);
                    let room = replies.bytes.get_mut(from..).unwrap_or_default();
                    let n = encode.encode(room).unwrap_or(0);
                    replies.bytes.truncate(from + n);
                }
            }
            // The bytes are in `replies`, in order, and leave before anything sealed later.
            Ok(ConnectionState::TransmitTlsData(transmit)) => transmit.done(),
            Ok(ConnectionState::PeerClosed) => out.peer_closed = true,
            Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                stop = true;
                let sealed = match &mut then {
                    Then::Nothing => Ok(0),
                    Then::Seal { data, into } => traffic.encrypt(data, into),
                    Then::Close { into } => traffic.queue_close_notify(into),
                };
                match sealed {
                    Ok(n) => (out.sealed, out.done) = (n, true),
                    Err(EncryptError::EncryptExhausted) => {
                        out.failed.get_or_insert(rustls::Error::EncryptError);
                    }
                    Err(EncryptError::InsufficientSize(_)) => {
                        out.failed
                            .get_or_insert(rustls::Error::General("record buffer too small".to_owned()));
                    }
                }
            }
            // Blocked in the handshake, closed on both sides, or early data, which is never offered.
            Ok(_) => stop = true,
            Err(error) => _ = out.failed.get_or_insert(error),
        }
        out.consumed = (out.consumed + discard).min(input.len());
        // After an error there is at most an alert to be fetched, which comes before any record is looked at. Without
        // one, rustls must not see the input again.
        if stop || (out.failed.is_some() && !session.has_more_to_say()) {
            return out;
        }
    }
}

impl Session {
    /// [`step`] for either side.
    pub(super) fn step(
        &mut self,
        input: &mut [u8],
        plain: impl FnMut(&[u8]),
        replies: &mut LeftOver,
        then: Then<'_>,
    ) -> Stepped {
        match self {
            Session::Client(session) => step(&mut **session, input, plain, replies, then),
            Session::Server(session) => step(&mut **session, input, plain, replies, then),
        }
    }

    pub(super) fn is_handshaking(&self) -> bool {
        match self {
            Session::Client(session) => session.is_handshaking(),
            Session::Server(session) => session.is_handshaking(),
        }
    }

    /// The peer's chain, leaf first.
    pub(super) fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        match self {
            Session::Client(session) => session.peer_certificates(),
            Session::Server(session) => session.peer_certificates(),
        }
        .unwrap_or_default()
    }

    /// The protocol agreed on.
    pub(super) fn alpn(&self) -> Option<&[u8]> {
        match self {
            Session::Client(session) => session.alpn_protocol(),
            Session::Server(session) => session.alpn_protocol(),
        }
    }

    /// Whether the handshake resumed an earlier session.
    pub(super) fn is_resumed(&self) -> bool {
        let kind = match self {
            Session::Client(session) => session.handshake_kind(),
            Session::Server(session) => session.handshake_kind(),
        };
        kind == Some(HandshakeKind::Resumed)
    }

    /// The key exchange agreed on.
    #[cfg(test)]
    pub(super) fn key_exchange(&self) -> Option<rustls::NamedGroup> {
        match self {
            Session::Client(session) => session.negotiated_key_exchange_group(),
            Session::Server(session) => session.negotiated_key_exchange_group(),
        }
        .map(|group| group.name())
    }
}
