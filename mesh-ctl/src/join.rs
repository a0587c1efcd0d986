//! `mesh-ctl token`, `bundle` and `version`: what an agent needs to join, and who is who.

use std::time::Duration;

use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_api::wire::operator::{BundleRequest, IssueJoinTokenRequest, StatusRequest};
use serde_json::json;

use crate::{
    connect::{CALL_TIMEOUT, Failure, World, connect},
    output::{Format, print, print_value},
};

/// Join tokens.
#[derive(Debug, clap::Subcommand)]
pub enum TokenCommand {
    /// Make a token with which one node's agent may join; it is printed once and kept nowhere.
    Create {
        /// The node's name.
        #[arg(long, value_name = "NAME")]
        node: String,
        /// How long it may be used, as often as need be (30 days at most).
        #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = crate::duration)]
        ttl: Duration,
        /// How the result is printed.
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
}

/// Arguments of `version`.
#[derive(Debug, clap::Args)]
pub struct VersionArgs {
    /// Do not ask the controller.
    #[arg(long)]
    client: bool,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Runs `mesh-ctl token`.
pub async fn token(command: TokenCommand, world: &World) -> Result<(), Failure> {
    let TokenCommand::Create { node, ttl, output } = command;
    if ttl.as_secs() == 0 {
        return Err(Failure::Usage("--ttl: expected at least 1s".into()));
    }
    let mut client = connect(world, CALL_TIMEOUT).await?;
    let request = IssueJoinTokenRequest {
        node,
        valid_for_seconds: u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX),
    };
    let response = client.issue_join_token(request).await?.into_inner();
    match output {
        Format::Table => print(&format!("{}\n", response.join_token)),
        format => print_value(
            &json!({ "token": response.join_token, "expires": response.expires_unix }),
            format,
        )?,
    }
    Ok(())
}

/// A certificate in the textual form of RFC 7468.
fn pem(der: &[u8]) -> String {
    let text = BASE64_STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem + "-----END CERTIFICATE-----\n"
}

/// Runs `mesh-ctl bundle`.
pub async fn bundle(world: &World) -> Result<(), Failure> {
    let mut client = connect(world, CALL_TIMEOUT).await?;
    let response = client.bundle(BundleRequest {}).await?.into_inner();
    print(&response.roots_der.iter().map(|der| pem(der)).collect::<String>());
    Ok(())
}

/// Runs `mesh-ctl version`. A controller that does not answer is no failure.
pub async fn version(args: VersionArgs, world: &World) -> Result<(), Failure> {
    let own = env!("CARGO_PKG_VERSION");
    let asked = async {
        let mut client = connect(world, CALL_TIMEOUT).await?;
        Ok::<_, Failure>(client.status(StatusRequest {}).await?.into_inner().controller_version)
    };
    let controller = if args.client { None } else { asked.await.ok() };
    if args.output != Format::Table {
        return print_value(&json!({ "client": own, "controller": controller }), args.output);
    }
    let controller = match (controller, args.client) {
        (Some(version), _) => format!("controller {version}\n"),
        (None, false) => "controller: not reached\n".to_owned(),
        (None, true) => String::new(),
    };
    print(&format!("mesh-ctl {own}\n{controller}"));
    Ok(())
}
