//! The board against what trainers say: what it shows, measures and hints at.

use std::time::Duration;

use super::instruments::{INSTRUMENTS, samples};
use super::*;
use crate::coordinator::events::{Event, Limits, Progress, Running};
use crate::coordinator::verdict::{Account, Part};
use crate::proto::Vitals;
use crate::types::{Rank, Step, WorldSize};

fn facts() -> Facts {
    let run = Run { name: "demo".to_owned(), steps: 1000, ..Run::default() };
    Facts { run, loader_threads: 1, checkpoint_every: 100 }
}

fn board() -> Board {
    Board::new(facts(), None, 1000.0)
}

fn step(step: u64, total: f64) -> TrainerEvent {
    TrainerEvent::Step {
        step: Step(step),
        total: Step(1000),
        terms: BTreeMap::from([("total".to_owned(), total), ("dice".to_owned(), 0.5)]),
        images_per_s: 10.0,
        data_wait: 0.1,
        lr: 0.01,
        consistency: 0.02,
        receipt: None,
    }
}

fn limits() -> Limits {
    let second = Duration::from_secs(1);
    Limits {
        min: 1,
        max: 3,
        spares: 0,
        backend: None,
        restarts: 3,
        wait: 30 * second,
        heartbeat: 600 * second,
        start: 180 * second,
        progress: 120 * second,
        grace: 2 * second,
        drain: 20 * second,
    }
}

/// A generation of `world`, with a step done.
fn training(world: u32) -> State {
    let mut state = State::new(limits());
    for node in 0..world {
        state.apply(
            Duration::ZERO,
            Event::Joined {
                node: NodeId(node),
                incarnation: format!("a{node}"),
                kv_address: format!("10.0.0.{node}:1"),
                gpus: 0,
                running: None,
            },
        );
    }
    state.apply(Duration::from_secs(16), Event::Tick);
    progress(&mut state, 17, 1);
    state
}

fn progress(state: &mut State, now_s: u64, done: u64) {
    let generation = state.generation();
    let progress = Progress::Step { done: Step(done), last: false };
    let now = Duration::from_secs(now_s);
    state.apply(now, Event::Progressed { node: NodeId(0), generation, progress });
}

/// How a trainer does after `steps` of 100 ms, of which it waited `data_wait` of a second for data.
fn vitals(steps: u64, own_s: f64, data_wait: f64) -> TrainerEvent {
    let n = steps as f64;
    let phases = [("forward", own_s - data_wait), ("data_wait", data_wait), ("backward", 0.05)];
    TrainerEvent::Vitals(Vitals {
        step: Step(steps),
        steps,
        steps_s: 0.1 * n,
        phases_s: phases.map(|(name, s)| (name.to_owned(), s * n)).into(),
        memory: 1 << 30,
        ..Vitals::default()
    })
}

#[test]
fn curves_are_thinned_out_and_what_is_done_again_counts_once() {
    let mut board = board();
    for at in 1..=5000 {
        board.heard(at as f64, NodeId(0), &step(at, 1.0 / at as f64));
    }
    let curves = board.document(5000.0).curves;
    assert!(curves.steps.len() <= 402, "{}", curves.steps.len());
    assert_eq!(curves.steps.last(), Some(&5000));
    assert_eq!(curves.losses["total"].last(), Some(&Some(1.0 / 5000.0)));
    board.heard(5001.0, NodeId(0), &step(2001, f64::NAN));
    let curves = board.document(5001.0).curves;
    assert!(curves.steps.windows(2).all(|pair| pair[0] < pair[1]));
    assert_eq!(curves.steps.last(), Some(&2001));
    assert_eq!(curves.losses["total"].last(), Some(&None));
    assert_eq!(curves.lr.len(), curves.steps.len());
}

#[test]
fn the_pace_gives_the_time_that_is_left() {
    let mut board = board();
    for at in 0..20 {
        board.heard(1000.0 + at as f64, NodeId(0), &step(100 + at, 1.0));
    }
    assert_eq!(board.document(1020.0).state.eta_s, Some(881.0));
    board.heard(1021.0, NodeId(0), &step(100, 1.0));
    assert_eq!(board.document(1021.0).state.eta_s, None, "it went back");
}

#[test]
fn a_killed_trainer_is_shown_until_it_is_back_and_its_verdict_stays() {
    let mut board = board();
    let mut state = training(3);
    let mut clock = Duration::from_secs(17);
    board.ordered(1017.0, state.generation(), 3);
    board.heard(1017.0, NodeId(0), &step(1, 1.0));
    board.see(1017.0, &state, clock);
    let document = board.document(1017.0);
    assert_eq!(document.state.phase, "training");
    let states: Vec<&str> = document.workers.iter().map(|row| &*row.state).collect();
    assert_eq!(states, ["training"; 3]);
    assert_eq!(document.workers[2].host, "10.0.0.2");
    assert_eq!(document.workers[2].heard, 1000.0 + 0.0);

    clock = Duration::from_secs(18);
    let exit = Event::TrainerExited {
        node: NodeId(1),
        generation: state.generation(),
        status: 137,
        evidence: "was killed by signal 9".to_owned(),
        kind: crate::coordinator::verdict::kind_of_exit(137, false, false),
        doing: String::new(),
    };
    state.apply(clock, exit);
    board.see(1018.0, &state, clock);
    let document = board.document(1018.0);
    assert_eq!(document.state.phase, "recovering");
    let open: Vec<_> = document.interruptions.iter().filter(|row| row.open).collect();
    assert_eq!((open.len(), open[0].node, open[0].rank), (1, Some(1), Some(1)));
    assert_eq!(open[0].kind, "trainer-killed");
    assert_eq!(open[0].detect_s, Some(1.0));
    assert_eq!(document.workers[1].state, "starting", "another one, at once");
    assert_eq!(document.generations[0].to, Some(1018.0));

    // Survivors go on together.
    let generation = Generation(2);
    board.ordered(1018.5, generation, 2);
    for (node, s) in [(0, 19), (2, 20)] {
        let stranded = Event::TrainerStranded {
            node: NodeId(node),
            generation: Generation(1),
            done: Some(Step(1)),
            evidence: "gone".to_owned(),
        };
        state.apply(Duration::from_secs(s), stranded);
    }
    assert_eq!(state.generation(), generation);
    let milestones = [
        crate::coordinator::events::Milestone::Grouped,
        crate::coordinator::events::Milestone::Restored,
    ];
    for (milestone, s) in milestones.into_iter().zip([21, 23]) {
        let arrived = Event::Arrived { node: NodeId(0), generation, milestone };
        state.apply(Duration::from_secs(s), arrived);
    }
    let step_two = Progress::Step { done: Step(2), last: false };
    let effects = state.apply(
        Duration::from_secs(27),
        Event::Progressed { node: NodeId(0), generation, progress: step_two },
    );
    let verdict = effects.into_iter().find_map(|effect| match effect {
        crate::coordinator::events::Effect::Verdict(verdict) => Some(verdict),
        _ => None,
    });
    let verdict = verdict.expect("the interruption is over");
    let phases = verdict.phases.unwrap();
    assert_eq!(phases.seconds(), [1.0, 2.0, 1.0, 2.0, 4.0]);
    assert_eq!(Some(phases.seconds().iter().sum()), verdict.outage_s());
    board.verdict(1027.0, &verdict);
    board.see(1027.0, &state, Duration::from_secs(27));
    let document = board.document(1027.0);
    let row = document.interruptions.last().unwrap();
    assert!(!row.open && row.loss);
    let end = document.generations[0].end.as_deref();
    assert_eq!(end, Some("the trainer of node 1 (rank 1) was killed by signal 9"));
    assert_eq!((row.at, row.outage_s, row.restore_s), (1018.0, Some(10.0), Some(2.0)));
    let text = prometheus_text(&board, 1027.0);
    assert!(text.contains("cpcr_interruptions_total{kind=\"trainer-killed\"} 1\n"), "{text}");
    assert!(text.contains("cpcr_last_outage_seconds 10\n"));
}

#[test]
fn a_straggler_is_marked_measured_and_told_once() {
    let mut board = board();
    board.see(1017.0, &training(3), Duration::from_secs(17));
    let mut told = Vec::new();
    for s in 1..=30 {
        for (node, own_s) in [(0, 0.04), (1, 0.09), (2, 0.041)] {
            told.extend(board.heard(1020.0 + s as f64, NodeId(node), &vitals(10 * s, own_s, 0.0)));
        }
    }
    let document = board.document(1050.0);
    let lags: Vec<bool> = document.workers.iter().map(|row| row.straggler).collect();
    assert_eq!(lags, [false, true, false]);
    assert!((document.workers[1].own_s.unwrap() - 0.09).abs() < 1e-9);
    assert!((document.workers[1].step_s.unwrap() - 0.1).abs() < 1e-9);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].contains("node 1 (rank 1) is a straggler") && told[0].contains("90 ms"),
        "{told:?}"
    );
    assert_eq!(document.hints, told);
    let text = prometheus_text(&board, 1050.0);
    assert!(text.contains("cpcr_straggler{node=\"1\",rank=\"1\"} 1\n"), "{text}");
    assert!(
        text.contains("cpcr_phase_seconds_total{node=\"0\",rank=\"0\",phase=\"backward\"} 15\n")
    );
}

#[test]
fn a_run_that_waits_for_data_says_what_to_raise_and_a_quick_one_says_nothing() {
    for (data_wait, expected) in [(0.041, 1), (0.01, 0)] {
        let mut board = board();
        board.see(1017.0, &training(2), Duration::from_secs(17));
        let mut told = Vec::new();
        for s in 1..=40 {
            for node in 0..2 {
                let event = vitals(10 * s, 0.05, data_wait);
                told.extend(board.heard(1020.0 + s as f64, NodeId(node), &event));
            }
        }
        assert_eq!(told.len(), expected, "{told:?}");
        if expected > 0 {
            let start = "data wait is 41 % of step time: raise loader.threads (now 1)";
            assert!(told[0].starts_with(start), "{told:?}");
        }
    }
}

#[test]
fn every_sample_is_in_the_table_and_the_text_is_well_formed() {
    let mut board = board();
    board.see(1017.0, &training(2), Duration::from_secs(17));
    board.heard(1018.0, NodeId(0), &step(2, f64::NAN));
    for s in [10, 20] {
        let TrainerEvent::Vitals(vitals) = vitals(s, 0.05, 0.01) else { unreachable!() };
        let faults = BTreeMap::from([("reset".to_owned(), 2)]);
        let event = TrainerEvent::Vitals(Vitals { faults, gpu_memory: Some(5), ..vitals });
        board.heard(1018.0, NodeId(0), &event);
    }
    let dice = vec![("left \"ventricle\"\n".to_owned(), 0.5)];
    board.heard(
        1019.0,
        NodeId(0),
        &TrainerEvent::Validation { step: Step(2), dice, mean_dice: 0.5, pictures: Vec::new() },
    );
    board.heard(
        1019.0,
        NodeId(0),
        &TrainerEvent::Checkpoint {
            step: Step(2),
            bytes: 7,
            verified: true,
            upload_s: 0.5,
            hold_s: Some(0.1),
        },
    );
    let mut account = Account::default();
    account.mark(Duration::from_secs(3), Part::Training);
    board.account(&account.goodput());
    let all = samples(&board, 1020.0);
    for instrument in INSTRUMENTS {
        let names = INSTRUMENTS.iter().filter(|other| other.name == instrument.name).count();
        assert_eq!(names, 1, "{}", instrument.name);
        let told = all.iter().any(|sample| sample.name == instrument.name);
        let later = ["cpcr_last_outage_seconds", "cpcr_eta_seconds"].contains(&instrument.name);
        assert!(told || later, "{} has no sample", instrument.name);
    }
    for sample in &all {
        assert!(INSTRUMENTS.iter().any(|i| i.name == sample.name), "{}", sample.name);
    }
    let text = prometheus_text(&board, 1020.0);
    assert!(text.contains("cpcr_loss{term=\"total\"} NaN\n"), "{text}");
    assert!(
        text.contains("cpcr_validation_dice{class=\"left \\\"ventricle\\\"\\n\"} 0.5\n"),
        "{text}"
    );
    assert!(text.contains("# TYPE cpcr_checkpoints_total counter\n"));
    assert!(text.lines().all(|line| line.starts_with("# ") || line.starts_with("cpcr_")));
}

#[test]
fn a_coordinator_takes_up_what_the_one_before_wrote_down() {
    let mut first = board();
    let mut state = training(1);
    first.ordered(1017.0, state.generation(), 1);
    for at in 1..=100 {
        first.heard(1017.0 + at as f64, NodeId(0), &step(at, 2.0));
    }
    let mut account = Account::default();
    account.mark(Duration::from_secs(3), Part::Training);
    account.mark(Duration::from_secs(4), Part::Starting);
    account.count(true);
    first.account(&account.goodput());
    first.note(1100.0, "hello");
    first.see(1117.0, &state, Duration::from_secs(117));
    let written = serde_json::to_vec(&first.document(1117.0)).unwrap();

    let before = serde_json::from_slice(&written).unwrap();
    let mut second = Board::new(facts(), Some(before), 1200.0);
    let document = second.document(1200.0);
    assert_eq!(document.curves.steps.len(), 100);
    assert_eq!((document.notes.len(), document.workers.len()), (1, 0));
    assert_eq!(document.generations[0].to, Some(1200.0));
    // It resumes from a checkpoint of step 50.
    second.heard(1201.0, NodeId(0), &step(51, 2.0));
    assert_eq!(second.document(1201.0).curves.steps.last(), Some(&51));
    // An agent that brings its trainer along is adopted.
    state = State::new(limits());
    let running = Running {
        generation: Generation(4),
        rank: Rank(0),
        world: WorldSize(1),
        stranded: false,
        done: Some(Step(51)),
    };
    let joined = Event::Joined {
        node: NodeId(0),
        incarnation: "a".to_owned(),
        kv_address: "[::1]:1".to_owned(),
        gpus: 0,
        running: Some(running),
    };
    state.apply(Duration::from_secs(1), joined);
    second.see(1201.0, &state, Duration::from_secs(1));
    let document = second.document(1201.0);
    assert_eq!(document.workers[0].host, "[::1]");
    let last = document.generations.last().unwrap();
    assert_eq!((last.generation, last.world, last.to), (4, 1, None), "it was not ordered here");
    // The account goes on.
    second.account(&account.goodput());
    let goodput = second.document(1201.0).goodput.unwrap();
    assert_eq!((goodput.wall_s, goodput.goodput, goodput.losses), (8.0, 0.75, 2));
    assert_eq!(goodput.parts_s["starting"], 2.0);
    second.ended(1300.0, 0, "complete");
    let end = second.document(1300.0);
    assert_eq!((end.state.phase.as_str(), end.state.status), ("finished", Some(0)));
    assert_eq!(end.workers[0].state, "gone");
}

#[test]
fn what_no_trainer_sends_is_not_kept() {
    let mut board = board();
    let TrainerEvent::Step { step, total, images_per_s, data_wait, .. } = step(1, 1.0) else {
        unreachable!()
    };
    let terms = (0..1000).map(|n| (format!("term {n}"), 1.0)).collect();
    let (lr, consistency, receipt) = (0.0, 0.0, None);
    board.heard(
        1.0,
        NodeId(0),
        &TrainerEvent::Step {
            step,
            total,
            terms,
            images_per_s,
            data_wait,
            lr,
            consistency,
            receipt,
        },
    );
    assert!(
        board.heard(1.0, NodeId(0), &TrainerEvent::Warning { text: "x".repeat(5000) }).is_empty()
    );
    assert!(board.document(1.0).curves.steps.is_empty());
}
