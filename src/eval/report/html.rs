//! The page: one self-contained HTML file, for light and dark, for screen readers and for print.
//!
//! Nothing is loaded from anywhere, no script runs, and every text from outside is escaped.

use super::table::{cell, policy, unit};
use super::text::{base64, escape};
use super::{Picture, ReportInputs, RunEvent, headline_dice, mean_of};
use crate::eval::overlay::class_colour;
use crate::eval::summary::{Means, Summary};

const STYLE: &str = include_str!("style.css");

/// The whole page.
pub(super) fn page(inputs: &ReportInputs<'_>, loss: &Picture, dice: &Picture) -> String {
    let name = escape(inputs.name);
    let sections = [
        tiles(inputs),
        section("scores", "Scores", &scores(inputs)),
        section("curves", "Curves", &curves(loss, dice)),
        section("overlays", "Predictions", &overlays(inputs)),
        section("events", "What happened", &events(inputs)),
        section("next", "Use this run", &commands(inputs)),
        section("setup", "Configuration and environment", &setup(inputs)),
    ];
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{name} - cpcr report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <a class=\"skip\" href=\"#main\">Skip to the content</a>\n\
         <header><p class=\"brand\">cpcr &middot; run report</p><h1>{name}</h1>\
         <p class=\"muted\"><code>{}</code></p></header>\n<main id=\"main\">\n{}</main>\n\
         <footer>Research software: not a medical device. Made by cpcr {}.</footer>\n\
         </body>\n</html>\n",
        escape(inputs.run_url),
        sections.concat(),
        env!("CARGO_PKG_VERSION"),
    )
}

fn section(id: &str, title: &str, body: &str) -> String {
    if body.is_empty() {
        return String::new();
    }
    format!("<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title}</h2>\n{body}</section>\n")
}

fn tiles(inputs: &ReportInputs<'_>) -> String {
    let history = inputs.history;
    let number = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
    };
    let losses = |e: &&RunEvent| matches!(e, RunEvent::ProcessLost { .. });
    let resumes = |e: &&RunEvent| matches!(e, RunEvent::Resumed { .. });
    let best = history.best().map_or_else(
        || "-".to_owned(),
        |best| format!("{:.4} at step {}", best.mean_dice, best.step),
    );
    let wait = mean_of(history, |s| s.data_wait_share).map(|share| share * 100.0);
    let tiles = [
        ("Mean Dice", number(headline_dice(inputs), 4)),
        ("Best validation", best),
        ("Steps", history.steps.last().map_or(0, |s| s.step).to_string()),
        ("Images per second", number(mean_of(history, |s| s.images_per_s), 1)),
        ("Waiting for data", format!("{} %", number(wait, 1))),
        ("Resumes", history.events.iter().filter(resumes).count().to_string()),
        ("Processes lost", history.events.iter().filter(losses).count().to_string()),
    ];
    let items: String =
        tiles.iter().map(|(k, v)| format!("<div><dt>{k}</dt><dd>{v}</dd></div>\n")).collect();
    format!("<dl class=\"tiles\">\n{items}</dl>\n")
}

fn scores(inputs: &ReportInputs<'_>) -> String {
    if let Some(summary) = inputs.summary {
        return summary_table(summary);
    }
    let Some(last) = inputs.history.validations.last() else { return String::new() };
    let rows: String = last
        .class_dice
        .iter()
        .map(|(name, dice)| {
            format!(
                "<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n",
                escape(name),
                cell(Some(*dice), 100.0)
            )
        })
        .collect();
    format!(
        "<table>\n<caption>Last validation, at step {}</caption>\n<thead><tr>\
         <th scope=\"col\">Class</th><th scope=\"col\">Dice %</th></tr></thead>\n<tbody>\n{rows}\
         <tr class=\"mean\"><th scope=\"row\">mean</th><td>{}</td></tr>\n</tbody>\n</table>\n",
        last.step,
        cell(Some(last.mean_dice), 100.0)
    )
}

fn summary_table(summary: &Summary) -> String {
    let row = |class: &str, name: &str, means: &Means, empty: usize| {
        format!(
            "<tr{class}><th scope=\"row\">{name}</th><td>{}</td><td>{}</td><td>{}</td>\
             <td>{}</td><td>{}</td><td>{empty}</td></tr>\n",
            cell(means.dice, 100.0),
            cell(means.jaccard, 100.0),
            cell(means.hd95, 1.0),
            cell(means.asd, 1.0),
            cell(means.assd, 1.0),
        )
    };
    let rows: String = summary
        .classes
        .iter()
        .map(|c| {
            let name = format!("{}{}", swatch(c.class), escape(&c.name));
            row("", &name, &c.means, c.empty_predictions)
        })
        .collect();
    let mean = row(" class=\"mean\"", "mean", &summary.mean, summary.empty_predictions);
    let unit = unit(summary);
    format!(
        "<div class=\"wide\"><table>\n<caption>{} volumes; distances in {unit}; {}</caption>\n\
         <thead><tr><th scope=\"col\">Class</th><th scope=\"col\">Dice %</th>\
         <th scope=\"col\">Jaccard %</th><th scope=\"col\">HD95 ({unit})</th>\
         <th scope=\"col\">ASD ({unit})</th><th scope=\"col\">ASSD ({unit})</th>\
         <th scope=\"col\">Empty predictions</th></tr></thead>\n\
         <tbody>\n{rows}{mean}</tbody>\n</table></div>\n{}",
        summary.cases.len(),
        policy(summary),
        case_table(summary),
    )
}

fn case_table(summary: &Summary) -> String {
    let head: String = summary
        .classes
        .iter()
        .map(|c| format!("<th scope=\"col\">{}</th>", escape(&c.name)))
        .collect();
    let rows: String = summary
        .cases
        .iter()
        .map(|case| {
            let cells: String =
                case.classes.iter().map(|c| format!("<td>{}</td>", cell(c.dice, 100.0))).collect();
            format!("<tr><th scope=\"row\">{}</th>{cells}</tr>\n", escape(&case.case))
        })
        .collect();
    format!(
        "<details><summary>Dice by case</summary>\n<div class=\"wide\"><table>\n<thead><tr>\
         <th scope=\"col\">Case</th>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n\
         </details>\n"
    )
}

fn swatch(class: u8) -> String {
    let [r, g, b] = class_colour(class);
    format!("<span class=\"swatch\" style=\"background:rgb({r},{g},{b})\"></span>")
}

fn curves(loss: &Picture, dice: &Picture) -> String {
    format!(
        "<figure>{}<figcaption>Validation Dice</figcaption></figure>\n\
         <figure>{}<figcaption>Loss terms, unweighted, on a logarithmic scale; long runs are drawn \
         as means over stretches of steps. The numbers are in metrics.csv.</figcaption></figure>\n",
        dice.inline, loss.inline
    )
}

fn overlays(inputs: &ReportInputs<'_>) -> String {
    if inputs.overlays.is_empty() {
        return String::new();
    }
    let legend: String = (1_u8..)
        .zip(inputs.class_names)
        .map(|(class, name)| format!("<li>{}{}</li>", swatch(class), escape(name)))
        .collect();
    let pictures: String = inputs
        .overlays
        .iter()
        .map(|overlay| {
            let caption = escape(&overlay.caption);
            format!(
                "<figure><img alt=\"Truth on the left, prediction on the right: {caption}\" \
                 src=\"data:image/png;base64,{}\"><figcaption>{caption}</figcaption></figure>\n",
                base64(&overlay.png)
            )
        })
        .collect();
    format!(
        "<p>Truth on the left, prediction on the right.</p>\n<ul class=\"legend\">{legend}</ul>\n\
         <div class=\"grid\">\n{pictures}</div>\n"
    )
}

fn events(inputs: &ReportInputs<'_>) -> String {
    let damaged = inputs.history.damaged_lines;
    let mut rows: String = inputs
        .history
        .events
        .iter()
        .map(|event| {
            let text = match event {
                RunEvent::Resumed { world, .. } => format!("Resumed with {world} trainers"),
                RunEvent::ProcessLost { detail, .. } => format!("Process lost: {}", escape(detail)),
                RunEvent::Note { detail, .. } => escape(detail),
            };
            format!("<li><span class=\"step\">step {}</span> {text}</li>\n", event.step())
        })
        .collect();
    if damaged > 0 {
        rows.push_str(&format!("<li>{damaged} lines of the history could not be read</li>\n"));
    }
    if rows.is_empty() {
        return "<p>No process was lost, and the run was never resumed.</p>\n".to_owned();
    }
    format!("<ul class=\"events\">\n{rows}</ul>\n")
}

/// A word of a shell command, quoted if it must be.
fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

fn commands(inputs: &ReportInputs<'_>) -> String {
    let (run, data) = (shell(inputs.run_url), shell(inputs.data_url));
    let commands = [
        ("Resume it", format!("cpcr-launch --run {run} --data {data} --resume auto")),
        (
            "Evaluate it",
            format!("cpcr eval --run {run} --data {data} --split test --out scores.json"),
        ),
        ("See its checkpoints", format!("cpcr checkpoints ls {run}")),
        (
            "Segment new images",
            "cpcr predict --checkpoint CHECKPOINT_URL --in IMAGES --out LABELS".to_owned(),
        ),
    ];
    commands
        .iter()
        .map(|(what, command)| {
            format!("<h3>{what}</h3>\n<pre tabindex=\"0\">{}</pre>\n", escape(command))
        })
        .collect()
}

fn setup(inputs: &ReportInputs<'_>) -> String {
    let rows: String = inputs
        .environment
        .iter()
        .map(|(k, v)| {
            format!("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", escape(k), escape(v))
        })
        .collect();
    let environment = match rows.is_empty() {
        true => rows,
        false => format!(
            "<div class=\"wide\"><table class=\"pairs\">\n<tbody>\n{rows}</tbody>\n</table></div>\n"
        ),
    };
    format!(
        "{environment}<details open><summary>Configuration, resolved</summary>\n\
         <pre tabindex=\"0\">{}</pre>\n</details>\n",
        escape(inputs.config)
    )
}

#[cfg(test)]
mod tests {
    use super::shell;

    #[test]
    fn commands_can_be_pasted() {
        assert_eq!(shell("s3://bucket/run-1"), "s3://bucket/run-1");
        assert_eq!(shell("./my runs/it's"), "'./my runs/it'\\''s'");
    }
}
