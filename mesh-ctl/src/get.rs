//! `mesh-ctl policy get`: the documents as the controller holds them.

use mesh_api::wire::operator::GetRequest;
use serde::Serialize;
use serde_json::Value;

use crate::{
    connect::{CALL_TIMEOUT, Failure, World, connect},
    output::{Format, Table, print, print_value},
    policy::kind_and_name,
};

/// Arguments of `get`.
#[derive(Debug, clap::Args)]
pub struct GetArgs {
    /// KIND or KIND/NAME, such as `httproute` or `Service/cart`; all kinds if absent.
    #[arg(value_name = "KIND[/NAME]")]
    pub what: Option<String>,
    /// The document's name.
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// All namespaces (the default without a cluster).
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

/// A set as programs read it.
#[derive(Serialize)]
struct Listing {
    revision: u64,
    items: Vec<Value>,
}

/// Runs `mesh-ctl policy get`.
pub async fn run(args: GetArgs, world: &World) -> Result<(), Failure> {
    let (kind, name) = kind_and_name(args.what.as_deref(), args.name.as_deref())?;
    let mut client = connect(world, CALL_TIMEOUT).await?;
    let request = GetRequest {
        kind: kind.map_or("", |kind| kind.as_str()).to_owned(),
        namespace: world.namespace().unwrap_or_default().to_owned(),
        name: name.clone(),
    };
    let response = client.get(request).await?.into_inner();
    if !name.is_empty() && response.documents.is_empty() {
        let kind = kind.map_or("document", |kind| kind.as_str());
        return Err(Failure::refused(format!("{kind} {name} is not there")));
    }
    if args.output == Format::Table {
        let mut table = Table::new(&["KIND", "NAMESPACE", "NAME", "GENERATION", "REVISION"]);
        for document in response.documents {
            let key = document.key.unwrap_or_default();
            let note = if document.unreadable.is_empty() {
                ""
            } else {
                " (unreadable)"
            };
            let revision = format!("{}{note}", document.revision);
            table.row([
                key.kind,
                key.namespace,
                key.name,
                document.generation.to_string(),
                revision,
            ]);
        }
        if table.is_empty() {
            eprintln!("no documents");
        } else {
            print(&table.to_string());
        }
        return Ok(());
    }
    let mut items = Vec::new();
    for document in response.documents {
        let mut value: Value = serde_json::from_str(&document.json)
            .map_err(|e| Failure::refused(format!("the controller's answer: {e}")))?;
        if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("generation".to_owned(), document.generation.into());
        }
        items.push(value);
    }
    if args.output == Format::Yaml {
        let mut text = String::new();
        for (place, item) in items.iter().enumerate() {
            if place > 0 {
                text.push_str("---\n");
            }
            text += &mesh_api::yaml::to_string(item).map_err(|e| Failure::refused(e.to_string()))?;
        }
        print(&text);
        return Ok(());
    }
    let revision = response.revision;
    print_value(&Listing { revision, items }, Format::Json)
}
