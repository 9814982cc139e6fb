//! Arguments, configuration, logging; then hands over to the library.
//!
//! Exit codes: 0 fine; 1 it failed while running, or `check` found problems; 2 the arguments or the
//! configuration are wrong, and nothing was started.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser, Subcommand};
use highwater::config::Config;
use highwater::demo::DemoOptions;
use highwater::explain::Explanation;
use highwater::progress::Progress;
use highwater::rejoin::{self, Request, Told};

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
    /// Say where a statement would go, and why. It is not run.
    Route {
        /// The statement, as a client would send it.
        sql: String,
        /// With the catalog facts of a live database, of these nodes.
        #[arg(short = 'c', long = "config", value_name = "FILE")]
        config: Option<PathBuf>,
        /// The database; default: the control user's.
        #[arg(short = 'd', long = "database", value_name = "NAME", requires = "config")]
        database: Option<String>,
        /// The user whose statement it is, for the rules; default: the control user.
        #[arg(short = 'U', long = "user", value_name = "NAME", requires = "config")]
        user: Option<String>,
    },
    /// On a database host: make a former primary, or a diverged replica, a replica of the current primary.
    Rejoin(HostArguments),
    /// On a database host: make a new replica from a consistent copy of the primary.
    Clone(HostArguments),
    /// Start a private primary and two replicas, the proxy over them and live traffic; Ctrl-C ends it.
    Demo {
        /// End by itself after this time, for example `10s` or `2m`.
        #[arg(long, value_name = "TIME", value_parser = duration)]
        exit_after: Option<Duration>,
    },
    /// Ask a running proxy whether it lives; exits with 1 if it does not.
    Healthcheck {
        /// The configuration file, whose `http` says where to ask.
        #[arg(short = 'c', long = "config", value_name = "FILE", required_unless_present = "http")]
        config: Option<PathBuf>,
        /// Where to ask.
        #[arg(long, value_name = "HOST:PORT", conflicts_with = "config")]
        http: Option<String>,
        /// Ask whether it should be sent clients: whether there is a node to serve them.
        #[arg(long)]
        ready: bool,
    },
    /// Write the manual pages and the shells' completions, for packages.
    #[command(hide = true)]
    Manual {
        /// The directory.
        #[arg(long, value_name = "DIRECTORY")]
        to: PathBuf,
    },
}

#[derive(clap::Args)]
struct ConfigFile {
    /// The configuration file.
    #[arg(short = 'c', long = "config", value_name = "FILE")]
    config: PathBuf,
}

#[derive(clap::Args)]
struct HostArguments {
    #[command(flatten)]
    file: ConfigFile,
    /// The node's name in the configuration.
    #[arg(long, value_name = "NAME")]
    node: String,
    /// Its data directory, with no server running on it.
    #[arg(long, value_name = "DIRECTORY")]
    data: PathBuf,
    /// The directory of PostgreSQL's programs; default: the PATH.
    #[arg(long, value_name = "DIRECTORY")]
    bin: Option<PathBuf>,
    /// How it logs in for replication, as in primary_conninfo; default: as another node does. Host and port are
    /// those of the primary.
    #[arg(long, value_name = "STRING")]
    conninfo: Option<String>,
    /// A physical replication slot to use, made on the primary if it is missing.
    #[arg(long, value_name = "NAME")]
    slot: Option<String>,
    /// Where its postgresql.conf is, if not in the data directory (pg_rewind of PostgreSQL 15 and later).
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Start the server with pg_ctl, and wait until it streams.
    #[arg(long)]
    start: bool,
    /// Only look, and say what would be done.
    #[arg(long)]
    dry_run: bool,
}

fn main() -> ExitCode {
    // clap itself exits with 2 on wrong arguments.
    match Arguments::parse().command {
        Command::Run(file) => with_config(file, run),
        Command::Check(file) => with_config(file, check),
        Command::Route { sql, config: None, .. } => {
            route(async move { highwater::explain::built_in(&sql).await })
        }
        Command::Route { sql, config: Some(config), database, user } => match Config::load(&config) {
            Ok(config) => route(async move {
                let database = database.unwrap_or_else(|| config.control.database.clone());
                let user = user.unwrap_or_else(|| config.control.user.clone());
                highwater::explain::live(&sql, config, &user, &database).await
            }),
            Err(e) => {
                eprintln!("{e}");
                ExitCode::from(2)
            }
        },
        Command::Rejoin(arguments) => on_host(arguments, true),
        Command::Clone(arguments) => on_host(arguments, false),
        Command::Demo { exit_after } => demo(exit_after),
        Command::Healthcheck { config, http, ready } => match (http, config) {
            (Some(address), _) => healthcheck(&address, ready),
            (None, Some(file)) => with_config(ConfigFile { config: file }, |config| match &config.http {
                Some(address) => healthcheck(address, ready),
                None => {
                    eprintln!("highwater: `http` is null: there is nothing to ask");
                    ExitCode::from(2)
                }
            }),
            // clap does not let this happen.
            (None, None) => ExitCode::from(2),
        },
        Command::Manual { to } => ended(highwater::manual::write(&Arguments::command(), &to)),
    }
}

fn with_config(file: ConfigFile, command: impl FnOnce(Config) -> ExitCode) -> ExitCode {
    match Config::load(&file.config) {
        Ok(config) => command(config),
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(2)
        }
    }
}

fn run(config: Config) -> ExitCode {
    let level = highwater::log::start(&config.log);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    match highwater::server::run(config, level) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("highwater: {e}");
            ExitCode::from(1)
        }
    }
}

fn healthcheck(address: &str, ready: bool) -> ExitCode {
    ended(highwater::healthcheck::ask(address, ready).map(|said| println!("{said}")))
}

fn ended(result: Result<(), impl std::fmt::Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("highwater: {e}");
            ExitCode::from(1)
        }
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    highwater::config::parse_duration(text).ok_or_else(|| "expected a time such as 10s or 2m".to_owned())
}

fn demo(exit_after: Option<Duration>) -> ExitCode {
    let start_proxy = |path: &Path| {
        let config = Config::load(path).map_err(|e| e.to_string())?;
        highwater::server::start(config).map_err(|e| e.to_string())
    };
    match highwater::demo::run(&DemoOptions { exit_after }, start_proxy) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("highwater: {e}");
            ExitCode::from(1)
        }
    }
}

fn route(question: impl Future<Output = Result<Explanation, String>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("highwater: the runtime cannot be started: {e}");
            return ExitCode::from(1);
        }
    };
    match runtime.block_on(question) {
        Ok(explanation) => {
            // Whoever reads may have seen enough (`| head`).
            let _ = write!(std::io::stdout(), "{explanation}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("highwater: {e}");
            ExitCode::from(1)
        }
    }
}

fn on_host(arguments: HostArguments, rejoins: bool) -> ExitCode {
    let config = match Config::load(&arguments.file.config) {
        Ok(config) => config,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(2);
        }
    };
    let HostArguments { file: _, node, data, bin, conninfo, slot, config_file, start, dry_run } = arguments;
    // PostgreSQL's programs are run in a directory of their own.
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    let (data, bin, config_file) = (absolute(data), bin.map(absolute), config_file.map(absolute));
    let request = Request { node, data, bin, conninfo, slot, config_file, start, dry_run };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("highwater: the runtime cannot be started: {e}");
            return ExitCode::from(1);
        }
    };
    let mut progress = Progress::new(std::io::stdout(), std::io::stdout().is_terminal(), 1);
    // Nobody may be there to see it; what is done counts.
    let mut tell = |told: Told<'_>| match told {
        Told::Line(line) => drop(progress.line(line)),
        Told::Copied(percent) => drop(progress.percent(percent)),
    };
    let done = runtime.block_on(async {
        match rejoins {
            true => rejoin::rejoin(&config, &request, &mut tell).await,
            false => rejoin::clone(&config, &request, &mut tell).await,
        }
    });
    drop(progress);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("highwater: {e}");
            ExitCode::from(1)
        }
    }
}

fn check(config: Config) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("highwater: the runtime cannot be started: {e}");
            return ExitCode::from(1);
        }
    };
    for warning in &config.warnings {
        eprintln!("warning: {warning}");
    }
    let terminal = std::io::stderr().is_terminal();
    let mut progress = Progress::new(std::io::stderr(), terminal, config.nodes.len());
    // Nobody may be there to see it; the report counts.
    let report = runtime.block_on(highwater::check::check(&config, &mut |step| drop(progress.step(step))));
    drop(progress);
    print!("{report}");
    if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
