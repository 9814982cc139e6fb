//! Arguments, configuration, logging; then hands over to the library.
//!
//! Exit codes: 0 fine; 1 it failed while running, or `check` found problems; 2 the arguments or the
//! configuration are wrong, and nothing was started.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use highwater::config::{Config, LogConfig, LogFormat};
use tracing_subscriber::EnvFilter;

/// A transparent PostgreSQL replication proxy.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the proxy.
    Run(ConfigFile),
    /// Validate the configuration, try the nodes, and say where statements would go.
    Check(ConfigFile),
    // `Demo` goes here: `--exit-after`, and its arm in `main` calls `highwater::demo::run`.
}

#[derive(clap::Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: PathBuf,
}

fn main() -> ExitCode {
    // clap itself exits with 2 on wrong arguments.
    match Arguments::parse().command {
        Command::Run(file) => with_config(file, run),
        Command::Check(file) => with_config(file, check),
    }
}

fn with_config(file: ConfigFile, command: fn(Config) -> ExitCode) -> ExitCode {
    match Config::load(&file.config) {
        Ok(config) => command(config),
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}

/// `highwater::server::run(config)` is called here once the server is there.
fn run(config: Config) -> ExitCode {
    start_logging(&config.log);
    tracing::error!("this build has no server yet");
    ExitCode::from(1)
}

fn check(config: Config) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("highwater: the runtime cannot be started: {e}");
            return ExitCode::from(1);
        }
    };
    let report = runtime.block_on(highwater::check::check(&config));
    print!("{report}");
    if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

/// Log lines go to standard error, so that standard output is free for answers.
fn start_logging(log: &LogConfig) {
    // The configuration has been checked to hold a valid filter.
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}
