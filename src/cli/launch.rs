//! `cpcr-launch`: one machine, one command. It resolves the configuration, prepares the run's
//! folder, starts a coordinator and N agents, shows one progress line, and starts again what dies.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;

use tokio::process::Child;

pub use super::launch_arguments::Arguments;
use super::launch_arguments::Place;
use super::local::{Agent, Family};
use super::run::{self, BackendArgument, NodeRange, absolute};
use super::serve::Dashboard;
use super::ssh::{SSH_FAILED, Way};
use super::view::{View, ask_to_stop, follow};
use super::{Failure, named, sibling, tell, threads_each};
use crate::config::{self, ConfigSource, RunConfig};
use crate::coordinator::verdict::Goodput;
use crate::page;
use crate::proto::wire::RunStatus;
use crate::proto::{EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, EXIT_USAGE};
use crate::store::{Store, StoreOptions};
use crate::telemetry::progress::{Outcome, Progress};
use crate::telemetry::{TRACEPARENT, traceparent_of};
use crate::trust::{JoinToken, TOKEN_VARIABLE, Trust};

/// How long an agent may take to leave once the run has ended.
const LINGER: std::time::Duration = std::time::Duration::from_secs(5);
/// Before another host is asked again.
const HOST_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// A run, resolved.
struct Plan {
    config: RunConfig,
    nodes: NodeRange,
    spares: u32,
    backend: BackendArgument,
    dashboard: Dashboard,
    /// GPUs of this machine, one for each agent as far as they go.
    gpus: Vec<String>,
    /// Where the agents are, by node; here if there are none.
    hosts: Vec<String>,
    /// This host, as those reach it.
    here: Option<String>,
    run: String,
    family: Family,
    /// Where the report can be opened on this machine, if it can.
    report: Option<PathBuf>,
    /// The embedded S3 server of the demonstration.
    s3: Option<Child>,
    security: Security,
}

/// The run's token, and what follows from it.
struct Security {
    token: JoinToken,
    trust: Trust,
    /// Whether children have it from this process's environment already.
    inherited: bool,
}

/// Runs `cpcr-launch`; the result is the exit status.
///
/// # Errors
/// [`Failure`]: one line and an exit status.
pub async fn launch(arguments: Arguments) -> Result<i32, Failure> {
    let demonstration = arguments.config.is_none() && arguments.data.is_none();
    let source = match (&arguments.config, demonstration) {
        (Some(name), _) => ConfigSource::Named(name.clone()),
        (None, true) => ConfigSource::Named("demo".to_owned()),
        (None, false) => ConfigSource::Defaults,
    };
    let mut config = config::load(&source, &arguments.set).map_err(Failure::usage)?;
    if let Some(data) = &arguments.data {
        config.data.url = Some(absolute(data));
    }
    let nodes = arguments.workers()?;
    if arguments.on == Place::K8s {
        return arguments.print_manifests(&config, nodes);
    }
    let security = secure()?;
    let gpus = arguments.gpus_here(nodes).await?;
    let mut plan = if demonstration && config.data.url.is_none() {
        demonstrate(&arguments, config, (nodes, gpus), security).await?
    } else {
        plain(&arguments, config, (nodes, gpus), security)
    };
    if !plan.security.inherited {
        let token = plan.security.token.expose().to_owned();
        plan.family.environment.push((TOKEN_VARIABLE.to_owned(), token));
    }
    // The coordinator's trace, and that of one that follows it, are below this process's.
    if let Some(context) = traceparent_of(&tracing::Span::current()) {
        plan.family.environment.push((TRACEPARENT.to_owned(), context));
    }
    let options = options(&plan);
    plan.config =
        run::prepare(plan.config, &plan.run, plan.nodes.max, arguments.resume, &options).await?;
    let store = Store::open(&plan.run, &options).map_err(Failure::usage)?;
    let complete = run::says_complete(&store, &plan.config).await?;
    let status = if complete { EXIT_DONE } else { supervise(&plan).await? };
    if status == EXIT_DONE
        && let Some(report) = &plan.report
    {
        tell(&format!("report: {}", report.display()));
    }
    if let Some(s3) = &mut plan.s3
        && let Err(error) = s3.kill().await
    {
        tracing::warn!(%error, "the S3 server could not be ended");
    }
    Ok(status)
}

/// The run's token: the user's, else one of its own, so that nobody else on this machine gets in either.
fn secure() -> Result<Security, Failure> {
    let given = JoinToken::from_environment().map_err(Failure::usage)?;
    let inherited = given.is_some();
    let token = match given {
        Some(token) => token,
        None => JoinToken::random().map_err(Failure::failed)?,
    };
    let trust = Trust::holding(&token).map_err(Failure::usage)?;
    Ok(Security { token, trust, inherited })
}

fn local_folder(url: &str) -> Option<PathBuf> {
    match url.split_once("://") {
        None => Some(PathBuf::from(url)),
        Some(("file", path)) => Some(PathBuf::from(path)),
        Some(_) => None,
    }
}

/// A run on data of the user's own.
fn plain(
    arguments: &Arguments,
    config: RunConfig,
    (nodes, gpus): (NodeRange, Vec<String>),
    security: Security,
) -> Plan {
    let run = absolute(&arguments.run.clone().unwrap_or(format!("runs/{}", config.name)));
    let folder = local_folder(&run);
    let logs =
        folder.clone().unwrap_or_else(|| PathBuf::from("runs").join(&config.name)).join("logs");
    let report = folder.map(|folder| folder.join("report/index.html"));
    let family = Family { logs, environment: Vec::new() };
    let Arguments { spares, backend, dashboard, .. } = *arguments;
    Plan {
        config,
        nodes,
        spares,
        backend,
        dashboard,
        gpus,
        hosts: arguments.hosts.clone(),
        here: arguments.address.clone(),
        run,
        family,
        report,
        s3: None,
        security,
    }
}

/// The built-in demonstration: phantoms behind an S3 server whose bucket is in the run's folder.
async fn demonstrate(
    arguments: &Arguments,
    mut config: RunConfig,
    (nodes, gpus): (NodeRange, Vec<String>),
    security: Security,
) -> Result<Plan, Failure> {
    if !arguments.hosts.is_empty() {
        return Err(Failure::usage(
            "--hosts: give --data and --run, in folders that all hosts reach",
        ));
    }
    let run = absolute(&arguments.run.clone().unwrap_or(format!("runs/{}", config.name)));
    let Some(folder) = local_folder(&run) else {
        return Err(Failure::usage(format!(
            "--run {run}: the demonstration keeps its bucket in a local folder"
        )));
    };
    let mut family = Family { logs: folder.join("logs"), environment: Vec::new() };
    // Nobody else on this machine is to know it; the bucket's files are the user's.
    let secret = JoinToken::random().map_err(Failure::failed)?;
    let credentials = [("AWS_ACCESS_KEY_ID", "cpcr"), ("AWS_SECRET_ACCESS_KEY", secret.expose())];
    family.environment = credentials.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
    let bucket = folder.join("bucket");
    let arguments_s3 = ["s3", "--dir", &bucket.display().to_string(), "--listen", "127.0.0.1:0"]
        .map(str::to_owned);
    let (s3, address) = family.server("s3.log", &arguments_s3).await?;
    family.environment.extend([
        ("AWS_ENDPOINT".to_owned(), format!("http://{address}")),
        ("AWS_REGION".to_owned(), "us-east-1".to_owned()),
        ("AWS_ALLOW_HTTP".to_owned(), "true".to_owned()),
    ]);
    let outside = bucket.join("cpcr");
    let shown = format!("s3://cpcr={}", outside.display());
    family.environment.push((page::SHOWN_AS.to_owned(), shown));
    config.data.url = Some("s3://cpcr/data".to_owned());
    let report = Some(outside.join("run/report/index.html"));
    let run = "s3://cpcr/run".to_owned();
    let Arguments { spares, backend, dashboard, .. } = *arguments;
    let plan = Plan {
        config,
        nodes,
        spares,
        backend,
        dashboard,
        gpus,
        hosts: arguments.hosts.clone(),
        here: arguments.address.clone(),
        run,
        family,
        report,
        s3: Some(s3),
        security,
    };
    let data = Store::open("s3://cpcr/data", &options(&plan)).map_err(Failure::usage)?;
    run::phantoms(data).await?;
    Ok(plan)
}

/// The launcher's own store options: what the children get by their environment.
fn options(plan: &Plan) -> StoreOptions {
    plan.family.environment.iter().fold(StoreOptions::default(), |options, (key, value)| {
        options.with(key.to_lowercase(), value)
    })
}

/// Which child ended, with what exit status; none if a signal killed it.
enum Ended {
    Coordinator(Option<i32>),
    Agent(usize, Option<i32>),
}

/// The processes of a run.
struct Processes<'a> {
    plan: &'a Plan,
    coordinator: Child,
    address: SocketAddr,
    agents: Vec<Option<Agent>>,
    restarts_left: u32,
    /// Where the page is: a coordinator that follows shows it there, too.
    dashboard: Dashboard,
}

impl Processes<'_> {
    fn coordinator_arguments(plan: &Plan, listen: &str, dashboard: Dashboard) -> Vec<String> {
        [
            "coordinator".to_owned(),
            format!("--listen={listen}"),
            format!("--nodes={}:{}", plan.nodes.min, plan.nodes.max),
            format!("--spares={}", plan.spares),
            format!("--run={}", plan.run),
            format!("--backend={}", named(plan.backend)),
            format!("--dashboard={dashboard}"),
        ]
        .to_vec()
    }

    async fn agent(&self, node: u32) -> Result<Agent, Failure> {
        let plan = self.plan;
        if let Some(host) = plan.hosts.get(node as usize) {
            let arguments = [
                format!("--node={node}"),
                format!("--run={}", plan.run),
                format!("--logs=cpcr-logs/{}", plan.config.name),
            ];
            let program = sibling("cpcr")?;
            let (address, port) = (plan.here.as_deref(), self.address.port());
            let way = Way { program: &program, address, port };
            let token = &plan.security.token;
            return plan.family.agent_on((host, node), &way, token, &arguments).await;
        }
        let gpu = plan.gpus.get(node as usize);
        plan.family.agent(
            node,
            // An empty list shows none.
            &[("CUDA_VISIBLE_DEVICES", gpu.map_or("", String::as_str))],
            &[
                "worker".to_owned(),
                format!("--coordinator={}", self.address),
                format!("--node={node}"),
                format!("--run={}", plan.run),
                format!("--logs={}", plan.family.logs.display()),
                format!("--threads={}", threads_each(plan.nodes.max)),
                format!("--gpus={}", u32::from(gpu.is_some())),
            ],
        )
    }

    /// Waits for a child to end.
    async fn next_end(&mut self) -> Result<Ended, Failure> {
        let agents = self.agents.iter_mut().enumerate();
        let ended = futures::future::select_all(agents.map(|(node, child)| {
            Box::pin(async move {
                match child {
                    Some(child) => (node, child.wait().await),
                    None => std::future::pending().await,
                }
            })
        }));
        tokio::select! {
            status = self.coordinator.wait() => {
                Ok(Ended::Coordinator(status.map_err(Failure::failed)?.code()))
            }
            ((node, status), _, _) = ended => {
                Ok(Ended::Agent(node, status.map_err(Failure::failed)?.code()))
            }
        }
    }

    /// Starts again what the run still needs; `Some`: the run is over, with this status.
    async fn react(
        &mut self,
        ended: Ended,
        progress: &mut Progress,
    ) -> Result<Option<i32>, Failure> {
        match ended {
            Ended::Coordinator(Some(status)) => return Ok(Some(status)),
            Ended::Coordinator(None) => {
                // It may have died of old age: the end is in the bucket before anybody is told.
                let store = Store::open(&self.plan.run, &options(self.plan));
                if run::says_complete(&store.map_err(Failure::failed)?, &self.plan.config).await? {
                    return Ok(Some(EXIT_DONE));
                }
                self.spend("the coordinator died")?;
                progress.note("the coordinator died; starting it again (training goes on)");
                let listen = self.address.to_string();
                let arguments = Self::coordinator_arguments(self.plan, &listen, self.dashboard);
                let family = &self.plan.family;
                (self.coordinator, _) = family.server("coordinator.log", &arguments).await?;
            }
            Ended::Agent(node, status) => self.agent_ended(node, status, progress).await?,
        }
        Ok(None)
    }

    /// An agent that died, or whose host was lost, is started again; one that left in good order is not.
    async fn agent_ended(
        &mut self,
        node: usize,
        status: Option<i32>,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        self.agents[node] = None;
        let host = self.plan.hosts.get(node);
        let on = host.map(|host| format!(" on {host}")).unwrap_or_default();
        let last_words = || self.plan.family.last_line(&format!("agent-{node}.log"));
        let what = match status {
            None => format!("the agent of node {node}{on} died"),
            Some(SSH_FAILED) if host.is_some() => {
                format!("the agent of node {node}{on} is lost ({})", last_words())
            }
            // The coordinator will say why.
            Some(EXIT_DONE | EXIT_RESUMABLE) => return Ok(()),
            Some(status) => {
                let why = last_words();
                progress.note(&format!("the agent of node {node}{on} ended with {status}: {why}"));
                if host.is_some() && self.agents.iter().all(Option::is_none) {
                    let status = if status == EXIT_USAGE { EXIT_USAGE } else { EXIT_FAILED };
                    return Err(Failure { message: format!("no agent is left: {why}"), status });
                }
                return Ok(());
            }
        };
        if let Err(failure) = self.spend(&what) {
            // The others may be enough, and the coordinator is the judge of that.
            if self.agents.iter().flatten().count() < self.plan.nodes.min as usize {
                return Err(failure);
            }
            progress.note(&failure.message);
            return Ok(());
        }
        progress.note(&format!("{what}; starting it again"));
        if host.is_some() {
            // A host that refuses does so at once.
            tokio::time::sleep(HOST_PAUSE).await;
        }
        self.agents[node] = Some(self.agent(u32::try_from(node).unwrap_or(u32::MAX)).await?);
        Ok(())
    }

    /// Waits for the agents, which have heard of the end; what lingers is killed. When the launcher
    /// leaves, nothing of the run is left behind.
    async fn end(&mut self) {
        for child in self.agents.iter_mut().flatten() {
            if tokio::time::timeout(LINGER, child.wait()).await.is_err()
                && let Err(error) = child.kill().await
            {
                tracing::warn!(%error, "an agent could not be killed");
            }
        }
    }

    fn spend(&mut self, what: &str) -> Result<(), Failure> {
        match self.restarts_left.checked_sub(1) {
            Some(left) => {
                self.restarts_left = left;
                Ok(())
            }
            None => Err(Failure::failed(format!("{what}, and the restarts are used up"))),
        }
    }
}

/// From the first process to the last.
async fn supervise(plan: &Plan) -> Result<i32, Failure> {
    let listen = if plan.hosts.is_empty() { "127.0.0.1:0" } else { "0.0.0.0:0" };
    let arguments = Processes::coordinator_arguments(plan, listen, plan.dashboard);
    let (coordinator, address) = plan.family.server("coordinator.log", &arguments).await?;
    let restarts_left = plan.config.recovery.restarts;
    let (agents, dashboard) = (Vec::new(), plan.dashboard);
    let mut processes = Processes { plan, coordinator, address, agents, restarts_left, dashboard };
    for node in 0..plan.nodes.max + plan.spares {
        let child = processes.agent(node).await?;
        processes.agents.push(Some(child));
    }
    let terminal = std::io::stderr().is_terminal();
    let mut progress = Progress::new(plan.config.train.iterations, terminal);
    let mut shown = View::default();
    let (statuses, mut updates) = tokio::sync::watch::channel(RunStatus::default());
    // On all addresses is on this one.
    let here = SocketAddr::from(([127, 0, 0, 1], address.port()));
    let watcher = tokio::spawn(follow((plan.security.trust.clone(), here), statuses));
    let mut interrupted = Box::pin(super::signals::interrupted());
    let mut stopping = false;
    let status = loop {
        tokio::select! {
            ended = processes.next_end() => {
                if let Some(status) = processes.react(ended?, &mut progress).await? { break status }
            }
            Ok(()) = updates.changed() => {
                let status = updates.borrow_and_update().clone();
                let step = shown.state.step;
                shown.show(&status, &mut progress);
                processes.dashboard = shown.dashboard().unwrap_or(processes.dashboard);
                if shown.state.step > step {
                    // What gets on may be restarted again.
                    processes.restarts_left = plan.config.recovery.restarts;
                }
            }
            signal = &mut interrupted, if !stopping => {
                stopping = true;
                progress.note(&format!("{signal}: writing a checkpoint, then stopping"));
                ask_to_stop(&plan.security.trust, here, signal).await;
            }
        }
    };
    processes.end().await;
    shown.show(&updates.borrow_and_update().clone(), &mut progress);
    watcher.abort();
    finish(plan, status, &shown, progress);
    Ok(status)
}

fn finish(plan: &Plan, status: i32, shown: &View, progress: Progress) {
    let outcome = match status {
        EXIT_DONE => Outcome::Complete,
        EXIT_RESUMABLE => Outcome::Interrupted,
        _ => Outcome::Failed(if shown.reason.is_empty() {
            plan.family.last_line("coordinator.log")
        } else {
            shown.reason.clone()
        }),
    };
    progress.finish(&outcome, &shown.state);
    if matches!(status, EXIT_DONE | EXIT_RESUMABLE)
        && let Ok(goodput) = serde_json::from_str::<Goodput>(&shown.goodput)
    {
        tell(&goodput.to_string());
    }
    if status == EXIT_DONE && !shown.dice.is_empty() {
        let width = shown.dice.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        tell("validation   Dice");
        for (name, dice) in &shown.dice {
            tell(&format!("  {name:<width$}  {dice:.4}", width = width.max(9)));
        }
    }
}
