//! Certificates for the pairs: one authority, one leaf for each end, P-256 as the mesh's own. Made by `openssl`, valid for
//! a day, and gone with the lab.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{DESTINATION_NAME, SOURCE_NAME};

/// The files of one certificate.
#[derive(Debug)]
pub struct Files {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Both in one file.
    pub both: PathBuf,
}

/// The certificates of a pair.
#[derive(Debug)]
pub struct Credentials {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The source's end.
    pub source: Files,
    /// The destination's end.
    pub destination: Files,
}

impl Credentials {
    /// Makes them in a directory.
    pub fn create(directory: &Path) -> Result<Credentials> {
        fs::create_dir_all(directory)?;
        let ca = Files::of(directory, "ca");
        openssl(&ca.request("/CN=bench", &["-x509", "-addext", "basicConstraints=critical,CA:TRUE"]))?;
        let leaf = |side: &str, name: &str| -> Result<Files> {
            let files = Files::of(directory, side);
            let names = format!("subjectAltName=DNS:{name}");
            let signed = [text(&ca.certificate), text(&ca.key)];
            let subject = format!("/CN={name}");
            openssl(&files.request(
                &subject,
                &[
                    "-x509",
                    "-CA",
                    &signed[0],
                    "-CAkey",
                    &signed[1],
                    "-addext",
                    &names,
                    "-addext",
                    "basicConstraints=CA:FALSE",
                ],
            ))?;
            let both = fs::read_to_string(&files.certificate)? + &fs::read_to_string(&files.key)?;
            fs::write(&files.both, both)?;
            Ok(files)
        };
        Ok(Credentials {
            source: leaf("source", SOURCE_NAME)?,
            destination: leaf("destination", DESTINATION_NAME)?,
            ca: ca.certificate,
        })
    }
}

impl Files {
    fn of(directory: &Path, name: &str) -> Files {
        Files {
            certificate: directory.join(format!("{name}.crt")),
            key: directory.join(format!("{name}.key")),
            both: directory.join(format!("{name}.pem")),
        }
    }

    fn request(&self, subject: &str, more: &[&str]) -> Vec<String> {
        let (certificate, key) = (text(&self.certificate), text(&self.key));
        let base = [
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-noenc",
            "-days",
            "1",
        ];
        let files = ["-subj", subject, "-out", &certificate, "-keyout", &key];
        base.iter()
            .chain(more)
            .chain(&files)
            .map(|word| (*word).to_string())
            .collect()
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn openssl(arguments: &[String]) -> Result<()> {
    let output = Command::new("openssl")
        .args(arguments)
        .output()
        .context("run openssl")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "openssl {}: {}",
        arguments.join(" "),
        said.trim()
    );
    Ok(())
}
