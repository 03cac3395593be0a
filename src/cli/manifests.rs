//! `cpcr-launch --on k8s`: the manifests of a run, for `kubectl apply -f -`.
//!
//! They are `k8s/base/job.yaml` with the run's own values in it: that file is where everything else is decided and
//! explained. Nothing is contacted.

use super::run::{BackendArgument, NodeRange};
use super::{Failure, named};
use crate::config::{Recovery, RunConfig};

/// The template.
const JOB: &str = include_str!("../../k8s/base/job.yaml");
/// The image that it names.
const IMAGE: &str = "cpcr:0.1.0-cuda";

/// What lets workers onto nodes that are kept for GPUs.
const TOLERATION: &str = "        # Nodes with GPUs are often kept for pods that want them.
        - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
";

/// What a user decides of a run on a cluster.
pub(super) struct ClusterRun<'a> {
    /// With the dataset's URL.
    pub config: &'a RunConfig,
    /// The run's folder.
    pub run: &'a str,
    pub nodes: NodeRange,
    pub spares: u32,
    /// `gloo` makes pods without GPUs.
    pub backend: BackendArgument,
    /// None: the template's name, with the tag that fits the backend.
    pub image: Option<&'a str>,
}

/// The manifests, as YAML.
///
/// # Errors
/// [`Failure`] (2) for what pods could not use: a folder of this machine.
pub(super) fn manifests(cluster: &ClusterRun<'_>) -> Result<String, Failure> {
    let data = cluster.config.data.url.as_deref().ok_or_else(|| {
        Failure::usage("--on k8s: no dataset; give --data URL, in a bucket that the pods reach")
    })?;
    for (flag, url) in [("--data", data), ("--run", cluster.run)] {
        if !["s3://", "gs://", "az://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err(Failure::usage(format!(
                "--on k8s: {flag} {url} is not in a bucket (s3://, gs:// or az://), where pods could reach it"
            )));
        }
    }
    let toml = toml::to_string(cluster.config).map_err(Failure::failed)?;
    let on_cpus = cluster.backend == BackendArgument::Gloo;
    let cpu_image = IMAGE.replace("-cuda", "-cpu");
    let image = cluster.image.unwrap_or(if on_cpus { &cpu_image } else { IMAGE });
    let workers = cluster.nodes.max + cluster.spares;
    let mut yaml = with_config(&toml)?;
    let mut set = |what: &str, value: String| -> Result<(), Failure> {
        if !yaml.contains(what) {
            return Err(Failure::failed(format!("k8s/base/job.yaml has no {what:?}")));
        }
        yaml = yaml.replace(what, &value);
        Ok(())
    };
    set("data-url: s3://my-bucket/datasets/acdc\n", format!("data-url: {}\n", quoted(data)?))?;
    set("run-url: s3://my-bucket/runs/acdc-7\n", format!("run-url: {}\n", quoted(cluster.run)?))?;
    set(&format!("image: {IMAGE}\n"), format!("image: {}\n", quoted(image)?))?;
    let NodeRange { min, max } = cluster.nodes;
    let spares = cluster.spares;
    set("- --nodes=2:4\n", format!("- --nodes={min}:{max}\n            - --spares={spares}\n"))?;
    set("- --backend=nccl\n", format!("- --backend={}\n", named(cluster.backend)))?;
    let wait_s = cluster.config.recovery.wait_s;
    if wait_s != Recovery::default().wait_s {
        set("--set=recovery.wait_s=1800\n", format!("--set=recovery.wait_s={wait_s}\n"))?;
    }
    set(
        "  completions: 4\n  parallelism: 4\n",
        format!("  completions: {workers}\n  parallelism: {workers}\n"),
    )?;
    if on_cpus {
        set(", nvidia.com/gpu: 1}", "}".to_owned())?;
        set(TOLERATION, String::new())?;
    }
    Ok(yaml)
}

/// The template with `toml` as the configuration in its ConfigMap.
fn with_config(toml: &str) -> Result<String, Failure> {
    let begins = "  config.toml: |\n";
    let (head, rest) = JOB
        .split_once(begins)
        .ok_or_else(|| Failure::failed("k8s/base/job.yaml has no config.toml"))?;
    let (_, tail) = rest
        .split_once("\n---\n")
        .ok_or_else(|| Failure::failed("k8s/base/job.yaml has one document"))?;
    let mut block = String::new();
    for line in toml.lines() {
        if !line.is_empty() {
            block.push_str("    ");
            block.push_str(line);
        }
        block.push('\n');
    }
    Ok(format!("{head}{begins}{block}---\n{tail}"))
}

/// A text as YAML takes it whatever is in it: JSON's strings are YAML's.
fn quoted(text: &str) -> Result<String, Failure> {
    serde_json::to_string(text).map_err(Failure::failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, ConfigSource};

    fn config() -> RunConfig {
        let mut config = config::load(&ConfigSource::Named("acdc-14".to_owned()), &[]).unwrap();
        config.data.url = Some("s3://b/data".to_owned());
        config
    }

    fn cluster(config: &RunConfig) -> ClusterRun<'_> {
        let (nodes, backend) = (NodeRange { min: 3, max: 7 }, BackendArgument::Auto);
        ClusterRun { config, run: "s3://b/run", nodes, spares: 1, backend, image: None }
    }

    #[test]
    fn the_runs_values_are_in_and_the_examples_are_not() {
        let config = config();
        let yaml = manifests(&cluster(&config)).unwrap();
        assert!(!yaml.contains("my-bucket") && !yaml.contains("2:4"), "{yaml}");
        for part in [
            "data-url: \"s3://b/data\"",
            "--nodes=3:7",
            "--spares=1",
            "--backend=auto",
            "--set=recovery.wait_s=1800",
            "completions: 8",
            "parallelism: 8",
        ] {
            assert!(yaml.contains(part), "{part}");
        }
        assert_eq!(yaml.matches("image: \"cpcr:0.1.0-cuda\"").count(), 2);
        // The configuration comes back as it was.
        let (_, rest) = yaml.split_once("config.toml: |\n").unwrap();
        let (block, _) = rest.split_once("---\n").unwrap();
        let toml =
            block.lines().map(|line| line.strip_prefix("    ").unwrap_or(line).to_owned() + "\n");
        let again = config::load(&ConfigSource::Text(toml.collect()), &[]).unwrap();
        assert!(
            config.differences(&again).is_empty()
                && again.train.iterations == config.train.iterations
        );
    }

    #[test]
    fn without_gpus_neither_pods_nor_the_image_have_any() {
        let config = config();
        let mut wanted = cluster(&config);
        wanted.backend = BackendArgument::Gloo;
        let yaml = manifests(&wanted).unwrap();
        assert!(!yaml.contains("nvidia.com/gpu") && yaml.contains("\"cpcr:0.1.0-cpu\""));
        assert!(yaml.contains("- --backend=gloo\n"));
        wanted.image = Some("registry/cpcr:mine");
        assert!(manifests(&wanted).unwrap().contains("image: \"registry/cpcr:mine\""));
    }

    #[test]
    fn a_wait_of_ones_own_counts_more_than_the_templates() {
        let mut config = config();
        config.recovery.wait_s = 60;
        let yaml = manifests(&cluster(&config)).unwrap();
        assert!(yaml.contains("--set=recovery.wait_s=60\n") && !yaml.contains("wait_s=1800"));
    }

    #[test]
    fn what_pods_cannot_reach_is_refused_by_name() {
        let mut config = config();
        let mut wanted = cluster(&config);
        wanted.run = "/home/me/run";
        assert!(manifests(&wanted).unwrap_err().message.contains("--run /home/me/run"));
        config.data.url = None;
        assert!(manifests(&cluster(&config)).unwrap_err().message.contains("--data"));
    }
}
