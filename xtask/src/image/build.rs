//! The verb: which images there are, what is in them, and how large they are.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use sha2::{Digest, Sha256};

use super::{
    archive::{self, Image, Platform},
    closure::{self, Files},
    sbom,
};
use crate::{build, setup, shell};

/// The largest that an image may be as it is pulled.
const TRANSFERRED_MAX: u64 = 25 * 1024 * 1024;
/// Where the list of parts lies in an image.
const SBOM: &str = "/usr/share/sbom/cyclonedx.json";

/// Which images.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// The registry and path that names begin with.
    #[arg(long, default_value = "localhost/nodemesh")]
    pub registry: String,
    /// The tag.
    #[arg(long, default_value = "dev")]
    pub tag: String,
    /// Without optimizations and uncompressed: larger, built faster.
    #[arg(long)]
    pub dev: bool,
    /// The directory for the files; `target/images` without it.
    #[arg(long)]
    pub out: Option<PathBuf>,
}

impl Options {
    /// Images for the clusters of this machine.
    pub fn local(dev: bool) -> Options {
        Options {
            registry: "localhost/nodemesh".into(),
            tag: "dev".into(),
            dev,
            out: None,
        }
    }
}

struct Part {
    /// The image's last name, and the file's.
    name: &'static str,
    /// The package of the workspace, and the program in it.
    package: &'static str,
    title: &'static str,
    /// The agent is root in a container without most of root's rights; the controller is nobody.
    user: &'static str,
}

const PARTS: [Part; 2] = [
    Part {
        name: "agent",
        package: "mesh-agent",
        title: "Nodemesh node agent",
        user: "",
    },
    Part {
        name: "controller",
        package: "mesh-ctl",
        title: "Nodemesh controller and command line",
        user: "65532:65532",
    },
];

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure_all()?;
    let started = Instant::now();
    for path in write_all(options)? {
        println!("{}", path.display());
    }
    println!("images took {}", shell::time(started.elapsed()));
    Ok(ExitCode::SUCCESS)
}

/// Builds the programs and writes their images; gives the files.
pub fn write_all(options: &Options) -> Result<Vec<PathBuf>> {
    let programs = build::programs(&build::Options { release: !options.dev })?;
    let target = shell::target()?;
    let out = options.out.clone().unwrap_or_else(|| target.join("images"));
    fs::create_dir_all(&out).with_context(|| format!("make {}", out.display()))?;
    let work = target.join("image-work");
    fs::create_dir_all(&work)?;
    PARTS
        .iter()
        .map(|part| write_part(part, options, &programs, &work, &out))
        .collect()
}

fn write_part(part: &Part, options: &Options, programs: &Path, work: &Path, out: &Path) -> Result<PathBuf> {
    let program = closure::stripped(&programs.join(part.package), work)?;
    let sbom = serde_json::to_vec(&sbom::of(part.package)?)?;
    let mut files = Files::default();
    files.base();
    files.program(&format!("/{}", part.package), &program)?;
    let labels = labels(part, &sbom);
    files.bytes(SBOM, 0o644, sbom);
    let image = Image {
        platform: Platform::host(),
        entrypoint: vec![format!("/{}", part.package)],
        user: part.user.into(),
        labels,
        files,
        compress: !options.dev,
    };
    let name = format!("{}/{}:{}", options.registry, part.name, options.tag);
    let path = out.join(format!("{}.tar", part.name));
    let written = archive::write(&path, &[&name], &[image])?;
    let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "{name}: {:.1} MiB to pull, {:.1} MiB on the node, {}",
        mebibytes(written.transferred),
        mebibytes(written.unpacked),
        written.digest
    );
    ensure!(
        options.dev || written.transferred <= TRANSFERRED_MAX,
        "{name} is larger than the {:.0} MiB that an image may have",
        mebibytes(TRANSFERRED_MAX)
    );
    Ok(path)
}

fn labels(part: &Part, sbom: &[u8]) -> BTreeMap<String, String> {
    let revision = Command::new("git")
        .args(["rev-parse", "HEAD"])
        .current_dir(shell::root())
        .output();
    let revision = revision.ok().filter(|output| output.status.success());
    let digest: String = Sha256::digest(sbom).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut labels = BTreeMap::from([
        ("org.opencontainers.image.title".into(), part.title.into()),
        (
            "org.opencontainers.image.version".into(),
            env!("CARGO_PKG_VERSION").into(),
        ),
        ("org.opencontainers.image.licenses".into(), "Apache-2.0".into()),
        (
            "org.opencontainers.image.source".into(),
            "https://github.com/nodemesh/nodemesh".into(),
        ),
        ("io.nodemesh.sbom.format".into(), "CycloneDX 1.5 JSON".into()),
        ("io.nodemesh.sbom.path".into(), SBOM.into()),
        ("io.nodemesh.sbom.sha256".into(), digest),
    ]);
    // A source tree that is no git clone has no revision to name.
    if let Some(revision) = revision {
        let revision = String::from_utf8_lossy(&revision.stdout).trim().to_string();
        labels.insert("org.opencontainers.image.revision".into(), revision);
    }
    labels
}
