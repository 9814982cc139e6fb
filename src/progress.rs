//! What a command that takes a while is doing: a bar on a terminal, plain lines otherwise.
//!
//! Promises: each step is told as it begins, and how far a copy is; without a terminal there is not one control character, so that
//! a log of it reads well; a bar that is not finished is wiped out, so that an error stands on a line of its own.

use std::io::{self, Write};

const WIDTH: usize = 24;

/// The steps of one command.
pub struct Progress<W: Write> {
    out: W,
    bar: bool,
    steps: usize,
    begun: usize,
    /// A bar is there.
    drawn: bool,
    /// Of the running step, the tenth that was told last.
    told: Option<u8>,
}

impl<W: Write> Progress<W> {
    /// About so many `steps`; a bar if `out` is a terminal.
    pub fn new(out: W, terminal: bool, steps: usize) -> Progress<W> {
        Progress { out, bar: terminal, steps: steps.max(1), begun: 0, drawn: false, told: None }
    }

    /// The next step begins: what it is.
    pub fn step(&mut self, what: &str) -> io::Result<()> {
        self.begun += 1;
        self.told = None;
        if !self.bar {
            writeln!(self.out, "{what}")?;
            return self.out.flush();
        }
        self.drawn = true;
        // What is done lies before the step that begins; more steps than were foretold keep the bar nearly full.
        let full = ((self.begun - 1) * WIDTH / self.steps).min(WIDTH - 1);
        // Longer lines would wrap and stay; control characters are nobody's business here.
        let what: String = what.chars().filter(|c| !c.is_control()).take(50).collect();
        write!(self.out, "\r\x1b[K[{}{}] {what}", "#".repeat(full), ".".repeat(WIDTH - full))?;
        self.out.flush()
    }

    /// A line that stays: what a command has to say besides, or says in place of its steps.
    pub fn line(&mut self, what: &str) -> io::Result<()> {
        self.wipe();
        self.told = None;
        writeln!(self.out, "{what}")?;
        self.out.flush()
    }

    /// So many percent of the running step are done. Without a terminal that is a line for every tenth of it.
    pub fn percent(&mut self, percent: u8) -> io::Result<()> {
        let tenth = percent / 10;
        if !self.bar {
            if self.told.replace(tenth) != Some(tenth) {
                writeln!(self.out, "{percent} %")?;
            }
            return self.out.flush();
        }
        self.drawn = true;
        let full = usize::from(percent.min(100)) * WIDTH / 100;
        write!(self.out, "\r\x1b[K[{}{}] {percent} %", "#".repeat(full), ".".repeat(WIDTH - full))?;
        self.out.flush()
    }

    fn wipe(&mut self) {
        if std::mem::take(&mut self.drawn) {
            // The terminal may be gone: then nobody sees the bar either.
            let _ = write!(self.out, "\r\x1b[K").and_then(|()| self.out.flush());
        }
    }
}

impl<W: Write> Drop for Progress<W> {
    fn drop(&mut self) {
        self.wipe();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(terminal: bool) -> String {
        let mut out = Vec::new();
        let mut progress = Progress::new(&mut out, terminal, 2);
        for what in ["one", "two", "thr\nee", "four"] {
            progress.step(what).unwrap();
        }
        drop(progress);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn without_a_terminal_there_are_plain_lines() {
        assert_eq!(shown(false), "one\ntwo\nthr\nee\nfour\n");
    }

    #[test]
    fn on_a_terminal_a_bar_grows_in_place_and_is_gone_at_the_end() {
        let shown = shown(true);
        assert!(!shown.contains('\n'));
        let bars: Vec<&str> = shown.split("\r\x1b[K").collect();
        assert_eq!(bars[1], format!("[{}] one", ".".repeat(24)));
        assert_eq!(bars[2], format!("[{}{}] two", "#".repeat(12), ".".repeat(12)));
        assert_eq!(bars[3], format!("[{}.] three", "#".repeat(23)));
        assert_eq!(bars[4], format!("[{}.] four", "#".repeat(23)));
        assert_eq!(bars[5], "");
    }

    #[test]
    fn a_copy_is_a_bar_between_lines_that_stay_or_a_line_for_each_tenth() {
        let shown = |terminal| {
            let mut out = Vec::new();
            let mut progress = Progress::new(&mut out, terminal, 1);
            for copy in ["one", "two"] {
                progress.line(copy).unwrap();
                for percent in [0, 4, 55, 100, 100] {
                    progress.percent(percent).unwrap();
                }
            }
            progress.line("done").unwrap();
            drop(progress);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(shown(false), "one\n0 %\n55 %\n100 %\ntwo\n0 %\n55 %\n100 %\ndone\n");
        let bar = shown(true);
        assert!(bar.starts_with(&format!("one\n\r\x1b[K[{}] 0 %\r\x1b[K[", ".".repeat(24))), "{bar:?}");
        assert!(bar.contains(&format!("[{}{}] 55 %", "#".repeat(13), ".".repeat(11))), "{bar:?}");
        assert!(bar.ends_with(&format!("[{}] 100 %\r\x1b[Kdone\n", "#".repeat(24))), "{bar:?}");
        assert_eq!(bar.matches('\n').count(), 3);
    }
}
