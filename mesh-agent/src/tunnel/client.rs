//! The source's end: dial the destination's own port from the source's network namespace, mTLS with one of our ALPN
//! names, and compare who answered with whom the view names.
//!
//! Nothing is sent on a tunnel before that comparison, resumed session or not.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::ServerName;

use super::{DialError, TunnelKey};
use crate::{
    identity::{Alpn, Credential, verify},
    net::{self, SocketSource},
    tls::TlsStream,
};

/// Opens one tunnel. `now` judges the peer's certificate.
pub async fn open(
    credential: &Arc<Credential>,
    key: &TunnelKey,
    alpn: Alpn,
    from: &dyn SocketSource,
    now: SystemTime,
    dial_timeout: Duration,
    handshake_timeout: Duration,
) -> Result<TlsStream, DialError> {
    let tcp = net::dial(from, key.address, dial_timeout).await?;
    // The name only selects the session to resume; it is not sent.
    let name = ServerName::IpAddress(key.address.ip().into());
    let config = credential.client(alpn).clone();
    let mut tls = TlsStream::connect(tcp, config, name, handshake_timeout).await?;
    if tls.alpn() != Some(alpn.as_bytes()) {
        return Err(DialError::Alpn);
    }
    let peer = verify::peer(tls.peer_certificates(), credential.bundle(), now)?;
    if peer.spiffe != key.destination {
        return Err(DialError::WrongIdentity {
            expected: key.destination.clone(),
            found: peer.spiffe,
        });
    }
    tls.set_peer(peer);
    Ok(tls)
}
