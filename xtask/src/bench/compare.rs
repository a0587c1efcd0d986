//! Two runs beside each other. A change counts only where the spreads of the rounds do not touch.

use super::report::{Report, Row, Spread, show};

/// What became of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Better,
    Worse,
    /// Within the spread of the rounds.
    Same,
}

/// Prints what changed from `base` to `new`.
pub fn print(base: &Report, new: &Report) {
    println!("\nbase: {}\nnew:  {}", base.headline(), new.headline());
    let before = base.rows();
    let mut figure = "";
    for row in new.rows() {
        let Some(old) = before
            .iter()
            .find(|old| old.figure == row.figure && old.system == row.system)
        else {
            continue;
        };
        if row.figure != figure {
            figure = row.figure;
            println!("\n{figure}, {}", row.unit);
        }
        let (change, percent) = judge(old, &row);
        let ratios = match (old.ratio, row.ratio) {
            (Some(old), Some(new)) => format!("x{} -> x{}", show(old.median), show(new.median)),
            _ => String::new(),
        };
        let word = match change {
            Change::Better => "better",
            Change::Worse => "WORSE",
            Change::Same => "",
        };
        println!(
            "  {:<42} {:>10} -> {:>10} {percent:>+7.1} %  {ratios:>18}  {word}",
            row.title,
            show(old.value.median),
            show(row.value.median)
        );
    }
}

/// Judges by ratios where both runs have them, else by values; gives the change of the median in percent.
fn judge(old: &Row, new: &Row) -> (Change, f64) {
    let (before, after) = match (old.ratio, new.ratio) {
        (Some(before), Some(after)) => (before, after),
        _ => (old.value, new.value),
    };
    let percent = if before.median == 0.0 {
        0.0
    } else {
        (after.median / before.median - 1.0) * 100.0
    };
    let change = match apart(before, after) {
        false => Change::Same,
        true if (after.median > before.median) == new.more_is_better => Change::Better,
        true => Change::Worse,
    };
    (change, percent)
}

fn apart(a: Spread, b: Spread) -> bool {
    a.max < b.min || b.max < a.min
}

#[cfg(test)]
mod tests {
    use super::{super::report::tests::report, *};

    #[test]
    fn only_what_leaves_the_spread_counts() {
        let direct = [(100.0, false), (100.0, false)];
        for (before, after, change) in [
            ([30.0, 32.0], [33.0, 35.0], Change::Better),
            ([30.0, 32.0], [31.0, 35.0], Change::Same),
            ([30.0, 32.0], [20.0, 29.0], Change::Worse),
        ] {
            let rows = |values: [f64; 2]| report(&direct, &values.map(|value| (value, false))).rows();
            let find = |rows: Vec<Row>| {
                rows.into_iter()
                    .find(|row| row.system == "l7" && row.unit == "1/s")
                    .unwrap()
            };
            let (old, new) = (find(rows(before)), find(rows(after)));
            assert_eq!(judge(&old, &new).0, change, "{before:?} {after:?}");
        }
    }
}
