//! The spans of a trainer's life: its time in a generation, epochs, validations, checkpoints. Steps and their phases are
//! `telemetry`'s; what is exported, and whether, is not asked here.

use tracing::{Span, info_span};

use super::setup::Trainer;
use crate::checkpoint::Written;
use crate::proto::{Membership, TrainerEvent};
use crate::telemetry::{Guard, continues, number, past_span};

/// Its time in a generation, in the trace of whoever ordered it.
pub fn member(m: &Membership, telemetry: &Guard) -> Span {
    let generation = number(m.generation.0);
    let (rank, world) = (i64::from(m.rank.0), i64::from(m.world.0));
    let span = info_span!(
        parent: telemetry.span(), "member",
        cpcr.generation = generation, cpcr.rank = rank, cpcr.world = world
    );
    continues(span, m.traceparent.as_deref())
}

/// The span of the epoch that is under way.
#[derive(Debug)]
pub struct EpochSpan {
    epoch: Option<u64>,
    span: Span,
}

impl Default for EpochSpan {
    fn default() -> Self {
        Self { epoch: None, span: Span::none() }
    }
}

impl EpochSpan {
    /// That of the next step: of the pass over the unlabelled pool, or over the labelled one where there is no other.
    pub fn of(&mut self, t: &Trainer, member: &Span) -> &Span {
        let now = t.loader.as_ref().map(|loader| {
            let spec = loader.deal().spec();
            let pool = spec.unlabelled.end - spec.unlabelled.start;
            match t.step.0.saturating_mul(u64::from(spec.batch_unlabelled)).checked_div(pool) {
                Some(epoch) => epoch,
                None => loader.deal().labelled_epoch(t.step).0,
            }
        });
        if self.epoch != now {
            self.span = Span::none(); // the one before ends first
            self.span = info_span!(parent: member, "epoch", epoch = now.map(number));
            self.epoch = now;
        }
        &self.span
    }
}

/// A checkpoint is committed: said to the agent, and to the trace. On the writer's thread.
pub fn checkpoint_written(written: &Written) {
    let manifest = &written.manifest;
    let bytes = manifest.objects.values().map(|object| object.digest.bytes).sum();
    let took = written.committed.duration_since(written.began).unwrap_or_default();
    let attributes = vec![
        opentelemetry::KeyValue::new("step", number(manifest.step.0)),
        opentelemetry::KeyValue::new("bytes", number(bytes)),
    ];
    past_span(&written.cause, "checkpoint_upload", (written.began, written.committed), attributes);
    super::emit(&TrainerEvent::Checkpoint {
        step: manifest.step,
        bytes,
        verified: written.verified,
        upload_s: took.as_secs_f64(),
        hold_s: Some(written.held.as_secs_f64()),
    });
}
