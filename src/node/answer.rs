//! What a node answers to a question of ours, read where it lies. Pure.
//!
//! Promises: an answer is whole only when the node says that it is ready, outside a transaction, and has sent the messages
//! that the question leads to and no others, not more than [`LARGEST`] bytes in all; what comes unasked between them
//! (parameters, notices, notifications) is passed over; no input panics, and of what is not understood nothing is believed.
//!
//! Deliberately not here: sockets and deadlines. Values are in the binary format, in which a text array needs no quoting.

use std::ops::Range;

use super::{PrimarySample, ReplicaSample, SampleAnswer, Snapshot, widen_xid};
use crate::wal::{Lsn, TimelineId, round_down_page_header};
use crate::wire;

/// Bytes of an answer. A sample that lists a hundred thousand running transactions has about a quarter of that.
pub(super) const LARGEST: usize = 4 << 20;

/// It is not an answer to what was asked; in which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Nonsense(pub(super) &'static str);

/// How far an answer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Something is still to come.
    More,
    /// It is there.
    Whole,
    /// An error instead of it; the connection can be used further.
    Refused,
    /// The last error of a connection that is over.
    Ended,
}

/// An answer that is being read, out of a buffer that only grows meanwhile. Ranges are those of the buffer.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    /// The messages still to come, by tag, in their order.
    expected: &'static [u8],
    at: usize,
    row: Range<usize>,
    error: Range<usize>,
    refused: bool,
}

impl Answer {
    /// It begins at `at` and has these messages.
    pub(super) fn of(expected: &'static [u8], at: usize) -> Answer {
        Answer { expected, at, row: 0..0, error: 0..0, refused: false }
    }

    /// Nothing was asked: what comes unasked, from `at` on. It is never whole.
    pub(super) fn none(at: usize) -> Answer {
        Answer::of(b"", at)
    }

    /// Up to where messages have been taken, each of them whole.
    pub(super) fn taken(&self) -> usize {
        self.at
    }

    /// The body of its row; empty: it has none.
    pub(super) fn row(&self) -> Range<usize> {
        self.row.clone()
    }

    /// The body of the error.
    pub(super) fn error(&self) -> Range<usize> {
        self.error.clone()
    }

    /// Takes what has come since the last call.
    pub(super) fn take(&mut self, buffer: &[u8]) -> Result<Progress, Nonsense> {
        loop {
            let rest = buffer.get(self.at..).unwrap_or_default();
            let header = wire::header(rest).map_err(|_| Nonsense("invalid message length"))?;
            let Some(header) = header else { return Ok(Progress::More) };
            if self.at + header.len > LARGEST {
                return Err(Nonsense("its answer is too long"));
            }
            if rest.len() < header.len {
                return Ok(Progress::More);
            }
            let body = self.at + wire::HEADER..self.at + header.len;
            self.at = body.end;
            if let Some(done) = self.message(header.tag, body, buffer)? {
                return Ok(done);
            }
        }
    }

    fn message(&mut self, tag: u8, body: Range<usize>, buffer: &[u8]) -> Result<Option<Progress>, Nonsense> {
        match tag {
            // ParameterStatus, NoticeResponse, NotificationResponse.
            b'S' | b'N' | b'A' => Ok(None),
            b'E' => Ok(self.refuse(body, buffer)),
            tag if self.expected.first() == Some(&tag) => {
                self.expected = &self.expected[1..];
                match tag {
                    b'D' => self.row = body,
                    b'Z' if buffer[body.clone()] != *b"I" => return Err(Nonsense("it is in a transaction")),
                    b'Z' if self.refused => return Ok(Some(Progress::Refused)),
                    b'Z' => return Ok(Some(Progress::Whole)),
                    _ => {}
                }
                Ok(None)
            }
            _ => Err(Nonsense("unexpected message")),
        }
    }

    fn refuse(&mut self, body: Range<usize>, buffer: &[u8]) -> Option<Progress> {
        let goes_on = wire::error_fields(&buffer[body.clone()]).severity == b"ERROR";
        self.error = body;
        self.refused = true;
        // What is left of the question is skipped up to its Sync.
        if goes_on && !self.expected.is_empty() {
            self.expected = b"Z";
            return None;
        }
        Some(Progress::Ended)
    }
}

/// The values of a DataRow's body, which must be so many.
pub(super) fn columns<const N: usize>(row: &[u8]) -> Option<[Option<&[u8]>; N]> {
    let (count, mut rest) = row.split_first_chunk::<2>()?;
    let mut columns = [None; N];
    if usize::from(u16::from_be_bytes(*count)) != N {
        return None;
    }
    for column in &mut columns {
        *column = value(&mut rest)?;
    }
    rest.is_empty().then_some(columns)
}

/// Takes one value with its length off the front; the inner `None`: NULL.
fn value<'a>(rest: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    let (length, after) = rest.split_first_chunk::<4>()?;
    let length = i32::from_be_bytes(*length);
    if length == -1 {
        *rest = after;
        return Some(None);
    }
    let (value, after) = after.split_at_checked(usize::try_from(length).ok()?)?;
    *rest = after;
    Some(Some(value))
}

/// An int8 column.
pub(super) fn int8(column: Option<&[u8]>) -> Option<u64> {
    u64::try_from(i64::from_be_bytes(column?.try_into().ok()?)).ok()
}

/// A text column.
pub(super) fn text(column: Option<&[u8]>) -> Option<&str> {
    std::str::from_utf8(column?).ok()
}

/// The elements of an array of one dimension, or of an empty one.
struct Elements<'a> {
    left: usize,
    rest: &'a [u8],
}

impl<'a> Elements<'a> {
    fn of(array: &'a [u8]) -> Option<Elements<'a>> {
        let word =
            |index: usize| array.get(index..)?.first_chunk::<4>().map(|word| u32::from_be_bytes(*word));
        match word(0)? {
            0 => Some(Elements { left: 0, rest: &[] }),
            // Dimensions, whether there are NULLs, the type; then the length and the lower bound.
            1 => Some(Elements { left: usize::try_from(word(12)?).ok()?, rest: array.get(20..)? }),
            _ => None,
        }
    }

    fn element(&mut self) -> Option<Option<&'a [u8]>> {
        self.left = self.left.checked_sub(1)?;
        value(&mut self.rest)
    }

    /// The next one, which is not NULL, as a text that says a `T`.
    fn said<T: Said>(&mut self) -> Option<T> {
        T::by(self.element()??)
    }

    /// The same where it may be NULL, which is the inner `None`.
    fn may_say<T: Said>(&mut self) -> Option<Option<T>> {
        match self.element()? {
            None => Some(None),
            Some(text) => T::by(text).map(Some),
        }
    }

    fn is_over(&self) -> bool {
        self.left == 0 && self.rest.is_empty()
    }
}

/// What a text of the server's says, read without asking whether it is UTF-8.
trait Said: Sized {
    /// `None`: it says something else.
    fn by(text: &[u8]) -> Option<Self>;
}

impl Said for Lsn {
    fn by(text: &[u8]) -> Option<Lsn> {
        Lsn::from_text(text)
    }
}

impl Said for u32 {
    fn by(text: &[u8]) -> Option<u32> {
        let digit = |byte: u8| char::from(byte).to_digit(10);
        let (first, rest) = text.split_first()?;
        rest.iter().try_fold(digit(*first)?, |sum, byte| sum.checked_mul(10)?.checked_add(digit(*byte)?))
    }
}

impl Said for bool {
    fn by(text: &[u8]) -> Option<bool> {
        match text {
            b"true" => Some(true),
            b"false" => Some(false),
            _ => None,
        }
    }
}

/// A timeline as the names of files in `pg_wal` write it.
struct OfFile(TimelineId);

impl Said for OfFile {
    fn by(text: &[u8]) -> Option<OfFile> {
        let digits: [u8; 8] = text.try_into().ok()?;
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let timeline = digits.into_iter().try_fold(0, |sum, byte| Some(sum << 4 | digit(byte)?))?;
        Some(OfFile(TimelineId(timeline)))
    }
}

impl Said for Snapshot {
    fn by(text: &[u8]) -> Option<Snapshot> {
        Snapshot::parse(std::str::from_utf8(text).ok()?)
    }
}

/// The row that answers a sampler's question; with the sizes of a WAL page and segment.
pub(super) fn sample(row: &[u8], (block, segment): (u64, u64)) -> Option<SampleAnswer> {
    let [array] = columns(row)?;
    let mut fields = Elements::of(array?)?;
    let answer = match fields.element()?? {
        b"primary" => {
            let snapshot: Snapshot = fields.said()?;
            let (insert, flush) = (fields.said()?, fields.said()?);
            SampleAnswer::Primary(PrimarySample {
                insert: round_down_page_header(insert, block, segment),
                flush,
                next_xid: widen_xid(fields.said()?, snapshot.xmax),
                timeline: fields.said::<OfFile>()?.0,
                snapshot,
            })
        }
        b"replica" => SampleAnswer::Replica(ReplicaSample {
            receive: fields.may_say()?,
            replay: fields.may_say()?,
            // A walreceiver that has not begun shows 0.
            received_timeline: fields.may_say()?.filter(|timeline| *timeline > 0).map(TimelineId),
            archive: fields.may_say()?.unwrap_or(true),
            newest_history: fields.may_say::<OfFile>()?.map(|of_file| of_file.0),
            receiver: fields.may_say()?,
        }),
        _ => return None,
    };
    fields.is_over().then_some(answer)
}

/// The row that says which transactions do not commit. `None`: it does not say.
pub(super) fn not_committing(row: &[u8]) -> Option<(Lsn, Vec<u64>)> {
    let [position, held] = columns(row)?;
    let position = text(position)?.parse().ok()?;
    let mut xids = Vec::new();
    if let Some(held) = held {
        let mut elements = Elements::of(held)?;
        while elements.left > 0 {
            xids.push(int8(elements.element()?)?);
        }
    }
    Some((position, xids))
}

/// A parameter that is an array of int8.
pub(super) fn int8_array(values: &[u64]) -> Vec<u8> {
    const INT8: u32 = 20;
    let count = u32::try_from(values.len()).expect("a question names a few hundred at most");
    let head = if values.is_empty() { &[0, 0, INT8][..] } else { &[1, 0, INT8, count, 1][..] };
    let mut out: Vec<u8> = head.iter().flat_map(|word| word.to_be_bytes()).collect();
    for value in values {
        out.extend_from_slice(&8u32.to_be_bytes());
        out.extend_from_slice(&value.to_be_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZES: (u64, u64) = (8192, 16 << 20);

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        wire::put(&mut out, tag, |out| out.extend_from_slice(body));
        out
    }

    fn array(elements: &[Option<&str>]) -> Vec<u8> {
        let count = u32::try_from(elements.len()).unwrap();
        let mut out: Vec<u8> =
            [1, 1, 25, count, 1].iter().flat_map(|word: &u32| word.to_be_bytes()).collect();
        elements.iter().for_each(|element| put_value(&mut out, element.map(str::as_bytes)));
        out
    }

    fn put_value(out: &mut Vec<u8>, value: Option<&[u8]>) {
        let length = value.map_or(-1, |value| i32::try_from(value.len()).unwrap());
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(value.unwrap_or_default());
    }

    fn row(values: &[Option<&[u8]>]) -> Vec<u8> {
        let mut out = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        values.iter().for_each(|value| put_value(&mut out, *value));
        out
    }

    const PRIMARY: [Option<&str>; 6] = [
        Some("primary"),
        Some("790:812:790,801"),
        Some("16/B374D848"),
        Some("16/B3000000"),
        Some("815"),
        Some("0000000A"),
    ];
    const REPLICA: [Option<&str>; 7] =
        [Some("replica"), Some("0/3000060"), Some("0/3000028"), Some("2"), Some("false"), None, Some("4711")];

    fn primary() -> SampleAnswer {
        SampleAnswer::Primary(PrimarySample {
            snapshot: Snapshot { xmax: 812, xip: vec![790, 801] },
            insert: Lsn(0x16_B374_D848),
            flush: Lsn(0x16_B300_0000),
            next_xid: 815,
            timeline: TimelineId(10),
        })
    }

    fn read(fields: &[Option<&str>]) -> Option<SampleAnswer> {
        sample(&row(&[Some(&array(fields))]), SIZES)
    }

    fn answer_to_a_sample() -> Vec<u8> {
        let mut bytes = message(b'S', b"TimeZone\0UTC\0");
        bytes.extend(message(b'2', b""));
        bytes.extend(message(b'N', b"SNOTICE\0\0"));
        bytes.extend(message(b'D', &row(&[Some(&array(&PRIMARY))])));
        bytes.extend(message(b'C', b"SELECT 1\0"));
        bytes.extend(message(b'A', &[0; 12]));
        bytes.extend(message(b'Z', b"I"));
        bytes
    }

    fn error(severity: &str) -> Vec<u8> {
        message(b'E', format!("S{severity}\0V{severity}\0C57P01\0Mtext\0RProcessInterrupts\0\0").as_bytes())
    }

    #[test]
    fn an_answer_is_the_same_wherever_it_is_split() {
        let bytes = answer_to_a_sample();
        for first in 0..=bytes.len() {
            for second in [first, first + 1, (first + bytes.len()).div_ceil(2), bytes.len()] {
                let mut answer = Answer::of(b"2DCZ", 0);
                for end in [first, second.min(bytes.len())] {
                    if end < bytes.len() {
                        assert_eq!(answer.take(&bytes[..end]), Ok(Progress::More), "{end}");
                    }
                }
                assert_eq!(answer.take(&bytes), Ok(Progress::Whole));
                assert_eq!(answer.taken(), bytes.len());
                assert_eq!(sample(&bytes[answer.row()], SIZES), Some(primary()));
            }
        }
    }

    #[test]
    fn several_answers_are_told_apart_and_what_follows_is_left() {
        let mut bytes = answer_to_a_sample();
        let second = bytes.len();
        bytes.extend(message(b'1', b""));
        bytes.extend(message(b'Z', b"I"));
        let third = bytes.len();
        bytes.extend(error("FATAL"));
        let mut answer = Answer::of(b"2DCZ", 0);
        assert_eq!((answer.take(&bytes), answer.taken()), (Ok(Progress::Whole), second));
        let mut answer = Answer::of(b"1Z", second);
        assert_eq!((answer.take(&bytes), answer.taken()), (Ok(Progress::Whole), third));
        assert!(answer.row().is_empty());
        let mut unasked = Answer::none(third);
        assert_eq!(unasked.take(&bytes), Ok(Progress::Ended));
        assert_eq!(wire::error_fields(&bytes[unasked.error()]).routine, b"ProcessInterrupts");
    }

    #[test]
    fn an_error_is_the_end_unless_the_node_goes_on() {
        for end in 0..error("FATAL").len() {
            let mut answer = Answer::of(b"2DCZ", 0);
            assert_eq!(answer.take(&error("FATAL")[..end]), Ok(Progress::More));
            assert_eq!(answer.take(&error("FATAL")), Ok(Progress::Ended));
        }
        let mut bytes = message(b'2', b"");
        bytes.extend(error("ERROR"));
        let mut answer = Answer::of(b"2DCZ", 0);
        assert_eq!(answer.take(&bytes), Ok(Progress::More));
        bytes.extend(message(b'Z', b"I"));
        assert_eq!(answer.take(&bytes), Ok(Progress::Refused));
        assert_eq!(wire::error_fields(&bytes[answer.error()]).sqlstate, b"57P01");
        // Nobody asked; and one without a severity that is not translated.
        assert_eq!(Answer::none(0).take(&error("ERROR")), Ok(Progress::Ended));
        assert_eq!(Answer::of(b"Z", 0).take(&message(b'E', b"SERROR\0\0")), Ok(Progress::Ended));
    }

    #[test]
    fn what_was_not_asked_for_is_no_answer() {
        let whole = row(&[Some(&array(&PRIMARY))]);
        let check = |messages: &[(u8, &[u8])]| {
            let bytes: Vec<u8> = messages.iter().flat_map(|(tag, body)| message(*tag, body)).collect();
            let mut answer = Answer::of(b"2DCZ", 0);
            assert!(answer.take(&bytes).is_err(), "{messages:?}");
        };
        check(&[(b'D', &whole)]);
        check(&[(b'2', b""), (b'C', b"SELECT 0\0")]);
        check(&[(b'2', b""), (b'Z', b"I")]);
        check(&[(b'2', b""), (b'D', &whole), (b'D', &whole)]);
        check(&[(b'2', b""), (b'D', &whole), (b'C', b"SELECT 1\0"), (b'Z', b"T")]);
        check(&[(b'2', b""), (b'D', &whole), (b'C', b"SELECT 1\0"), (b'Z', b"")]);
        check(&[(b'2', b""), (b'2', b"")]);
        check(&[(b'G', b"")]);
        check(&[(b'R', &[0; 4])]);
        assert!(Answer::none(0).take(&message(b'Z', b"I")).is_err(), "an answer that nobody is waiting for");
        assert!(Answer::of(b"2DCZ", 0).take(b"2\0\0\0\x03").is_err());
    }

    #[test]
    fn an_answer_that_is_too_long_is_refused_before_it_has_come() {
        let mut bytes = message(b'2', b"");
        let at = bytes.len();
        bytes.push(b'D');
        let longest = u32::try_from(LARGEST - at - 1).unwrap();
        for (length, refused) in [(longest, false), (longest + 1, true), (0x3fff_fff0, true)] {
            bytes.truncate(at + 1);
            bytes.extend_from_slice(&length.to_be_bytes());
            assert_eq!(Answer::of(b"2DCZ", 0).take(&bytes).is_err(), refused, "{length}");
        }
    }

    #[test]
    fn a_sample_is_read_as_the_server_writes_it() {
        assert_eq!(read(&PRIMARY), Some(primary()));
        let replica = ReplicaSample {
            receive: Some(Lsn(0x300_0060)),
            replay: Some(Lsn(0x300_0028)),
            received_timeline: Some(TimelineId(2)),
            archive: false,
            newest_history: None,
            receiver: Some(4711),
        };
        assert_eq!(read(&REPLICA), Some(SampleAnswer::Replica(replica)));
        let alone = [Some("replica"), None, None, None, Some("true"), Some("0000000B"), None];
        let expected = ReplicaSample {
            receive: None,
            replay: None,
            received_timeline: None,
            archive: true,
            newest_history: Some(TimelineId(11)),
            receiver: None,
        };
        assert_eq!(read(&alone), Some(SampleAnswer::Replica(expected)));
        let not_begun = [Some("replica"), None, None, Some("0"), Some("true"), Some("0000000B"), None];
        assert_eq!(read(&not_begun), read(&alone));
    }

    #[test]
    fn a_sample_with_a_field_that_is_not_understood_is_none() {
        for fields in [&PRIMARY[..], &REPLICA[..]] {
            for index in 0..fields.len() {
                let mut bent = fields.to_vec();
                bent[index] = Some("x?");
                assert_eq!(read(&bent), None, "{index}");
                bent.remove(index);
                assert_eq!(read(&bent), None, "{index}");
            }
            assert_eq!(read(&[fields, &[None]].concat()), None, "one too many");
        }
        for index in 0..PRIMARY.len() {
            let mut bent = PRIMARY;
            bent[index] = None;
            assert_eq!(read(&bent), None, "{index}");
        }
        assert_eq!(read(&[]), None);
        assert_eq!(sample(&row(&[None]), SIZES), None);
        let (whole, flat) = (array(&PRIMARY), [0u8; 12]);
        assert_eq!(sample(&row(&[Some(&whole), Some(&whole)]), SIZES), None);
        assert_eq!(sample(&row(&[Some(&flat)]), SIZES), None);
        for end in 0..whole.len() {
            assert_eq!(sample(&row(&[Some(&whole[..end])]), SIZES), None, "{end}");
        }
        assert_eq!(sample(&row(&[Some(&[whole, vec![0]].concat())]), SIZES), None);
    }

    #[test]
    fn an_array_of_ids_is_written_and_read_as_the_server_does() {
        for xids in [vec![], vec![3], vec![7, 1 << 40, 9]] {
            let bytes = row(&[Some(b"0/64"), Some(&int8_array(&xids))]);
            assert_eq!(not_committing(&bytes), Some((Lsn(0x64), xids)));
        }
        assert_eq!(not_committing(&row(&[Some(b"0/64"), None])), Some((Lsn(0x64), vec![])));
        assert_eq!(not_committing(&row(&[None, None])), None);
        assert_eq!(not_committing(&row(&[Some(b"0/64"), Some(&[0, 0, 0, 2])])), None);
        assert_eq!(not_committing(&row(&[Some(b"0/64"), Some(&array(&[None]))])), None);
    }

    proptest! {
        #[test]
        fn a_bent_answer_never_panics(at in 0usize..400, value: u8, cut in 0usize..400) {
            let mut bytes = answer_to_a_sample();
            let at = at % bytes.len();
            bytes[at] = value;
            bytes.truncate(cut);
            let mut answer = Answer::of(b"2DCZ", 0);
            if answer.take(&bytes) == Ok(Progress::Whole) {
                let _ = sample(&bytes[answer.row()], SIZES);
            }
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (sample(&bytes, SIZES), not_committing(&bytes), Answer::of(b"12DCZ", 0).take(&bytes));
            let array = row(&[Some(&bytes)]);
            let _ = sample(&array, SIZES);
        }
    }
}
