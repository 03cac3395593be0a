//! The last word in a run's report: how it ended, which its trainers could not know when they wrote it.

use crate::page::{self, Document};
use crate::store::{Store, StoreError};

/// The report of a run that was stopped: what the coordinator has `seen`. One that is complete has more.
///
/// # Errors
/// When the store fails.
pub async fn interim(run: &Store, seen: Document) -> Result<(), StoreError> {
    match page::embedded(&Document { live: false, ..seen }) {
        Ok(html) => run.put(page::REPORT_HTML_PATH, html.into()).await,
        Err(error) => {
            tracing::warn!(%error, "the report is not written");
            Ok(())
        }
    }
}

/// Puts what the coordinator has `seen` into the report that rank 0 has left. One that is missing stays so.
///
/// # Errors
/// When the store fails, or the report's document is damaged: the report then stays as it is.
pub async fn complete(run: &Store, seen: Document) -> Result<(), StoreError> {
    let bytes = match run.get(page::REPORT_PATH).await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let whole = serde_json::from_slice(&bytes).and_then(|report| {
        let document = merged(report, seen);
        Ok((page::embedded(&document)?, serde_json::to_vec(&document)?))
    });
    let (html, json) = match whole {
        Ok(whole) => whole,
        Err(error) => {
            tracing::warn!(%error, "`{}` is damaged", page::REPORT_PATH);
            return Ok(());
        }
    };
    run.put(page::REPORT_HTML_PATH, html.into()).await?;
    run.put(page::REPORT_PATH, json.into()).await
}

/// Scores, curves and pictures are the trainer's, which saw every step; the rest is the coordinator's.
fn merged(report: Document, seen: Document) -> Document {
    let mut document = Document { live: false, ..seen };
    document.run.classes = report.run.classes;
    document.curves = report.curves;
    document.overlays = report.overlays;
    document.report = report.report;
    let state = &mut document.state;
    state.step = report.state.step;
    state.mean_dice = report.state.mean_dice;
    state.best = report.state.best;
    // Of the whole run, not of its last step.
    state.images_per_s = report.state.images_per_s;
    state.data_wait = report.state.data_wait;
    document
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Note, Report};
    use crate::store::StoreOptions;

    #[tokio::test]
    async fn the_end_is_put_into_the_report_that_is_there() {
        let run = Store::open("memory:///", &StoreOptions::default()).unwrap();
        let mut seen = Document { live: true, ..Document::default() };
        seen.state.status = Some(0);
        seen.notes.push(Note { at: 1.0, text: "a worker was killed".to_owned() });
        complete(&run, seen.clone()).await.unwrap();
        assert!(!run.exists(page::REPORT_HTML_PATH).await.unwrap(), "there was none");
        let mut report = Document { report: Some(Report::default()), ..Document::default() };
        report.curves.steps = vec![1, 2];
        let bytes = serde_json::to_vec(&report).unwrap();
        run.put(page::REPORT_PATH, bytes.into()).await.unwrap();
        complete(&run, seen).await.unwrap();
        let bytes = run.get(page::REPORT_PATH).await.unwrap();
        let document: Document = serde_json::from_slice(&bytes).unwrap();
        assert_eq!((document.state.status, document.curves.steps.len()), (Some(0), 2));
        assert!(document.report.is_some() && !document.live);
        let html = run.get(page::REPORT_HTML_PATH).await.unwrap();
        assert!(String::from_utf8_lossy(&html).contains("a worker was killed"));
    }
}
