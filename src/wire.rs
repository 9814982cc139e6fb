//! The frames of the PostgreSQL protocol, as far as a relay looks into them. Pure.
//!
//! A message is a tag byte and a length (which counts itself, not the tag); see "Message Formats" in
//! PostgreSQL's manual, chapter "Frontend/Backend Protocol". Nothing here copies message bodies but
//! the writers of messages that the proxy makes itself.

use std::fmt;

/// Bytes of tag and length.
pub const HEADER: usize = 5;

/// PostgreSQL's own limit of one message (`PQ_LARGE_MESSAGE_LIMIT`, MaxAllocSize - 1).
pub const MAX_MESSAGE: usize = 0x3fff_fffe;

/// Tag and whole length (header included) of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The tag byte.
    pub tag: u8,
    /// The message's bytes, tag and length word included.
    pub len: usize,
}

/// The length word is impossible: less than itself, or above what PostgreSQL accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidLength {
    /// The tag byte.
    pub tag: u8,
    /// The length word as sent.
    pub length: u32,
}

impl fmt::Display for InvalidLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid message length {} of message type {:?}", self.length as i32, char::from(self.tag))
    }
}

impl std::error::Error for InvalidLength {}

/// Reads the header at the start of `bytes`; `None`: not all of it is there yet.
#[inline]
pub fn header(bytes: &[u8]) -> Result<Option<Header>, InvalidLength> {
    let Some(head) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    if length < 4 || length as usize > MAX_MESSAGE {
        return Err(InvalidLength { tag: head[0], length });
    }
    Ok(Some(Header { tag: head[0], len: length as usize + 1 }))
}

/// The zero-terminated string at the start of `bytes`, and what follows its terminator.
#[inline]
pub fn cstr(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    // Most of those that are read for each statement are names of a few letters, or none: a vector search, which has to
    // be called, costs more than that.
    let end = match bytes.iter().take(8).position(|byte| *byte == 0) {
        Some(end) => end,
        None => memchr::memchr(0, bytes)?,
    };
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// Appends one message: its tag, its length, and what `body` appends.
#[inline]
pub fn put(out: &mut Vec<u8>, tag: u8, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[tag, 0, 0, 0, 0]);
    body(out);
    let length = u32::try_from(out.len() - start - 1).expect("a message of ours is far below 4 GiB");
    out[start + 1..start + HEADER].copy_from_slice(&length.to_be_bytes());
}

/// Appends a zero-terminated string.
#[inline]
pub fn put_cstr(out: &mut Vec<u8>, text: &[u8]) {
    debug_assert!(!text.contains(&0), "a protocol string holds no zero byte");
    out.extend_from_slice(text);
    out.push(0);
}

/// ReadyForQuery's byte: the state of the transaction, as PostgreSQL reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionStatus {
    /// `I`
    Idle,
    /// `T`
    InTransaction,
    /// `E`
    Failed,
}

impl TransactionStatus {
    /// From ReadyForQuery's byte.
    pub fn from_byte(byte: u8) -> Option<TransactionStatus> {
        match byte {
            b'I' => Some(TransactionStatus::Idle),
            b'T' => Some(TransactionStatus::InTransaction),
            b'E' => Some(TransactionStatus::Failed),
            _ => None,
        }
    }

    /// ReadyForQuery's byte.
    pub fn byte(self) -> u8 {
        match self {
            TransactionStatus::Idle => b'I',
            TransactionStatus::InTransaction => b'T',
            TransactionStatus::Failed => b'E',
        }
    }
}

/// An ErrorResponse or NoticeResponse of our own. PostgreSQL's words: lower case, no full stop;
/// detail and hint in sentences. The routine field says `highwater`, so that an operator can tell
/// who spoke (but where a driver knows what to do by the server's own routine, that is named).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorReport {
    /// ERROR or FATAL.
    pub severity: Severity,
    /// Five characters.
    pub sqlstate: &'static str,
    /// The message.
    pub message: String,
    /// What happened, in a sentence.
    pub detail: Option<String>,
    /// What to do, in a sentence.
    pub hint: Option<String>,
    /// Who raised it: `highwater`, unless drivers look there for the server's function.
    pub routine: &'static str,
}

/// How bad an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The statement failed.
    Error,
    /// The session ends.
    Fatal,
}

impl Severity {
    /// As the protocol writes it.
    pub fn text(self) -> &'static str {
        match self {
            Severity::Error => "ERROR",
            Severity::Fatal => "FATAL",
        }
    }
}

impl ErrorReport {
    /// A failed statement.
    pub fn error(sqlstate: &'static str, message: impl Into<String>) -> ErrorReport {
        ErrorReport {
            severity: Severity::Error,
            sqlstate,
            message: message.into(),
            detail: None,
            hint: None,
            routine: "highwater",
        }
    }

    /// The end of a session.
    pub fn fatal(sqlstate: &'static str, message: impl Into<String>) -> ErrorReport {
        ErrorReport { severity: Severity::Fatal, ..ErrorReport::error(sqlstate, message) }
    }

    /// Adds the detail.
    pub fn detail(mut self, text: impl Into<String>) -> ErrorReport {
        self.detail = Some(text.into());
        self
    }

    /// Adds the hint.
    pub fn hint(mut self, text: impl Into<String>) -> ErrorReport {
        self.hint = Some(text.into());
        self
    }

    /// Names the server's function that raises this error.
    pub fn routine(mut self, name: &'static str) -> ErrorReport {
        self.routine = name;
        self
    }

    /// Appends it as an ErrorResponse.
    pub fn put(&self, out: &mut Vec<u8>) {
        self.put_as(out, b'E', self.severity.text());
    }

    /// Appends it as a NoticeResponse of severity WARNING.
    pub fn put_notice(&self, out: &mut Vec<u8>) {
        self.put_as(out, b'N', "WARNING");
    }

    fn put_as(&self, out: &mut Vec<u8>, tag: u8, severity: &str) {
        put(out, tag, |out| {
            let mut field = |code: u8, text: &str| {
                out.push(code);
                // A zero byte would end the field early: a text from outside is cut there.
                let text = text.split('\0').next().unwrap_or_default();
                put_cstr(out, text.as_bytes());
            };
            field(b'S', severity);
            field(b'V', severity);
            field(b'C', self.sqlstate);
            field(b'M', &self.message);
            if let Some(detail) = &self.detail {
                field(b'D', detail);
            }
            if let Some(hint) = &self.hint {
                field(b'H', hint);
            }
            field(b'R', self.routine);
            out.push(0);
        });
    }
}

impl fmt::Display for ErrorReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.severity.text(), self.sqlstate, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        Ok(())
    }
}

/// The fields of an ErrorResponse or NoticeResponse that the proxy looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ErrorFields<'a> {
    /// `V`: the severity that is never translated.
    pub severity: &'a [u8],
    /// `C`: SQLSTATE.
    pub sqlstate: &'a [u8],
    /// `M`: the message.
    pub message: &'a [u8],
    /// `R`: the C function that raised it.
    pub routine: &'a [u8],
}

/// Reads the fields of an ErrorResponse's or NoticeResponse's body (without header).
pub fn error_fields(mut body: &[u8]) -> ErrorFields<'_> {
    let mut fields = ErrorFields::default();
    while let Some((&code, rest)) = body.split_first() {
        if code == 0 {
            break;
        }
        let Some((text, rest)) = cstr(rest) else { break };
        match code {
            b'V' => fields.severity = text,
            b'C' => fields.sqlstate = text,
            b'M' => fields.message = text,
            b'R' => fields.routine = text,
            _ => {}
        }
        body = rest;
    }
    fields
}
