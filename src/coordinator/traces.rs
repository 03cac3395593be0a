//! The coordinator's spans: its generations, and what came between them. Others continue them, by the `traceparent` that
//! goes with their orders. No decision.

use std::time::{Duration, SystemTime};

use opentelemetry::KeyValue;
use tracing::{Span, info_span};

use super::verdict::{Phases, Verdict};
use crate::telemetry::{Past, number, past_span, traceparent_of};
use crate::types::Generation;

/// The run's span, and that of the generation that trains.
pub(super) struct Traces {
    run: Span,
    generation: Option<(Generation, Span)>,
}

impl Traces {
    /// Below `run`.
    pub(super) fn of(run: Span) -> Self {
        Self { run, generation: None }
    }

    /// The context of the run; empty where traces are not exported.
    pub(super) fn run(&self) -> String {
        traceparent_of(&self.run).unwrap_or_default()
    }

    /// The context of a generation, which begins with its first order.
    pub(super) fn generation(&mut self, generation: Generation, world: u32) -> String {
        if self.generation.as_ref().is_none_or(|(current, _)| *current != generation) {
            let span = info_span!(
                parent: &self.run, "generation",
                cpcr.generation = number(generation.0), cpcr.world = i64::from(world)
            );
            self.generation = Some((generation, span));
        }
        let span = self.generation.as_ref().map(|(_, span)| span);
        span.and_then(traceparent_of).unwrap_or_default()
    }

    /// A generation is over.
    pub(super) fn ended(&mut self) {
        self.generation = None;
    }

    /// What became of an interruption, whose first step after it is being told now: the whole of it, phase by phase.
    pub(super) fn recovered(&self, verdict: &Verdict) {
        let (Some(outage_s), Some(phases)) = (verdict.outage_s(), verdict.phases) else { return };
        let to = SystemTime::now();
        let seconds = |s: f64| Duration::try_from_secs_f64(s).unwrap_or_default();
        let Some(from) = to.checked_sub(seconds(outage_s)) else { return };
        let mut attributes = vec![
            KeyValue::new("cpcr.generation", number(verdict.generation.0)),
            KeyValue::new("cpcr.cause", verdict.cause.kind.name()),
            KeyValue::new("cpcr.outage_s", outage_s),
        ];
        attributes
            .extend(verdict.cause.node.map(|node| KeyValue::new("cpcr.node", i64::from(node.0))));
        attributes
            .extend(verdict.cause.rank.map(|rank| KeyValue::new("cpcr.rank", i64::from(rank.0))));
        let recovery = past_span(&Past::below(&self.run), "recovery", (from, to), attributes);
        let mut at = from;
        for (name, s) in Phases::NAMES.into_iter().zip(phases.seconds()) {
            let end = at + seconds(s);
            past_span(&recovery, name, (at, end), Vec::new());
            at = end;
        }
    }
}
