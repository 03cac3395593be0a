//! The per-class table, as text for a terminal. Its JSON form is [`Summary`] itself.

use crate::eval::metrics::EmptyPolicy;
use crate::eval::summary::{Means, Summary};
use crate::eval::volumes::DistanceUnit;

/// A number for a table; a dash where there is none.
#[must_use]
pub(super) fn cell(value: Option<f64>, scale: f64) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{:.2}", value * scale))
}

/// What distances are counted in, for people.
pub(super) fn unit(summary: &Summary) -> &'static str {
    match summary.unit {
        DistanceUnit::Voxel => "voxel",
        DistanceUnit::Mm => "mm",
    }
}

/// What empty masks were worth, for people.
pub(super) fn policy(summary: &Summary) -> &'static str {
    match summary.policy {
        EmptyPolicy::Zero => "an empty mask scores 0 in all five",
        EmptyPolicy::Exclude => "what an empty mask leaves undefined is left out",
        EmptyPolicy::Penalise => "a mask empty on one side only scores Dice 0, distance 100",
        EmptyPolicy::Refuse => "empty masks are refused",
    }
}

/// The table: a row per class, then the mean. Dice and Jaccard in per cent.
#[must_use]
pub fn text_table(summary: &Summary) -> String {
    let unit = unit(summary);
    let row = |name: &str, means: &Means, empty: usize| {
        vec![
            name.to_owned(),
            cell(means.dice, 100.0),
            cell(means.jaccard, 100.0),
            cell(means.hd95, 1.0),
            cell(means.asd, 1.0),
            cell(means.assd, 1.0),
            empty.to_string(),
        ]
    };
    let mut head: Vec<String> = ["class", "Dice %", "Jaccard %"].map(str::to_owned).to_vec();
    head.extend(["HD95", "ASD", "ASSD"].map(|distance| format!("{distance} {unit}")));
    head.push("empty".to_owned());
    let columns = head.len();
    let mut rows = vec![head];
    rows.extend(summary.classes.iter().map(|c| row(&c.name, &c.means, c.empty_predictions)));
    rows.push(row("mean", &summary.mean, summary.empty_predictions));
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let name = format!("{:<1$}", row[0], widths[0]);
        let numbers = (1..row.len()).map(|i| format!("{:>1$}", row[i], widths[i]));
        let cells: Vec<String> = std::iter::once(name).chain(numbers).collect();
        text.push_str(&cells.join("  "));
        text.push('\n');
    }
    text.push_str(&format!("{} volumes; {}\n", summary.cases.len(), policy(summary)));
    text
}

/// A line for each case and class, then the means: for spreadsheets. Undefined scores are empty.
#[must_use]
pub fn csv(summary: &Summary) -> String {
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
    let line = |case: &str, class: &str, scores: [Option<f64>; 5]| {
        format!("{},{},{}\n", quoted(case), quoted(class), scores.map(number).join(","))
    };
    let unit = unit(summary);
    let mut text = format!("case,class,dice,jaccard,hd95_{unit},asd_{unit},assd_{unit}\n");
    for case in &summary.cases {
        for (class, s) in summary.classes.iter().zip(&case.classes) {
            let scores = [s.dice, s.jaccard, s.hd95, s.asd, s.assd];
            text.push_str(&line(&case.case, &class.name, scores));
        }
    }
    let means = summary.classes.iter().map(|c| (c.name.as_str(), &c.means));
    for (name, m) in means.chain([("mean", &summary.mean)]) {
        text.push_str(&line("mean", name, [m.dice, m.jaccard, m.hd95, m.asd, m.assd]));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::tests::summary;
    use super::*;

    #[test]
    fn columns_line_up() {
        assert_eq!(
            text_table(&summary()),
            "class          Dice %  Jaccard %  HD95 voxel  ASD voxel  ASSD voxel  empty\n\
             RV              50.00      50.00        0.50       0.50        0.50      1\n\
             <b>LV</b> & x       -          -           -          -           -      0\n\
             mean            50.00      50.00        0.50       0.50        0.50      1\n\
             2 volumes; what an empty mask leaves undefined is left out\n"
        );
    }

    #[test]
    fn a_spreadsheet_has_every_case_and_the_means() {
        let text = csv(&summary());
        assert!(
            text.starts_with("case,class,dice,jaccard,hd95_voxel,asd_voxel,assd_voxel\n"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1 + 2 * 2 + 3);
        assert!(text.lines().all(|line| line.split(',').count() == 7), "{text}");
        assert!(text.contains("\"mean\",\"RV\",0.5,0.5,0.5,0.5,0.5\n"), "{text}");
    }
}
