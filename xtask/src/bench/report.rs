//! What a run found: samples as they were, and the figures that are made from them, as a table and as files.
//!
//! A ratio belongs to one round: a system's value by its base's value of the same round. Disturbed samples count only
//! where a figure has no others, and the figure is marked then.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    measure::spread,
    plot,
    work::{self, FIGURES, IDLE_RSS, PER_CONNECTION},
};
use crate::shell;

/// A run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// When it began.
    pub unix_seconds: u64,
    /// The kernel.
    pub kernel: String,
    /// CPUs of the machine.
    pub cpus: usize,
    /// The order's seed.
    pub seed: u64,
    /// Rounds.
    pub rounds: usize,
    /// Seconds of each measurement.
    pub seconds: f64,
    /// The share of the machine above which a sample is disturbed.
    pub foreign_max: f64,
    /// The versions of the other proxies.
    pub versions: BTreeMap<String, String>,
    /// Those that were asked for and are not there, and why.
    pub absent: BTreeMap<String, String>,
    /// The systems.
    pub systems: Vec<SystemInfo>,
    /// Memory.
    pub memory: Vec<Memory>,
    /// Everything that was measured.
    pub samples: Vec<Sample>,
}

/// A system of a run.
#[derive(Debug, Serialize, Deserialize)]
pub struct SystemInfo {
    /// Its name.
    pub name: String,
    /// What it is called.
    pub title: String,
    /// What it is compared with.
    pub base: Option<String>,
}

/// Memory of a system's proxies together.
#[derive(Debug, Serialize, Deserialize)]
pub struct Memory {
    /// Whose.
    pub system: String,
    /// After a first request.
    pub idle_rss_bytes: u64,
    /// What each idle connection adds.
    pub bytes_per_connection: f64,
}

/// One measurement.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Its round, from 0.
    pub round: usize,
    /// The system.
    pub system: String,
    /// The work.
    pub work: String,
    /// Figures by name.
    pub values: BTreeMap<String, f64>,
    /// The share of the machine that others used.
    pub foreign: f64,
    /// Whether that was too much.
    pub disturbed: bool,
    /// How often it was measured until it was taken.
    pub turns: usize,
}

/// Values of several rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

/// A figure of a system.
pub struct Row {
    /// The figure.
    pub figure: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// The system's name.
    pub system: String,
    /// The system's title.
    pub title: String,
    /// The values.
    pub value: Spread,
    /// By the base of the same round.
    pub ratio: Option<Spread>,
    /// What we want.
    pub target: Option<work::Target>,
    /// Whether disturbed samples had to be taken.
    pub disturbed: bool,
    /// Whether more is better.
    pub more_is_better: bool,
}

impl Row {
    /// Whether the bound is met; none without one.
    pub fn met(&self) -> Option<bool> {
        self.target?
            .met(self.value.median, self.ratio.map(|ratio| ratio.median))
    }
}

impl Report {
    /// All figures, by figure and then by system.
    pub fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for figure in FIGURES {
            for system in &self.systems {
                let pairs: Vec<(f64, Option<f64>, bool)> = self
                    .samples
                    .iter()
                    .filter(|sample| sample.system == system.name)
                    .filter_map(|sample| {
                        let value = *sample.values.get(figure.name)?;
                        let base = system.base.as_ref().and_then(|base| self.find(base, sample));
                        let of = base.and_then(|base| base.values.get(figure.name));
                        let disturbed = sample.disturbed || base.is_some_and(|base| base.disturbed);
                        Some((value, of.map(|of| value / of), disturbed))
                    })
                    .collect();
                let clean = pairs.iter().any(|(_, _, disturbed)| !disturbed);
                let taken: Vec<_> = pairs
                    .iter()
                    .filter(|(_, _, disturbed)| !(clean && *disturbed))
                    .collect();
                let Some(value) = spread(taken.iter().map(|(value, _, _)| *value).collect()) else {
                    continue;
                };
                rows.push(Row {
                    figure: figure.name,
                    unit: figure.unit,
                    system: system.name.clone(),
                    title: system.title.clone(),
                    value,
                    ratio: spread(taken.iter().filter_map(|(_, ratio, _)| *ratio).collect()),
                    target: work::target(&system.name, figure.name),
                    disturbed: !clean,
                    more_is_better: figure.more_is_better,
                });
            }
        }
        for (name, unit, value) in [
            (
                IDLE_RSS,
                "MiB",
                (|memory| memory.idle_rss_bytes as f64 / 1048576.0) as fn(&Memory) -> f64,
            ),
            (PER_CONNECTION, "KiB", |memory| memory.bytes_per_connection / 1024.0),
        ] {
            rows.extend(self.memory.iter().map(|memory| Row {
                figure: name,
                unit,
                system: memory.system.clone(),
                title: self.title(&memory.system),
                value: Spread {
                    median: value(memory),
                    min: value(memory),
                    max: value(memory),
                },
                ratio: None,
                target: work::target(&memory.system, name),
                disturbed: false,
                more_is_better: false,
            }));
        }
        rows
    }

    fn find(&self, system: &str, like: &Sample) -> Option<&Sample> {
        let same = |sample: &&Sample| sample.system == system && sample.work == like.work && sample.round == like.round;
        self.samples.iter().find(same)
    }

    fn title(&self, name: &str) -> String {
        let known = self.systems.iter().find(|system| system.name == name);
        known.map_or_else(|| name.into(), |system| system.title.clone())
    }

    /// One line about the run.
    pub fn headline(&self) -> String {
        let disturbed = self.samples.iter().filter(|sample| sample.disturbed).count();
        let versions: Vec<String> = self
            .versions
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        let absent: Vec<&str> = self.absent.keys().map(String::as_str).collect();
        let mut text = format!(
            "{} CPUs, Linux {}, {} rounds of {} s, seed {}; {disturbed} of {} samples disturbed (others above {:.0} %)",
            self.cpus,
            self.kernel,
            self.rounds,
            self.seconds,
            self.seed,
            self.samples.len(),
            self.foreign_max * 100.0
        );
        for (what, names) in [("", versions.join(", ")), ("absent: ", absent.join(", "))] {
            if !names.is_empty() {
                text.push_str(&format!("; {what}{names}"));
            }
        }
        text
    }
}

/// A number for people: three digits that count.
pub fn show(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Prints the table.
pub fn print(report: &Report) {
    println!(
        "\n{}; medians (least to most); ratios to direct of the same round",
        report.headline()
    );
    let mut figure = "";
    for row in report.rows() {
        if row.figure != figure {
            figure = row.figure;
            println!("\n{figure}, {}", row.unit);
        }
        let Spread { median, min, max } = row.value;
        let value = format!("{} ({} to {})", show(median), show(min), show(max));
        let ratio = row.ratio.map_or(String::new(), |ratio| {
            format!("x{} ({} to {})", show(ratio.median), show(ratio.min), show(ratio.max))
        });
        let bound = match row.target {
            None => String::new(),
            Some(work::Target::RatioAtMost(bound)) => format!("<= x{bound}"),
            Some(work::Target::RatioAtLeast(bound)) => format!(">= x{bound}"),
            Some(work::Target::AtMost(bound)) => format!("<= {bound}"),
        };
        let met = match row.met() {
            None => "",
            Some(true) => " met",
            Some(false) => " MISSED",
        };
        let disturbed = if row.disturbed { "  disturbed" } else { "" };
        println!("  {:<42} {value:>28}  {ratio:>24}  {bound}{met}{disturbed}", row.title);
    }
    for (name, why) in &report.absent {
        println!("absent: {name}: {why}");
    }
}

/// Reads a report of an earlier run.
pub fn read(file: &Path) -> Result<Report> {
    let text = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{}: expected a report of `cargo xtask bench`", file.display()))
}

/// Writes the report and its plot, once under the time of the run and once as the latest.
pub fn write(report: &Report) -> Result<()> {
    let directory = shell::root().join("target/bench");
    fs::create_dir_all(&directory)?;
    let (json, svg) = (serde_json::to_vec_pretty(report)?, plot::svg(report));
    let mut written: Vec<PathBuf> = vec![directory.clone()];
    for name in [report.unix_seconds.to_string(), "latest".into()] {
        for (extension, bytes) in [("json", json.as_slice()), ("svg", svg.as_bytes())] {
            let file = directory.join(format!("{name}.{extension}"));
            fs::write(&file, bytes).with_context(|| format!("write {}", file.display()))?;
            written.push(file);
        }
    }
    // Under sudo the developer shall own what the developer asked for.
    let id = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
        for file in &written {
            chown(file, Some(user), Some(group))?;
        }
    }
    println!(
        "\nwritten to {}/{}.json and .svg",
        directory.display(),
        report.unix_seconds
    );
    Ok(())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A report of two systems with the given (value, disturbed) by round.
    pub fn report(base: &[(f64, bool)], ours: &[(f64, bool)]) -> Report {
        let sample = |system: &str, (round, &(value, disturbed)): (usize, &(f64, bool))| Sample {
            round,
            system: system.into(),
            work: "full".into(),
            values: [("max requests, 64 conns".to_string(), value)].into(),
            foreign: 0.0,
            disturbed,
            turns: 1,
        };
        let info = |name: &str, base: Option<&str>| SystemInfo {
            name: name.into(),
            title: format!("the {name}"),
            base: base.map(Into::into),
        };
        let mut samples: Vec<Sample> = base.iter().enumerate().map(|pair| sample("direct", pair)).collect();
        samples.extend(ours.iter().enumerate().map(|pair| sample("l7", pair)));
        Report {
            unix_seconds: 1,
            kernel: "6".into(),
            cpus: 2,
            seed: 1,
            rounds: base.len(),
            seconds: 2.0,
            foreign_max: 0.05,
            versions: BTreeMap::new(),
            absent: BTreeMap::new(),
            systems: vec![info("direct", None), info("l7", Some("direct"))],
            memory: vec![Memory {
                system: "l7".into(),
                idle_rss_bytes: 16 << 20,
                bytes_per_connection: 2048.0,
            }],
            samples,
        }
    }

    #[test]
    fn ratios_are_of_the_same_round_and_clean_where_possible() {
        let report = report(
            &[(100.0, false), (50.0, false), (10.0, true)],
            &[(40.0, false), (20.0, false), (9.0, false)],
        );
        let rows = report.rows();
        let row = rows.iter().find(|row| row.system == "l7" && row.unit == "1/s").unwrap();
        assert_eq!(
            row.ratio.unwrap(),
            Spread {
                median: 0.4,
                min: 0.4,
                max: 0.4
            }
        );
        assert_eq!((row.met(), row.disturbed), (Some(true), false));
        let memory = rows.iter().find(|row| row.figure == PER_CONNECTION).unwrap();
        assert_eq!((memory.value.median, memory.met()), (2.0, Some(true)));
    }

    #[test]
    fn a_figure_with_disturbed_samples_only_is_marked() {
        let report = report(&[(100.0, true)], &[(20.0, false)]);
        let rows = report.rows();
        let row = rows.iter().find(|row| row.system == "l7" && row.unit == "1/s").unwrap();
        assert!(row.disturbed);
        assert_eq!(row.met(), Some(false));
    }

    #[test]
    fn a_written_report_is_read_again() {
        let report = report(&[(100.0, false)], &[(20.0, false)]);
        let text = serde_json::to_string(&report).unwrap();
        let again: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(again.rows().len(), report.rows().len());
        assert!(again.headline().contains("0 of 2 samples disturbed"));
    }
}
