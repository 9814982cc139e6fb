//! What an expression or query that PostgreSQL has stored (`pg_node_tree`, cast to text) reaches: functions,
//! operators, types and relations, by their object identifiers. Pure; one pass, no recursion, time linear.
//!
//! `pg_depend` cannot tell this: it does not record built-in objects. The reader knows no node by heart: it
//! takes the number behind each field whose name says that it holds such an identifier, so that nodes of later
//! majors are read too. A column that a user has named like a field adds an object, and never hides one.

/// One thing that a tree mentions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A function, an aggregate, a window function, a sampling method.
    Function(u32),
    /// An operator.
    Operator(u32),
    /// A type.
    Type(u32),
    /// A relation.
    Relation(u32),
    /// A function over a column, where only what is folded counts: if it is written in SQL its body is put in its
    /// place, and there may be something to fold in that.
    Inlined(u32),
    /// `current_setting` of a constant name with a dot in it: a setting of an application's own.
    OwnSetting,
    /// FOR UPDATE and kin, a command other than SELECT, or a utility command.
    Writes,
}

/// Which references count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// It is evaluated: all of them.
    Evaluated,
    /// An index, check, partition or statistics expression: a SELECT evaluates only what the planner folds, calls
    /// whose first argument is no column, be it in the body of a function in SQL (measured: an index on `((f(1)))` took f's advisory lock on a standby
    /// at `SELECT count(*)`).
    Folded,
}

/// `current_setting(text)` and `current_setting(text, boolean)`.
const CURRENT_SETTING: [u32; 2] = [2077, 3294];

/// Built-in functions that tell when their transaction began: now, transaction_timestamp, age (from today).
pub(super) const MOMENTS: [u32; 7] = [1299, 2647, 1386, 2059, 2648, 2649, 274];

/// Whether the tree has CURRENT_TIMESTAMP or one of its kin, which are no functions: `SVFOP_CURRENT_DATE` (0) to
/// `SVFOP_LOCALTIMESTAMP_N` (8). Or a constant, in bytes, with a word that is turned into a time.
pub(super) fn names_the_clock(tree: &str) -> bool {
    const NODE: &str = "{SQLVALUEFUNCTION :op ";
    let keyword = tree.match_indices(NODE).any(|(at, _)| {
        let digits = tree[at + NODE.len()..].split(' ').next().unwrap_or_default();
        digits.parse::<u32>().map_or(true, |op| op <= 8)
    });
    let in_bytes = |word: &str| word.bytes().map(|byte| byte.to_string()).collect::<Vec<_>>().join(" ");
    let word =
        |word: &&str| tree.contains(&in_bytes(word)) || tree.contains(&in_bytes(&word.to_ascii_uppercase()));
    keyword || ["now", "today", "tomorrow", "yesterday"].iter().any(word)
}

/// Calls `found` with each reference of the tree.
pub fn references(tree: &str, used: Use, mut found: impl FnMut(Reference)) {
    let mut tokens = Tokens { text: tree.as_bytes(), at: 0 };
    while let Some(token) = tokens.next() {
        let Some(field) = token.strip_prefix(b":") else { continue };
        match field {
            b"opnos" => {
                // ROW(..) < ROW(..): `(o 97 97)`
                let mut ahead = tokens.clone();
                while let Some(number) = ahead.next().filter(|token| !token.starts_with(b":")) {
                    if let Some(oid) = oid(number) {
                        found(Reference::Operator(oid));
                    }
                }
            }
            b"opno" | b"eqop" | b"sortop" => {
                // Over a column too: its function may be one in SQL.
                tokens.peek_oid().into_iter().for_each(|oid| found(Reference::Operator(oid)));
            }
            b"relid" => tokens.peek_oid().into_iter().for_each(|oid| found(Reference::Relation(oid))),
            b"hasForUpdate" if tokens.clone().next() == Some(b"true") => found(Reference::Writes),
            b"commandType" if tokens.clone().next() != Some(b"1") => found(Reference::Writes),
            b"utilityStmt" if tokens.clone().next() != Some(b"<>") => found(Reference::Writes),
            _ if is_function_field(field) => {
                let Some(oid) = tokens.peek_oid() else { continue };
                if CURRENT_SETTING.contains(&oid) && tokens.first_argument_is_an_own_setting() {
                    found(Reference::OwnSetting);
                } else if used == Use::Evaluated || !tokens.first_argument_is_a_column() {
                    found(Reference::Function(oid));
                } else {
                    found(Reference::Inlined(oid));
                }
            }
            // The columns of XMLTABLE, of a function's records, of a WITH: `(o 23 20001)`. They are made whether or not
            // anything reads them.
            _ if is_list_of_types(field) => {
                let mut ahead = tokens.clone();
                if ahead.next() == Some(b"o") {
                    while let Some(oid) = ahead.next().and_then(oid) {
                        found(Reference::Type(oid));
                    }
                }
            }
            _ if is_type_field(field) => {
                tokens.peek_oid().into_iter().for_each(|oid| found(Reference::Type(oid)));
            }
            _ => {}
        }
    }
}

fn is_function_field(field: &[u8]) -> bool {
    // opfuncid is not filled in everywhere, and where it is, it is opno's.
    (field.ends_with(b"funcid") || field.ends_with(b"fnoid") || field == b"tsmhandler")
        && field != b"opfuncid"
}

fn is_list_of_types(field: &[u8]) -> bool {
    field.ends_with(b"types") || field.ends_with(b"Types")
}

fn is_type_field(field: &[u8]) -> bool {
    field.ends_with(b"type")
        || field.ends_with(b"typeid")
        || field.ends_with(b"typeId")
        || field.ends_with(b"typid")
}

fn oid(token: &[u8]) -> Option<u32> {
    std::str::from_utf8(token).ok()?.parse().ok()
}

/// The tree's words: names, numbers, `:fields`, and `{` and `}` by themselves. Round and square brackets and
/// white space part them; a backslash takes what follows into the word.
#[derive(Clone)]
struct Tokens<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Tokens<'a> {
    fn next(&mut self) -> Option<&'a [u8]> {
        while matches!(self.text.get(self.at), Some(b' ' | b'\n' | b'\t' | b'(' | b')' | b'[' | b']')) {
            self.at += 1;
        }
        let start = self.at;
        if matches!(self.text.get(self.at)?, b'{' | b'}') {
            self.at += 1;
            return self.text.get(start..self.at);
        }
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b' ' | b'\n' | b'\t' | b'(' | b')' | b'[' | b']' | b'{' | b'}' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        self.at = self.at.min(self.text.len());
        self.text.get(start..self.at)
    }

    fn peek_oid(&self) -> Option<u32> {
        oid(self.clone().next()?).filter(|oid| *oid != 0)
    }

    /// The reader behind `:args` of the node it stands in, if that comes before any other node.
    fn arguments(&self) -> Option<Tokens<'a>> {
        let mut ahead = self.clone();
        loop {
            match ahead.next()? {
                b":args" => return Some(ahead),
                b"{" | b"}" => return None,
                _ => {}
            }
        }
    }

    fn first_argument_is_a_column(&self) -> bool {
        let Some(mut ahead) = self.arguments() else { return false };
        if ahead.next() != Some(b"{") {
            return false;
        }
        match ahead.next() {
            Some(b"VAR") => true,
            Some(b"RELABELTYPE") => {
                ahead.next() == Some(b":arg") && ahead.next() == Some(b"{") && ahead.next() == Some(b"VAR")
            }
            _ => false,
        }
    }

    fn first_argument_is_an_own_setting(&self) -> bool {
        let Some(mut ahead) = self.arguments() else { return false };
        if ahead.next() != Some(b"{") || ahead.next() != Some(b"CONST") {
            return false;
        }
        loop {
            match ahead.next() {
                Some(b":constvalue") => break,
                None | Some(b"}") => return false,
                _ => {}
            }
        }
        // The length, then the bytes as stored: four of header, and the text.
        ahead.next();
        let mut bytes = std::iter::from_fn(|| ahead.next())
            .take_while(|token| *token != b"}")
            .map(|token| std::str::from_utf8(token).ok().and_then(|text| text.parse::<u8>().ok()))
            .skip(4);
        let mut dotted = false;
        let plain = bytes.all(|byte| {
            dotted |= byte == Some(b'.');
            byte.is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_'))
        });
        plain && dotted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(tree: &str, used: Use) -> Vec<Reference> {
        let mut found = Vec::new();
        references(tree, used, |reference| found.push(reference));
        found
    }

    /// As PostgreSQL 15 wrote it, shortened.
    const POLICY: &str = "{OPEXPR :opno 98 :opfuncid 67 :opresulttype 16 :args ({VAR :varno 1 :vartype 25 :location 60} \
        {FUNCEXPR :funcid 2077 :funcresulttype 25 :inputcollid 100 :args ({CONST :consttype 25 :constlen -1 \
        :location 80 :constvalue 14 [ 56 0 0 0 97 112 112 46 116 101 110 97 110 116 ]}) :location 64}) :location 62}";

    #[test]
    fn what_is_mentioned() {
        assert_eq!(
            all("{ROWCOMPAREEXPR :opnos (o 97 98) :opfamilies (o 1976) :relid 7}", Use::Evaluated),
            [Reference::Operator(97), Reference::Operator(98), Reference::Relation(7)]
        );
        assert_eq!(
            all(
                "({AGGREF :aggfnoid 2108 :aggtype 20} {X :elemfuncid 5 :newtypeid 6 :tsmhandler 9})",
                Use::Evaluated
            ),
            [
                Reference::Function(2108),
                Reference::Type(20),
                Reference::Function(5),
                Reference::Type(6),
                Reference::Function(9)
            ]
        );
        assert_eq!(
            all(
                "{TF :coltypes (o 23 20001) :coltypmods (i -1 -1) :funccoltypes <> :colTypes (o 5)}",
                Use::Evaluated
            ),
            [Reference::Type(23), Reference::Type(20001), Reference::Type(5)]
        );
        assert_eq!(all("{QUERY :hasForUpdate true :relid 0}", Use::Evaluated), [Reference::Writes]);
        for written in
            ["{QUERY :commandType 3}", "{QUERY :commandType 1 :utilityStmt {X}}", "{QUERY :commandType"]
        {
            assert_eq!(all(written, Use::Evaluated), [Reference::Writes], "{written}");
        }
        assert_eq!(all("{QUERY :commandType 1 :utilityStmt <> :hasForUpdate false}", Use::Evaluated), []);
        // A column called `:funcid 5` hides nothing.
        assert_eq!(
            all("{T :resname :funcid\\ 5 :resorigtbl 3} {F :funcid 20000 :args <>}", Use::Evaluated),
            [Reference::Function(20000)]
        );
    }

    #[test]
    fn a_setting_of_an_applications_own() {
        assert!(all(POLICY, Use::Evaluated).contains(&Reference::OwnSetting));
        assert!(!all(POLICY, Use::Evaluated).contains(&Reference::Function(2077)));
        for other in [
            // No dot in its name; not ASCII; no constant; NULL.
            POLICY.replace(" 46 ", " 47 "),
            POLICY.replace(" 116 ", " 200 "),
            POLICY.replace("{CONST", "{PARAM"),
            POLICY.replace(
                ":constvalue 14 [ 56 0 0 0 97 112 112 46 116 101 110 97 110 116 ]",
                ":constvalue <>",
            ),
        ] {
            assert!(all(&other, Use::Evaluated).contains(&Reference::Function(2077)), "{other}");
        }
    }

    #[test]
    fn only_what_is_folded() {
        let call =
            |argument: &str| format!("{{FUNCEXPR :funcid 20000 :funcresulttype 23 :args ({argument})}}");
        let inlined = [Reference::Inlined(20000), Reference::Type(23)];
        assert_eq!(all(&call("{VAR :varno 1}"), Use::Folded), inlined);
        assert_eq!(all(&call("{RELABELTYPE :arg {VAR :varno 1}}"), Use::Folded), inlined);
        for argument in ["{CONST :x 1}", "{FUNCEXPR :funcid 9 :args ({VAR :varno 1})}", ""] {
            assert!(all(&call(argument), Use::Folded).contains(&Reference::Function(20000)), "{argument}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_survived(text in "[:{}()\\[\\] a-z0-9\\\\é]{0,80}") {
            references(&text, Use::Folded, |_| ());
            references(&format!("{{F :funcid 2077 :args ({text}"), Use::Evaluated, |_| ());
        }
    }
}
