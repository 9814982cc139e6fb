//! Positions in the write-ahead log (WAL). Pure.
//!
//! A position means something only together with the timeline it was read on: after a failover two
//! nodes may hold the same number for different histories. So [`Lsn`] is ordered, and
//! [`WalPosition`] deliberately is not.

use std::fmt;
use std::str::FromStr;

/// A byte position in the write-ahead log of one timeline, as PostgreSQL's `pg_lsn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The position before all others: "nothing has been seen yet".
    pub const ZERO: Lsn = Lsn(0);

    /// Reads it as the server writes it; `None`: it is not one.
    pub fn from_text(text: &[u8]) -> Option<Lsn> {
        let (mut high, mut half, mut digits) = (None, 0, 0);
        for byte in text {
            if *byte == b'/' && digits > 0 && high.is_none() {
                (high, half, digits) = (Some(half), 0, 0);
            } else {
                digits += 1;
                half = half << 4 | u64::from(char::from(*byte).to_digit(16).filter(|_| digits <= 8)?);
            }
        }
        Some(Lsn(high? << 32 | half)).filter(|_| digits > 0)
    }

    /// Bytes from `earlier` up to `self`; 0 when `self` is not past it.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// The text is not a `pg_lsn`: two hexadecimal numbers of at most eight digits around a slash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidLsn;

impl fmt::Display for InvalidLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "invalid WAL position: expected two hexadecimal numbers around a slash, as in 16/B374D848",
        )
    }
}

impl std::error::Error for InvalidLsn {}

impl FromStr for Lsn {
    type Err = InvalidLsn;

    fn from_str(text: &str) -> Result<Lsn, InvalidLsn> {
        Lsn::from_text(text.as_bytes()).ok_or(InvalidLsn)
    }
}

/// A timeline of the cluster's history: raised by one at each promotion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimelineId(pub u32);

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A position on a timeline. It has no order: positions of two timelines compare only through the
/// point where one forked off the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WalPosition {
    /// The timeline that `lsn` was read on.
    pub timeline: TimelineId,
    /// The byte position.
    pub lsn: Lsn,
}

/// Bytes of the header that starts each WAL page.
const PAGE_HEADER: u64 = 24;
/// Bytes of the longer header that starts the first page of each WAL segment.
const SEGMENT_HEADER: u64 = 40;

/// An insert position rounded down over a page or segment header.
///
/// The server's insert position is where the *next* record would start. When the last record ended
/// exactly at the end of a page, that is behind the next page's header: a position that no replica
/// reaches until something more is written, which on an idle primary may take seconds. Nothing can end
/// inside a header, so the page's start covers the same records.
///
/// `wal_block_size` and `wal_segment_size` are the server's, in bytes; with values no server can have
/// (zero, or a segment smaller than a block) the position is returned as it is.
pub fn round_down_page_header(lsn: Lsn, wal_block_size: u64, wal_segment_size: u64) -> Lsn {
    if wal_block_size <= SEGMENT_HEADER || wal_segment_size < wal_block_size {
        return lsn;
    }
    let in_page = lsn.0 % wal_block_size;
    let page = lsn.0 - in_page;
    let header = if page.is_multiple_of(wal_segment_size) { SEGMENT_HEADER } else { PAGE_HEADER };
    if in_page == header { Lsn(page) } else { lsn }
}

/// What recovery may write at the start of a page before its checkpoint, with the page's header: that the record
/// which ran into the page is void (XLOG_OVERWRITE_CONTRECORD, 48 bytes), and whether pages are written whole
/// (XLOG_FPW_CHANGE, 32 bytes). Sizes of PostgreSQL 15 to 18, aligned.
const AFTER_TORN_RECORD: u64 = SEGMENT_HEADER + 48 + 32;

/// Up to where what was logged before a crash is there for certain, when the checkpoint that ended recovery began at `end`.
///
/// The server writes WAL in pages, so the last record that a crash leaves often has its beginning in one page and its end
/// in the next, which was never written. Recovery then goes on at the start of that next page, and its checkpoint comes
/// to lie beyond where the lost record had ended. So a checkpoint that close to a page's start vouches for the page before
/// only.
pub fn whole_until(end: Lsn, wal_block_size: u64) -> Lsn {
    match end.0.checked_rem(wal_block_size) {
        Some(in_page) if in_page <= AFTER_TORN_RECORD => Lsn(end.0 - in_page),
        _ => end,
    }
}

/// The timelines that a timeline descends from, and where each was left: the content of a
/// `.history` file in `pg_wal`. Timeline 1 has no such file and an empty history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TimelineHistory {
    left: Vec<(TimelineId, Lsn)>,
}

/// The text is not a timeline history file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidHistory;

impl fmt::Display for InvalidHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("invalid timeline history: expected lines of timeline, WAL position and reason")
    }
}

impl std::error::Error for InvalidHistory {}

impl TimelineHistory {
    /// Reads the file's text: a line per ancestor, oldest first; empty lines and `#` comments are
    /// skipped. Timelines that do not rise are refused, as the server does.
    pub fn parse(text: &str) -> Result<TimelineHistory, InvalidHistory> {
        let mut left: Vec<(TimelineId, Lsn)> = Vec::new();
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let mut fields = line.split_ascii_whitespace();
            let timeline =
                fields.next().and_then(|f| f.parse().ok()).map(TimelineId).ok_or(InvalidHistory)?;
            let lsn = fields.next().and_then(|f| f.parse().ok()).ok_or(InvalidHistory)?;
            if left.last().is_some_and(|(earlier, _)| *earlier >= timeline) {
                return Err(InvalidHistory);
            }
            left.push((timeline, lsn));
        }
        Ok(TimelineHistory { left })
    }

    /// Where `ancestor` was left for the next timeline; `None` when it is not an ancestor.
    pub fn fork_of(&self, ancestor: TimelineId) -> Option<Lsn> {
        self.left.iter().find(|(timeline, _)| *timeline == ancestor).map(|(_, lsn)| *lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: u64 = 8192;
    const SEGMENT: u64 = 16 << 20;

    #[test]
    fn a_checkpoint_behind_a_torn_record_vouches_for_the_page_before_only() {
        for (end, whole) in
            [(0x6000, 0x6000), (0x6018, 0x6000), (0x6068, 0x6000), (0x6079, 0x6079), (0x5ff8, 0x5ff8)]
        {
            assert_eq!(whole_until(Lsn(end), BLOCK), Lsn(whole));
        }
        assert_eq!(whole_until(Lsn(0x6018), 0), Lsn(0x6018));
    }

    #[test]
    fn an_lsn_is_written_and_read_as_the_server_does() {
        for (text, value) in [("0/0", 0), ("16/B374D848", 0x16_B374_D848), ("FFFFFFFF/FFFFFFFF", u64::MAX)] {
            assert_eq!(text.parse(), Ok(Lsn(value)));
            assert_eq!(Lsn(value).to_string(), text);
        }
        for bad in
            ["", "/", "0", "0/", "/0", "+1/0", "0/-1", "0/ 1", "123456789/0", "0/123456789", "g/0", "0/0/0"]
        {
            assert_eq!(bad.parse::<Lsn>(), Err(InvalidLsn), "{bad:?}");
        }
    }

    #[test]
    fn a_position_behind_a_header_is_the_start_of_its_page() {
        for (at, rounded) in [
            (SEGMENT + 40, SEGMENT),
            (SEGMENT + 24, SEGMENT + 24),
            (SEGMENT + BLOCK + 24, SEGMENT + BLOCK),
            (SEGMENT + BLOCK + 40, SEGMENT + BLOCK + 40),
            (SEGMENT + BLOCK, SEGMENT + BLOCK),
            (SEGMENT + BLOCK + 32, SEGMENT + BLOCK + 32),
            (0, 0),
        ] {
            assert_eq!(round_down_page_header(Lsn(at), BLOCK, SEGMENT), Lsn(rounded), "{at:#x}");
        }
        assert_eq!(round_down_page_header(Lsn(77), 0, 0), Lsn(77));
    }

    #[test]
    fn a_history_tells_where_each_ancestor_was_left() {
        let text = "1\t0/83D58E0\tno recovery target specified\n\n# note\n2\t0/9000000\tbefore 2026-01-01\n";
        let history = TimelineHistory::parse(text).unwrap();
        assert_eq!(history.fork_of(TimelineId(1)), Some(Lsn(0x83D_58E0)));
        assert_eq!(history.fork_of(TimelineId(2)), Some(Lsn(0x900_0000)));
        assert_eq!(history.fork_of(TimelineId(3)), None);
        assert_eq!(TimelineHistory::parse(""), Ok(TimelineHistory::default()));
        for bad in ["x", "1", "1 nonsense", "2 0/1\n1 0/2", "1 0/1\n1 0/2"] {
            assert_eq!(TimelineHistory::parse(bad), Err(InvalidHistory), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn text_and_value_agree(value: u64) {
            prop_assert_eq!(Lsn(value).to_string().parse(), Ok(Lsn(value)));
        }

        #[test]
        fn rounding_takes_off_one_header_or_nothing(at: u64, block in 9u32..17, segment in 20u32..31) {
            let (block, segment) = (1u64 << block, 1u64 << segment);
            let rounded = round_down_page_header(Lsn(at), block, segment);
            let taken = at - rounded.0;
            prop_assert!([0, PAGE_HEADER, SEGMENT_HEADER].contains(&taken));
            prop_assert!(taken == 0 || rounded.0.is_multiple_of(block));
            prop_assert_eq!(round_down_page_header(rounded, block, segment), rounded);
        }

        #[test]
        fn no_text_is_a_panic(text in ".{0,60}") {
            let _ = text.parse::<Lsn>();
            let _ = TimelineHistory::parse(&text);
        }
    }
}
