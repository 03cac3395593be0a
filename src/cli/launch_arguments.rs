//! What `cpcr-launch` is told, and what follows from it alone: how many workers, which GPUs, which manifests.

use clap::{Parser, ValueEnum};

use super::manifests::{ClusterRun, manifests};
use super::run::{BackendArgument, NodeRange, Resume};
use super::serve::Dashboard;
use super::{Failure, gpus, print};
use crate::config::RunConfig;
use crate::proto::EXIT_DONE;

/// Where a run's processes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Place {
    /// Started from here: on this machine, or on --hosts.
    Here,
    /// On Kubernetes: the manifests are printed, for `kubectl apply -f -`.
    K8s,
}

/// Trains on this machine: a coordinator, N agents, N trainers. Or on others: --hosts, --on k8s.
#[derive(Debug, Parser)]
#[command(name = "cpcr-launch", version)]
pub struct Arguments {
    /// How many workers: N, or MIN:MAX for a run that goes on with any number in between; default 4, or one for each of --hosts.
    #[arg(long, value_name = "N|MIN:MAX")]
    pub(super) nodes: Option<NodeRange>,
    /// Where to train.
    #[arg(long, default_value = "here", value_enum)]
    pub(super) on: Place,
    /// Hosts for the workers, reached by ssh, one worker each; the coordinator stays here. They need the dataset's and the
    /// run's folder, and this port: any.
    #[arg(long, value_name = "HOST,...", value_delimiter = ',', conflicts_with = "on")]
    pub(super) hosts: Vec<String>,
    /// With --hosts: this host, as they reach it; default: where ssh comes from.
    #[arg(long, value_name = "HOST", requires = "hosts")]
    pub(super) address: Option<String>,
    /// With --on k8s: the image; default cpcr:VERSION-cuda, or -cpu with --backend gloo.
    #[arg(long)]
    pub(super) image: Option<String>,
    /// Workers beyond that, which wait to take a place.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub(super) spares: u32,
    /// A preset (demo, acdc-7, acdc-14, acdc-quick) or a TOML file.
    #[arg(long)]
    pub(super) config: Option<String>,
    /// One configuration key, e.g. `train.iterations=100`; may be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub(super) set: Vec<String>,
    /// The dataset's folder: s3://, gs://, az://, file:// or a path.
    #[arg(long, value_name = "URL")]
    pub(super) data: Option<String>,
    /// The run's folder; default ./runs/<config name>.
    #[arg(long, value_name = "URL")]
    pub(super) run: Option<String>,
    /// `auto` goes on from the newest checkpoint; `never` refuses a folder that has one.
    #[arg(long, default_value = "auto", value_enum)]
    pub(super) resume: Resume,
    /// Which collectives; `auto` takes NCCL if every trainer has a GPU of its own, else Gloo.
    #[arg(long, default_value = "auto", value_enum)]
    pub(super) backend: BackendArgument,
    /// Where the run's page and its metrics are to be seen: an address, or `off`. Beyond loopback they want a token of
    /// yours and a password (`cpcr page-password`).
    #[arg(long, default_value = "127.0.0.1:0", value_name = "ADDR|off")]
    pub(super) dashboard: Dashboard,
}

impl Arguments {
    /// How many workers there are to be.
    pub(super) fn workers(&self) -> Result<NodeRange, Failure> {
        let Some(hosts) = u32::try_from(self.hosts.len()).ok().filter(|hosts| *hosts > 0) else {
            return Ok(self.nodes.unwrap_or(NodeRange { min: 4, max: 4 }));
        };
        let all = NodeRange { min: hosts, max: hosts };
        let nodes =
            self.nodes.unwrap_or(NodeRange { max: hosts.saturating_sub(self.spares), ..all });
        if nodes.max + self.spares != hosts || nodes.max == 0 {
            return Err(Failure::usage(format!(
                "--hosts: {hosts} hosts for {} workers and {} spares; name one for each (twice for two on one host)",
                nodes.max, self.spares
            )));
        }
        Ok(NodeRange { min: nodes.min.min(nodes.max), ..nodes })
    }

    /// The GPUs for workers of this machine. Other hosts look for their own.
    pub(super) async fn gpus_here(&self, nodes: NodeRange) -> Result<Vec<String>, Failure> {
        if self.backend == BackendArgument::Gloo || !self.hosts.is_empty() {
            return Ok(Vec::new());
        }
        let gpus = gpus::visible().await?;
        if self.backend == BackendArgument::Nccl && gpus.len() < nodes.max as usize {
            return Err(Failure::usage(format!(
                "--backend nccl: {} trainers want a GPU each, libtorch can use {}; see `cpcr doctor`",
                nodes.max,
                gpus.len()
            )));
        }
        Ok(gpus)
    }

    /// Prints the manifests of this run.
    pub(super) fn print_manifests(
        &self,
        config: &RunConfig,
        nodes: NodeRange,
    ) -> Result<i32, Failure> {
        let Some(run) = self.run.as_deref() else {
            return Err(Failure::usage(
                "--on k8s: give --run URL, in a bucket that the pods reach",
            ));
        };
        let Arguments { spares, backend, .. } = *self;
        let image = self.image.as_deref();
        let cluster = ClusterRun { config, run, nodes, spares, backend, image };
        print(&manifests(&cluster)?)?;
        Ok(EXIT_DONE)
    }
}
