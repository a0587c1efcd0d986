//! The bytes of an image: a tar layer, and an OCI image layout that is a docker archive too.
//!
//! One file serves every reader: `index.json` for containerd, podman, skopeo and crane, `manifest.json` for
//! `docker load`. Each name points to an image index with one manifest per platform. Everything is sorted and has the
//! time 0, so that equal files give equal digests.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::closure::{Content, Files};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const BLOCK: usize = 512;

/// For which machines an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// As the OCI specification calls it: `amd64`, `arm64`.
    pub architecture: String,
}

impl Platform {
    /// That of this machine.
    pub fn host() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Platform {
            architecture: architecture.into(),
        }
    }
}

/// What an image is, for one platform.
#[derive(Clone, Debug)]
pub struct Image {
    /// The platform that its programs are built for.
    pub platform: Platform,
    /// What it runs; empty leaves it to the pod.
    pub entrypoint: Vec<String>,
    /// Whom it runs as, by number; empty for root.
    pub user: String,
    /// Facts about it.
    pub labels: BTreeMap<String, String>,
    /// Its files.
    pub files: Files,
    /// Whether the layer is compressed. An image that stays on this machine need not be.
    pub compress: bool,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Bytes of all layers as they are transferred.
    pub transferred: u64,
    /// Bytes of all layers as they lie on a node.
    pub unpacked: u64,
    /// The digest of the image index.
    pub digest: String,
}

/// Writes images of the same names, one per platform, into one file.
pub fn write(path: &Path, names: &[&str], images: &[Image]) -> Result<Written> {
    ensure!(
        !names.is_empty() && !images.is_empty(),
        "an image needs a name and a platform"
    );
    let mut blobs = Blobs::default();
    let mut manifests = Vec::new();
    let mut docker = Vec::new();
    let (mut transferred, mut unpacked) = (0, 0);
    for image in images {
        let layer = tar_of(&image.files)?;
        unpacked += layer.len() as u64;
        let diff = digest(&layer);
        let (media, layer) = match image.compress {
            true => (format!("{LAYER}+gzip"), gzip(layer)?),
            false => (LAYER.to_string(), layer),
        };
        transferred += layer.len() as u64;
        let layer = blobs.add(&media, layer);
        let config = blobs.add_json(
            CONFIG,
            &json!({
                "architecture": image.platform.architecture,
                "os": "linux",
                "config": {
                    "Entrypoint": image.entrypoint,
                    "User": image.user,
                    "WorkingDir": "/",
                    "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                    "Labels": image.labels,
                },
                "rootfs": {"type": "layers", "diff_ids": [diff]},
                "history": [{"created_by": "cargo xtask image", "created": "1970-01-01T00:00:00Z"}],
                "created": "1970-01-01T00:00:00Z",
            }),
        )?;
        // docker load knows one platform per name: the first.
        if docker.is_empty() {
            docker.push(json!({"Config": blob_path(&config), "RepoTags": names, "Layers": [blob_path(&layer)]}));
        }
        let mut manifest = blobs.add_json(
            MANIFEST,
            &json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
                    "annotations": image.labels}),
        )?;
        manifest["platform"] = json!({"architecture": image.platform.architecture, "os": "linux"});
        manifests.push(manifest);
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
    let index = blobs.add_json(INDEX, &index)?;
    let digest = index["digest"].as_str().unwrap_or_default().to_string();
    let named: Vec<Value> = names
        .iter()
        .map(|name| {
            let mut entry = index.clone();
            let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
            entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag});
            entry
        })
        .collect();
    let mut archive = Tar::default();
    archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let top = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": named});
    archive.file("index.json", 0o644, &serde_json::to_vec(&top)?)?;
    archive.file("manifest.json", 0o644, &serde_json::to_vec(&docker)?)?;
    archive.directory("blobs", 0o755)?;
    archive.directory("blobs/sha256", 0o755)?;
    for (digest, bytes) in &blobs.0 {
        archive.file(&format!("blobs/sha256/{digest}"), 0o644, bytes)?;
    }
    // Beside it first: who reads the file never sees half of it.
    let partial = path.with_extension("partial");
    fs::write(&partial, archive.end()).with_context(|| format!("write {}", partial.display()))?;
    fs::rename(&partial, path)?;
    Ok(Written {
        transferred,
        unpacked,
        digest,
    })
}

#[derive(Debug, Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Adds a blob and gives its descriptor.
    fn add(&mut self, media: &str, bytes: Vec<u8>) -> Value {
        let digest = digest(&bytes);
        let descriptor = json!({"mediaType": media, "digest": digest, "size": bytes.len()});
        self.0.insert(digest.trim_start_matches("sha256:").to_string(), bytes);
        descriptor
    }

    fn add_json(&mut self, media: &str, value: &Value) -> Result<Value> {
        Ok(self.add(media, serde_json::to_vec(value)?))
    }
}

fn blob_path(descriptor: &Value) -> String {
    let digest = descriptor["digest"].as_str().unwrap_or_default();
    format!("blobs/{}", digest.replace(':', "/"))
}

/// A digest as the OCI specification writes it.
fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn gzip(bytes: Vec<u8>) -> Result<Vec<u8>> {
    // Without name and time in its header: equal input gives equal output.
    let mut command = Command::new("gzip");
    let mut child = command
        .args(["-9", "-n", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("run gzip")?;
    let mut stdin = child.stdin.take().context("gzip has no input")?;
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output()?;
    writer.join().ok().context("the thread that feeds gzip")??;
    ensure!(output.status.success(), "gzip: {}", output.status);
    Ok(output.stdout)
}

/// The tar layer of a set of files, with the directories above them.
fn tar_of(files: &Files) -> Result<Vec<u8>> {
    let mut directories = BTreeSet::new();
    for path in files.paths() {
        let mut parent = Path::new(path).parent();
        while let Some(directory) = parent.filter(|directory| !directory.as_os_str().is_empty()) {
            directories.insert(directory.to_string_lossy().into_owned());
            parent = directory.parent();
        }
    }
    // The sort order puts each directory before what is in it.
    let mut entries: BTreeMap<String, Option<&(u32, Content)>> = BTreeMap::new();
    for directory in directories {
        entries.insert(directory, None);
    }
    for (path, entry) in files.iter() {
        entries.insert(path.clone(), Some(entry));
    }
    let mut tar = Tar::default();
    for (path, entry) in entries {
        match entry {
            None => tar.directory(&path, if path == "tmp" { 0o1777 } else { 0o755 })?,
            Some((mode, Content::Directory)) => tar.directory(&path, *mode)?,
            Some((_, Content::Link(target))) => tar.link(&path, target)?,
            Some((mode, Content::Bytes(bytes))) => tar.file(&path, *mode, bytes)?,
            Some((mode, Content::File(source))) => {
                let bytes = fs::read(source).with_context(|| format!("read {}", source.display()))?;
                tar.file(&path, *mode, &bytes)?;
            }
        }
    }
    Ok(tar.end())
}

/// A tar file as POSIX.1-1988 (ustar) describes it, which every reader knows.
#[derive(Debug, Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(&format!("{path}/"), mode, b'5', "", &[])
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path, 0o777, b'2', target, &[])
    }

    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.entry(path, mode, b'0', "", bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, kind: u8, target: &str, bytes: &[u8]) -> Result<()> {
        let mut header = [0_u8; BLOCK];
        let mut put = |at: usize, limit: usize, text: &str| -> Result<()> {
            let text = text.as_bytes();
            ensure!(text.len() <= limit, "{path}: {limit} bytes are the most here");
            header[at..at + text.len()].copy_from_slice(text);
            Ok(())
        };
        // A long path is split at a slash into a prefix and a name.
        let (prefix, name) = if path.len() <= 100 {
            ("", path)
        } else {
            let mut cut = path.char_indices().rev().filter(|(_, c)| *c == '/').map(|(at, _)| at);
            let cut = cut.find(|at| *at <= 155 && path.len() - at - 1 <= 100);
            let cut = cut.with_context(|| format!("{path}: too long for a tar file"))?;
            (&path[..cut], &path[cut + 1..])
        };
        put(0, 100, name)?;
        put(100, 8, &format!("{mode:07o}"))?;
        put(108, 8, "0000000")?;
        put(116, 8, "0000000")?;
        put(124, 12, &format!("{:011o}", bytes.len()))?;
        put(136, 12, "00000000000")?;
        put(148, 8, "        ")?;
        put(157, 100, target)?;
        put(257, 8, "ustar\u{0}00")?;
        put(345, 155, prefix)?;
        header[156] = kind;
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\u{0} ").as_bytes());
        self.0.extend_from_slice(&header);
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        Ok(())
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_reads_what_was_written() -> Result<()> {
        let long = format!("usr/{}/{}", "d".repeat(90), "f".repeat(90));
        let mut files = Files::default();
        files.bytes("etc/passwd", 0o644, "root\n");
        files.bytes(&long, 0o755, "x".repeat(1000));
        files.link("lib64", "usr/lib64");
        let bytes = tar_of(&files)?;
        assert_eq!(bytes, tar_of(&files)?, "equal files give equal bytes");
        let mut child = Command::new("tar")
            .args(["-tvf", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        child.stdin.take().context("no input")?.write_all(&bytes)?;
        let output = child.wait_with_output()?;
        let listing = String::from_utf8(output.stdout)?;
        assert!(output.status.success(), "{listing}");
        let shown: Vec<(&str, &str)> = listing
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                Some((words.next()?, words.nth(4)?))
            })
            .collect();
        let directory = format!("usr/{}/", "d".repeat(90));
        let expected = [
            ("drwxr-xr-x", "etc/"),
            ("-rw-r--r--", "etc/passwd"),
            ("lrwxrwxrwx", "lib64"),
            ("drwxr-xr-x", "usr/"),
            ("drwxr-xr-x", directory.as_str()),
            ("-rwxr-xr-x", long.as_str()),
        ];
        assert_eq!(shown, expected);
        Ok(())
    }

    #[test]
    fn equal_images_have_equal_digests() -> Result<()> {
        let directory = std::env::temp_dir().join(format!("image-test-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let mut files = Files::default();
        files.bytes("a", 0o644, "a");
        let image = Image {
            platform: Platform::host(),
            entrypoint: vec!["/a".into()],
            user: String::new(),
            labels: BTreeMap::new(),
            files,
            compress: true,
        };
        let path = directory.join("a.tar");
        let first = write(&path, &["localhost/a:1", "localhost/b:1"], std::slice::from_ref(&image))?;
        let bytes = fs::read(&path)?;
        let second = write(&path, &["localhost/a:1", "localhost/b:1"], &[image])?;
        assert_eq!(first.digest, second.digest);
        assert_eq!(bytes, fs::read(&path)?);
        fs::remove_dir_all(&directory)?;
        Ok(())
    }
}
