//! A run as a picture: for each figure one panel of bars, one bar for each system, a whisker from least to most, and a
//! line where our bound lies. Plain SVG, written by hand, readable on light and dark pages.

use std::fmt::Write;

use super::{
    report::{Report, Row, Spread, show},
    work::Target,
};

const WIDTH: f64 = 1180.0;
const COLUMNS: usize = 2;
const PANEL: f64 = WIDTH / COLUMNS as f64;
const BAR: f64 = 15.0;
const STEP: f64 = 21.0;
const TITLE: f64 = 34.0;
const LABELS: f64 = 215.0;
const NUMBERS: f64 = 70.0;
const TOP: f64 = 56.0;

/// The picture.
pub fn svg(report: &Report) -> String {
    let rows = report.rows();
    let mut figures: Vec<&str> = rows.iter().map(|row| row.figure).collect();
    figures.dedup();
    let panels: Vec<Vec<&Row>> = figures
        .iter()
        .map(|figure| rows.iter().filter(|row| row.figure == *figure).collect())
        .collect();
    let mut body = String::new();
    let mut heights = [TOP; COLUMNS];
    for panel in &panels {
        // Into the shorter column.
        let column = (0..COLUMNS)
            .min_by(|a, b| heights[*a].total_cmp(&heights[*b]))
            .unwrap_or(0);
        draw(&mut body, panel, column as f64 * PANEL, heights[column]);
        heights[column] += TITLE + panel.len() as f64 * STEP + 14.0;
    }
    let height = heights.iter().copied().fold(TOP, f64::max) + 10.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"16\" font-weight=\"bold\">cargo xtask bench</text>\n\
         <text x=\"10\" y=\"42\" fill=\"#555555\">{}</text>\n{body}</svg>\n",
        escape(&report.headline())
    )
}

/// One figure. Ratios where there are some: they are what can be compared.
fn draw(out: &mut String, rows: &[&Row], left: f64, top: f64) {
    let Some(first) = rows.first() else { return };
    let ratios = rows.iter().any(|row| row.ratio.is_some());
    let drawn: Vec<(&Row, Spread)> = rows
        .iter()
        .filter_map(|row| Some((*row, if ratios { row.ratio? } else { row.value })))
        .collect();
    let most = drawn
        .iter()
        .map(|(_, spread)| spread.max)
        .fold(f64::MIN_POSITIVE, f64::max)
        * 1.02;
    let scale = (PANEL - LABELS - NUMBERS - 20.0) / most;
    let unit = if ratios { "ratio to direct" } else { first.unit };
    let arrow = if first.more_is_better {
        "more is better"
    } else {
        "less is better"
    };
    let _ = writeln!(
        out,
        "<text x=\"{:.1}\" y=\"{:.1}\" font-weight=\"bold\">{} ({unit}; {arrow})</text>",
        left + 10.0,
        top + 20.0,
        escape(first.figure)
    );
    for (number, (row, spread)) in drawn.iter().enumerate() {
        let y = top + TITLE + number as f64 * STEP;
        let x = left + LABELS;
        let ours = row.title.starts_with("ours");
        let fill = match (ours, row.disturbed) {
            (_, true) => "#bbbbbb",
            (true, false) => "#1f6feb",
            (false, false) => "#e0a458",
        };
        let middle = y + BAR / 2.0;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{fill}\"/>\
             <path d=\"M{:.1} {middle:.1}H{:.1}\" stroke=\"#222222\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            x - 6.0,
            y + 12.0,
            escape(&row.title.replace("ours, ", "").replace(" with policy", "")),
            spread.median * scale,
            x + spread.min * scale,
            x + spread.max * scale,
            x + spread.max * scale + 6.0,
            y + 12.0,
            show(spread.median),
        );
        let bound = match row.target {
            Some(Target::RatioAtMost(bound) | Target::RatioAtLeast(bound)) if ratios => Some(bound),
            Some(Target::AtMost(bound)) if !ratios => Some(bound),
            _ => None,
        };
        if let Some(bound) = bound.filter(|bound| *bound <= most) {
            let x = x + bound * scale;
            let _ = writeln!(
                out,
                "<path d=\"M{x:.1} {:.1}V{:.1}\" stroke=\"#c62828\" stroke-width=\"2\"/>",
                y - 2.0,
                y + BAR + 2.0
            );
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::{super::report::tests::report, *};

    #[test]
    fn a_picture_names_its_systems_and_closes_its_tags() {
        let svg = svg(&report(&[(100.0, false)], &[(20.0, true)]));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("the l7") && svg.contains("max requests, 64 conns"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        assert!(!svg.contains("NaN"));
    }
}
