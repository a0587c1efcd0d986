//! `mesh-ctl policy check`: validation without a controller, by the code that the controller runs.

use std::path::PathBuf;

use mesh_api::document::{DocumentSet, Problem, parse};
use serde::Serialize;

use crate::{
    connect::Failure,
    output::{Format, print, print_value},
    policy::{read_sources, warn},
};

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// A file, a directory (its *.yaml, *.yml and *.json) or - for standard input; may be given again.
    #[arg(short, long = "filename", value_name = "FILE|DIR|-", required = true)]
    filenames: Vec<PathBuf>,
    /// Fail on warnings as well: references to what is not in these files.
    #[arg(long)]
    strict: bool,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// What `check` prints for programs.
#[derive(Serialize)]
struct CheckReport {
    valid: bool,
    documents: usize,
    problems: Vec<String>,
    warnings: Vec<String>,
}

/// Runs `mesh-ctl policy check`.
pub fn run(args: CheckArgs) -> Result<(), Failure> {
    let mut problems = Vec::new();
    let mut set = DocumentSet::new();
    let mut count = 0;
    for source in read_sources(&args.filenames)? {
        match parse(&source.name, &source.yaml) {
            Ok(documents) => {
                for document in documents {
                    count += 1;
                    let key = document.key();
                    if set.insert(document).is_some() {
                        problems.push(format!(
                            "{}: {key} is there twice, expected each document once",
                            source.name
                        ));
                    }
                }
            }
            Err(found) => problems.extend(found.iter().map(Problem::to_string)),
        }
    }
    let warnings: Vec<String> = if problems.is_empty() {
        set.validate().iter().map(Problem::to_string).collect()
    } else {
        Vec::new()
    };
    let valid = problems.is_empty() && (!args.strict || warnings.is_empty());
    if args.output == Format::Table {
        warn(&warnings);
        if valid {
            print(&format!("{count} documents are valid\n"));
            return Ok(());
        }
    } else {
        let report = CheckReport {
            valid,
            documents: count,
            problems: problems.clone(),
            warnings,
        };
        print_value(&report, args.output)?;
    }
    match (valid, problems.is_empty()) {
        (true, _) => Ok(()),
        (false, false) => Err(Failure::Refused(problems)),
        (false, true) => Err(Failure::refused("there are warnings")),
    }
}
