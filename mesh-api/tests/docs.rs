//! Every example in docs/policies is a document that the mesh takes, against the services that the pages speak of.

use std::{collections::BTreeSet, fs, path::Path};

use mesh_api::document::{Document, DocumentSet, Kind, Problem, parse};

/// What the examples refer to.
const SHOP: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: database, namespace: shop}
spec: {clusterIP: 10.96.0.2, selector: {app: database}, ports: [{name: tcp, port: 5432}]}
---
apiVersion: nodemesh.io/v1alpha1
kind: ServiceSubset
metadata: {name: cart-v1, namespace: shop}
spec: {service: cart, labels: {version: v1}}
---
apiVersion: nodemesh.io/v1alpha1
kind: ServiceSubset
metadata: {name: cart-v2, namespace: shop}
spec: {service: cart, labels: {version: v2}}
";

/// The YAML blocks of a page; lines before each are kept as empty ones, so that problems have the page's lines.
fn yaml_blocks(page: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut open: Option<String> = None;
    for (number, line) in page.lines().enumerate() {
        match &mut open {
            None if line.trim() == "```yaml" => open = Some("\n".repeat(number + 1)),
            None => {}
            Some(_) if line.trim() == "```" => blocks.extend(open.take()),
            Some(block) => {
                block.push_str(line);
                block.push('\n');
            }
        }
    }
    assert!(open.is_none(), "a block is not closed");
    blocks
}

fn texts(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn every_example_is_taken() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policies");
    let mut kinds = BTreeSet::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let page = fs::read_to_string(&path).unwrap();
        let mut set: DocumentSet = parse("shop", SHOP).unwrap().into_iter().collect();
        let mut count = 0;
        for block in yaml_blocks(&page) {
            let documents = parse(&name, &block).unwrap_or_else(|problems| panic!("{}", texts(&problems)));
            assert!(!documents.is_empty(), "{name}: an example without a document");
            count += documents.len();
            kinds.extend(documents.iter().map(Document::kind));
            set.extend(documents);
        }
        assert!(count > 0 || name == "README.md", "{name} has no example");
        let warnings = set.validate();
        assert!(warnings.is_empty(), "{name}:\n{}", texts(&warnings));
    }
    let policies: BTreeSet<Kind> = Kind::ALL.into_iter().filter(|kind| kind.is_policy()).collect();
    assert_eq!(kinds, policies, "kinds with an example, and kinds of policy");
}
