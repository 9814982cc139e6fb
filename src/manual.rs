//! The manual pages and the shells' completions, written from the definition of the command line, so that
//! they cannot say anything else than the program does.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

/// What the definition of the command line does not know; in roff, the language of manual pages.
const MORE: &str = r#".SH "EXIT STATUS"
.TP
0
Fine.
.TP
1
It failed while running; \fBcheck\fR found problems; \fBhealthcheck\fR: the proxy is not well.
.TP
2
The arguments or the configuration are wrong; nothing was started.
.SH SIGNALS
.TP
SIGTERM
New clients are refused, idle sessions end, transactions may finish within \fIdrain_timeout\fR.
.TP
SIGINT, or a second SIGTERM
All sessions end at once.
.TP
SIGQUIT
The process ends without a word.
.SH FILES
.TP
/etc/highwater/config.yaml
The configuration, by convention; \fB\-c\fR names it.
.SH "SEE ALSO"
.BR psql (1),
.BR postgres (1)
"#;

/// Writes `man/*.1` and `completions/*` under `directory`, which is made where it is missing.
pub fn write(command: &Command, directory: &Path) -> io::Result<()> {
    let (man, completions) = (directory.join("man"), directory.join("completions"));
    fs::create_dir_all(&man)?;
    fs::create_dir_all(&completions)?;
    // `help` is no page of its own.
    page(command.clone().disable_help_subcommand(true), "highwater", &man, MORE)?;
    for part in command.get_subcommands().filter(|part| !part.is_hide_set()) {
        let name = format!("highwater-{}", part.get_name());
        // Its synopsis begins with the program's name.
        let shown = part.clone().bin_name(name.replacen('-', " ", 1));
        page(shown, &name, &man, "")?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command.clone(), "highwater", &completions)?;
    }
    Ok(())
}

fn page(command: Command, name: &str, directory: &Path, more: &str) -> io::Result<()> {
    let mut file = fs::File::create(directory.join(format!("{name}.1")))?;
    let version = env!("CARGO_PKG_VERSION");
    let source = format!("highwater {version}");
    Man::new(command).title(name).section("1").source(source).manual("Highwater").render(&mut file)?;
    file.write_all(more.as_bytes())
}
