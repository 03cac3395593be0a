//! What the state machine says of interruptions and of its time, and how a run that is done ends.

use std::time::Duration;

use super::events::{Effect, Event, Limits, Progress};
use super::state::{Phase, State};
use super::state_tests::{
    all_here, elastic, exited, joined, limits, progressed, started, stranded,
};
use super::verdict::{Cause, CauseKind, Part, Verdict};
use crate::types::{Generation, NodeId, Rank, Step, WorldSize};

fn verdicts(effects: Vec<Effect>) -> Vec<Verdict> {
    let verdicts = effects.into_iter().filter_map(|effect| match effect {
        Effect::Verdict(verdict) => Some(*verdict),
        _ => None,
    });
    verdicts.collect()
}

#[test]
fn a_verdict_names_who_ended_first_and_the_others_as_victims() {
    let at = |ms| Duration::from_millis(ms);
    let mut state = elastic(2, 3);
    let step = |state: &mut State, ms, generation, step| {
        let progress = Progress::Step { done: Step(step), last: false };
        let (node, generation) = (NodeId(0), Generation(generation));
        verdicts(state.apply(at(ms), Event::Progressed { node, generation, progress }))
    };
    assert_eq!(step(&mut state, 1000, 1, 1), []);
    assert_eq!(step(&mut state, 3000, 1, 2), []);
    // A peer sees it first; the process that died is to blame all the same.
    state.apply(at(3100), stranded(2, 1, 2));
    assert_eq!(verdicts(state.apply(at(3200), exited(1, 1, 137))), []);
    state.apply(at(3250), stranded(0, 1, 2));
    assert_eq!(state.generation(), Generation(2));
    // Waiting is no step.
    let (node, generation, progress) = (NodeId(0), Generation(2), Progress::Validating);
    let effects = state.apply(at(3300), Event::Progressed { node, generation, progress });
    assert_eq!(verdicts(effects), []);
    let [verdict] = step(&mut state, 3700, 2, 3).try_into().unwrap();
    let cause = &verdict.cause;
    assert_eq!(
        (cause.kind, cause.node, cause.rank),
        (CauseKind::TrainerKilled, Some(NodeId(1)), Some(Rank(1)))
    );
    assert_eq!((cause.status, verdict.step), (Some(137), Some(Step(2))));
    let victims: Vec<_> =
        verdict.victims.iter().map(|v| (v.node.0, v.rank.0, v.evidence.is_some())).collect();
    assert_eq!(victims, [(0, 0, true), (2, 2, true)]);
    assert_eq!(verdict.next, Some((Generation(2), WorldSize(2))));
    let times = [verdict.detect_s, verdict.regroup_s.unwrap(), verdict.step_s.unwrap()];
    assert_eq!(times, [0.2, 0.0, 0.5]);
    assert!(verdict.line().contains("node 1 (rank 1) exited with 137"), "{}", verdict.line());

    // All of the time is accounted for, and each part of it once.
    assert_eq!(step(&mut state, 4700, 2, 4), []);
    let goodput = state.goodput(at(5000));
    let parts = |part| goodput.parts_s.get(&part).copied().unwrap_or_default();
    assert_eq!([parts(Part::Starting), parts(Part::Training)], [1.0, 3.3]);
    assert_eq!((parts(Part::Recovery), goodput.wall_s, goodput.losses), (0.7, 5.0, 1));
}

#[test]
fn whoever_is_lost_before_the_next_generation_is_no_victim_and_a_joiner_no_loss() {
    let at = |ms| Duration::from_millis(ms);
    let mut state = all_here();
    state.apply(at(1000), progressed(0, 1));
    state.apply(at(1100), stranded(0, 1, 1));
    state.apply(at(1200), Event::Left { node: NodeId(1), incarnation: "1.0".to_owned() });
    state.apply(at(1300), exited(2, 1, 137));
    assert!(matches!(state.phase(), Phase::Gathering { .. }));
    state.apply(at(3000), joined(1, 1));
    let [verdict] = verdicts(state.apply(at(4000), progressed(0, 2))).try_into().unwrap();
    assert_eq!((verdict.cause.kind, verdict.cause.rank), (CauseKind::AgentLost, Some(Rank(1))));
    let also = |cause: &Cause| (cause.kind, cause.node, cause.rank);
    let lost = (CauseKind::TrainerKilled, Some(NodeId(2)), Some(Rank(2)));
    assert_eq!(verdict.also.iter().map(also).collect::<Vec<_>>(), [lost]);
    assert_eq!(verdict.victims.iter().map(|victim| victim.node.0).collect::<Vec<_>>(), [0]);
    assert_eq!((verdict.regroup_s, verdict.step_s), (Some(1.8), Some(1.0)));

    let mut state = State::new(Limits { min: 1, max: 2, ..limits() });
    state.apply(Duration::ZERO, joined(0, 0));
    state.apply(at(12_000), Event::Heard { node: NodeId(0) });
    state.apply(at(13_000), Event::Tick);
    state.apply(at(14_000), progressed(0, 1));
    state.apply(at(14_000), joined(1, 0));
    state.apply(at(14_500), Event::TrainerStandby { node: NodeId(1) });
    let [joining] = verdicts(state.apply(at(15_000), progressed(0, 2))).try_into().unwrap();
    assert_eq!((joining.cause.kind, joining.outage_s()), (CauseKind::Joined, Some(1.0)));
    let goodput = state.goodput(at(15_000));
    assert_eq!((goodput.losses, goodput.joins), (0, 1));
    assert_eq!(goodput.parts_s[&Part::Joining], 1.0);
}

/// What a campaign of real processes found: a member was ready while the only trainer wrote its report, the two were told
/// to meet, and the one left, all done, while the other waited; then the same with their parts exchanged, and again.
#[test]
fn a_member_that_comes_when_all_is_done_changes_nothing() {
    let second = Duration::from_secs(1);
    let one_of_two = || {
        let mut state = State::new(Limits { min: 1, max: 2, ..limits() });
        state.apply(Duration::ZERO, joined(0, 0));
        state.apply(second, Event::Heard { node: NodeId(0) });
        state.apply(Duration::from_secs(13), Event::Heard { node: NodeId(0) });
        assert_eq!(state.generation(), Generation(1));
        state
    };
    let (node, generation) = (NodeId(0), Generation(1));
    let step = |last| Event::Progressed {
        node,
        generation,
        progress: Progress::Step { done: Step(9), last },
    };
    let ready = Event::TrainerStandby { node: NodeId(1) };
    // After the last step nobody is waited for.
    let mut state = one_of_two();
    state.apply(13 * second, step(true));
    state.apply(13 * second, joined(1, 0));
    assert!(started(&state.apply(13 * second, ready.clone())).is_empty());
    state.apply(13 * second, Event::Completed { node, generation });
    state.apply(13 * second, exited(0, 1, 0));
    assert!(matches!(state.phase(), Phase::Finished { status: 0, .. }));
    // The word of that may cross with the order to meet.
    let mut state = one_of_two();
    state.apply(13 * second, step(false));
    state.apply(13 * second, joined(1, 0));
    assert_eq!(started(&state.apply(13 * second, ready)), [0, 1]);
    state.apply(13 * second, Event::Completed { node, generation });
    assert!(matches!(state.phase(), Phase::Finished { status: 0, .. }), "{:?}", state.phase());
}

/// Whoever is lost on the way out takes nothing along.
#[test]
fn a_loss_after_all_is_done_is_none() {
    let mut state = all_here();
    let (node, generation) = (NodeId(0), Generation(1));
    state.apply(Duration::ZERO, Event::Completed { node, generation });
    assert!(matches!(state.phase(), Phase::Training { .. }), "the others still leave");
    state.apply(Duration::from_secs(1), exited(1, 1, 137));
    assert!(matches!(state.phase(), Phase::Finished { status: 0, .. }));
}
