//! Thousands of seeded lives of the coordinator: members come, die, fall silent and return at
//! random, and the promises hold in every one. A failing seed is printed and can be replayed.

use std::collections::BTreeMap;
use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::events::{Effect, Event, Limits};
use super::state::{Phase, State};
use crate::ledger::Recorded;
use crate::types::{Backend, Generation, Lineage, NodeId, Step};

fn limits() -> Limits {
    Limits {
        nodes: 3,
        backend: None,
        restarts: 2,
        wait: Duration::from_secs(25),
        heartbeat: Duration::from_secs(8),
        start: Duration::from_secs(60),
        progress: Duration::from_secs(20),
        drain: Duration::from_secs(10),
    }
}

fn joined(node: u32, life: u32) -> Event {
    Event::Joined {
        node: NodeId(node),
        incarnation: format!("{node}.{life}"),
        kv_address: format!("127.0.0.1:{node}"),
        gpus: 0,
    }
}

fn exited(node: u32, generation: u64, status: i32) -> Event {
    Event::TrainerExited {
        node: NodeId(node),
        generation: Generation(generation),
        status,
        evidence: format!("exited with {status}"),
    }
}

fn all_here() -> State {
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
fn a_lost_trainer_ends_the_generation_everywhere_and_the_next_one_starts() {
    let mut state = all_here();
    let effects = state.apply(Duration::from_secs(1), exited(1, 1, 137));
    let ended = effects.iter().filter(|e| matches!(e, Effect::End { .. })).count();
    assert_eq!(ended, 3);
    state.apply(Duration::from_secs(1), exited(0, 1, 137));
    let effects = state.apply(Duration::from_secs(1), exited(2, 1, 137));
    assert_eq!(effects.iter().filter(|e| matches!(e, Effect::Start { .. })).count(), 3);
    assert_eq!(state.generation(), Generation(2));
}

/// What a run of three does whose members have so many GPUs each.
fn with_gpus(backend: Option<Backend>, gpus: [u32; 3]) -> Vec<Effect> {
    let mut state = State::new(Limits { backend, ..limits() });
    let mut effects = Vec::new();
    for (node, gpus) in (0..).zip(gpus) {
        let Event::Joined { node, incarnation, kv_address, .. } = joined(node, 0) else {
            return effects;
        };
        let event = Event::Joined { node, incarnation, kv_address, gpus };
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
    let before = state.clone();
    assert!(state.apply(Duration::from_secs(1), exited(1, 0, 1)).is_empty());
    assert_eq!(state, before);
}

#[test]
fn the_restart_budget_is_kept_and_usage_errors_are_final() {
    let mut state = all_here();
    for generation in 1..=3 {
        for node in 0..3 {
            state.apply(Duration::from_secs(1), exited(node, generation, 1));
        }
    }
    assert!(matches!(state.phase(), Phase::Finished { status: 1, .. }), "{:?}", state.phase());
    let mut state = all_here();
    state.apply(Duration::from_secs(1), exited(0, 1, 2));
    assert!(matches!(state.phase(), Phase::Finished { status: 2, .. }));
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
                state.apply(second, exited(victim, 1, 1));
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
            state.apply(now, Event::Progressed { node: NodeId(1) });
        }
        let effects = state.apply(now, Event::Tick);
        if effects.iter().filter(|e| matches!(e, Effect::End { .. })).count() == 3 {
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

/// Whatever happens, the run ends within a bounded time after the last event, a generation never
/// has two trainers on a node at once, and generations only grow.
#[test]
fn thousands_of_seeds_end_and_never_double_a_trainer() {
    for seed in 0..4000 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut state = State::new(limits());
        let mut now = Duration::ZERO;
        let mut lives = [0_u32; 3];
        let mut running: BTreeMap<NodeId, Generation> = BTreeMap::new();
        for _ in 0..60 {
            now += Duration::from_millis(u64::from(rng.next_u32() % 3000));
            let node = rng.next_u32() % 3;
            let event = match rng.next_u32() % 12 {
                0..=3 => {
                    lives[node as usize] += 1;
                    running.remove(&NodeId(node)); // a new agent has no trainer
                    joined(node, lives[node as usize])
                }
                4 => {
                    running.remove(&NodeId(node));
                    Event::Left {
                        node: NodeId(node),
                        incarnation: format!("{node}.{}", lives[node as usize]),
                    }
                }
                5 | 6 => match running.remove(&NodeId(node)) {
                    Some(generation) => {
                        exited(node, generation.0, [0, 1, 75, 137][(rng.next_u32() % 4) as usize])
                    }
                    None => Event::Tick,
                },
                7 if rng.next_u32() % 8 == 0 => Event::StopRequested { reason: "test".to_owned() },
                8 => Event::Tick,
                _ => Event::Heard { node: NodeId(node) },
            };
            let before = state.generation();
            for effect in state.apply(now, event) {
                match effect {
                    Effect::Start { node, generation, .. } => {
                        assert!(generation > before, "seed {seed}");
                        let doubled = running.insert(node, generation);
                        assert_eq!(doubled, None, "seed {seed}: two trainers on node {node}");
                    }
                    // The agent kills it and reports, later or never: here at once, half the time.
                    Effect::End { node, generation, .. }
                        if rng.next_u32() % 2 == 0 && running.get(&node) == Some(&generation) =>
                    {
                        running.remove(&node);
                        for effect in state.apply(now, exited(node.0, generation.0, 137)) {
                            if let Effect::Start { node, generation, .. } = effect {
                                running.insert(node, generation);
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
        for _ in 0..200 {
            now += Duration::from_secs(1);
            state.apply(now, Event::Tick);
        }
        assert!(
            matches!(state.phase(), Phase::Finished { .. }),
            "seed {seed}: {:?}",
            state.phase()
        );
    }
}
