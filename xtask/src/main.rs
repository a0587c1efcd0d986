//! `cargo xtask`: the one door for every chore. Without a verb it lists them.
//!
//! Nothing here is part of the mesh. What needs root runs through sudo when the developer is not root; what needs a
//! package says so or installs it, and nothing is ever skipped in silence.

mod bench;
mod build;
mod conform;
mod demo;
mod fuzz;
mod generate;
mod image;
mod kernels;
mod kube;
mod lab;
mod setup;
mod shell;
mod supply;
mod test;
mod test_image;
mod test_kube;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};

/// Every chore of Nodemesh.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Installs what is missing on a Debian machine: packages and bpf-linker.
    Setup,
    /// Builds the agent, mesh-ctl and the programs of the lab.
    Build(build::Options),
    /// Shows the main job on a lab of two nodes, step by step, with figures.
    Demo(demo::Options),
    /// Runs every test: unit, property, kernel, end to end.
    Test(test::Options),
    /// A mesh on one machine: nodes and pods as network namespaces.
    Lab(lab::Options),
    /// A real Kubernetes on this machine, and the Gateway API's conformance suite.
    Kube(kube::Options),
    /// Runs the kernel and end-to-end tests in virtual machines with other kernels.
    Kernels(kernels::Options),
    /// Writes OCI images of the agent and the controller, without docker.
    Image(image::Options),
    /// Compares the mesh with direct connections: latency, rates, bandwidth, CPU, memory.
    Bench(bench::Options),
    /// Checks the house rules: ranks, dependency directions, generated files, tests, licenses.
    Tidy(tidy::Options),
    /// Writes the generated files anew.
    Gen,
    /// Runs a fuzz target for a while; without a name it lists them.
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Some(verb) = arguments.verb else {
        // A missing verb is a question, not an error.
        let _ = Arguments::command().print_help();
        return ExitCode::SUCCESS;
    };
    match run(verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Setup => setup::run(),
        Verb::Build(options) => build::run(&options),
        Verb::Demo(options) => demo::run(&options),
        Verb::Test(options) => test::run(&options),
        Verb::Lab(options) => lab::run(options),
        Verb::Kube(options) => kube::run(options),
        Verb::Kernels(options) => kernels::run(&options),
        Verb::Image(options) => image::run(&options),
        Verb::Bench(options) => bench::run(&options),
        Verb::Tidy(options) => tidy::run(&options),
        Verb::Gen => tidy::generate(),
        Verb::Fuzz(options) => fuzz::run(&options),
    }
}
