//! What is read through a proxy: behind a link of a known width, and under faults.

use super::{Command, Contender, DataBenchError, DataOptions, Site, Task, rounds};
use crate::store::{FaultPlan, FaultProxy, InjectedFault};

/// 1 Gbit/s: less than the bare loop and ours can take in on a core, so that the link is what counts.
const LINK_BYTES_PER_S: u64 = 125_000_000;
/// Requests that are answered with 503.
const UNAVAILABLE_SHARE: f64 = 0.01;
/// One in so many requests stalls before its first byte: not drawn, or a round might have none.
const STALLED_EVERY: u64 = 1000;

/// The bare loop and ours, cold, when neither processor nor server are what limits them.
pub(super) async fn behind_link(
    site: &Site,
    options: &DataOptions,
    url: &str,
    progress: &dyn Fn(&str),
) -> Result<Vec<Contender>, DataBenchError> {
    let proxy = start(site, FaultPlan::none().link(LINK_BYTES_PER_S)).await?;
    let commands = vec![
        through(&proxy, "bare GET loop, 1 Gbit/s", Task::Get { url: url.to_owned() }),
        through(&proxy, "cpcr, 1 Gbit/s", Task::epoch(url, 1, 0)),
    ];
    rounds(site, commands, options.rounds, progress)
}

/// Contenders, and the faults that were injected.
type Faulty = (Vec<Contender>, Vec<(String, u64)>);

/// Ours through a proxy that passes everything on, and through one that does not.
pub(super) async fn through_faults(
    site: &Site,
    options: &DataOptions,
    url: &str,
    progress: &dyn Fn(&str),
) -> Result<Faulty, DataBenchError> {
    let clean = start(site, FaultPlan::none()).await?;
    let mut plan = FaultPlan::seeded(1).rate(InjectedFault::Unavailable, UNAVAILABLE_SHARE);
    plan.burst = 1;
    plan.at = (1..1000).map(|n| (n * STALLED_EVERY, InjectedFault::Stall)).collect();
    let faulty = start(site, plan).await?;
    let commands = vec![
        through(&clean, "cpcr through a proxy", Task::epoch(url, 1, 0)),
        through(&faulty, "cpcr through faults", Task::epoch(url, 1, 0)),
    ];
    let measured = rounds(site, commands, options.rounds, progress)?;
    let counts = faulty.counts();
    let injected = InjectedFault::ALL.iter().map(|f| (f.name().to_owned(), counts.of(*f)));
    Ok((measured, injected.filter(|(_, count)| *count > 0).collect()))
}

async fn start(site: &Site, plan: FaultPlan) -> Result<FaultProxy, DataBenchError> {
    let proxy = FaultProxy::start(site.server.addr(), plan).await;
    proxy.map_err(DataBenchError::io("start a proxy"))
}

fn through(proxy: &FaultProxy, who: &str, task: Task) -> (String, Command) {
    (who.to_owned(), Command { task: Some(task), endpoint: proxy.endpoint(), line: Vec::new() })
}
