//! Tests of the report as a whole.

use std::collections::BTreeMap;

use super::*;
use crate::eval::metrics::{ClassScores, Emptiness, EmptyPolicy};
use crate::eval::overlay::overlay_png;
use crate::eval::volumes::{CaseScores, DistanceUnit, EvalSettings};

/// Two cases of two classes; nothing of the second, whose name would like to be markup.
pub(super) fn summary() -> Summary {
    let class = |score: Option<f64>, empty| ClassScores {
        dice: score,
        jaccard: score,
        hd95: score,
        asd: score,
        assd: score,
        empty,
    };
    let case = |name: &str, score, empty| CaseScores {
        case: name.to_owned(),
        classes: vec![class(score, empty), class(None, Emptiness::Truth)],
    };
    let settings = EvalSettings {
        patch: (8, 8),
        classes: 3,
        batch: 1,
        unit: DistanceUnit::Voxel,
        policy: EmptyPolicy::Exclude,
    };
    let parts = [
        vec![case("p2", None, Emptiness::Prediction)],
        vec![case("p1", Some(0.5), Emptiness::Neither)],
    ];
    Summary::of(parts, &names(), &settings).unwrap()
}

fn names() -> [String; 2] {
    ["RV".to_owned(), "<b>LV</b> & x".to_owned()]
}

fn history(steps: u64) -> RunHistory {
    let mut history = RunHistory::default();
    for step in 1..=steps {
        let decay = (-(step as f64) / steps as f64 * 3.0).exp();
        let wobble = 1.0 + 0.2 * (step as f64 * 0.7).sin();
        let losses = [("total", 2.0), ("dice", 1.6), ("kd_main", 0.4), ("entropy", 0.3)]
            .map(|(name, scale)| (name.to_owned(), scale * decay * wobble));
        history.push(Record::Step(StepRecord {
            step,
            losses: losses.into(),
            lr: 0.01,
            consistency_weight: 0.1,
            images_per_s: 120.0,
            data_wait_share: 0.03,
        }));
        if step % 50 == 0 {
            let mean_dice = 0.9 * (1.0 - decay);
            let class_dice =
                BTreeMap::from([("RV".to_owned(), mean_dice * 0.95), ("LV".to_owned(), mean_dice)]);
            history.push(Record::Validation(ValidationRecord { step, mean_dice, class_dice }));
        }
    }
    let detail = "rank 3 <killed> by signal 9".to_owned();
    history.push(Record::Event(RunEvent::ProcessLost { step: 120, detail }));
    history
}

fn files(history: &RunHistory, summary: Option<&Summary>) -> BTreeMap<String, Vec<u8>> {
    let side = 96;
    let disc = |r: f64, dx: f64| -> Vec<u8> {
        (0..side * side)
            .map(|i| {
                let (y, x) = ((i / side) as f64 - 48.0, (i % side) as f64 - 48.0 - dx);
                let d = (x * x + y * y).sqrt();
                if d < r { 1 } else { 2 * u8::from(d < r + 10.0) }
            })
            .collect()
    };
    let image: Vec<f32> = (0..side * side).map(|i| ((i % side) as f32 / 96.0).sin()).collect();
    let png = overlay_png(&image, &disc(15.0, 0.0), &disc(13.0, 4.0), (side, side)).unwrap();
    let overlays = vec![ReportOverlay { caption: "p1, slice 4".into(), png }; 2];
    let mut seen = Document { live: true, ..Document::default() };
    seen.notes.push(page::Note { at: 5.0, text: "rank 3 <killed> by signal 9".to_owned() });
    let inputs = ReportInputs {
        name: "demo <script>alert(1)</script>",
        run_url: "s3://bucket/my run",
        data_url: "s3://bucket/data",
        history,
        summary,
        class_names: &names(),
        config: "method = \"cpcr\"\n[train]\niterations = 400 # <&>\n",
        environment: &[("CPU".to_owned(), "some <model>".to_owned())],
        overlays: &overlays,
        best: &overlays[..1],
        worst: &overlays[..1],
        method: "cpcr",
        steps: 400,
        seen: Some(&seen),
    };
    render(&inputs).unwrap().into_iter().collect()
}

#[test]
fn the_report_has_every_file_and_the_page_stands_alone() {
    let summary = summary();
    let files = files(&history(400), Some(&summary));
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "report/curves-dice.svg",
            "report/curves-loss.svg",
            "report/index.html",
            "report/metrics.csv",
            "report/metrics.json",
            "report/overlays/001.png",
            "report/overlays/002.png",
            "report/page.json",
        ]
    );
    let page = String::from_utf8(files["report/index.html"].clone()).unwrap();
    for forbidden in [
        "<script>alert",
        "<b>LV",
        "<killed>",
        "some <model>",
        "src=\"http",
        "href=\"http",
        "@import",
    ] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    for expected in [
        "--resume auto",
        "cpcr eval --run 's3://bucket/my run'",
        "cpcr predict",
        "killed> by signal",
    ] {
        assert!(page.contains(expected), "{expected}");
    }
    let document: Document = serde_json::from_slice(&files["report/page.json"]).unwrap();
    assert!(!document.live && document.curves.steps.len() <= 400);
    assert_eq!(document.curves.steps.last(), Some(&400));
    let report = document.report.unwrap();
    assert_eq!(report.scores.unwrap().classes[0].dice, Some(0.5));
    assert_eq!((report.cases.len(), report.best.len(), report.worst.len()), (2, 1, 1));
    assert_eq!(document.notes.len(), 1, "the coordinator's own words");
    if let Some(folder) = std::env::var_os("CPCR_KEEP_REPORT") {
        for (path, bytes) in &files {
            let path = std::path::Path::new(&folder).join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
    }
}

#[test]
fn metrics_json_has_the_promised_keys() {
    let with = files(&history(400), Some(&summary()));
    let json: serde_json::Value = serde_json::from_slice(&with["report/metrics.json"]).unwrap();
    assert_eq!(json["val"]["mean_dice"], 0.5);
    assert_eq!(json["val"]["best"]["step"], 400);
    assert_eq!(json["final"]["classes"][0]["dice"], 0.5);
    assert_eq!(json["final"]["empty_predictions"], 1);
    assert_eq!(json["loss"]["terms"]["dice"].as_array().unwrap().len(), 400);
    assert_eq!(json["events"][0]["what"], "process-lost");
    let csv = String::from_utf8(with["report/metrics.csv"].clone()).unwrap();
    assert_eq!(csv.lines().count(), 401);
    let columns = |line: &str| line.split(',').count();
    assert!(csv.lines().all(|line| columns(line) == columns(csv.lines().next().unwrap())));

    let without = files(&history(100), None);
    let json: serde_json::Value = serde_json::from_slice(&without["report/metrics.json"]).unwrap();
    assert_eq!(json["val"]["mean_dice"], json["validation"]["mean_dice"][1]);
}

#[test]
fn a_run_that_never_began_has_a_report_too() {
    let files = files(&RunHistory::default(), None);
    let json: serde_json::Value = serde_json::from_slice(&files["report/metrics.json"]).unwrap();
    assert!(json["val"]["mean_dice"].is_null());
}
