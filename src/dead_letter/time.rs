//! Moments in UTC, as text and as microseconds since 1970. Pure.

use crate::config::read_duration;

const SECOND: i64 = 1_000_000;
const DAY: i64 = 86_400 * SECOND;

/// `microseconds` since 1970 such as `2026-05-04T03:02:01.123Z`.
#[must_use]
pub fn format(microseconds: i64) -> String {
    let (days, rest) = (
        microseconds.div_euclid(DAY),
        microseconds.rem_euclid(DAY) / 1_000,
    );
    let (year, month, day) = date_of(days);
    let (seconds, milliseconds) = (rest / 1_000, rest % 1_000);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

/// Reads a date, a date and time in UTC, or a duration before `now`: such as
/// `2026-05-04`, `2026-05-04T03:02:01Z` (or with a space, without the `Z`, with
/// a fraction), `90m`, `2d`.
///
/// # Errors
///
/// What is wrong with `text`, and how to write it.
pub fn read(text: &str, now: i64) -> Result<i64, String> {
    if text.get(4..5) != Some("-") {
        let ago = read_duration(text).map_err(|error| {
            format!("{error}; or give a moment in UTC, like 2026-05-04 or 2026-05-04T03:02:01Z")
        })?;
        let ago = i64::try_from(ago.as_micros()).unwrap_or(i64::MAX);
        return Ok(now.saturating_sub(ago));
    }
    moment(text).ok_or_else(|| {
        format!(
            "is no moment: {text:?}; write it in UTC like 2026-05-04 or 2026-05-04T03:02:01Z, or \
             say how long ago, like 90m or 2d"
        )
    })
}

fn moment(text: &str) -> Option<i64> {
    let text = text.strip_suffix('Z').unwrap_or(text);
    let (date, time) = match text.split_once(['T', ' ']) {
        Some((date, time)) => (date, time),
        None => (text, "00:00"),
    };
    let mut parts = date.split('-');
    let (year, month, day) = (
        number(parts.next()?, 4)?,
        number(parts.next()?, 2)?,
        number(parts.next()?, 2)?,
    );
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let mut clock = time.split(':');
    let (hour, minute) = (number(clock.next()?, 2)?, number(clock.next()?, 2)?);
    let second = clock.next().map_or(Some(0), |text| number(text, 2))?;
    let days = days_of(year, month, day);
    let is_real = parts.next().is_none()
        && clock.next().is_none()
        && date_of(days) == (year, month, day)
        && (hour < 24 && minute < 60 && second < 60);
    if !is_real || fraction.is_empty() || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000".chars()).take(6).collect();
    let seconds = (hour * 60 + minute) * 60 + second;
    Some(days * DAY + seconds * SECOND + digits.parse::<i64>().ok()?)
}

fn number(text: &str, digits: usize) -> Option<i64> {
    let sound = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| sound)
}

/// Days since 1970 of a date of the Gregorian calendar, by eras of 400 years
/// that begin in March.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let year_of_era = year.rem_euclid(400);
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn moments_are_read_in_every_spelling() {
        let at = 1_777_863_721 * SECOND;
        assert_eq!(format(at), "2026-05-04T03:02:01.000Z");
        for text in [
            "2026-05-04T03:02:01Z",
            "2026-05-04 03:02:01",
            "2026-05-04T03:02:01.0Z",
        ] {
            assert_eq!(read(text, 0), Ok(at), "{text}");
        }
        assert_eq!(read("2026-05-04", 0), Ok(at - (3 * 3_600 + 121) * SECOND));
        assert_eq!(read("2026-05-04T03:02", 0), Ok(at - SECOND));
        assert_eq!(read("1m30s", at), Ok(at - 90 * SECOND));
        assert_eq!(format(0), "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn what_is_no_moment_is_refused_with_the_way_out() {
        for text in [
            "2026-02-30",
            "2026-13-01",
            "2026-05-04T24:00",
            "2026-05-04T03",
            "2026-05-04T03:02:01+02",
            "2026-5-4",
            "2026-05-04T03:02:01.Z",
            "yesterday",
            "",
            "12",
            "2026-",
            "ä2026-",
        ] {
            let error = read(text, 0).unwrap_err();
            assert!(error.contains("2026-05-04T03:02:01Z"), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_printed_moment_reads_back_to_the_millisecond(at in 0i64..253_402_300_800_000_000) {
            prop_assert_eq!(read(&format(at), 0), Ok(at - at % 1_000));
        }

        #[test]
        fn reading_a_moment_never_panics(text in "\\PC*|[0-9TZ:. -]{0,30}") {
            let _ = read(&text, 0);
        }
    }
}
