//! The load of `cargo xtask bench --scale`: fills a standalone controller with a large world, stands in for hundreds of
//! agents, changes endpoints at a rate, and measures what a view costs. Each verb prints one line of JSON.
//!
//! It speaks the real protocols: the operator's socket, and for each agent a join, a TLS connection with the node's own
//! certificate and a stream. Simulated agents answer every update and keep nothing. It must never decide whether a
//! figure is good.

mod agents;
mod operator;
mod views;
mod world;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Applies the documents of the world.
    Fill {
        /// The operator's socket.
        #[arg(long)]
        socket: PathBuf,
        #[command(flatten)]
        size: world::Size,
    },
    /// Applies a policy again and again and says how long it takes until all agents have acked it.
    Apply {
        /// The operator's socket.
        #[arg(long)]
        socket: PathBuf,
        /// The agents' port of the controller.
        #[arg(long)]
        address: SocketAddr,
        /// How many agents.
        #[arg(long)]
        agents: usize,
        /// How many changes, one after the other.
        #[arg(long, default_value_t = 20)]
        rounds: usize,
    },
    /// Changes the readiness of endpoints, at a rate.
    Churn {
        /// The operator's socket.
        #[arg(long)]
        socket: PathBuf,
        /// The agents' port of the controller; without it no agents are simulated.
        #[arg(long)]
        address: Option<SocketAddr>,
        /// How many simulated agents listen meanwhile.
        #[arg(long, default_value_t = 0)]
        agents: usize,
        /// Changes per second.
        #[arg(long, default_value_t = 1000)]
        rate: u32,
        /// Applies per second, over which the changes are spread.
        #[arg(long, default_value_t = 10)]
        applies: u32,
        /// For so long.
        #[arg(long, default_value_t = 10)]
        seconds: u32,
        #[command(flatten)]
        size: world::Size,
    },
    /// Compiles views of growing worlds and measures their look-ups.
    Views {
        #[command(flatten)]
        size: world::Size,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(figures) => {
            println!("{figures}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("scale-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<serde_json::Value> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    match verb {
        Verb::Fill { socket, size } => runtime.block_on(operator::fill(&socket, &size)),
        Verb::Apply {
            socket,
            address,
            agents,
            rounds,
        } => runtime.block_on(agents::apply(&socket, address, agents, rounds)),
        Verb::Churn {
            socket,
            address,
            agents,
            rate,
            applies,
            seconds,
            size,
        } => {
            let (per_apply, pause) = (rate / applies.max(1), Duration::from_secs(1) / applies.max(1));
            let load = agents::Churn {
                agents: address.map(|address| (address, agents)),
                per_apply,
                pause,
                applies: applies * seconds,
            };
            runtime.block_on(agents::churn(&socket, &load, &size))
        }
        Verb::Views { size } => views::measure(&size),
    }
}
