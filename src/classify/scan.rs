//! The token scan: one pass over a statement's text that finds its kind, whatever makes it not a read, what
//! it leaves behind, and its *skeleton*, a keyed hash in which literals that cannot change the verdict are
//! folded. Pure; no allocation, no recursion, time linear in the text.
//!
//! The scan calls a text a read only when every word is accounted for: each name before a parenthesis is
//! a clause of the grammar, a safe built-in function or an alias; no name and no operator is one that the
//! catalog calls unsafe. It does not check the grammar: that is left to the second opinion.

use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher13};

use super::builtin::{Keyword, Special, Vocabulary, Word};
use super::catalog::{Catalog, Flags};
use super::hint::Hints;
use super::lexer::{Lexer, TextKind, Token};
use super::{ClassReason, Kind, Leaves, PinReason, StatementClass, body};
use crate::consistency::Route;

/// Parentheses that a read candidate may nest: the second parser recurses, and some of its attempts double
/// with each level.
const MAX_DEPTH: u32 = 40;

/// Prefix operators, NOTs, open CASEs and joins without a condition that a read candidate may pile up.
const MAX_PILE: u32 = 32;

/// What the scan found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// The class; for a candidate the class it has if the second opinion agrees.
    pub class: StatementClass,
    /// The hash of the text with its harmless literals folded.
    pub skeleton: u128,
    /// What it says rests on a value in the text, too.
    pub by_value: bool,
}

/// Scans a text. `prefix` is a hasher that has been fed whatever else the skeleton depends on;
/// `ascii_names`: names with other characters cannot be compared (client and server encodings differ).
pub fn scan(
    text: &[u8],
    prefix: SipHasher13,
    vocabulary: &Vocabulary,
    catalog: &Catalog,
    ascii_names: bool,
) -> Scanned {
    Scan {
        lexer: Lexer::new(text),
        hash: prefix,
        vocabulary,
        catalog,
        ascii_names,
        statement: Current::default(),
        total: None,
        hints: Hints::default(),
        by_value: false,
    }
    .run()
}

/// The token before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Previous {
    #[default]
    Start,
    Keyword(Keyword),
    Name,
    /// A name behind FROM or JOIN.
    Relation,
    Open,
    Close,
    Comma,
    Dot,
    /// `::`
    Cast,
    Operator,
    Other,
}

/// A name whose role shows at the next token.
#[derive(Clone, Copy, Debug)]
struct Pending {
    word: Word,
    quoted: bool,
    flags: Flags,
    dotted: bool,
    alias: bool,
    /// It is a type's, or its schema's, behind `::` or AS (or an alias there): neither a call nor a column, whatever else bears it.
    is_type: bool,
    after_into: bool,
    is_operator_word: bool,
    pg_prefix: bool,
}

/// current_setting's argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CurrentSetting {
    No,
    Name,
    End,
}

/// What the leading words say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lead {
    /// SELECT, WITH, VALUES, TABLE.
    Query,
    /// EXPLAIN, until its statement begins.
    Explain,
    Copy,
    Create,
    /// Other data definition.
    Define,
    /// INSERT, UPDATE, LOCK, VACUUM...
    Change,
    /// CALL, DO.
    Opaque,
    Transaction,
    Commit,
    Set,
    Reset,
    Prepare,
    Execute,
    Deallocate,
    Discard,
    Declare,
    Listen,
    Load,
    /// SHOW, FETCH, MOVE, CLOSE, UNLISTEN.
    SessionOther,
    Unknown,
}

/// The statement that is being read.
#[derive(Debug)]
struct Current {
    lead: Option<Lead>,
    explained: bool,
    keep_literals: bool,
    words_after_lead: u32,
    depth: u32,
    kind: Kind,
    reason: ClassReason,
    leaves: Leaves,
    pending: Option<Pending>,
    previous: Previous,
    /// The name before the last dot is that of a type's schema.
    of_type: bool,
    /// The number of the schema that the name before the last dot is, or 0: see [`Flags::schema`].
    schema: u16,
    with_active: u64,
    /// A `(` here would belong to a WITH list: it follows a part's name, AS or NOT MATERIALIZED.
    opens_with_part: bool,
    close_may_precede_call: bool,
    /// It may change settings: see `setting`.
    settings: bool,
    current_setting: CurrentSetting,
    /// SET TRANSACTION, SET CONSTRAINTS: nothing outlives the transaction.
    set_is_transactions: bool,
    copy_to: bool,
    copy_stdout: bool,
    /// INSERT, UPDATE, DELETE, MERGE, TRUNCATE.
    modifies: bool,
    /// It names a relation of which a change may fire a trigger that changes settings.
    fires: bool,
    /// It names one of which a change may run code that leaves other session state.
    leaving: bool,
    into_table: bool,
    pile: u32,
    cases: u32,
    joins: u32,
    too_deep: bool,
    tokens: u32,
}

impl Default for Current {
    fn default() -> Current {
        Current {
            lead: None,
            explained: false,
            keep_literals: false,
            words_after_lead: 0,
            depth: 0,
            kind: Kind::Read,
            reason: ClassReason::Read,
            leaves: Leaves::NOTHING,
            pending: None,
            previous: Previous::Start,
            of_type: false,
            schema: 0,
            with_active: 0,
            opens_with_part: false,
            close_may_precede_call: false,
            settings: false,
            current_setting: CurrentSetting::No,
            set_is_transactions: false,
            copy_to: false,
            copy_stdout: false,
            modifies: false,
            fires: false,
            leaving: false,
            into_table: false,
            pile: 0,
            cases: 0,
            joins: 0,
            too_deep: false,
            tokens: 0,
        }
    }
}

impl Current {
    fn leave(&mut self, leaves: Leaves) {
        self.leaves |= leaves;
    }

    /// Not a read, for this reason; the first one found is kept.
    fn refuse(&mut self, kind: Kind, reason: ClassReason) {
        if self.kind == Kind::Read {
            self.kind = kind;
            self.reason = reason;
        } else if self.kind == Kind::Write && kind == Kind::Ddl {
            self.kind = kind;
        }
    }
}

struct Scan<'a> {
    lexer: Lexer<'a>,
    hash: SipHasher13,
    vocabulary: &'a Vocabulary,
    catalog: &'a Catalog,
    ascii_names: bool,
    statement: Current,
    total: Option<StatementClass>,
    hints: Hints,
    by_value: bool,
}

impl Scan<'_> {
    fn run(mut self) -> Scanned {
        loop {
            let token = self.lexer.next_token();
            if let Some(hint) = self.lexer.hint() {
                feed(&mut self.hash, b'h', hint);
                self.hints = self.hints.and(hint);
            }
            match token {
                Token::End => {
                    self.end_statement();
                    break;
                }
                Token::Unclear => {
                    // What follows cannot be told from a string: nothing of it is known.
                    self.statement.tokens += 1;
                    if self.statement.kind != Kind::Ddl {
                        self.statement.kind = Kind::Write;
                    }
                    self.statement.reason = ClassReason::Unclear;
                    self.statement.leave(Leaves::UNPROVEN);
                    self.statement.settings = true;
                    self.statement.lead = Some(Lead::Unknown);
                    self.end_statement();
                    break;
                }
                Token::Punctuation(b';') if self.statement.depth == 0 => {
                    self.hash.write(b";");
                    self.end_statement();
                }
                _ => self.token(token),
            }
        }
        let class = self.total.unwrap_or(StatementClass {
            kind: Kind::Empty,
            reason: ClassReason::Empty,
            leaves: Leaves::NOTHING,
            settings: false,
            hints: Hints::default(),
        });
        let class = StatementClass { hints: self.hints, ..class };
        Scanned { class, skeleton: self.hash.finish128().into(), by_value: self.by_value }
    }

    fn token(&mut self, token: Token) {
        self.statement.tokens = self.statement.tokens.saturating_add(1);
        let called = token == Token::Punctuation(b'(');
        self.statement.opens_with_part =
            matches!(self.statement.previous, Previous::Keyword(Keyword::As | Keyword::Materialized))
                || self.statement.pending.is_some_and(|pending| pending.alias && !pending.dotted);
        if let Some(pending) = self.statement.pending.take() {
            let dot = token == Token::Punctuation(b'.');
            self.statement.of_type = pending.is_type && dot;
            // `a.s.f` is of the database a, and that is an error if a is another.
            self.statement.schema = if dot && !pending.dotted { pending.flags.schema } else { 0 };
            self.resolve(pending, called);
        } else if token == Token::Punctuation(b'.') {
            self.statement.schema = 0;
        }
        self.argument(token);
        let previous = match token {
            Token::Word | Token::Quoted => self.name(token == Token::Quoted),
            Token::Text(kind) => {
                self.literal(kind);
                Previous::Other
            }
            Token::Number => {
                if self.statement.keep_literals {
                    feed(&mut self.hash, b'N', self.lexer.raw());
                } else {
                    self.hash.write(b"n");
                }
                Previous::Other
            }
            Token::Parameter => {
                self.hash.write(b"p");
                Previous::Other
            }
            Token::Operator => {
                self.operator();
                Previous::Operator
            }
            Token::Punctuation(byte) => self.punctuation(byte),
            Token::End | Token::Unclear => Previous::Other,
        };
        self.pile(token, previous);
        self.statement.previous = previous;
        if self.statement.lead.is_none() && !matches!(previous, Previous::Open | Previous::Keyword(_)) {
            self.lead(None);
        }
    }

    /// Counts what makes a recursive parser deep.
    fn pile(&mut self, token: Token, previous: Previous) {
        let statement = &mut self.statement;
        match previous {
            Previous::Operator | Previous::Keyword(Keyword::Not) => statement.pile += 1,
            _ if token == Token::Punctuation(b'[') => statement.pile += 1,
            _ => statement.pile = 0,
        }
        match previous {
            Previous::Keyword(Keyword::Case) => statement.cases += 1,
            Previous::Keyword(Keyword::End) => statement.cases = statement.cases.saturating_sub(1),
            Previous::Keyword(Keyword::Join) => statement.joins += 1,
            Previous::Keyword(Keyword::On | Keyword::Using) => {
                statement.joins = statement.joins.saturating_sub(1)
            }
            _ => {}
        }
        statement.too_deep |= statement.depth > MAX_DEPTH
            || statement.pile > MAX_PILE
            || statement.cases > MAX_PILE
            || statement.joins > MAX_PILE;
    }

    fn name(&mut self, quoted: bool) -> Previous {
        let name = self.lexer.name();
        feed(&mut self.hash, if quoted { b'q' } else { b'w' }, name);
        let word = self.vocabulary.get(name).copied().unwrap_or_default();
        let mut flags = self.catalog.name(name);
        let dotted = self.statement.previous == Previous::Dot;
        // `s.f(..)` finds no function of another schema, whatever the search path.
        if dotted && flags.called && self.catalog.is_harmless_within(self.statement.schema, name) {
            (flags.called, flags.proven) = (false, true);
        }
        let unclear = self.ascii_names && !name.is_ascii();
        let pg_prefix = name.starts_with(b"pg_");
        let shows_statements = pg_prefix && name == b"pg_prepared_statements";
        // A rule of it calls set_config.
        let is_settings = pg_prefix && name == b"pg_settings";
        let temporary_schema = pg_prefix && (name == b"pg_temp" || name.starts_with(b"pg_temp_"));
        let is_operator_word = !quoted && name == b"operator";
        let of_from = !quoted && matches!(name, b"only" | b"lateral" | b"rows");
        let keyword = if quoted || dotted { None } else { word.keyword };
        if self.statement.lead.is_none() {
            self.lead(keyword);
        } else {
            self.statement.words_after_lead = self.statement.words_after_lead.saturating_add(1);
            if self.statement.lead == Some(Lead::Explain) && keyword.is_some_and(starts_statement) {
                let in_options = self.statement.depth > 0;
                if !in_options {
                    self.statement.explained = true;
                    self.lead(keyword);
                }
            } else if let Some(keyword) = keyword {
                self.keyword(keyword);
            }
        }
        let statement = &mut self.statement;
        if unclear {
            statement.refuse(Kind::Write, ClassReason::Unclear);
            statement.leave(Leaves::UNPROVEN);
        }
        if temporary_schema
            && (statement.into_table || matches!(statement.lead, Some(Lead::Create | Lead::Define)))
        {
            statement.leave(Leaves::pin(PinReason::TemporaryTable));
        }
        statement.fires |= flags.fires || is_settings;
        statement.leaving |= flags.leaves;
        if shows_statements {
            statement.leave(Leaves::SHOWS_STATEMENTS);
        }
        if flags.code || flags.elsewhere {
            statement.refuse(Kind::Write, ClassReason::UnsafeName);
            if flags.code {
                statement.leave(Leaves::UNPROVEN);
            }
        }
        if matches!(statement.lead, Some(Lead::Deallocate | Lead::Discard | Lead::Reset))
            && statement.words_after_lead > 0
            && keyword.is_none()
        {
            self.session_word(None);
        }
        let statement = &mut self.statement;
        let in_with_list = statement.depth < 64 && statement.with_active & (1 << statement.depth) != 0;
        let alias = match statement.previous {
            Previous::Keyword(Keyword::As) => true,
            Previous::Keyword(Keyword::With | Keyword::Recursive) | Previous::Comma => {
                in_with_list && !dotted
            }
            Previous::Close => !statement.close_may_precede_call,
            // `FROM t a (x, y)`: nothing else can stand there.
            Previous::Relation => true,
            _ => false,
        };
        let is_type = match statement.previous {
            // `AS name(` is no call either: a type in CAST, or an alias with its columns.
            Previous::Cast | Previous::Keyword(Keyword::As) => true,
            Previous::Dot => statement.of_type,
            _ => false,
        };
        statement.pending = Some(Pending {
            word,
            quoted,
            flags,
            dotted,
            alias,
            is_type,
            after_into: statement.previous == Previous::Keyword(Keyword::Into)
                || (dotted && statement.lead == Some(Lead::Change) && statement.words_after_lead <= 3),
            is_operator_word,
            pg_prefix,
        });
        match (keyword, statement.previous) {
            (Some(keyword), _) => Previous::Keyword(keyword),
            (None, Previous::Keyword(Keyword::From | Keyword::Join)) if !of_from => Previous::Relation,
            (None, _) => Previous::Name,
        }
    }

    /// A name's role, now that the next token is known.
    fn resolve(&mut self, pending: Pending, called: bool) {
        let word = pending.word;
        let statement = &mut self.statement;
        let known = word.safe_name || word.safe_function || word.special.is_some();
        if pending.pg_prefix && !known {
            statement.refuse(Kind::Write, ClassReason::UnsafeName);
        }
        if pending.is_type {
            return;
        }
        if !called {
            if pending.dotted && pending.flags.attribute {
                statement.refuse(Kind::Write, ClassReason::UnsafeName);
                statement.leave(Leaves::UNPROVEN);
            }
            return;
        }
        if pending.flags.called {
            statement.refuse(Kind::Write, ClassReason::UnsafeName);
            if pending.flags.defines && !pending.after_into {
                statement.refuse(Kind::Ddl, ClassReason::UnsafeName);
            }
            if pending.flags.sets && !pending.after_into {
                statement.leave(Leaves::pin(PinReason::Setting));
            }
            if !pending.after_into {
                statement.leave(Leaves::UNPROVEN);
            }
            if let Some(Special::Pins(reason)) = word.special {
                statement.leave(Leaves::pin(reason));
            }
            return;
        }
        if pending.is_operator_word {
            statement.close_may_precede_call = true;
            return;
        }
        match word.special {
            Some(Special::SetConfig) => {
                statement.refuse(Kind::Write, ClassReason::UnsafeFunction);
                statement.settings = true;
            }
            Some(Special::CurrentSetting) => statement.current_setting = CurrentSetting::Name,
            Some(Special::Pins(reason)) => {
                statement.refuse(Kind::Write, ClassReason::UnsafeFunction);
                statement.leave(Leaves::pin(reason));
            }
            Some(Special::LeavesNothing) => statement.refuse(Kind::Write, ClassReason::UnsafeFunction),
            None => {
                let accounted = (statement.lead == Some(Lead::Copy) && statement.depth == 0)
                    || word.safe_function
                    || pending.flags.proven
                    || pending.alias
                    || (word.before_paren && !pending.quoted && !pending.dotted);
                if !accounted {
                    statement.refuse(Kind::Write, ClassReason::UnsafeFunction);
                    let a_tables_columns = pending.after_into
                        || matches!(statement.lead, Some(Lead::Create | Lead::Define | Lead::Copy));
                    if !a_tables_columns {
                        statement.leave(Leaves::UNPROVEN);
                    }
                }
            }
        }
    }

    /// Follows the argument of current_setting; called before the token takes effect.
    fn argument(&mut self, token: Token) {
        let statement = &mut self.statement;
        self.by_value |= statement.current_setting != CurrentSetting::No;
        match (statement.current_setting, token) {
            (CurrentSetting::No, _) => {}
            (CurrentSetting::Name, Token::Punctuation(b'(')) => {}
            (CurrentSetting::Name, Token::Text(TextKind::Plain)) if is_own_setting(self.lexer.raw()) => {
                feed(&mut self.hash, b'S', self.lexer.raw());
                statement.current_setting = CurrentSetting::End;
            }
            (CurrentSetting::End, Token::Punctuation(b')' | b',')) => {
                statement.current_setting = CurrentSetting::No
            }
            _ => {
                statement.current_setting = CurrentSetting::No;
                statement.refuse(Kind::Write, ClassReason::UnsafeFunction);
            }
        }
    }

    fn punctuation(&mut self, byte: u8) -> Previous {
        self.hash.write(&[byte]);
        match byte {
            b'(' => {
                match self.statement.previous {
                    Previous::Keyword(Keyword::In) => self.fold_list(),
                    Previous::Keyword(Keyword::Values) => self.fold_rows(),
                    _ => {}
                }
                // Any other parenthesis begins the query itself: `WITH a AS (..) (SELECT ..) ORDER BY 1, f()`.
                if !self.statement.opens_with_part && self.statement.depth < 64 {
                    self.statement.with_active &= !(1 << self.statement.depth);
                }
                self.statement.depth += 1;
                Previous::Open
            }
            b')' => {
                if self.statement.depth == 0 {
                    self.statement.refuse(Kind::Write, ClassReason::Unclear);
                }
                if self.statement.depth < 64 {
                    self.statement.with_active &= !(1 << self.statement.depth);
                }
                self.statement.depth = self.statement.depth.saturating_sub(1);
                Previous::Close
            }
            b',' => Previous::Comma,
            b'.' => Previous::Dot,
            b'T' => Previous::Cast,
            _ => Previous::Other,
        }
    }

    /// After `IN (`: a list of nothing but literals and parameters is one skeleton, however long.
    fn fold_list(&mut self) {
        if self.statement.keep_literals {
            return;
        }
        if let Some((lexer, kinds, _)) = literals(&self.lexer) {
            self.hash.write(&[b'L', kinds]);
            self.lexer = lexer;
        }
    }

    /// After `VALUES (`: rows of nothing but literals and parameters, all of one width.
    fn fold_rows(&mut self) {
        if self.statement.keep_literals {
            return;
        }
        let Some((mut end, mut kinds, width)) = literals(&self.lexer) else { return };
        loop {
            let mut ahead = end.clone();
            let another = ahead.next_token() == Token::Punctuation(b')')
                && ahead.next_token() == Token::Punctuation(b',')
                && ahead.next_token() == Token::Punctuation(b'(');
            if !another {
                break;
            }
            match literals(&ahead) {
                Some((next, more, same)) if same == width => {
                    end = next;
                    kinds |= more;
                }
                _ => break,
            }
        }
        self.hash.write(&[b'R', kinds]);
        self.hash.write_u32(width);
        self.lexer = end;
    }

    fn literal(&mut self, kind: TextKind) {
        let raw = self.lexer.raw();
        if self.statement.lead == Some(Lead::Opaque) {
            if body_may_set(raw, self.catalog) {
                self.statement.leave(Leaves::pin(PinReason::Setting));
            }
            if body::defines(raw, |name| self.catalog.name(name).defines) {
                self.statement.refuse(Kind::Ddl, ClassReason::Command);
            }
        }
        let tag = match kind {
            TextKind::Plain | TextKind::Escaped | TextKind::Dollar => b's',
            TextKind::Unicode => b'u',
            TextKind::Bits => b'b',
        };
        let keep = self.statement.keep_literals || kind == TextKind::Unicode || names_the_clock(raw)
            // The escape character of a U& string or name decides what it says.
            || self.statement.previous == Previous::Keyword(Keyword::Uescape);
        if keep {
            feed(&mut self.hash, tag.to_ascii_uppercase(), raw);
        } else {
            self.hash.write(&[tag]);
        }
    }

    fn operator(&mut self) {
        let token = match self.lexer.raw() {
            b"!=" => b"<>",
            token => token,
        };
        feed(&mut self.hash, b'o', token);
        if self.catalog.is_loaded() && self.catalog.operator_is_unsafe(token) {
            self.statement.refuse(Kind::Write, ClassReason::UnsafeName);
            self.statement.leave(Leaves::UNPROVEN);
        }
    }

    /// The leading word of a statement.
    fn lead(&mut self, keyword: Option<Keyword>) {
        use Keyword as K;
        let statement = &mut self.statement;
        let in_parentheses = statement.depth > 0;
        let lead = match keyword {
            Some(K::Select | K::Values | K::Table) => Lead::Query,
            Some(K::With) => {
                if statement.depth < 64 {
                    statement.with_active |= 1 << statement.depth;
                }
                Lead::Query
            }
            _ if in_parentheses => Lead::Unknown,
            Some(K::Explain) if !statement.explained => Lead::Explain,
            Some(K::Copy) => Lead::Copy,
            Some(K::Create | K::Import) => Lead::Create,
            Some(K::Alter | K::Drop | K::Grant | K::Revoke | K::Comment | K::Security | K::Reassign) => {
                Lead::Define
            }
            Some(
                K::Insert
                | K::Update
                | K::Delete
                | K::Merge
                | K::Truncate
                | K::Lock
                | K::Vacuum
                | K::Analyze
                | K::Cluster
                | K::Checkpoint
                | K::Reindex
                | K::Refresh
                | K::Notify,
            ) => Lead::Change,
            Some(K::Call | K::Do) => Lead::Opaque,
            Some(K::Begin | K::Start | K::Abort | K::Savepoint | K::Release | K::End) => Lead::Transaction,
            Some(K::Commit | K::Rollback) => Lead::Commit,
            Some(K::Set) => Lead::Set,
            Some(K::Reset) => Lead::Reset,
            Some(K::Prepare) => Lead::Prepare,
            Some(K::Execute) => Lead::Execute,
            Some(K::Deallocate) => Lead::Deallocate,
            Some(K::Discard) => Lead::Discard,
            Some(K::Declare) => Lead::Declare,
            Some(K::Listen) => Lead::Listen,
            Some(K::Load) => Lead::Load,
            Some(K::Show | K::Fetch | K::Move | K::Close | K::Unlisten) => Lead::SessionOther,
            _ => Lead::Unknown,
        };
        statement.lead = Some(lead);
        statement.modifies |=
            matches!(keyword, Some(K::Insert | K::Update | K::Delete | K::Merge | K::Truncate));
        statement.words_after_lead = 0;
        statement.keep_literals = lead != Lead::Query || statement.explained;
        let (kind, reason, leaves) = match lead {
            Lead::Query | Lead::Explain | Lead::Copy => return,
            Lead::Create | Lead::Define => (Kind::Ddl, ClassReason::Command, Leaves::NOTHING),
            Lead::Change => (Kind::Write, ClassReason::Command, Leaves::NOTHING),
            Lead::Opaque => (Kind::Write, ClassReason::Command, Leaves::UNPROVEN),
            Lead::Transaction | Lead::Commit => {
                (Kind::TransactionControl, ClassReason::Session, Leaves::NOTHING)
            }
            // What SET sets, and what PREPARE is followed by, shows at the next word.
            Lead::Set
            | Lead::Reset
            | Lead::Deallocate
            | Lead::Discard
            | Lead::Declare
            | Lead::SessionOther => (Kind::Session, ClassReason::Session, Leaves::NOTHING),
            Lead::Prepare | Lead::Execute => {
                (Kind::Session, ClassReason::Session, Leaves::pin(PinReason::SqlPrepare))
            }
            Lead::Listen => (Kind::Session, ClassReason::Session, Leaves::pin(PinReason::Listen)),
            Lead::Load => (Kind::Session, ClassReason::Session, Leaves::pin(PinReason::Process)),
            Lead::Unknown => (Kind::Write, ClassReason::Unclear, Leaves::UNPROVEN),
        };
        statement.refuse(kind, reason);
        statement.leave(leaves);
    }

    /// A keyword behind the leading one.
    fn keyword(&mut self, keyword: Keyword) {
        use Keyword as K;
        let statement = &mut self.statement;
        let second = statement.words_after_lead == 1;
        match statement.lead {
            Some(Lead::Query | Lead::Explain) => self.query_keyword(keyword),
            Some(Lead::Copy) => {
                match keyword {
                    K::From if statement.depth == 0 => statement.refuse(Kind::Write, ClassReason::Command),
                    K::To if statement.depth == 0 => statement.copy_to = true,
                    K::Stdout if statement.depth == 0 && statement.previous == Previous::Keyword(K::To) => {
                        statement.copy_stdout = true;
                    }
                    K::Program => statement.refuse(Kind::Write, ClassReason::Command),
                    _ => {}
                }
                if self.statement.depth > 0 {
                    self.query_keyword(keyword);
                }
            }
            Some(Lead::Create) => {
                if matches!(keyword, K::Temp | K::Temporary) && statement.words_after_lead <= 4 {
                    statement.leave(Leaves::pin(PinReason::TemporaryTable));
                }
                if keyword == K::Execute {
                    statement.leave(Leaves::pin(PinReason::SqlPrepare));
                }
            }
            Some(Lead::Commit) if keyword == K::Prepared => {
                statement.kind = Kind::Write;
                statement.reason = ClassReason::Command;
            }
            Some(Lead::Prepare) if second && keyword == K::Transaction => {
                statement.kind = Kind::TransactionControl;
                statement.leaves = Leaves::NOTHING;
            }
            Some(Lead::Declare) if keyword == K::Hold && statement.previous == Previous::Keyword(K::With) => {
                statement.leave(Leaves::pin(PinReason::HoldCursor));
            }
            Some(Lead::Change) => {
                // INSERT .. SELECT .. FROM: nothing more to learn. The words of an inner query do no harm here.
            }
            Some(Lead::Set | Lead::Reset | Lead::Deallocate | Lead::Discard) => {
                self.session_word(Some(keyword))
            }
            _ => {}
        }
    }

    /// The words behind SET, RESET, DEALLOCATE and DISCARD.
    fn session_word(&mut self, keyword: Option<Keyword>) {
        use Keyword as K;
        let statement = &mut self.statement;
        let word = statement.words_after_lead;
        match (statement.lead, keyword) {
            (Some(Lead::Reset), _) => statement.settings = true,
            (Some(Lead::Deallocate), Some(K::Prepare)) if word == 1 => {}
            (Some(Lead::Deallocate), Some(K::All)) => statement.leave(Leaves::DEALLOCATES_ALL),
            (Some(Lead::Deallocate), _) => statement.leave(Leaves::pin(PinReason::SqlPrepare)),
            (Some(Lead::Discard), Some(K::All)) => {
                statement.settings = true;
                statement.leave(Leaves::DISCARDS_ALL);
            }
            (Some(Lead::Set), Some(K::Transaction)) if word == 1 => {
                statement.kind = Kind::TransactionControl;
                statement.set_is_transactions = true;
            }
            (Some(Lead::Set), Some(K::Constraints)) if word == 1 => statement.set_is_transactions = true,
            _ => {}
        }
    }

    /// A keyword inside a query.
    fn query_keyword(&mut self, keyword: Keyword) {
        use Keyword as K;
        let catalog = self.catalog;
        let statement = &mut self.statement;
        let depth_bit = if statement.depth < 64 { 1u64 << statement.depth } else { 0 };
        match keyword {
            K::With if statement.previous == Previous::Open => statement.with_active |= depth_bit,
            K::Select | K::Values | K::Table => statement.with_active &= !depth_bit,
            K::Insert | K::Update | K::Delete | K::Merge => {
                statement.with_active &= !depth_bit;
                statement.modifies |= !matches!(statement.previous, Previous::Keyword(K::For | K::Key));
                statement.refuse(Kind::Write, ClassReason::WriteClause);
            }
            K::Into if !matches!(statement.previous, Previous::Keyword(K::Insert | K::Merge)) => {
                statement.into_table = true;
                statement.refuse(Kind::Ddl, ClassReason::WriteClause);
            }
            K::Temp | K::Temporary | K::Local | K::Global
                if statement.into_table
                    && (statement.previous == Previous::Keyword(K::Into)
                        || matches!(statement.previous, Previous::Keyword(K::Local | K::Global))) =>
            {
                statement.leave(Leaves::pin(PinReason::TemporaryTable));
            }
            K::Share | K::No | K::Key if statement.previous == Previous::Keyword(K::For) => {
                statement.refuse(Kind::Write, ClassReason::WriteClause);
            }
            K::On if statement.previous == Previous::Keyword(K::Distinct) => {
                statement.close_may_precede_call = true
            }
            K::Execute if statement.lead == Some(Lead::Explain) => {
                statement.leave(Leaves::pin(PinReason::SqlPrepare));
            }
            _ => {}
        }
        let implied: &[&[u8]] = match keyword {
            K::Like => &[b"~~", b"!~~"],
            K::Ilike => &[b"~~*", b"!~~*"],
            K::Similar => &[b"~", b"!~"],
            K::Between => &[b"<=", b">=", b"<", b">"],
            K::In | K::Using | K::Natural | K::Nullif | K::Case | K::Distinct => &[b"=", b"<>"],
            _ => &[],
        };
        if catalog.is_loaded() && implied.iter().any(|token| catalog.operator_is_unsafe(token)) {
            statement.refuse(Kind::Write, ClassReason::UnsafeName);
            statement.leave(Leaves::UNPROVEN);
        }
    }

    fn end_statement(&mut self) {
        if let Some(pending) = self.statement.pending.take() {
            self.resolve(pending, false);
        }
        let mut statement = std::mem::take(&mut self.statement);
        if statement.tokens == 0 {
            return;
        }
        match statement.lead {
            None | Some(Lead::Explain) => {
                statement.refuse(Kind::Write, ClassReason::Unclear);
                statement.leave(Leaves::UNPROVEN);
            }
            Some(Lead::Copy) if !(statement.copy_to && statement.copy_stdout) => {
                statement.modifies |= !statement.copy_to;
                statement.refuse(Kind::Write, ClassReason::Command);
            }
            Some(Lead::Set) if !statement.set_is_transactions => statement.settings = true,
            _ => {}
        }
        if statement.depth != 0 || statement.current_setting != CurrentSetting::No {
            statement.refuse(Kind::Write, ClassReason::Unclear);
        }
        if statement.fires && statement.modifies {
            statement.leave(Leaves::pin(PinReason::Setting));
        }
        if statement.leaving && statement.modifies {
            statement.leave(Leaves::UNPROVEN);
        }
        if statement.too_deep {
            statement.refuse(Kind::Write, ClassReason::SecondOpinion);
        }
        // The last reason: what has it would be a read.
        if self.hints.route == Some(Route::Primary) {
            statement.refuse(Kind::Write, ClassReason::Hint);
        }
        let class = StatementClass {
            kind: statement.kind,
            reason: statement.reason,
            leaves: statement.leaves,
            settings: statement.settings,
            hints: Hints::default(),
        };
        self.total = Some(match self.total {
            None => class,
            Some(before) => StatementClass {
                kind: if before.kind == Kind::Ddl || class.kind == Kind::Ddl {
                    Kind::Ddl
                } else {
                    Kind::Write
                },
                reason: ClassReason::Several,
                leaves: before.leaves | class.leaves,
                settings: before.settings || class.settings,
                hints: Hints::default(),
            },
        });
    }
}

fn starts_statement(keyword: Keyword) -> bool {
    use Keyword as K;
    !matches!(keyword, K::Analyze | K::Verbose | K::True | K::On)
}

/// Feeds a tagged, delimited piece to the hash: pieces never run into each other.
fn feed(hash: &mut SipHasher13, tag: u8, bytes: &[u8]) {
    hash.write(&[tag]);
    hash.write_u32(bytes.len() as u32);
    hash.write(bytes);
}

/// Whether behind `lexer` stand only literals and parameters up to a `)`: where that begins, which kinds
/// they are (a bit each), and how many.
fn literals<'a>(lexer: &Lexer<'a>) -> Option<(Lexer<'a>, u8, u32)> {
    let mut lexer = lexer.clone();
    let mut kinds = 0;
    let mut count = 0u32;
    loop {
        let mut token = lexer.next_token();
        if lexer.hint().is_some() {
            return None;
        }
        if token == Token::Operator && matches!(lexer.raw(), b"-" | b"+") {
            token = lexer.next_token();
            if token != Token::Number {
                return None;
            }
        }
        kinds |= match token {
            Token::Number => 1,
            Token::Parameter => 2,
            Token::Text(TextKind::Plain | TextKind::Escaped | TextKind::Dollar)
                if !names_the_clock(lexer.raw()) =>
            {
                4
            }
            Token::Text(TextKind::Bits) => 8,
            _ => return None,
        };
        count = count.saturating_add(1);
        let before = lexer.clone();
        match lexer.next_token() {
            Token::Punctuation(b',') if lexer.hint().is_none() => {}
            Token::Punctuation(b')') if lexer.hint().is_none() => return Some((before, kinds, count)),
            _ => return None,
        }
    }
}

/// Whether the body of a DO may change settings: as the catalog query asks of functions, word by word.
fn body_may_set(raw: &[u8], catalog: &Catalog) -> bool {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | 0x80..);
    let mut starts_statement = true;
    let mut at = 0;
    while at < raw.len() {
        let length = raw[at..].iter().take_while(|byte| is_word(byte)).count();
        if length == 0 {
            match raw[at] {
                b';' | b'\'' | b'$' => starts_statement = true,
                b' ' | b'\t' | b'\n' | b'\r' => {}
                _ => starts_statement = false,
            }
            at += 1;
            continue;
        }
        let mut name = [0; 64];
        let word = &raw[at..at + length];
        let folded = &mut name[..length.min(63)];
        folded.copy_from_slice(&word[..length.min(63)]);
        folded.make_ascii_lowercase();
        match &*folded {
            b"set_config" | b"reset" | b"discard" => return true,
            b"set" if starts_statement => return true,
            word => {
                if catalog.name(word).sets {
                    return true;
                }
                starts_statement = matches!(word, b"begin" | b"then" | b"else" | b"loop");
            }
        }
        at += length;
    }
    false
}

/// A text that PostgreSQL would read as a time of its clock, were it cast to one.
pub(super) fn names_the_clock(raw: &[u8]) -> bool {
    // Date and time input refuses longer texts.
    if raw.len() < 5 || raw.len() > 256 {
        return false;
    }
    raw.iter().enumerate().any(|(at, byte)| {
        let begins =
            |word: &[u8]| raw.get(at..at + word.len()).is_some_and(|found| found.eq_ignore_ascii_case(word));
        match byte {
            b'n' | b'N' => begins(b"now"),
            b't' | b'T' => begins(b"today") || begins(b"tomorrow"),
            b'y' | b'Y' => begins(b"yesterday"),
            // It may be written with escapes, or in several pieces.
            b'\\' | b'\n' | b'\r' => true,
            _ => false,
        }
    })
}

/// A setting of an application's own: its name has a dot, as no setting of the server has.
fn is_own_setting(raw: &[u8]) -> bool {
    let name = raw.strip_prefix(b"'").and_then(|rest| rest.strip_suffix(b"'")).unwrap_or_default();
    // Highwater's own are shown as they are for the session: that is done on the primary.
    name.contains(&b'.')
        && !name.get(..10).is_some_and(|prefix| prefix.eq_ignore_ascii_case(b"highwater."))
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_'))
}
