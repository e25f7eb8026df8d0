//! `Retry-After`: how long a receiver asks to be left alone. Pure.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::defaults::RETRY_AFTER_MAX;

/// The wait that `value` asks for: a number of seconds, or an HTTP date. A date
/// counts from `date`, the receiver's own clock, or else from `now`. At most
/// [`RETRY_AFTER_MAX`]; `None` for what is neither, or asks for no wait.
#[must_use]
pub fn wait(value: &str, date: Option<&str>, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // So many digits that no number holds them: as long as it gets.
        value.parse().map_or(RETRY_AFTER_MAX, Duration::from_secs)
    } else {
        let now = match date.and_then(seconds) {
            Some(seconds) => seconds,
            None => i64::try_from(now.duration_since(UNIX_EPOCH).ok()?.as_secs()).ok()?,
        };
        let wait = seconds(value)?.checked_sub(now)?;
        Duration::from_secs(u64::try_from(wait).ok()?)
    };
    (!wait.is_zero()).then(|| wait.min(RETRY_AFTER_MAX))
}

/// Seconds since 1970 of an HTTP date in any of its three forms: `Sun, 06 Nov
/// 1994 08:49:37 GMT`, `Sunday, 06-Nov-94 08:49:37 GMT`, `Sun Nov  6 08:49:37
/// 1994`.
fn seconds(text: &str) -> Option<i64> {
    let words: Vec<&str> = text
        .split([' ', ',', '-'])
        .filter(|word| !word.is_empty())
        .collect();
    let (day, month, year, time) = match words.as_slice() {
        [_, day, month, year, time, "GMT"] => (day, month, year, time),
        [_, month, day, time, year] => (day, month, year, time),
        _ => return None,
    };
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let month = MONTHS.iter().position(|name| name == month)?;
    let day = number(day, 31)?;
    let year = match (year.len(), number(year, 9_999)?) {
        // Two digits, in the oldest form: the years around our own.
        (2, year) if year < 70 => year + 2_000,
        (2, year) => year + 1_900,
        (4, year) if year >= 1_970 => year,
        _ => return None,
    };
    let mut clock = time.split(':');
    let hour = number(clock.next()?, 23)?;
    let minute = number(clock.next()?, 59)?;
    // 60 is a leap second.
    let second = number(clock.next()?, 60)?;
    if clock.next().is_some() || day == 0 {
        return None;
    }
    let days = days_since_1970(year, i64::try_from(month).ok()? + 1, day);
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

/// At most four digits, and at most `most`.
fn number(text: &str, most: i64) -> Option<i64> {
    let digits = (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    let number = digits.then(|| text.parse().ok()).flatten()?;
    (number <= most).then_some(number)
}

/// Days from 1 January 1970, in the Gregorian calendar. The year begins in
/// March here, so that the leap day is its last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    year * 365 + year / 4 - year / 100 + year / 400 + (month * 306 + 5) / 10 + day - 719_469
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn every_form_of_date_is_the_same_moment() {
        for text in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(seconds(text), Some(784_111_777), "{text}");
        }
        assert_eq!(seconds("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(
            seconds("Thu, 29 Feb 2024 12:00:00 GMT"),
            Some(1_709_208_000)
        );
        assert_eq!(
            seconds("Fri, 31 Dec 2100 23:59:59 GMT"),
            Some(4_133_980_799)
        );
    }

    #[test]
    fn seconds_and_dates_are_waits_with_an_upper_bound() {
        let now = at(784_111_777);
        for (value, wait_for) in [
            ("120", Some(120)),
            (" 7 ", Some(7)),
            ("0", None),
            ("3601", Some(3600)),
            ("99999999999999999999999", Some(3600)),
            ("Sun, 06 Nov 1994 08:49:47 GMT", Some(10)),
            ("Sun, 06 Nov 1994 08:49:27 GMT", None),
            ("Sun, 06 Nov 2094 08:49:27 GMT", Some(3600)),
            ("", None),
            ("-5", None),
            ("1.5", None),
            ("soon", None),
            ("Sun, 06 Nov 1994 25:49:37 GMT", None),
            ("Sun, 00 Nov 1994 08:49:37 GMT", None),
        ] {
            assert_eq!(
                wait(value, None, now),
                wait_for.map(Duration::from_secs),
                "{value}"
            );
        }
    }

    #[test]
    fn a_date_counts_from_the_receivers_own_clock() {
        let date = Some("Sun, 06 Nov 1994 08:49:37 GMT");
        let value = "Sun, 06 Nov 1994 08:50:37 GMT";
        assert_eq!(wait(value, date, at(0)), Some(Duration::from_secs(60)));
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic_or_a_longer_wait(value in "\\PC{0,40}", day in "[A-Z][a-z]{2},? [0-9 -]{0,4}[A-Z][a-z]{2}[0-9: -]{0,20}(GMT)?") {
            for text in [&value, &day] {
                prop_assert!(wait(text, Some(&day), at(1)).is_none_or(|w| w <= RETRY_AFTER_MAX));
            }
        }

        #[test]
        fn days_follow_each_other(day in 0_i64..80_000) {
            // Every day of 219 years has a date whose next day is one more.
            let (mut year, mut rest) = (1970, day);
            let leap = |y: i64| y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
            while rest >= 365 + i64::from(leap(year)) {
                rest -= 365 + i64::from(leap(year));
                year += 1;
            }
            let lengths = [31, 28 + i64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            let mut month = 0;
            while rest >= lengths[month] {
                rest -= lengths[month];
                month += 1;
            }
            prop_assert_eq!(days_since_1970(year, month as i64 + 1, rest + 1), day);
        }
    }
}
