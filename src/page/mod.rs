//! The page: what a run shows of itself, live from its coordinator and afterwards as its report.
//!
//! One HTML file with its style and script inside, and one JSON document that it draws ([`Document`]): sent again and
//! again while the run lives, embedded in the file once it is over. Nothing is loaded from anywhere else. Not here: who
//! fills the document (`coordinator::board`, `eval::report`), and who serves it.

mod document;

pub use document::{
    Case, CheckpointRow, ClassScore, Curves, Document, GenerationRow, InterruptionRow, Mark, Note,
    Overlay, Report, Run, Scores, State, Timeline, ValidationPoint, WorkerRow, thin,
};

const HTML: &str = include_str!("index.html");
const STYLE: &str = include_str!("page.css");
const CHARTS: &str = include_str!("charts.js");
const SCRIPT: &str = include_str!("page.js");

/// Where a coordinator keeps its document, for the one after it and for the report.
pub const SEEN_PATH: &str = "page.json";
/// The report.
pub const REPORT_HTML_PATH: &str = "report/index.html";
/// Its document.
pub const REPORT_PATH: &str = "report/page.json";
/// Where pictures of validations are kept: `STEP-NUMBER.png`, the step of eight digits or more.
pub const PICTURES: &str = "validations";

/// Where the document is put.
const DATA: &str = "<script id=\"data\" type=\"application/json\">null</script>";

/// The page as a server gives it: it asks for its document.
#[must_use]
pub fn live() -> String {
    HTML.replacen("/*CSS*/", STYLE, 1).replacen("/*JS*/", &format!("{CHARTS}\n{SCRIPT}"), 1)
}

/// The page with `document` inside: a file that needs nothing else.
///
/// # Errors
/// None that these types can cause; the encoder's signature has one.
pub fn embedded(document: &Document) -> Result<String, serde_json::Error> {
    // No text can end the element that holds it.
    let json = serde_json::to_string(document)?.replace('<', "\\u003c");
    let data = DATA.replacen("null", &json, 1);
    let title = format!("<title>{} - cpcr report</title>", escape(&document.run.name));
    Ok(live().replacen(DATA, &data, 1).replacen("<title>cpcr</title>", &title, 1))
}

/// Who has a bucket in a folder of their own says so here: `s3://cpcr=/home/me/runs/demo/bucket/cpcr`.
pub const SHOWN_AS: &str = "CPCR_SHOWN_AS";

/// A URL as its user can use it, who may know it by another name than a run's processes.
#[must_use]
pub fn shown(url: &str) -> String {
    shown_as(&std::env::var(SHOWN_AS).unwrap_or_default(), url)
}

fn shown_as(names: &str, url: &str) -> String {
    match names.split_once('=') {
        Some((inside, outside)) => match url.strip_prefix(inside) {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => format!("{outside}{rest}"),
            _ => url.to_owned(),
        },
        None => url.to_owned(),
    }
}

/// What a picture of a validation is called.
#[must_use]
pub fn picture_name(step: u64, number: usize) -> String {
    format!("{step:08}-{number}.png")
}

/// Whether something is called so; nothing else is looked for in the run's folder.
#[must_use]
pub fn is_picture_name(name: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let parts = name.strip_suffix(".png").and_then(|stem| stem.split_once('-'));
    name.len() < 40 && parts.is_some_and(|(step, number)| digits(step) && digits(number))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_in_a_folder_is_shown_as_that() {
        let under = shown_as;
        assert_eq!(under("s3://cpcr=/x/b", "s3://cpcr/run"), "/x/b/run");
        assert_eq!(under("s3://cpcr=/x/b", "s3://cpcr2/run"), "s3://cpcr2/run");
        assert_eq!(under("", "s3://cpcr/run"), "s3://cpcr/run");
    }

    #[test]
    fn pictures_have_names_of_one_kind() {
        assert!(
            is_picture_name(&picture_name(7, 0)) && is_picture_name(&picture_name(u64::MAX, 15))
        );
        for name in ["", "1-.png", "../1-2.png", "1-2.png/x", "1-2.jpg", "0000-0\u{660}.png"] {
            assert!(!is_picture_name(name), "{name}");
        }
    }

    #[test]
    fn the_page_is_one_file_and_no_text_gets_out_of_its_place() {
        let page = live();
        assert!(page.contains(DATA) && !page.contains("/*CSS*/") && !page.contains("/*JS*/"));
        let outside = ["src=\"", "href=\"http", "@import", "url(http", "//cdn"];
        let found = outside.iter().find(|text| page.contains(**text));
        assert_eq!(found, None, "nothing is loaded from elsewhere");
        let mut document = Document::default();
        document.run.name = "a</script><b>".to_owned();
        document.notes.push(Note { at: 1.5, text: "</script><!--".to_owned() });
        let page = embedded(&document).unwrap();
        assert!(!page.contains("</script><b>") && !page.contains("</script><!--"), "{page}");
        assert!(page.contains("<title>a&lt;/script&gt;&lt;b&gt; - cpcr report</title>"));
        let from = page.find("type=\"application/json\">").unwrap() + 24;
        let json = &page[from..from + page[from..].find("</script>").unwrap()];
        assert_eq!(serde_json::from_str::<Document>(json).unwrap(), document);
    }
}
