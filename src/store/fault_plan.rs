//! What a [`FaultProxy`](super::FaultProxy) does to which request: seeded, and a function of the request's number.
//!
//! For tests and for `cpcr bench data`; nothing in production code makes one. No socket here.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// One way in which an exchange with an object store goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InjectedFault {
    /// 503 for this request and the next ones: see [`FaultPlan::burst`].
    Unavailable,
    /// 500.
    ServerError,
    /// 429.
    Throttled,
    /// The connection is reset before an answer.
    Reset,
    /// The connection ends in the middle of the body.
    Truncated,
    /// 200 with nothing in it.
    EmptyOk,
    /// Other bytes than were asked for, and `Content-Range` says so.
    WrongRange,
    /// Other bytes than were asked for, under the headers of the right ones.
    MislabelledRange,
    /// One bit of the body is flipped.
    BitFlip,
    /// Not one byte comes until the client leaves.
    Stall,
    /// The body comes byte by byte, slowly.
    Trickle,
    /// Another object under that name: other bytes, other `ETag`.
    Changed,
    /// A write is carried out and the connection reset instead of an answer.
    AnswerLost,
}

/// What is asked for, as far as it decides which faults make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// The bytes of an object.
    Object,
    /// Something is changed.
    Write,
    /// Headers, listings.
    Other,
}

impl InjectedFault {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Unavailable,
        Self::ServerError,
        Self::Throttled,
        Self::Reset,
        Self::Truncated,
        Self::EmptyOk,
        Self::WrongRange,
        Self::MislabelledRange,
        Self::BitFlip,
        Self::Stall,
        Self::Trickle,
        Self::Changed,
        Self::AnswerLost,
    ];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::ServerError => "server_error",
            Self::Throttled => "throttled",
            Self::Reset => "reset",
            Self::Truncated => "truncated",
            Self::EmptyOk => "empty",
            Self::WrongRange => "wrong_range",
            Self::MislabelledRange => "mislabelled_range",
            Self::BitFlip => "bit_flip",
            Self::Stall => "stall",
            Self::Trickle => "trickle",
            Self::Changed => "changed",
            Self::AnswerLost => "answer_lost",
        }
    }

    /// Whether it can happen to such a request.
    pub(super) fn applies(self, asked: Asked) -> bool {
        match self {
            Self::Unavailable | Self::ServerError | Self::Throttled | Self::Reset | Self::Stall => {
                true
            }
            Self::AnswerLost => asked == Asked::Write,
            Self::Truncated
            | Self::EmptyOk
            | Self::WrongRange
            | Self::MislabelledRange
            | Self::BitFlip
            | Self::Trickle
            | Self::Changed => asked == Asked::Object,
        }
    }
}

/// Which requests go wrong, and how. Requests are numbered from 0 in the order of their arrival;
/// with [`FaultPlan::only`], those that it selects.
#[derive(Debug, Clone, PartialEq)]
pub struct FaultPlan {
    /// Of the draws.
    pub seed: u64,
    /// Each kind's probability; their sum should not be above 1.
    pub rates: Vec<(InjectedFault, f64)>,
    /// Requests whose fate is fixed, whatever the draws say.
    pub at: Vec<(u64, InjectedFault)>,
    /// How many requests in a row one 503 takes with it, itself included.
    pub burst: u64,
    /// Seconds in the `Retry-After` of 503 and 429.
    pub retry_after_s: Option<u32>,
    /// Only requests whose path (with the bucket) contains this.
    pub only: Option<String>,
    /// What all answers together get through to the clients; else as fast as it goes.
    pub link_bytes_per_s: Option<u64>,
}

impl FaultPlan {
    /// Nothing goes wrong.
    #[must_use]
    pub fn none() -> Self {
        Self::seeded(0)
    }

    /// Nothing goes wrong yet; the draws to come are those of `seed`.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self {
            seed,
            rates: vec![],
            at: vec![],
            burst: 3,
            retry_after_s: None,
            only: None,
            link_bytes_per_s: None,
        }
    }

    /// The same plan behind a link of `bytes_per_s`.
    #[must_use]
    pub fn link(mut self, bytes_per_s: u64) -> Self {
        self.link_bytes_per_s = Some(bytes_per_s);
        self
    }

    /// The same plan, in which `fault` happens to a request with `probability`.
    #[must_use]
    pub fn rate(mut self, fault: InjectedFault, probability: f64) -> Self {
        self.rates.push((fault, probability));
        self
    }

    /// The same plan, in which `fault` happens to request `number`.
    #[must_use]
    pub fn at(mut self, number: u64, fault: InjectedFault) -> Self {
        self.at.push((number, fault));
        self
    }

    /// The same plan for paths that contain `part` only.
    #[must_use]
    pub fn only(mut self, part: impl Into<String>) -> Self {
        self.only = Some(part.into());
        self
    }

    /// What is meant to happen to request `number`.
    pub(super) fn draw(&self, number: u64) -> Option<InjectedFault> {
        if let Some((_, fault)) = self.at.iter().find(|(at, _)| *at == number) {
            return Some(*fault);
        }
        let burst = number.saturating_sub(self.burst.saturating_sub(1))..number;
        let unavailable = |n: u64| self.draw_alone(n) == Some(InjectedFault::Unavailable);
        let begun_before = burst.into_iter().any(unavailable);
        begun_before.then_some(InjectedFault::Unavailable).or_else(|| self.draw_alone(number))
    }

    fn draw_alone(&self, number: u64) -> Option<InjectedFault> {
        // 53 bits: every value of an f64 in [0, 1) that is a multiple of 2^-53.
        let mut left = (self.bits(number) >> 11) as f64 / (1_u64 << 53) as f64;
        for (fault, probability) in &self.rates {
            if left < *probability {
                return Some(*fault);
            }
            left -= probability;
        }
        None
    }

    /// The random bits of request `number`.
    pub(super) fn bits(&self, number: u64) -> u64 {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(number);
        rng.next_u64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_a_function_of_seed_and_number_at_about_their_rate() {
        let plan = FaultPlan::seeded(7).rate(InjectedFault::Reset, 0.3);
        let draws: Vec<_> = (0..2000).map(|n| plan.draw(n)).collect();
        assert_eq!(draws, (0..2000).map(|n| plan.draw(n)).collect::<Vec<_>>());
        let hit = draws.iter().flatten().count();
        assert!((500..700).contains(&hit), "{hit} of 2000 at 0.3");
        let other: Vec<_> =
            (0..2000).map(|n| FaultPlan { seed: 8, ..plan.clone() }.draw(n)).collect();
        assert_ne!(draws, other);
    }

    #[test]
    fn a_burst_goes_on_and_a_fixed_fate_wins() {
        let plan = FaultPlan::seeded(1).rate(InjectedFault::Unavailable, 0.05);
        let begun = (0..).find(|n| plan.draw(*n).is_some()).unwrap();
        assert!((begun..begun + 3).all(|n| plan.draw(n) == Some(InjectedFault::Unavailable)));
        let plan = plan.at(begun, InjectedFault::BitFlip);
        assert_eq!(plan.draw(begun), Some(InjectedFault::BitFlip));
        assert_eq!(FaultPlan::none().draw(0), None);
    }
}
