//! What a command answers, and how its values are written. Pure.

use std::borrow::Cow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{BufMut, BytesMut};

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `text`
    Text,
    /// `int8`
    Int,
    /// `float8`
    Float,
    /// `bool`
    Bool,
    /// `timestamptz`
    Time,
}

/// A column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: Cow<'static, str>,
    /// What it holds.
    pub kind: Kind,
}

/// A value; each column's values are of its kind, or null.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Nothing is known.
    Null,
    /// Of [`Kind::Text`].
    Text(String),
    /// Of [`Kind::Int`].
    Int(i64),
    /// Of [`Kind::Float`].
    Float(f64),
    /// Of [`Kind::Bool`].
    Bool(bool),
    /// Of [`Kind::Time`].
    Time(SystemTime),
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Text(text)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Value {
        Value::Bool(flag)
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Value {
        Value::Int(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Value {
        Value::Int(number.into())
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Value {
        Value::from(number as u64)
    }
}

/// In seconds, to the microsecond.
impl From<Duration> for Value {
    fn from(time: Duration) -> Value {
        Value::Float(time.as_micros() as f64 / 1e6)
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Value {
        value.map_or(Value::Null, Into::into)
    }
}

/// Rows, made as they are asked for.
pub type Rows = Box<dyn Iterator<Item = Vec<Value>> + Send>;

/// 2000-01-01, from which PostgreSQL counts.
const EPOCH: Duration = Duration::from_secs(946_684_800);

impl Value {
    /// Writes it as a DataRow has it: its length, and its bytes as text or in binary.
    pub fn put(&self, binary: bool, out: &mut BytesMut) {
        let mut bytes = BytesMut::new();
        match self {
            Value::Null => return out.put_i32(-1),
            Value::Text(text) => bytes.put_slice(text.as_bytes()),
            Value::Int(number) if binary => bytes.put_i64(*number),
            Value::Int(number) => bytes.put_slice(number.to_string().as_bytes()),
            Value::Float(number) if binary => bytes.put_f64(*number),
            Value::Float(number) => bytes.put_slice(number.to_string().as_bytes()),
            Value::Bool(flag) if binary => bytes.put_u8(u8::from(*flag)),
            Value::Bool(flag) => bytes.put_u8(if *flag { b't' } else { b'f' }),
            Value::Time(time) => {
                let since_1970 = time.duration_since(UNIX_EPOCH).unwrap_or_default();
                if binary {
                    let micros = since_1970.as_micros() as i64 - EPOCH.as_micros() as i64;
                    bytes.put_i64(micros);
                } else {
                    bytes.put_slice(timestamp(since_1970).as_bytes());
                }
            }
        }
        out.put_i32(i32::try_from(bytes.len()).unwrap_or(i32::MAX));
        out.put_slice(&bytes);
    }
}

/// `2026-11-21 15:35:31.123456+00`
fn timestamp(since_1970: Duration) -> String {
    let seconds = since_1970.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let micros = since_1970.subsec_micros();
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}+00")
}

/// Year, month and day of the civil calendar, of a day counted from 1970-01-01. Years are taken to begin in March, so
/// that the leap day is their last (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms").
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(value: Value, binary: bool) -> Vec<u8> {
        let mut out = BytesMut::new();
        value.put(binary, &mut out);
        out.to_vec()
    }

    #[test]
    fn values_are_written_as_postgresql_writes_them() {
        assert_eq!(put(Value::Null, false), [255, 255, 255, 255]);
        assert_eq!(put(Value::from("é"), true), [0, 0, 0, 2, 0xC3, 0xA9]);
        assert_eq!(put(Value::Int(-7), false), [0, 0, 0, 2, b'-', b'7']);
        assert_eq!(put(Value::from(258_u64), true), [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(put(Value::from(true), false), [0, 0, 0, 1, b't']);
        assert_eq!(put(Value::from(Duration::from_millis(1500)), false), b"\0\0\0\x031.5");
        let y2k = Value::Time(UNIX_EPOCH + EPOCH + Duration::from_micros(1));
        assert_eq!(put(y2k, true), [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn days_have_their_dates() {
        let shown = |seconds| timestamp(Duration::from_secs(seconds));
        assert_eq!(shown(0), "1970-01-01 00:00:00.000000+00");
        assert_eq!(shown(951_782_399), "2000-02-28 23:59:59.000000+00");
        assert_eq!(shown(951_782_400), "2000-02-29 00:00:00.000000+00");
        assert_eq!(shown(1_795_275_331), "2026-11-21 15:35:31.000000+00");
        assert_eq!(shown(4_107_542_400), "2100-03-01 00:00:00.000000+00");
    }
}
