//! Every document of the fixtures is one that the mesh accepts, so that an example never rots.

use std::path::Path;

use anyhow::{Result, ensure};
use mesh_api::document;

#[test]
fn fixtures_are_valid() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut files = 0;
    for directory in root.read_dir()? {
        for entry in directory?.path().read_dir()? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "yaml") {
                let text = std::fs::read_to_string(&path)?;
                let parsed = document::parse(&path.display().to_string(), &text);
                let problems: Vec<String> = parsed.err().into_iter().flatten().map(|p| p.to_string()).collect();
                ensure!(problems.is_empty(), "{}", problems.join("\n"));
                files += 1;
            }
        }
    }
    assert!(files >= 10, "only {files} fixtures were found");
    Ok(())
}
