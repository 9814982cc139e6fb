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
        let half = |digits: &str| {
            let plausible = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if !plausible {
                return Err(InvalidLsn);
            }
            u64::from_str_radix(digits, 16).map_err(|_| InvalidLsn)
        };
        let (high, low) = text.split_once('/').ok_or(InvalidLsn)?;
        Ok(Lsn(half(high)? << 32 | half(low)?))
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
