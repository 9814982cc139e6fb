//! The console's language: text in, [`Command`]s out. Pure.
//!
//! Words are read by PostgreSQL's lexical rules, in any case; comments and a semicolon at the end are fine, and several
//! commands in one text. What drivers and tools say by themselves (BEGIN, SET, `SELECT version()`) is understood as far
//! as it makes sense here. Anything else is a syntax error with its place, and with the nearest command as a hint.

use crate::classify::{Token, Words};
use crate::config::near::{distance, nearest};
use crate::wire::ErrorReport;

/// What an administrator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `SHOW x`, or `SELECT * FROM x`.
    Table(Table, Pick),
    /// `SHOW server_version` and kin.
    Parameter(String),
    /// `SELECT 1, version()`: what drivers ask.
    Scalars(Vec<Scalar>),
    /// `EXPLAIN ROUTE`.
    ExplainRoute {
        /// In this database; `None`: the control user's.
        database: Option<Argument>,
        /// By this user; `None`: who asks.
        user: Option<Argument>,
        /// The statement.
        sql: String,
    },
    /// `PAUSE [database]`.
    Pause(Option<Argument>),
    /// `RESUME [database]`.
    Resume(Option<Argument>),
    /// `DRAIN node`.
    Drain(Argument),
    /// `UNDRAIN node`.
    Undrain(Argument),
    /// `KILL pid`.
    Kill(Argument),
    /// `CANCEL pid`.
    Cancel(Argument),
    /// `RELOAD`.
    Reload,
    /// About the primary.
    Failover(Failover),
    /// BEGIN and kin.
    Begin,
    /// COMMIT, END.
    Commit,
    /// ROLLBACK, ABORT.
    Rollback,
    /// SET and kin, which change nothing here; the tag that answers it.
    Nothing(&'static str),
}

/// What is asked about the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failover {
    /// `SWITCHOVER [TO node] [DRY RUN] [TIMEOUT time]`.
    Switchover {
        /// For whom; `None`: the best one.
        to: Option<Argument>,
        /// Only say what would be done.
        dry_run: bool,
        /// How long clients may wait.
        timeout: Option<Argument>,
    },
    /// `FAILOVER [TO node] [ALLOW DATA LOSS]`.
    Failover {
        /// By whom; `None`: the best one.
        to: Option<Argument>,
        /// Also when acknowledged writes may be lost.
        allow_data_loss: bool,
    },
    /// `PAUSE FAILOVER`.
    Pause,
    /// `RESUME FAILOVER`.
    Resume,
    /// `FENCE node`.
    Fence(Argument),
    /// `UNFENCE node`.
    Unfence(Argument),
    /// `FORGET node`.
    Forget(Argument),
    /// `ACK RECOVERY`.
    AckRecovery,
}

/// A word that a command is given, or the number of the parameter that stands for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Argument {
    /// As written: a name, a string, a number.
    Text(String),
    /// `$n`, from 1.
    Parameter(usize),
}

/// Which columns and rows of a table are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pick {
    /// These columns, in this order; empty: all.
    pub columns: Vec<Wanted>,
    /// At most so many rows.
    pub limit: Option<u64>,
}

/// A column that is picked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What it holds.
    pub what: Of,
    /// What it is to be called.
    pub name: String,
}

/// What a picked column holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Of {
    /// The table's column of this name.
    Column(String),
    /// `now()`: tools that draw want a time in each row.
    Now,
}

/// What drivers ask for by `SELECT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scalar {
    /// The column's name.
    pub name: String,
    /// What it shows.
    pub what: Asked,
}

/// A value that drivers ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A number.
    Number(i64),
    /// A text.
    Text(String),
    /// `version()`.
    Version,
    /// `current_database()`.
    Database,
    /// `current_user` and kin.
    User,
    /// `pg_backend_pid()`.
    Pid,
    /// `pg_is_in_recovery()`.
    InRecovery,
    /// `now()`.
    Now,
    /// `current_setting('x')`; divided by this, as Grafana asks for the version.
    Setting(String, Option<i64>),
}

/// The tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Each node.
    Nodes,
    /// Each node's positions.
    Lag,
    /// Each pool.
    Pools,
    /// Each session.
    Sessions,
    /// What was done, by database and user.
    Stats,
    /// What was done, by statement.
    Statements,
    /// Each key of the configuration.
    Config,
    /// What is known of the primary, and what would be done without it.
    Failover,
    /// Primaries so far.
    History,
    /// The cluster as a whole.
    Topology,
    /// This program.
    Version,
    /// The commands.
    Help,
}

impl Table {
    /// All of them.
    pub const ALL: [Table; 12] = [
        Table::Nodes,
        Table::Lag,
        Table::Pools,
        Table::Sessions,
        Table::Stats,
        Table::Statements,
        Table::Config,
        Table::Failover,
        Table::History,
        Table::Topology,
        Table::Version,
        Table::Help,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Table::Nodes => "nodes",
            Table::Lag => "lag",
            Table::Pools => "pools",
            Table::Sessions => "sessions",
            Table::Stats => "stats",
            Table::Statements => "statements",
            Table::Config => "config",
            Table::Failover => "failover",
            Table::History => "history",
            Table::Topology => "topology",
            Table::Version => "version",
            Table::Help => "help",
        }
    }

    fn named(name: &str) -> Option<Table> {
        Table::ALL.into_iter().find(|table| table.name() == name)
    }
}

/// What is there, for HELP: a command's form and what it does.
pub const HELP: [(&str, &str); 32] = [
    ("SHOW NODES", "the nodes: role, standing and why, position, lag, what runs there"),
    ("SHOW LAG", "where each node is in the write-ahead log, by the last sample of it"),
    ("SHOW POOLS", "backends of each node, database and user"),
    ("SHOW SESSIONS", "clients: what they do, wait for, are pinned by, and their marks"),
    (
        "SHOW STATS",
        "by database and user: statements, reads on replicas and on the primary and why, bytes, waits",
    ),
    ("SHOW STATEMENTS", "by statement without its literals: class, where it ran, how long it took"),
    ("SHOW CONFIG", "each key: value, default, where the value is from, when a change takes effect"),
    ("SHOW FAILOVER", "the primary, and what is done when it is lost"),
    ("SHOW HISTORY", "how the latest epochs ended"),
    ("SHOW TOPOLOGY", "the cluster: identity, epoch, primary, timelines"),
    ("SHOW VERSION", "this program"),
    ("SHOW HELP", "this list; HELP does the same"),
    (
        "SELECT * FROM sessions",
        "as SHOW, for any of the tables above; columns by name (AS another), now(), LIMIT n; no WHERE",
    ),
    ("EXPLAIN ROUTE SELECT 1", "where a statement would go and why; it is not run"),
    ("EXPLAIN ROUTE (DATABASE app, USER app) SELECT 1", "the same for this database and user"),
    ("PAUSE", "hold statements of all databases, once transactions have ended"),
    ("PAUSE database", "the same for one database"),
    ("RESUME", "let them go on"),
    ("RESUME database", "the same for one database"),
    ("DRAIN node", "no new reads on this replica, and its idle backends are closed"),
    ("UNDRAIN node", "reads on it again"),
    ("KILL pid", "end a session"),
    ("CANCEL pid", "cancel a session's statement"),
    ("RELOAD", "read the configuration file again"),
    (
        "SWITCHOVER [TO node] [DRY RUN] [TIMEOUT time]",
        "exchange a living primary for a replica, without loss",
    ),
    ("FAILOVER [TO node] [ALLOW DATA LOSS]", "replace a dead primary"),
    ("PAUSE FAILOVER", "no failover by itself"),
    ("RESUME FAILOVER", "undoes that"),
    ("FENCE node", "keep a node from taking writes"),
    ("UNFENCE node", "undoes that"),
    ("FORGET node", "this node is gone for good"),
    ("ACK RECOVERY", "a failover or quarantine that waits for an operator goes on"),
];

/// Why a text is none of the console's, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What is said.
    pub report: ErrorReport,
    /// The character, from 1.
    pub position: usize,
}

/// Reads a text of commands.
pub fn parse(text: &str) -> Result<Vec<Command>, Box<Refused>> {
    let mut commands = Vec::new();
    let mut reader = Reader::new(text);
    loop {
        if reader.takes(Token::Punctuation(b';')) {
            continue;
        }
        if reader.token == Token::End {
            return Ok(commands);
        }
        let begin = reader.words.start();
        commands.push(reader.command().map_err(|what| reader.refuse(what, begin))?);
        if reader.token != Token::End && !reader.takes(Token::Punctuation(b';')) {
            return Err(reader.refuse(Wrong::Here, begin));
        }
    }
}

impl Command {
    /// The arguments, to be replaced.
    fn arguments(&mut self) -> Vec<&mut Argument> {
        match self {
            Command::ExplainRoute { database, user, .. } => database.iter_mut().chain(user).collect(),
            Command::Pause(of) | Command::Resume(of) => of.iter_mut().collect(),
            Command::Drain(of) | Command::Undrain(of) | Command::Kill(of) | Command::Cancel(of) => vec![of],
            Command::Failover(failover) => match failover {
                Failover::Switchover { to, timeout, .. } => to.iter_mut().chain(timeout).collect(),
                Failover::Failover { to, .. } => to.iter_mut().collect(),
                Failover::Fence(of) | Failover::Unfence(of) | Failover::Forget(of) => vec![of],
                Failover::Pause | Failover::Resume | Failover::AckRecovery => Vec::new(),
            },
            _ => Vec::new(),
        }
    }

    /// How many parameters it has: the greatest number that stands for an argument.
    pub fn parameters(&self) -> usize {
        let number = |argument: &mut Argument| match argument {
            Argument::Parameter(number) => *number,
            Argument::Text(_) => 0,
        };
        self.clone().arguments().into_iter().map(number).max().unwrap_or(0)
    }

    /// Whether its parameters are numbers.
    pub fn takes_numbers(&self) -> bool {
        matches!(self, Command::Kill(_) | Command::Cancel(_))
    }

    /// With the parameters' values in place of their numbers.
    pub fn with(mut self, values: &[Option<String>]) -> Result<Command, ErrorReport> {
        for argument in self.arguments() {
            if let Argument::Parameter(number) = argument {
                let value = values.get(number.wrapping_sub(1)).cloned().flatten();
                let missing =
                    || ErrorReport::error("22004", format!("parameter ${number} is null or missing"));
                *argument = Argument::Text(value.ok_or_else(missing)?);
            }
        }
        Ok(self)
    }
}

impl Argument {
    /// As text. A parameter that has not been given is an empty one.
    pub fn text(&self) -> &str {
        match self {
            Argument::Text(text) => text,
            Argument::Parameter(_) => "",
        }
    }
}

/// Why a command is not understood.
enum Wrong {
    /// At the token that is next.
    Here,
    /// It names a table or column that there is not.
    Unknown(ErrorReport),
}

struct Reader<'a> {
    text: &'a str,
    words: Words<'a>,
    token: Token,
    word: String,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Reader<'a> {
        let mut reader =
            Reader { text, words: Words::new(text.as_bytes()), token: Token::End, word: String::new() };
        reader.next();
        reader
    }

    fn next(&mut self) {
        self.token = self.words.next_token();
        self.word.clear();
        if matches!(self.token, Token::Word | Token::Quoted) {
            self.word.push_str(&String::from_utf8_lossy(self.words.name()));
        }
    }

    fn raw(&self) -> &'a str {
        // Tokens begin and end at the boundaries of characters.
        self.text.get(self.words.start()..self.words.end()).unwrap_or_default()
    }

    fn takes(&mut self, token: Token) -> bool {
        let is = self.token == token;
        if is {
            self.next();
        }
        is
    }

    fn is(&self, word: &str) -> bool {
        self.token == Token::Word && self.word == word
    }

    fn takes_word(&mut self, word: &str) -> bool {
        let is = self.is(word);
        if is {
            self.next();
        }
        is
    }

    fn needs_word(&mut self, word: &str) -> Result<(), Wrong> {
        if self.takes_word(word) { Ok(()) } else { Err(Wrong::Here) }
    }

    fn at_end(&self) -> bool {
        matches!(self.token, Token::End | Token::Punctuation(b';'))
    }

    /// Passes over the rest of the command.
    fn skip(&mut self) {
        while !self.at_end() && self.token != Token::Unclear {
            self.next();
        }
    }

    fn argument(&mut self) -> Result<Argument, Wrong> {
        let argument = match self.token {
            Token::Word | Token::Quoted => Argument::Text(self.word.clone()),
            Token::Number => Argument::Text(self.raw().to_owned()),
            Token::Text(_) => Argument::Text(self.string().ok_or(Wrong::Here)?),
            Token::Parameter => Argument::Parameter(self.raw()[1..].parse().map_err(|_| Wrong::Here)?),
            _ => return Err(Wrong::Here),
        };
        if matches!(argument, Argument::Parameter(0 | 100..)) {
            return Err(Wrong::Here);
        }
        self.next();
        Ok(argument)
    }

    /// A plain string's value.
    fn string(&self) -> Option<String> {
        let inside = self.raw().strip_prefix('\'')?.strip_suffix('\'')?;
        Some(inside.replace("''", "'"))
    }

    fn optional(&mut self) -> Result<Option<Argument>, Wrong> {
        if self.at_end() { Ok(None) } else { self.argument().map(Some) }
    }

    fn command(&mut self) -> Result<Command, Wrong> {
        if self.token != Token::Word {
            return Err(Wrong::Here);
        }
        let verb = self.word.clone();
        match verb.as_str() {
            "show" => self.show(),
            "select" => self.select(),
            "help" => {
                self.next();
                Ok(Command::Table(Table::Help, Pick::default()))
            }
            "explain" => self.explain(),
            "pause" | "resume" => self.pause(verb == "pause"),
            "drain" => self.of_one(Command::Drain),
            "undrain" => self.of_one(Command::Undrain),
            "kill" => self.of_one(Command::Kill),
            "cancel" => self.of_one(Command::Cancel),
            "reload" => {
                self.next();
                Ok(Command::Reload)
            }
            "switchover" | "failover" | "fence" | "unfence" | "forget" | "ack" => {
                self.failover(&verb).map(Command::Failover)
            }
            _ => self.of_drivers(&verb),
        }
    }

    fn of_one(&mut self, made: fn(Argument) -> Command) -> Result<Command, Wrong> {
        self.next();
        self.argument().map(made)
    }

    /// What drivers and tools say by themselves.
    fn of_drivers(&mut self, verb: &str) -> Result<Command, Wrong> {
        let command = match verb {
            "begin" | "start" => Command::Begin,
            "commit" | "end" => Command::Commit,
            "rollback" | "abort" => Command::Rollback,
            "set" => Command::Nothing("SET"),
            "reset" => Command::Nothing("RESET"),
            "discard" => Command::Nothing("DISCARD ALL"),
            "deallocate" => Command::Nothing("DEALLOCATE"),
            _ => return Err(Wrong::Here),
        };
        self.next();
        if matches!(command, Command::Nothing("SET")) {
            self.refuse_encoding()?;
        }
        self.skip();
        Ok(command)
    }

    /// Whatever a client sets, it is answered in UTF-8.
    fn refuse_encoding(&mut self) -> Result<(), Wrong> {
        let names = self.is("names");
        if !names && !self.is("client_encoding") {
            return Ok(());
        }
        self.next();
        if !names && !self.takes(Token::Operator) {
            self.takes_word("to");
        }
        let value = self.argument()?.text().to_ascii_lowercase().replace('-', "");
        if matches!(value.as_str(), "utf8" | "unicode" | "default" | "sql_ascii") {
            return Ok(());
        }
        Err(Wrong::Unknown(
            ErrorReport::error("0A000", "the admin console speaks UTF8 only")
                .hint("SET client_encoding TO 'UTF8'."),
        ))
    }

    fn show(&mut self) -> Result<Command, Wrong> {
        self.next();
        if !matches!(self.token, Token::Word | Token::Quoted) {
            return Err(Wrong::Here);
        }
        let name = self.word.clone();
        if let Some(table) = Table::named(&name) {
            self.next();
            return Ok(Command::Table(table, Pick::default()));
        }
        if name == "transaction" {
            self.next();
            self.needs_word("isolation")?;
            self.needs_word("level")?;
            return Ok(Command::Parameter("transaction_isolation".to_owned()));
        }
        if !PARAMETERS.iter().any(|known| known.eq_ignore_ascii_case(&name)) {
            return Err(Wrong::Here);
        }
        self.next();
        Ok(Command::Parameter(name))
    }

    fn explain(&mut self) -> Result<Command, Wrong> {
        self.next();
        self.needs_word("route")?;
        let (mut database, mut user) = (None, None);
        if self.token == Token::Punctuation(b'(') && self.options_follow() {
            self.next();
            loop {
                if self.takes_word("database") {
                    database = Some(self.argument()?);
                } else if self.takes_word("user") {
                    user = Some(self.argument()?);
                } else {
                    return Err(Wrong::Here);
                }
                if self.takes(Token::Punctuation(b')')) {
                    break;
                }
                if !self.takes(Token::Punctuation(b',')) {
                    return Err(Wrong::Here);
                }
            }
        }
        if self.at_end() {
            return Err(Wrong::Here);
        }
        // With the comments in front of its first word: they may be hints.
        let begin = self.before_token();
        let mut end = begin;
        while !self.at_end() {
            if self.token == Token::Unclear {
                end = self.text.len();
                self.token = Token::End;
                break;
            }
            end = self.words.end();
            self.next();
        }
        // And those behind its last one.
        end = end.max(if self.token == Token::End { self.text.len() } else { self.words.start() });
        let sql = self.text.get(begin..end).unwrap_or_default().trim().to_owned();
        Ok(Command::ExplainRoute { database, user, sql })
    }

    /// Whether a parenthesis holds options, not a query.
    fn options_follow(&self) -> bool {
        let mut ahead = self.words.clone();
        ahead.next_token() == Token::Word && matches!(ahead.name(), b"database" | b"user")
    }

    /// Where the blanks and comments in front of the next token begin.
    fn before_token(&self) -> usize {
        let mut words = Words::new(self.text.as_bytes());
        let mut last = 0;
        loop {
            let token = words.next_token();
            if words.start() >= self.words.start() || matches!(token, Token::End | Token::Unclear) {
                return last;
            }
            last = words.end();
        }
    }

    fn pause(&mut self, pause: bool) -> Result<Command, Wrong> {
        self.next();
        if self.takes_word("failover") {
            return Ok(Command::Failover(if pause { Failover::Pause } else { Failover::Resume }));
        }
        let of = self.optional()?;
        Ok(if pause { Command::Pause(of) } else { Command::Resume(of) })
    }

    fn failover(&mut self, verb: &str) -> Result<Failover, Wrong> {
        self.next();
        Ok(match verb {
            "fence" => Failover::Fence(self.argument()?),
            "unfence" => Failover::Unfence(self.argument()?),
            "forget" => Failover::Forget(self.argument()?),
            "ack" => {
                self.needs_word("recovery")?;
                Failover::AckRecovery
            }
            "failover" => {
                let to = if self.takes_word("to") { Some(self.argument()?) } else { None };
                let allow_data_loss = self.takes_word("allow");
                if allow_data_loss {
                    self.needs_word("data")?;
                    self.needs_word("loss")?;
                }
                Failover::Failover { to, allow_data_loss }
            }
            _ => {
                let (mut to, mut dry_run, mut timeout) = (None, false, None);
                loop {
                    if to.is_none() && self.takes_word("to") {
                        to = Some(self.argument()?);
                    } else if !dry_run && self.takes_word("dry") {
                        self.needs_word("run")?;
                        dry_run = true;
                    } else if timeout.is_none() && self.takes_word("timeout") {
                        timeout = Some(self.time()?);
                    } else {
                        break;
                    }
                }
                Failover::Switchover { to, dry_run, timeout }
            }
        })
    }

    /// `10s` is no single token of PostgreSQL's, and `'10s'` is.
    fn time(&mut self) -> Result<Argument, Wrong> {
        if self.token != Token::Unclear {
            return self.argument();
        }
        let rest = self.text.get(self.words.start()..).unwrap_or_default();
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        let (text, after) = (&rest[..end], self.words.start() + end);
        if text.is_empty() {
            return Err(Wrong::Here);
        }
        // The reader goes on behind it, with the same places.
        let mut words = Words::new(self.text.as_bytes());
        words.skip_to(after);
        self.words = words;
        self.next();
        Ok(Argument::Text(text.to_owned()))
    }

    fn select(&mut self) -> Result<Command, Wrong> {
        self.next();
        if self.raw() == "*" {
            self.next();
            self.needs_word("from")?;
            return self.from(Vec::new());
        }
        let from_a_table = {
            let mut ahead = self.words.clone();
            loop {
                match ahead.next_token() {
                    Token::End | Token::Unclear | Token::Punctuation(b';') => break false,
                    Token::Word if ahead.name() == b"from" => break true,
                    _ => {}
                }
            }
        };
        if !from_a_table {
            return self.scalars();
        }
        let mut columns = Vec::new();
        loop {
            columns.push(self.wanted()?);
            if self.takes_word("from") {
                return self.from(columns);
            }
            if !self.takes(Token::Punctuation(b',')) {
                return Err(Wrong::Here);
            }
        }
    }

    fn wanted(&mut self) -> Result<Wanted, Wrong> {
        if !matches!(self.token, Token::Word | Token::Quoted) {
            return Err(Wrong::Here);
        }
        let (column, calls) = (self.word.clone(), self.is("now"));
        self.next();
        let what = if calls && self.takes(Token::Punctuation(b'(')) {
            if !self.takes(Token::Punctuation(b')')) {
                return Err(Wrong::Here);
            }
            Of::Now
        } else {
            Of::Column(column.clone())
        };
        Ok(Wanted { what, name: self.alias()?.unwrap_or(column) })
    }

    /// `AS name`.
    fn alias(&mut self) -> Result<Option<String>, Wrong> {
        if !self.takes_word("as") {
            return Ok(None);
        }
        if !matches!(self.token, Token::Word | Token::Quoted) {
            return Err(Wrong::Here);
        }
        let name = self.word.clone();
        self.next();
        Ok(Some(name))
    }

    fn from(&mut self, columns: Vec<Wanted>) -> Result<Command, Wrong> {
        if !matches!(self.token, Token::Word | Token::Quoted) {
            return Err(Wrong::Here);
        }
        let Some(table) = Table::named(&self.word) else {
            let names = Table::ALL.map(Table::name).join(", ");
            let report = ErrorReport::error("42P01", format!("relation \"{}\" does not exist", self.word))
                .hint(format!("The admin console has {names}."));
            return Err(Wrong::Unknown(report));
        };
        self.next();
        let mut limit = None;
        if self.takes_word("limit") {
            match self.argument()? {
                Argument::Text(number) => limit = Some(number.parse().map_err(|_| Wrong::Here)?),
                Argument::Parameter(_) => return Err(Wrong::Here),
            }
        }
        Ok(Command::Table(table, Pick { columns, limit }))
    }

    fn scalars(&mut self) -> Result<Command, Wrong> {
        let mut found = Vec::new();
        loop {
            let mut scalar = self.scalar()?;
            if let Some(name) = self.alias()? {
                scalar.name = name;
            }
            found.push(scalar);
            if !self.takes(Token::Punctuation(b',')) {
                return Ok(Command::Scalars(found));
            }
        }
    }

    fn scalar(&mut self) -> Result<Scalar, Wrong> {
        let unnamed = |what| Scalar { name: "?column?".to_owned(), what };
        match self.token {
            Token::Number => {
                let number = self.raw().parse().map_err(|_| Wrong::Here)?;
                self.next();
                return Ok(unnamed(Asked::Number(number)));
            }
            Token::Text(_) => {
                let text = self.string().ok_or(Wrong::Here)?;
                self.next();
                return Ok(unnamed(Asked::Text(text)));
            }
            Token::Word => {}
            _ => return Err(Wrong::Here),
        }
        if self.is("pg_catalog") {
            self.next();
            if !self.takes(Token::Punctuation(b'.')) {
                return Err(Wrong::Here);
            }
        }
        let name = self.word.clone();
        let what = match name.as_str() {
            "current_user" | "session_user" | "user" => Some(Asked::User),
            "current_catalog" => Some(Asked::Database),
            _ => None,
        };
        if let Some(what) = what {
            self.next();
            return Ok(Scalar { name, what });
        }
        let what = match name.as_str() {
            "version" => Asked::Version,
            "current_database" => Asked::Database,
            "pg_backend_pid" => Asked::Pid,
            "pg_is_in_recovery" => Asked::InRecovery,
            "now" => Asked::Now,
            "current_setting" => return self.setting(name),
            _ => return Err(Wrong::Here),
        };
        self.next();
        if !self.takes(Token::Punctuation(b'(')) || !self.takes(Token::Punctuation(b')')) {
            return Err(Wrong::Here);
        }
        Ok(Scalar { name, what })
    }

    fn setting(&mut self, name: String) -> Result<Scalar, Wrong> {
        self.next();
        if !self.takes(Token::Punctuation(b'(')) {
            return Err(Wrong::Here);
        }
        let setting = self.string().filter(|_| matches!(self.token, Token::Text(_))).ok_or(Wrong::Here)?;
        let known = PARAMETERS.iter().any(|known| known.eq_ignore_ascii_case(&setting));
        if !known {
            let words = format!("unrecognized configuration parameter \"{setting}\"");
            return Err(Wrong::Unknown(ErrorReport::error("42704", words)));
        }
        self.next();
        if !self.takes(Token::Punctuation(b')')) {
            return Err(Wrong::Here);
        }
        let mut divisor = None;
        // `::` is read as `T`.
        if self.takes(Token::Punctuation(b'T')) {
            if !matches!(self.word.as_str(), "int" | "integer" | "int4" | "int8" | "bigint") {
                return Err(Wrong::Here);
            }
            self.next();
            divisor = Some(1);
            if self.token == Token::Operator && self.raw() == "/" {
                self.next();
                divisor = Some(self.raw().parse().ok().filter(|n| *n > 0).ok_or(Wrong::Here)?);
                self.next();
            }
        }
        Ok(Scalar { name, what: Asked::Setting(setting, divisor) })
    }

    fn refuse(&self, what: Wrong, begin: usize) -> Box<Refused> {
        let at = self.words.start().min(self.text.len());
        let position = self.text.get(..at).map_or(1, |before| before.chars().count() + 1);
        let report = match what {
            Wrong::Unknown(report) => report,
            Wrong::Here => {
                let words = match self.token {
                    Token::End => "syntax error at end of input".to_owned(),
                    Token::Unclear => "syntax error: this is not understood".to_owned(),
                    _ => format!("syntax error at or near \"{}\"", self.raw()),
                };
                let given = self.text.get(begin..).unwrap_or_default();
                ErrorReport::error("42601", words).hint(hint(given))
            }
        };
        Box::new(Refused { report, position })
    }
}

/// What to do about a command that is not understood.
fn hint(given: &str) -> String {
    let words: Vec<String> =
        given.split_whitespace().take(2).map(|w| w.trim_end_matches(';').to_ascii_lowercase()).collect();
    if let [show, table] = &words[..]
        && show == "show"
    {
        let tables = Table::ALL.map(Table::name);
        let known = tables.into_iter().find(|known| known == table);
        return match known.or_else(|| nearest(table, tables)) {
            Some(table) => format!("Perhaps SHOW {}. HELP lists all commands.", table.to_uppercase()),
            None => format!("There are {}. HELP lists all commands.", tables.join(", ").to_uppercase()),
        };
    }
    let given = words.join(" ");
    let near = |form: &str| {
        let form: Vec<&str> = form.split_whitespace().take(words.len().max(1)).collect();
        distance(&given, &form.join(" ").to_ascii_lowercase())
    };
    match HELP.iter().map(|(form, _)| (near(form), *form)).min_by_key(|(far, _)| *far) {
        // More than half of it wrong is no slip.
        Some((far, form)) if far * 2 <= given.len() => {
            format!("Perhaps {form}. HELP lists all commands.")
        }
        _ => "This is Highwater's admin console, not a database. HELP lists all commands.".to_owned(),
    }
}

/// Settings of a server that drivers ask for.
pub const PARAMETERS: [&str; 16] = [
    "server_version",
    "server_version_num",
    "server_encoding",
    "client_encoding",
    "application_name",
    "is_superuser",
    "session_authorization",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "integer_datetimes",
    "standard_conforming_strings",
    "transaction_isolation",
    "default_transaction_isolation",
    "transaction_read_only",
    "in_hot_standby",
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(text: &str) -> Command {
        let mut all = parse(text).unwrap_or_else(|refused| panic!("{text}: {refused:?}"));
        assert_eq!(all.len(), 1, "{text}");
        all.remove(0)
    }

    fn text(text: &str) -> Argument {
        Argument::Text(text.to_owned())
    }

    fn column(column: &str, name: &str) -> Wanted {
        Wanted { what: Of::Column(column.to_owned()), name: name.to_owned() }
    }

    #[test]
    fn commands_are_read_in_any_case_with_comments() {
        let all = |table| Command::Table(table, Pick::default());
        assert_eq!(one("show NODES;"), all(Table::Nodes));
        assert_eq!(one("  /* x */ Show -- y\n lag ; "), all(Table::Lag));
        assert_eq!(one("HELP"), all(Table::Help));
        assert_eq!(one("SELECT * FROM \"sessions\""), all(Table::Sessions));
        let pick = Pick { columns: vec![column("pid", "pid"), column("node", "node")], limit: Some(5) };
        assert_eq!(one("select pid, NODE from sessions limit 5;"), Command::Table(Table::Sessions, pick));
        let time = Wanted { what: Of::Now, name: "time".to_owned() };
        let pick = Pick { columns: vec![time, column("lag_seconds", "Value")], limit: None };
        let drawn = "SELECT now() AS \"time\", lag_seconds AS \"Value\" FROM lag";
        assert_eq!(one(drawn), Command::Table(Table::Lag, pick));
        for wrong in ["select now( from lag", "select pid() from sessions", "select pid as 5 from sessions"] {
            assert_eq!(parse(wrong).unwrap_err().report.sqlstate, "42601", "{wrong}");
        }
        assert_eq!(one("PAUSE"), Command::Pause(None));
        assert_eq!(one("pause \"My DB\""), Command::Pause(Some(text("My DB"))));
        assert_eq!(one("RESUME 'it''s'"), Command::Resume(Some(text("it's"))));
        assert_eq!(one("DRAIN n-1".replace("n-1", "\"n-1\"").as_str()), Command::Drain(text("n-1")));
        assert_eq!(one("kill 1073741824"), Command::Kill(text("1073741824")));
        assert_eq!(one("CANCEL $1"), Command::Cancel(Argument::Parameter(1)));
        assert_eq!(parse(" ; -- nothing\n;").unwrap(), []);
        assert_eq!(parse("begin; show lag;commit").unwrap().len(), 3);
        assert_eq!(one("SET extra_float_digits = 3"), Command::Nothing("SET"));
        assert_eq!(one("set client_encoding to 'UTF8'"), Command::Nothing("SET"));
        assert_eq!(one("SHOW server_version"), Command::Parameter("server_version".to_owned()));
    }

    #[test]
    fn failover_commands_are_read() {
        let failover = |text: &str| match one(text) {
            Command::Failover(failover) => failover,
            other => panic!("{text}: {other:?}"),
        };
        let plain = Failover::Switchover { to: None, dry_run: false, timeout: None };
        assert_eq!(failover("SWITCHOVER"), plain);
        for form in ["switchover to b dry run timeout 10s;", "SWITCHOVER TIMEOUT '10s' TO b DRY RUN"] {
            let to = Some(text("b"));
            assert_eq!(
                failover(form),
                Failover::Switchover { to, dry_run: true, timeout: Some(text("10s")) }
            );
        }
        assert_eq!(
            failover("FAILOVER TO $1 ALLOW DATA LOSS"),
            Failover::Failover { to: Some(Argument::Parameter(1)), allow_data_loss: true }
        );
        assert_eq!(failover("pause failover"), Failover::Pause);
        assert_eq!(failover("RESUME FAILOVER"), Failover::Resume);
        assert_eq!(failover("ack recovery"), Failover::AckRecovery);
        assert_eq!(failover("UNFENCE a"), Failover::Unfence(text("a")));
        assert_eq!(failover("forget a"), Failover::Forget(text("a")));
    }

    #[test]
    fn a_statement_to_explain_keeps_its_comments() {
        let explain = |text: &str| match one(text) {
            Command::ExplainRoute { database, user, sql } => (database, user, sql),
            other => panic!("{text}: {other:?}"),
        };
        let hinted = "/* highwater.route=primary */ select 1 /* highwater.consistency=strong */";
        assert_eq!(explain(&format!("EXPLAIN ROUTE {hinted};")), (None, None, hinted.to_owned()));
        assert_eq!(explain(&format!("EXPLAIN ROUTE {hinted}")), (None, None, hinted.to_owned()));
        assert_eq!(
            explain("explain route (database app, user 'u') (select ';')"),
            (Some(text("app")), Some(text("u")), "(select ';')".to_owned())
        );
        assert_eq!(explain("explain route (select 1)").2, "(select 1)");
        assert_eq!(explain("explain route select 'not closed").2, "select 'not closed");
        assert_eq!(parse("explain route select 1; show lag").unwrap().len(), 2);
    }

    #[test]
    fn what_drivers_ask_is_answered() {
        let asked = |text: &str| match one(text) {
            Command::Scalars(scalars) => scalars.into_iter().map(|s| s.what).collect::<Vec<_>>(),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(asked("SELECT 1"), [Asked::Number(1)]);
        assert_eq!(
            asked("select pg_catalog.version(), 'x' as y"),
            [Asked::Version, Asked::Text("x".to_owned())]
        );
        let version = Asked::Setting("server_version_num".to_owned(), Some(100));
        assert_eq!(asked("SELECT current_setting('server_version_num')::int/100 as version"), [version]);
        assert_eq!(asked("select current_user, pg_backend_pid()"), [Asked::User, Asked::Pid]);
    }

    #[test]
    fn mistakes_have_a_place_and_a_hint() {
        let check = |given: &str, position: usize, message: &str, hint: &str| {
            let refused = parse(given).expect_err(given);
            assert_eq!(
                (refused.report.sqlstate, refused.position),
                ("42601", position),
                "{given}: {refused:?}"
            );
            assert!(refused.report.message.contains(message), "{given}: {refused:?}");
            assert!(
                refused.report.hint.as_deref().unwrap_or_default().contains(hint),
                "{given}: {refused:?}"
            );
        };
        check("SHOW NODE", 6, "at or near \"NODE\"", "Perhaps SHOW NODES");
        check("show lag extra", 10, "\"extra\"", "Perhaps SHOW LAG");
        check("shwo sessions", 1, "\"shwo\"", "Perhaps SHOW SESSIONS");
        check("DRAIN", 6, "end of input", "Perhaps DRAIN node");
        check("show lag; INSERT INTO t VALUES (1)", 11, "\"INSERT\"", "not a database");
        check("é; x", 1, "\"é\"", "HELP");
        check("kill $0", 6, "\"$0\"", "Perhaps KILL pid");
        check("EXPLAIN ROUTE", 14, "end of input", "Perhaps EXPLAIN ROUTE");
        let unknown = parse("select * from pg_class").unwrap_err();
        assert_eq!((unknown.report.sqlstate, unknown.position), ("42P01", 15));
        assert_eq!(parse("set client_encoding = 'LATIN1'").unwrap_err().report.sqlstate, "0A000");
    }

    #[test]
    fn parameters_stand_for_arguments() {
        let kill = one("KILL $2");
        assert_eq!((kill.parameters(), kill.takes_numbers()), (2, true));
        assert_eq!(kill.clone().with(&[None, Some("7".to_owned())]), Ok(Command::Kill(text("7"))));
        assert_eq!(kill.with(&[Some("7".to_owned()), None]).unwrap_err().sqlstate, "22004");
        assert_eq!(one("SHOW LAG").parameters(), 0);
    }

    #[test]
    fn every_form_of_the_help_is_understood() {
        for (form, _) in HELP {
            // What stands in brackets may be left out, or said.
            let plain: String =
                form.split('[').map(|part| part.split_once(']').map_or(part, |(_, rest)| rest)).collect();
            for text in [plain, form.replace(['[', ']'], "").replace("TIMEOUT time", "TIMEOUT 10s")] {
                assert_eq!(parse(&text).map(|all| all.len()), Ok(1), "{text}");
            }
        }
    }

    /// What is shown to be typed, or said between backquotes in capitals, is a command; and each command is on the page.
    #[test]
    fn the_page_and_the_help_know_the_same_commands() {
        let page = include_str!("../../docs/CONSOLE.md");
        let typed: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("highwater=> ")).collect();
        assert!(typed.len() > 10, "{typed:?}");
        for command in typed {
            // One is there to show what a mistake looks like.
            assert_eq!(parse(command).is_ok(), command != "SHOW NODE;", "{command}");
        }
        let mut said = 0;
        for code in page.split('`').skip(1).step_by(2) {
            let verb = code.split(' ').next().unwrap_or_default();
            let is_command = HELP.iter().any(|(form, _)| form.split(' ').next() == Some(verb));
            if is_command && code.contains(' ') && !code.contains('\n') && code != "EXPLAIN ROUTE" {
                said += 1;
                assert!(parse(code).is_ok(), "{code}");
            }
        }
        assert!(said > 10, "{said}");
        for (form, meaning) in HELP {
            let row = format!(" {form:<47} | {meaning}");
            assert!(page.lines().any(|line| line.trim_end() == row), "the page lacks {row}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[ -~\\n\u{e9}$]{0,80}") {
            let _ = parse(&text);
            for (form, _) in HELP {
                let _ = parse(&format!("{form} {text}"));
                let _ = parse(&format!("{text} {form}"));
            }
        }
    }
}
