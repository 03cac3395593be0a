//! The spans of a training step, and the trace context between processes.
//!
//! A step is a span `step` with one child per [`Phase`]. The same object adds up how long each
//! phase took, so that the trace, the metrics and the progress line tell one story. Between
//! processes the W3C trace context travels in the environment variable `TRACEPARENT`.
//!
//! With no exporter these spans cost well under a microsecond; sampling is the SDK's own business
//! (`OTEL_TRACES_SAMPLER`).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use opentelemetry::Context;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::{Span, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::types::{Rank, Step};

/// The environment variable that carries the trace context to a child process.
pub const TRACEPARENT: &str = "TRACEPARENT";
const HEADER: &str = "traceparent";

macro_rules! phases {
    ($($(#[$doc:meta])* $phase:ident = $name:literal),+ $(,)?) => {
        /// What a trainer does within a step.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Phase {
            $($(#[$doc])* $phase),+
        }

        impl Phase {
            /// All of them, in the order in which a step goes through them.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$phase),+];

            /// The span's name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$phase => $name),+ }
            }

            fn span(self, parent: &Span) -> Span {
                match self { $(Self::$phase => info_span!(parent: parent, $name)),+ }
            }
        }
    };
}

phases! {
    /// Waiting for the loader.
    DataWait = "data_wait",
    /// The network, forwards.
    Forward = "forward",
    /// The loss terms.
    Loss = "loss",
    /// The gradient; the reducer's all-reduce overlaps it.
    Backward = "backward",
    /// Waiting for what of the all-reduce did not overlap.
    AllReduceWait = "all_reduce_wait",
    /// The parameters' update.
    Optimiser = "optimiser",
    /// Copying tensors for a checkpoint; the upload is not part of it.
    CheckpointHold = "checkpoint_hold",
}

/// One step being traced and timed. It ends when dropped.
#[derive(Debug)]
pub struct StepTrace {
    span: Span,
    started: Instant,
    phases: [Duration; Phase::ALL.len()],
}

impl StepTrace {
    /// Starts the span of a step, below `parent` (the process's span).
    #[must_use]
    pub fn begin(parent: &Span, step: Step, rank: Rank) -> Self {
        Self {
            span: info_span!(parent: parent, "step", step = step.0, rank = rank.0),
            started: Instant::now(),
            phases: Default::default(),
        }
    }

    /// Runs `work` as a phase of this step, and returns what it returns.
    pub fn phase<T>(&mut self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = phase.span(&self.span).in_scope(work);
        self.phases[phase as usize] += started.elapsed();
        result
    }

    /// How long a phase took so far.
    #[must_use]
    pub fn spent(&self, phase: Phase) -> Duration {
        self.phases[phase as usize]
    }

    /// How long the step took so far.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// The step's span, for events and spans of the caller's own.
    #[must_use]
    pub fn span(&self) -> &Span {
        &self.span
    }
}

/// The span of a whole process, continuing the trace of `traceparent` if that is one.
#[must_use]
pub fn process_span(role: &str, traceparent: Option<&str>) -> Span {
    let span = info_span!(parent: None, "process", otel.name = role, role);
    if let Some(parent) = traceparent.and_then(remote_context)
        && let Err(error) = span.set_parent(parent)
    {
        // Without an exporter there is no layer that would know of parents: nothing is lost.
        tracing::trace!(%error, "no trace to continue");
    }
    span
}

/// The `TRACEPARENT` that makes a child process continue the trace of `span`.
///
/// `None` when traces are not exported.
#[must_use]
pub fn traceparent_of(span: &Span) -> Option<String> {
    let context = span.context();
    if !context.span().span_context().is_valid() {
        return None;
    }
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&context, &mut carrier);
    carrier.remove(HEADER)
}

fn remote_context(traceparent: &str) -> Option<Context> {
    let carrier = HashMap::from([(HEADER.to_owned(), traceparent.to_owned())]);
    let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier);
    context.span().span_context().is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_and_hand_back_what_the_work_returns() {
        let mut step = StepTrace::begin(&Span::none(), Step(7), Rank(0));
        assert_eq!(step.phase(Phase::Forward, || 42), 42);
        let once = step.spent(Phase::Forward);
        step.phase(Phase::Forward, || std::thread::sleep(Duration::from_millis(2)));
        assert!(step.spent(Phase::Forward) >= once + Duration::from_millis(2));
        assert_eq!(step.spent(Phase::DataWait), Duration::ZERO);
        assert!(step.elapsed() >= step.spent(Phase::Forward));
    }

    #[test]
    fn without_an_exporter_there_is_no_trace_to_carry() {
        assert_eq!(traceparent_of(&process_span("trainer", Some("rubbish"))), None);
    }
}
