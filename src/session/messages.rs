//! What the session reads out of a client's extended-protocol messages. Pure.
//!
//! All take a message's *body*, without tag and length. `None` means that the body is not laid out as
//! the protocol says, by PostgreSQL's reading: it answers that with an error, and so is sent it as it is.

use std::hash::Hasher;
use std::num::NonZeroU64;

use siphasher::sip::SipHasher13;

use crate::backend::Shape;
use crate::wire::{Header, cstr};

/// PostgreSQL's limit for messages that hold no data of the user (`PQ_SMALL_MESSAGE_LIMIT`).
pub const SMALL_MESSAGE: usize = 10_000;

/// Whether it is a message without the user's data and longer than those may be: the server ends the connection.
pub fn is_too_long(header: Header) -> bool {
    // The length as it is sent leaves out the tag.
    matches!(header.tag, b'C' | b'D' | b'E' | b'H' | b'S' | b'X' | b'c' | b'f')
        && header.len > SMALL_MESSAGE + 1
}

/// The text of a Query.
pub fn query(body: &[u8]) -> Option<&[u8]> {
    let (text, rest) = cstr(body)?;
    rest.is_empty().then_some(text)
}

/// Parse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parse<'a> {
    /// The statement's name; empty: the unnamed statement.
    pub name: &'a [u8],
    /// The statement's text.
    pub text: &'a [u8],
    /// Everything behind the name, as sent: text, number of types, type OIDs.
    pub tail: &'a [u8],
    types: &'a [u8],
}

impl<'a> Parse<'a> {
    /// Reads a Parse message.
    pub fn read(body: &'a [u8]) -> Option<Parse<'a>> {
        let (name, tail) = cstr(body)?;
        let (text, rest) = cstr(tail)?;
        let (count, types) = rest.split_first_chunk::<2>()?;
        let count = usize::from(u16::from_be_bytes(*count));
        (types.len() == count * 4).then_some(Parse { name, text, tail, types })
    }

    /// The parameter types that the client stated; 0: left to the server.
    pub fn types(&self) -> impl Iterator<Item = u32> + 'a {
        self.types.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }
}

/// The names at the start of a Bind: portal, statement, and how many bytes they take.
pub fn bind_names(body: &[u8]) -> Option<(&[u8], &[u8], usize)> {
    let (portal, rest) = cstr(body)?;
    let (statement, rest) = cstr(rest)?;
    Some((portal, statement, body.len() - rest.len()))
}

/// The values of a Bind's parameters as text. `None`: null, or in binary form of a type that `types` (0: left
/// to the server) does not call a text.
pub fn bind_texts(body: &[u8], types: &[u32]) -> Option<Vec<Option<Vec<u8>>>> {
    // text, varchar, unknown
    const TEXTS: [u32; 4] = [0, 25, 1043, 705];
    let (_, _, names) = bind_names(body)?;
    let number = |rest: &[u8]| rest.first_chunk::<2>().map(|b| usize::from(u16::from_be_bytes(*b)));
    let mut rest = &body[names..];
    let formats = number(rest)?;
    let codes = rest.get(2..2 + 2 * formats)?;
    rest = &rest[2 + 2 * formats..];
    let count = number(rest)?;
    rest = &rest[2..];
    let mut values = Vec::with_capacity(count.min(64));
    for at in 0..count {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        let Ok(length) = usize::try_from(i32::from_be_bytes(*length)) else {
            values.push(None);
            rest = tail;
            continue;
        };
        let value = tail.get(..length)?;
        rest = &tail[length..];
        let format = match formats {
            0 => 0,
            1 => number(codes)?,
            _ => number(codes.get(2 * at..)?)?,
        };
        let is_text = TEXTS.contains(&types.get(at).copied().unwrap_or(0)) && format <= 1;
        values.push(is_text.then(|| value.to_vec()));
    }
    Some(values)
}

/// Whether what follows the names in a Bind binds no parameter, as the server takes it: more than one format must be as many
/// as there are parameters.
pub fn binds_nothing(rest: &[u8]) -> bool {
    let codes = |bytes: &[u8]| -> Option<(usize, usize)> {
        let (count, rest) = bytes.split_first_chunk::<2>()?;
        Some((usize::from(u16::from_be_bytes(*count)), rest.len()))
    };
    let Some((formats, left)) = codes(rest) else { return false };
    if formats > 1 || left < 2 * formats + 4 || rest[2 + 2 * formats..][..2] != [0, 0] {
        return false;
    }
    matches!(codes(&rest[4 + 2 * formats..]), Some((results, left)) if left == 2 * results)
}

/// What a Describe or Close is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// A prepared statement.
    Statement(&'a [u8]),
    /// A portal.
    Portal(&'a [u8]),
}

/// Reads a Describe or Close.
pub fn target(body: &[u8]) -> Option<Target<'_>> {
    let (&kind, rest) = body.split_first()?;
    let (name, rest) = cstr(rest)?;
    match (kind, rest) {
        (b'S', []) => Some(Target::Statement(name)),
        (b'P', []) => Some(Target::Portal(name)),
        _ => None,
    }
}

/// What a prepared statement takes and gives, read out of the answers to a Describe of it.
#[derive(Clone, Debug, Default)]
pub struct ShapeReader {
    hasher: SipHasher13,
}

impl ShapeReader {
    /// A ParameterDescription.
    pub fn parameters(&mut self, body: &[u8]) {
        self.hasher.write(body);
    }

    /// The last answer: a RowDescription, or NoData (`None`). What `equalTupleDescs` compares of a result's
    /// columns and the protocol shows counts: names, types and type modifiers; the table and column
    /// a value comes from do not. `None`: it is not laid out as the protocol says.
    pub fn row(mut self, body: Option<&[u8]>) -> Option<Shape> {
        match body {
            None => self.hasher.write_u8(b'n'),
            Some(body) => {
                self.hasher.write_u8(b'T');
                let (count, mut rest) = body.split_first_chunk::<2>()?;
                for _ in 0..u16::from_be_bytes(*count) {
                    let (name, column) = cstr(rest)?;
                    let (column, further) = column.split_first_chunk::<18>()?;
                    self.hasher.write(name);
                    // Behind the table's OID and the column's number, before the format.
                    self.hasher.write(&column[6..16]);
                    rest = further;
                }
                if !rest.is_empty() {
                    return None;
                }
            }
        }
        Some(Shape(NonZeroU64::new(self.hasher.finish()).unwrap_or(NonZeroU64::MIN)))
    }
}

/// Reads an Execute: the portal and the most rows (0: all).
pub fn execute(body: &[u8]) -> Option<(&[u8], u32)> {
    let (portal, rest) = cstr(body)?;
    Some((portal, u32::from_be_bytes(rest.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_parse_is_read_with_its_types() {
        let parse = Parse::read(b"s1\0select $1\0\0\x02\0\0\0\x17\0\0\0\0").unwrap();
        assert_eq!((parse.name, parse.text), (&b"s1"[..], &b"select $1"[..]));
        assert_eq!(parse.types().collect::<Vec<_>>(), [23, 0]);
        assert_eq!(parse.tail, b"select $1\0\0\x02\0\0\0\x17\0\0\0\0");
    }

    #[test]
    fn a_parse_with_missing_or_surplus_bytes_is_refused() {
        for body in [&b""[..], b"s1", b"s1\0select", b"\0select 1\0", b"\0select 1\0\0\x01", b"\0q\0\0\0x"] {
            assert_eq!(Parse::read(body), None, "{body:?}");
        }
    }

    #[test]
    fn names_of_a_bind_end_where_its_formats_begin() {
        assert_eq!(bind_names(b"p\0s\0\0\0"), Some((&b"p"[..], &b"s"[..], 4)));
        assert_eq!(bind_names(b"p\0s"), None);
    }

    #[test]
    fn a_bind_without_parameters_is_told_from_others() {
        for (rest, expected) in [
            (&b"\0\0\0\0\0\0"[..], true),
            (b"\0\x01\0\x01\0\0\0\x01\0\0", true),
            (b"\0\0\0\x01\0\0\0\x01a\0\0", false),
            (b"\0\0\0\0\0\x01", false),
            (b"\0\x02\0\0\0\x01\0\0\0\0", false),
            (b"\0\x05\0\0", false),
            (b"\0\0\0\0", false),
            (b"", false),
        ] {
            assert_eq!(binds_nothing(rest), expected, "{rest:?}");
        }
    }

    #[test]
    fn texts_of_a_bind_are_read_in_both_formats() {
        let body = b"\0\0\0\x01\0\x01\0\x03\0\0\0\x01a\0\0\0\x01b\xff\xff\xff\xff\0\0";
        let value = |text: &[u8]| Some(text.to_vec());
        assert_eq!(bind_texts(body, &[]), Some(vec![value(b"a"), value(b"b"), None]));
        assert_eq!(bind_texts(body, &[25, 23]), Some(vec![value(b"a"), None, None]));
    }

    fn column(name: &str, table: u32, type_oid: u32, modifier: i32, format: u16) -> Vec<u8> {
        let mut bytes = [name.as_bytes(), b"\0"].concat();
        bytes.extend_from_slice(&table.to_be_bytes());
        bytes.extend_from_slice(&1_u16.to_be_bytes());
        bytes.extend_from_slice(&type_oid.to_be_bytes());
        bytes.extend_from_slice(&4_u16.to_be_bytes());
        bytes.extend_from_slice(&modifier.to_be_bytes());
        bytes.extend_from_slice(&format.to_be_bytes());
        bytes
    }

    fn shape(parameters: &[u8], columns: &[Vec<u8>]) -> Option<Shape> {
        let mut reader = ShapeReader::default();
        reader.parameters(parameters);
        let count = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
        reader.row(Some(&[vec![count], columns.to_vec()].concat().concat()))
    }

    #[test]
    fn a_shape_is_what_postgresql_holds_to_be_the_result_type() {
        let base = shape(b"\0\0", &[column("a", 1, 23, -1, 0)]).unwrap();
        // Where a column comes from, and in which format, is not part of it.
        assert_eq!(shape(b"\0\0", &[column("a", 2, 23, -1, 1)]), Some(base));
        for other in [
            shape(b"\0\0", &[column("b", 1, 23, -1, 0)]),
            shape(b"\0\0", &[column("a", 1, 20, -1, 0)]),
            shape(b"\0\0", &[column("a", 1, 23, 8, 0)]),
            shape(b"\0\0", &[column("a", 1, 23, -1, 0), column("b", 1, 23, -1, 0)]),
            shape(b"\0\x01\0\0\0\x17", &[column("a", 1, 23, -1, 0)]),
            shape(b"\0\0", &[]),
            ShapeReader::default().row(None),
        ] {
            assert_ne!(other.unwrap(), base);
        }
        assert_eq!(ShapeReader::default().row(Some(b"\0\x01a\0")), None);
    }

    proptest! {
        #[test]
        fn garbage_is_refused_without_panic(body: Vec<u8>) {
            let _ = binds_nothing(&body);
            let _ = (Parse::read(&body), bind_names(&body), target(&body), execute(&body), bind_texts(&body, &[]));
            let _ = ShapeReader::default().row(Some(&body));
        }
    }
}
