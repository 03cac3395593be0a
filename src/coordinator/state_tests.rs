//! The state machine's promises, one by one. Whole lives of it are in `simulation.rs`.

use std::time::Duration;

use super::events::{Effect, Event, Limits, Progress, Running};
use super::state::{Phase, State};
use super::verdict::kind_of_exit;
use crate::ledger::Recorded;
use crate::types::{Backend, Generation, Lineage, NodeId, Rank, Step, WorldSize};

pub(super) fn limits() -> Limits {
    Limits {
        min: 3,
        max: 3,
        spares: 0,
        backend: None,
        restarts: 2,
        wait: Duration::from_secs(25),
        heartbeat: Duration::from_secs(8),
        start: Duration::from_secs(60),
        progress: Duration::from_secs(20),
        grace: Duration::from_secs(2),
        drain: Duration::from_secs(10),
    }
}

pub(super) fn joined(node: u32, life: u32) -> Event {
    Event::Joined {
        node: NodeId(node),
        incarnation: format!("{node}.{life}"),
        kv_address: format!("127.0.0.1:{node}"),
        gpus: 0,
        running: None,
    }
}

/// The same agent life, with a trainer of `generation` that has done `step` steps.
pub(super) fn came_back(node: u32, life: u32, running: Running) -> Event {
    match joined(node, life) {
        Event::Joined { node, incarnation, kv_address, gpus, .. } => {
            Event::Joined { node, incarnation, kv_address, gpus, running: Some(running) }
        }
        other => other,
    }
}

fn running(generation: u64, rank: u32, stranded: bool) -> Running {
    Running {
        generation: Generation(generation),
        rank: Rank(rank),
        world: WorldSize(3),
        stranded,
        done: Some(Step(7)),
    }
}

pub(super) fn stranded(node: u32, generation: u64, step: u64) -> Event {
    Event::TrainerStranded {
        node: NodeId(node),
        generation: Generation(generation),
        done: Some(Step(step)),
        evidence: "a peer was lost".to_owned(),
    }
}

pub(super) fn progressed(node: u32, generation: u64) -> Event {
    Event::Progressed {
        node: NodeId(node),
        generation: Generation(generation),
        progress: Progress::Step { done: Step(generation), last: false },
    }
}

/// Nodes that are told to join a generation, in the order of their ranks.
pub(super) fn started(effects: &[Effect]) -> Vec<u32> {
    let nodes = effects.iter().filter_map(|effect| match effect {
        Effect::Start { node, .. } => Some(node.0),
        _ => None,
    });
    nodes.collect()
}

pub(super) fn elastic(min: u32, max: u32) -> State {
    let mut state = State::new(Limits { min, max, ..limits() });
    for node in 0..max {
        state.apply(Duration::ZERO, joined(node, 0));
    }
    assert!(matches!(state.phase(), Phase::Training { .. }));
    state
}

pub(super) fn exited(node: u32, generation: u64, status: i32) -> Event {
    Event::TrainerExited {
        node: NodeId(node),
        generation: Generation(generation),
        status,
        evidence: format!("exited with {status}"),
        kind: kind_of_exit(status, false, false),
        doing: "training".to_owned(),
    }
}

pub(super) fn all_here() -> State {
    let mut state = State::new(limits());
    for node in 0..3 {
        state.apply(Duration::ZERO, joined(node, 0));
    }
    assert!(matches!(state.phase(), Phase::Training { .. }));
    state
}

#[test]
fn a_generation_starts_only_when_all_are_here_and_ranks_are_distinct() {
    let mut state = State::new(limits());
    assert!(state.apply(Duration::ZERO, joined(2, 0)).is_empty());
    assert!(state.apply(Duration::ZERO, joined(0, 0)).is_empty());
    let effects = state.apply(Duration::ZERO, joined(1, 0));
    let ranks: Vec<u32> = effects
        .iter()
        .map(|effect| match effect {
            Effect::Start { rank, kv_address, .. } => {
                assert_eq!(kv_address, "127.0.0.1:0");
                rank.0
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(ranks, [0, 1, 2]);
}

#[test]
fn a_lost_trainer_costs_a_new_generation_in_which_the_others_keep_their_processes() {
    let mut state = all_here();
    let effects = state.apply(Duration::from_secs(1), exited(1, 1, 137));
    let left = effects.iter().filter(|e| matches!(e, Effect::Leave { .. })).count();
    assert_eq!((left, started(&effects)), (2, vec![0, 1, 2]), "{effects:?}");
    assert!(!effects.iter().any(|e| matches!(e, Effect::End { .. })));
    assert_eq!(state.generation(), Generation(2));
    // What they say of the one before changes nothing.
    let before = state.clone();
    assert!(state.apply(Duration::from_secs(1), stranded(0, 1, 4)).is_empty());
    assert_eq!(state.phase(), before.phase());
}

#[test]
fn fewer_go_on_at_once_and_whoever_comes_back_joins_when_it_is_prepared() {
    let second = Duration::from_secs(1);
    let mut state = elastic(2, 4);
    let effects = state.apply(second, exited(1, 1, 137));
    assert_eq!(started(&effects), [0, 2, 3]);
    assert!(effects.iter().any(|e| matches!(e, Effect::Prepare { node: NodeId(1), .. })));
    let effects = state.apply(second, Event::TrainerStandby { node: NodeId(1) });
    assert_eq!((started(&effects), state.generation()), (vec![0, 1, 2, 3], Generation(3)));
    // Its agent dies too: two are enough, one is not.
    let mut lost = |node: u32, generation: u64, witness: u32| {
        state.apply(second, progressed(2, generation));
        let incarnation = format!("{node}.0");
        assert!(state.apply(second, Event::Left { node: NodeId(node), incarnation }).is_empty());
        state.apply(second, stranded(witness, generation, 5))
    };
    assert_eq!(started(&lost(1, 3, 0)), [0, 2, 3]);
    assert_eq!(started(&lost(0, 4, 3)), [2, 3]);
    let effects = lost(3, 5, 2);
    assert!(matches!(&effects[..], [Effect::Leave { node: NodeId(2), .. }, Effect::Note(_)]));
    assert!(matches!(state.phase(), Phase::Gathering { recovering: Some(_), .. }));
}

#[test]
fn below_the_least_the_most_advanced_one_saves_what_there_is() {
    let mut state = elastic(2, 2);
    let second = Duration::from_secs(1);
    state.apply(second, Event::Left { node: NodeId(1), incarnation: "1.0".to_owned() });
    state.apply(second, stranded(0, 1, 9));
    let heard = Duration::from_secs(26);
    state.apply(heard, Event::Heard { node: NodeId(0) });
    let effects = state.apply(heard + second, Event::Tick);
    let asked = Effect::CheckpointAndStop { node: NodeId(0), generation: Generation(1) };
    assert_eq!(effects, [asked]);
    let effects = state.apply(heard + second, exited(0, 1, 75));
    assert!(matches!(effects.last(), Some(Effect::Finish { status: 75, reason })
        if reason.contains("1 of 2 workers came within 25 s")));
}

#[test]
fn a_spare_takes_the_place_of_whoever_is_lost() {
    let mut state = State::new(Limits { spares: 1, ..limits() });
    for node in 0..3 {
        assert!(state.apply(Duration::ZERO, joined(node, 0)).is_empty(), "it may have the state");
    }
    let effects = state.apply(Duration::ZERO, joined(3, 0));
    assert_eq!(started(&effects), [0, 1, 2]);
    assert!(matches!(&effects[3..], [Effect::Prepare { node: NodeId(3), .. }]), "{effects:?}");
    assert!(state.apply(Duration::ZERO, Event::TrainerStandby { node: NodeId(3) }).is_empty());
    let effects = state.apply(Duration::from_secs(1), exited(1, 1, 137));
    assert_eq!(started(&effects), [0, 2, 3]);
}

#[test]
fn a_new_coordinator_takes_over_a_generation_that_never_noticed() {
    let mut state = State::new(limits());
    assert!(state.apply(Duration::ZERO, came_back(2, 0, running(5, 2, false))).is_empty());
    assert!(state.apply(Duration::ZERO, came_back(0, 0, running(5, 0, false))).is_empty());
    let effects = state.apply(Duration::ZERO, came_back(1, 0, running(5, 1, false)));
    let attest = Effect::Attest { node: NodeId(0), generation: Generation(5) };
    assert!(matches!(&effects[..], [Effect::Note(_), told] if *told == attest), "{effects:?}");
    assert!(matches!(state.phase(), Phase::Training { ranks, .. } if ranks.len() == 3));
    // The next one has a number of its own.
    let effects = state.apply(Duration::from_secs(1), exited(1, 5, 137));
    assert_eq!((started(&effects), state.generation()), (vec![0, 1, 2], Generation(6)));
}

#[test]
fn rank_0_is_asked_for_what_the_ledger_misses() {
    let mut state = all_here();
    let mut asked = |generation| {
        let generation = Generation(generation);
        state.apply(Duration::ZERO, Event::ReceiptsMissing { generation })
    };
    assert_eq!(asked(1), [Effect::Attest { node: NodeId(0), generation: Generation(1) }]);
    assert_eq!(asked(7), [], "nobody has that");
}

#[test]
fn a_generation_that_does_not_come_back_whole_goes_on_with_a_new_group() {
    let mut state = State::new(limits());
    state.apply(Duration::ZERO, came_back(2, 0, running(5, 2, false)));
    state.apply(Duration::ZERO, joined(1, 1));
    let effects = state.apply(Duration::ZERO, came_back(0, 0, running(5, 0, true)));
    assert_eq!((started(&effects), state.generation()), (vec![0, 1, 2], Generation(6)));
    // Whoever is there first waits a moment for those with a state, though one would be enough.
    let mut state = State::new(Limits { min: 1, ..limits() });
    state.apply(Duration::ZERO, came_back(2, 0, running(5, 2, false)));
    assert_eq!(started(&state.apply(Duration::ZERO, exited(2, 5, 137))), [] as [u32; 0]);
    state.apply(Duration::from_secs(1), came_back(0, 0, running(5, 0, true)));
    assert_eq!(started(&state.apply(Duration::from_secs(2), Event::Tick)), [0]);
}

#[test]
fn who_comes_from_an_older_generation_does_not_disturb_the_adoption_of_the_newest() {
    let limits = Limits { max: 4, ..limits() };
    let mut state = State::new(limits.clone());
    state.apply(Duration::ZERO, came_back(0, 0, running(5, 0, false)));
    assert!(state.apply(Duration::ZERO, came_back(3, 0, running(4, 0, true))).is_empty());
    state.apply(Duration::ZERO, came_back(1, 0, running(5, 1, false)));
    state.apply(Duration::ZERO, came_back(2, 0, running(5, 2, false)));
    assert!(matches!(state.phase(), Phase::Training { ranks, .. } if ranks.len() == 3));
    // Nor if it comes first.
    let mut state = State::new(limits.clone());
    state.apply(Duration::ZERO, came_back(3, 0, running(4, 0, false)));
    let effects = state.apply(Duration::ZERO, came_back(0, 0, running(5, 0, false)));
    assert_eq!(effects, [Effect::Leave { node: NodeId(3), generation: Generation(4) }]);
    state.apply(Duration::ZERO, came_back(1, 0, running(5, 1, false)));
    state.apply(Duration::ZERO, came_back(2, 0, running(5, 2, false)));
    assert!(matches!(state.phase(), Phase::Training { ranks, .. } if ranks.len() == 3));
    // One that still steps in a group of its own is told that this is over, and let in.
    let mut state = State::new(limits.clone());
    state.apply(Duration::ZERO, came_back(0, 0, running(5, 0, false)));
    let effects = state.apply(Duration::ZERO, came_back(3, 0, running(4, 0, false)));
    assert_eq!(effects, [Effect::Leave { node: NodeId(3), generation: Generation(4) }]);
    state.apply(Duration::ZERO, came_back(1, 0, running(5, 1, false)));
    state.apply(Duration::ZERO, came_back(2, 0, running(5, 2, false)));
    let effects = state.apply(Duration::ZERO, stranded(3, 4, 6));
    assert_eq!((started(&effects), state.generation()), (vec![0, 1, 2, 3], Generation(6)));
}

#[test]
fn the_most_advanced_train_on_where_not_all_can() {
    let mut state = State::new(Limits { max: 1, min: 1, spares: 1, ..limits() });
    let waits = |done| Running { done: Some(Step(done)), ..running(5, 0, true) };
    state.apply(Duration::ZERO, came_back(0, 0, waits(3)));
    assert_eq!(started(&state.apply(Duration::ZERO, came_back(1, 0, waits(9)))), [1]);
}

#[test]
fn a_connection_made_anew_interrupts_nothing() {
    let mut state = all_here();
    let left = Event::Left { node: NodeId(1), incarnation: "1.0".to_owned() };
    assert!(state.apply(Duration::from_secs(1), left.clone()).is_empty());
    let effects = state.apply(Duration::from_secs(1), came_back(1, 0, running(1, 1, false)));
    assert!(effects.is_empty() && state.generation() == Generation(1), "{effects:?}");
    let effects = state.apply(Duration::from_secs(1), came_back(0, 0, running(1, 0, false)));
    assert_eq!(effects, [Effect::Attest { node: NodeId(0), generation: Generation(1) }]);
    assert!(state.apply(Duration::from_secs(4), Event::Tick).is_empty());
    // If there is no other, it is lost, though nobody has missed it.
    state.apply(Duration::from_secs(4), left);
    let effects = state.apply(Duration::from_secs(7), Event::Tick);
    assert_eq!(effects.iter().filter(|e| matches!(e, Effect::Leave { .. })).count(), 2);
}

#[test]
fn whoever_had_only_to_join_and_says_nothing_is_killed() {
    let mut state = all_here();
    let second = Duration::from_secs(1);
    state.apply(second, progressed(0, 1));
    state.apply(second, exited(1, 1, 137));
    // Node 2 is frozen: it does not join, and the others give up after a while.
    for node in [0, 1] {
        state.apply(second * 5, stranded(node, 2, 4));
    }
    assert!(state.apply(second * 7, Event::Tick).is_empty(), "the cause may show yet");
    let effects = state.apply(second * 8, Event::Tick);
    let killed = |e: &&Effect| matches!(e, Effect::End { node: NodeId(2), .. });
    assert_eq!(effects.iter().filter(killed).count(), 1, "{effects:?}");
    assert_eq!(started(&effects), [0, 1, 2]);
}

/// What a run of three does whose members have so many GPUs each.
fn with_gpus(backend: Option<Backend>, gpus: [u32; 3]) -> Vec<Effect> {
    let mut state = State::new(Limits { backend, ..limits() });
    let mut effects = Vec::new();
    for (node, gpus) in (0..).zip(gpus) {
        let Event::Joined { node, incarnation, kv_address, running, .. } = joined(node, 0) else {
            return effects;
        };
        let event = Event::Joined { node, incarnation, kv_address, gpus, running };
        effects = state.apply(Duration::ZERO, event);
    }
    effects
}

#[test]
fn nccl_is_taken_only_if_every_member_has_a_gpu() {
    let chosen = |effects: &[Effect]| -> Vec<Backend> {
        effects
            .iter()
            .filter_map(
                |e| if let Effect::Start { backend, .. } = e { Some(*backend) } else { None },
            )
            .collect()
    };
    assert_eq!(chosen(&with_gpus(None, [1, 2, 1])), [Backend::Nccl; 3]);
    assert_eq!(chosen(&with_gpus(Some(Backend::Gloo), [1, 1, 1])), [Backend::Gloo; 3]);
    let mixed = with_gpus(None, [1, 0, 1]);
    assert_eq!(chosen(&mixed), [Backend::Gloo; 3]);
    assert!(mixed.iter().any(|e| matches!(e, Effect::Note(text) if text.contains("2 of 3"))));
    assert_eq!(with_gpus(None, [0, 0, 0]).len(), 3, "nothing to say without GPUs");
    let refused = with_gpus(Some(Backend::Nccl), [1, 1, 0]);
    assert!(
        matches!(&refused[..], [Effect::Finish { status: 2, reason }] if reason.contains("node 2"))
    );
}

#[test]
fn reports_of_an_older_generation_change_nothing() {
    let mut state = all_here();
    let second = Duration::from_secs(1);
    assert!(state.apply(second, exited(1, 0, 1)).is_empty());
    assert!(state.apply(second, stranded(1, 0, 3)).is_empty());
    assert!(matches!(state.phase(), Phase::Training { ranks, left, .. }
        if ranks.len() == 3 && left.is_empty()));
}

#[test]
fn generations_without_a_step_use_up_the_budget_and_a_step_renews_it() {
    let second = Duration::from_secs(1);
    let mut state = all_here();
    for generation in 1..=10 {
        state.apply(second, progressed(0, generation));
        state.apply(second, exited(1, generation, 1));
    }
    assert_eq!(state.generation(), Generation(11));
    // What comes at once is the same misfortune: a campaign killed four processes in a fifth of a second.
    for generation in 11..=14 {
        state.apply(second, exited(generation as u32 % 3, generation, 137));
    }
    assert_eq!(state.generation(), Generation(15));
    state.apply(4 * second, exited(1, 15, 1));
    assert_eq!(state.generation(), Generation(16));
    // Neither validating is a step nor one that was done before: whoever fails in them would fail for ever.
    let (node, generation) = (NodeId(0), Generation(16));
    for progress in [Progress::Validating, Progress::Step { done: Step(10), last: false }] {
        state.apply(4 * second, Event::Progressed { node, generation, progress });
    }
    state.apply(7 * second, exited(1, 16, 1));
    assert!(matches!(state.phase(), Phase::Finished { status: 1, .. }), "{:?}", state.phase());
    let mut state = all_here();
    state.apply(second, exited(0, 1, 2));
    assert!(matches!(state.phase(), Phase::Finished { status: 2, .. }), "usage errors are final");
}

#[test]
fn what_no_restart_cures_ends_the_run_at_once_whoever_leaves_first() {
    let second = Duration::from_secs(1);
    let said = |status: i32| Event::TrainerFailed {
        node: NodeId(2),
        generation: Generation(1),
        evidence: "a shard is damaged".to_owned(),
        status,
        curable: false,
    };
    for victims in 0..2 {
        for (event, wanted) in [(said(1), 1), (said(2), 2)] {
            let mut state = all_here();
            for victim in 0..victims {
                state.apply(second, stranded(victim, 1, 3));
            }
            let effects = state.apply(second, event);
            let ended = effects.iter().any(|e| {
                matches!(e, Effect::Finish { status, reason }
                    if *status == wanted && reason.contains("node 2") && reason.contains("damaged"))
            });
            assert!(ended, "{effects:?}");
        }
    }
}

#[test]
fn what_is_recorded_is_told_to_the_trainers_of_that_generation_only() {
    let mut state = all_here();
    let recorded = Recorded { generation: Generation(1), lineage: Lineage(2), step: Step(9) };
    let effects = state.apply(Duration::from_secs(1), Event::Recorded(recorded));
    let told: Vec<u32> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Recorded { node, recorded: told } if *told == recorded => Some(node.0),
            _ => None,
        })
        .collect();
    assert_eq!(told, [0, 1, 2]);
    let before = Recorded { generation: Generation(0), ..recorded };
    assert!(state.apply(Duration::from_secs(1), Event::Recorded(before)).is_empty());
}

#[test]
fn without_its_ledger_a_run_ends_once_with_the_reason() {
    let mut state = all_here();
    let lost = || Event::LedgerLost { status: 1, reason: "another coordinator".to_owned() };
    let effects = state.apply(Duration::from_secs(1), lost());
    assert!(matches!(&effects[..], [Effect::Finish { status: 1, .. }]), "{effects:?}");
    assert!(state.apply(Duration::from_secs(2), lost()).is_empty());
}

#[test]
fn a_stop_asks_every_trainer_and_ends_with_75() {
    let mut state = all_here();
    let effects =
        state.apply(Duration::from_secs(1), Event::StopRequested { reason: "SIGINT".to_owned() });
    assert_eq!(effects.len(), 3);
    for node in 0..3 {
        state.apply(Duration::from_secs(2), exited(node, 1, 75));
    }
    assert!(matches!(state.phase(), Phase::Finished { status: 75, .. }));
}

/// The second at which a generation is lost whose agents live and whose trainers made progress at
/// the given seconds only.
fn lost_at(progress: &[u64]) -> Option<u64> {
    let mut state = all_here();
    for second in 1..=400 {
        let now = Duration::from_secs(second);
        for node in (0..3).map(NodeId) {
            state.apply(now, Event::Heard { node });
        }
        if progress.contains(&second) {
            state.apply(now, progressed(1, 1));
        }
        let effects = state.apply(now, Event::Tick);
        if started(&effects).len() == 3 {
            return Some(second);
        }
    }
    None
}

#[test]
fn a_generation_without_progress_is_lost_though_its_agents_live() {
    assert_eq!(lost_at(&[]), Some(61), "nothing ever: the time to start");
    assert_eq!(lost_at(&[2, 4, 6]), Some(27), "quick steps, then none");
    assert_eq!(lost_at(&[50, 52]), Some(52 + 151), "slow ones earn patience");
}

/// Else an agent that was frozen for a while would go on talking to a coordinator that knows it no more.
#[test]
fn whoever_was_given_up_loses_its_connection_and_may_come_again() {
    let mut state = all_here();
    let later = Duration::from_secs(9);
    for node in [0, 2] {
        state.apply(later, Event::Heard { node: NodeId(node) });
    }
    assert!(state.has_or_rejects(NodeId(1)));
    state.apply(later, Event::Tick);
    assert!(!state.has_or_rejects(NodeId(1)) && state.has_or_rejects(NodeId(0)));
    assert!(state.has_or_rejects(NodeId(7)), "told that it is not wanted, it need not ask again");
    let effects = state.apply(later, came_back(1, 0, running(1, 1, true)));
    assert_eq!(started(&effects), [0, 1, 2]);
}
