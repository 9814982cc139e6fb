//! Figures and times as people read them. Pure.

use std::time::Duration;

/// A time that something took, or lags: `0.4 ms`, `350 ms`, `4.2 s`, `3.5 min`.
pub fn seconds(time: f32) -> String {
    match time {
        t if t <= 0.0 => "0 ms".to_owned(),
        t if t < 0.001 => format!("{:.2} ms", t * 1000.0),
        t if t < 0.01 => format!("{:.1} ms", t * 1000.0),
        t if t < 1.0 => format!("{:.0} ms", t * 1000.0),
        t if t < 60.0 => format!("{t:.1} s"),
        t if t < 7200.0 => format!("{:.1} min", t / 60.0),
        t => format!("{:.1} h", t / 3600.0),
    }
}

/// A span in its greatest unit, rounded down: `45 s`, `10 min`, `3 h`, `12 days`.
pub fn ago(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

/// A size: `168 B`, `4.0 KiB`.
pub fn bytes(size: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if size < 1024 {
        return format!("{size} B");
    }
    let mut scaled = size as f64 / 1024.0;
    let mut unit = 0;
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.1} {}", UNITS[unit])
}

/// Things a second: `0`, `3.4`, `87`, `12 400`.
pub fn rate(per_second: f32) -> String {
    if per_second > 0.0 && per_second < 10.0 && per_second.fract() > 0.0 {
        return format!("{per_second:.1}");
    }
    let digits = format!("{:.0}", per_second.max(0.0));
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            // A narrow space that does not break.
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// `part` of `whole`; only all is 100 %, only none 0 %.
pub fn percent(part: u64, whole: u64) -> String {
    if part == whole {
        return "100 %".to_owned();
    }
    let share = part as f64 * 100.0 / whole.max(1) as f64;
    let shown = share.clamp(if part == 0 { 0.0 } else { 0.1 }, 99.9);
    if part == 0 { "0 %".to_owned() } else { format!("{shown:.1} %") }
}

/// `2026-11-21 15:34:07`, of a time since 1970 in UTC.
pub fn clock_time(since_1970: Duration) -> String {
    let seconds = since_1970.as_secs();
    let (year, month, day) = civil(seconds / 86_400);
    let of_day = seconds % 86_400;
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// Year, month and day of a count of days since 1970, by years that begin in March: the leap day is their last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_their_unit_and_few_digits() {
        let times = [
            (0.0, "0 ms"),
            (0.00042, "0.42 ms"),
            (0.0042, "4.2 ms"),
            (0.35, "350 ms"),
            (4.2, "4.2 s"),
            (210.0, "3.5 min"),
        ];
        for (time, shown) in times {
            assert_eq!(seconds(time), shown);
        }
        for (size, shown) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4.0 KiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(bytes(size), shown);
        }
        for (count, shown) in
            [(0.0, "0"), (3.44, "3.4"), (7.0, "7"), (87.2, "87"), (12_400.0, "12\u{202f}400")]
        {
            assert_eq!(rate(count), shown);
        }
        for (part, whole, shown) in [
            (0, 0, "100 %"),
            (0, 5, "0 %"),
            (99_999, 100_000, "99.9 %"),
            (1, 100_000, "0.1 %"),
            (5, 5, "100 %"),
        ] {
            assert_eq!(percent(part, whole), shown);
        }
        for (time, shown) in [(45, "45 s"), (600, "10 min"), (10_000, "2 h"), (1_000_000, "11 days")] {
            assert_eq!(ago(Duration::from_secs(time)), shown);
        }
    }

    #[test]
    fn a_clock_shows_the_day_in_leap_years_and_others() {
        for (seconds, shown) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_709_164_799, "2024-02-28 23:59:59"),
            (1_709_251_199, "2024-02-29 23:59:59"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(clock_time(Duration::from_secs(seconds)), shown);
        }
    }
}
