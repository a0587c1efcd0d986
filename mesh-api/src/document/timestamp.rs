//! `metadata.creationTimestamp`: seconds since 1970 as the text that Kubernetes writes, and back.

/// The last second that has four digits for its year.
const LAST: u64 = 253_402_300_799;
const DAY: u64 = 86_400;

/// `2026-01-31T12:00:00Z`; times after the year 9999 are brought down to its end.
pub(super) fn print(unix: u64) -> String {
    let unix = unix.min(LAST);
    let (year, month, day) = civil(unix / DAY);
    let second = unix % DAY;
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

/// The form that [`print`] writes, and nothing else; years from 1970.
pub(super) fn parse(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let number = |text: &str, digits: usize| -> Option<u64> {
        let good = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit());
        if good { text.parse().ok() } else { None }
    };
    let mut parts = date.splitn(3, '-');
    let year = number(parts.next()?, 4)?;
    let (month, day) = (number(parts.next()?, 2)?, number(parts.next()?, 2)?);
    let mut parts = time.splitn(3, ':');
    let (hour, minute, second) = (
        number(parts.next()?, 2)?,
        number(parts.next()?, 2)?,
        number(parts.next()?, 2)?,
    );
    if year < 1970 || !(1..=12).contains(&month) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let days = days_before(year, month) + day.checked_sub(1)?;
    // A 31st of a month that has none would come out as another day.
    (civil(days) == (year, month, day)).then_some(days * DAY + hour * 3600 + minute * 60 + second)
}

/// Days from 1970-01-01 to the first of a month, by counting from March, so that the leap day comes last.
fn days_before(year: u64, month: u64) -> u64 {
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let leap_days = year / 4 - year / 100 + year / 400;
    // (153 m + 2) / 5 are the days before the m-th month after March; 719468 are those before 1970 in this count.
    year * 365 + leap_days + (153 * month + 2) / 5 - 719_468
}

/// Year, month and day of a day since 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Eras of 400 years have 146097 days.
    let from_march_0 = days + 719_468;
    let (era, of_era) = (from_march_0 / 146_097, from_march_0 % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next_year) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year_of_era + next_year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_are_read_or_refused() {
        let cases = [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2000-02-29T23:59:59Z", Some(951_868_799)),
            ("2026-11-21T08:00:00Z", Some(1_795_248_000)),
            ("9999-12-31T23:59:59Z", Some(LAST)),
            ("1969-12-31T23:59:59Z", None),
            ("2023-02-29T00:00:00Z", None),
            ("2023-04-31T00:00:00Z", None),
            ("2023-04-00T00:00:00Z", None),
            ("2023-13-01T00:00:00Z", None),
            ("2023-01-01T24:00:00Z", None),
            ("2023-01-01T00:00:00+00:00", None),
            ("2023-1-1T00:00:00Z", None),
            ("", None),
        ];
        for (text, unix) in cases {
            assert_eq!(parse(text), unix, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn times_read_back(unix in 0..=LAST) {
            prop_assert_eq!(parse(&print(unix)), Some(unix));
        }
    }
}
