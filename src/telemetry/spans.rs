//! The spans of a training step, and the trace context between processes.
//!
//! A step is a span `step` with one child per [`Phase`]. The same object adds up how long each
//! phase took, so that the trace, the metrics and the progress line tell one story. Between
//! processes the W3C trace context travels in the environment variable `TRACEPARENT`.
//!
//! With no exporter these spans cost well under a microsecond. Of steps, only some are traced ([`StepSampling`]); further
//! sampling is the SDK's own business (`OTEL_TRACES_SAMPLER`).

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanBuilder, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
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
    /// The batch, to where it is computed on.
    CopyToDevice = "copy_to_device",
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
    /// Starts a step, and if it is to be traced its span, below `parent`.
    #[must_use]
    pub fn begin(parent: &Span, step: Step, rank: Rank, traced: bool) -> Self {
        let span = match traced {
            true => {
                info_span!(parent: parent, "step", step = number(step.0), rank = i64::from(rank.0))
            }
            false => Span::none(),
        };
        Self { span, started: Instant::now(), phases: Default::default() }
    }

    /// Runs `work` as a phase of this step, and returns what it returns.
    pub fn phase<T>(&mut self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = match self.span.is_disabled() {
            true => work(),
            false => phase.span(&self.span).in_scope(work),
        };
        self.phases[phase as usize] += started.elapsed();
        result
    }

    /// How long a phase took so far.
    #[must_use]
    pub fn spent(&self, phase: Phase) -> Duration {
        self.phases[phase as usize]
    }

    /// Ends the span of the step; what is timed after that is of what follows it. Returns how long the step took.
    pub fn end(&mut self) -> Duration {
        self.span = Span::none();
        self.elapsed()
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

/// A count as a span has it: unsigned ones would arrive as text.
#[must_use]
pub fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Steps that are traced at the beginning of every generation.
const FIRST_STEPS: u32 = 5;

/// Which steps are traced: the first few of a generation, then one now and then, so that the cost has a bound however
/// short steps are.
#[derive(Debug)]
pub struct StepSampling {
    every: Duration,
    first: u32,
    last: Option<Instant>,
}

impl StepSampling {
    /// One in `every` at most; zero: all of them.
    #[must_use]
    pub fn new(every: Duration) -> Self {
        Self { every, first: FIRST_STEPS, last: None }
    }

    /// Whether the step that begins `now` is one of them.
    pub fn takes(&mut self, now: Instant) -> bool {
        let due = self.last.is_none_or(|last| now.duration_since(last) >= self.every);
        if self.first > 0 {
            self.first -= 1;
        } else if !due {
            return false;
        }
        self.last = Some(now);
        true
    }
}

/// A span that is over: known only now, with times of its own. Others may be recorded below it.
#[derive(Debug, Clone)]
pub struct Past(Context);

impl Past {
    /// A live span, as what others are recorded below.
    #[must_use]
    pub fn below(span: &Span) -> Self {
        Self(span.context())
    }
}

/// Records a span that was from one moment to another. Does nothing where traces are not exported.
pub fn past_span(
    parent: &Past,
    name: &'static str,
    (from, to): (SystemTime, SystemTime),
    attributes: Vec<KeyValue>,
) -> Past {
    let tracer = opentelemetry::global::tracer("cpcr");
    let builder = SpanBuilder::from_name(name).with_start_time(from).with_attributes(attributes);
    let mut span = tracer.build_with_context(builder, &parent.0);
    let context = parent.0.with_remote_span_context(span.span_context().clone());
    span.end_with_timestamp(to);
    Past(context)
}

/// `span`, continuing the trace of `traceparent` if that is one. To be called before anything is below it.
#[must_use]
pub fn continues(span: Span, traceparent: Option<&str>) -> Span {
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
        let mut step = StepTrace::begin(&Span::none(), Step(7), Rank(0), true);
        assert_eq!(step.phase(Phase::Forward, || 42), 42);
        let once = step.spent(Phase::Forward);
        step.phase(Phase::Forward, || std::thread::sleep(Duration::from_millis(2)));
        assert!(step.spent(Phase::Forward) >= once + Duration::from_millis(2));
        assert_eq!(step.spent(Phase::DataWait), Duration::ZERO);
        assert!(step.elapsed() >= step.spent(Phase::Forward));
    }

    #[test]
    fn without_an_exporter_there_is_no_trace_to_carry() {
        let span = info_span!("trainer");
        assert_eq!(traceparent_of(&continues(span.clone(), Some("rubbish"))), None);
        let now = SystemTime::now();
        past_span(&Past::below(&span), "recovery", (now, now), Vec::new());
    }

    #[test]
    fn the_first_steps_are_traced_then_one_now_and_then() {
        let start = Instant::now();
        let traced = |every_ms, steps: u64| {
            let mut sampling = StepSampling::new(Duration::from_millis(every_ms));
            let step = |n: u64| sampling.takes(start + Duration::from_millis(10 * n));
            (0..steps).map(step).filter(|taken| *taken).count()
        };
        assert_eq!(traced(1000, 5), 5);
        assert_eq!(traced(1000, 104), 5, "a second after the last of them");
        assert_eq!(traced(1000, 305), 8);
        assert_eq!(traced(0, 305), 305);
    }
}
