//! Runs whose workers are not the launcher's children: on hosts behind ssh, under Slurm, on Kubernetes. What stands in for
//! ssh and for Slurm starts real workers on this machine, with nothing but what the real one would hand to them.

// A test that cannot go on is a test that fails.
#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cpcr::trust::{TOKEN_FILE_VARIABLE, TOKEN_VARIABLE};
use support::{
    CPCR, LAUNCH, SMALL, audited, dataset, launch, processes, signal, skipped, succeed, text,
    wait_for_a_step,
};

/// Waits for what nothing tells of.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(60), "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A program that takes ssh's arguments: it notes them, and runs the command here, with an empty environment as a login would.
fn ssh(folder: &Path) -> PathBuf {
    let path = folder.join("ssh");
    let script = format!(
        "#!/bin/sh\n\
         while [ \"${{1#-}}\" != \"$1\" ]; do shift 2; done\n\
         echo \"$1: $2\" >> {0}/ssh.log\n\
         cd {0} && exec env -i PATH=\"$PATH\" SSH_CONNECTION='127.0.0.1 50000 127.0.0.1 22' sh -c \"$2\"\n",
        folder.display()
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn agents(run: &Path) -> Vec<i32> {
    processes(&format!("--run={}", run.display()))
        .into_iter()
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            text(&line).contains("--while-stdin")
        })
        .collect()
}

#[test]
fn hosts_behind_ssh_train_together_and_a_lost_one_is_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (dataset(folder.path()), folder.path().join("run"));
    let mut command =
        launch(folder.path(), &data, run.to_str().unwrap(), 2, &["train.iterations=40"]);
    command.args(["--hosts", "alpha,beta"]).env("CPCR_SSH", ssh(folder.path()));
    command.env_remove(TOKEN_VARIABLE).env_remove(TOKEN_FILE_VARIABLE);
    let mut child = command.spawn().unwrap();
    wait_for_a_step(&mut child);
    let before = agents(&run);
    assert_eq!(before.len(), 2);
    signal(before[0], rustix::process::Signal::KILL);
    let output = child.wait_with_output().unwrap();
    succeed(&output);
    let said = text(&output.stderr);
    assert!(said.contains("the agent of node") && said.contains("starting it again"), "{said}");
    assert_eq!(audited(&run)["steps"], 40);
    let log = std::fs::read_to_string(folder.path().join("ssh.log")).unwrap();
    assert_eq!(log.lines().count(), 3, "{log}");
    assert!(log.contains("alpha: ") && log.contains("beta: "), "{log}");
    // What is secret came another way.
    assert!(!log.contains(&format!("{TOKEN_VARIABLE}=")), "{log}");
}

#[test]
fn workers_on_other_hosts_end_with_their_launcher() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (dataset(folder.path()), folder.path().join("run"));
    let mut command =
        launch(folder.path(), &data, run.to_str().unwrap(), 2, &["train.iterations=100000"]);
    command.args(["--hosts", "alpha,beta"]).env("CPCR_SSH", ssh(folder.path()));
    let mut child = command.spawn().unwrap();
    wait_for_a_step(&mut child);
    assert_eq!(agents(&run).len(), 2);
    child.kill().unwrap();
    child.wait().unwrap();
    until("no process is left", || processes(&run.display().to_string()).is_empty());
}

#[test]
fn what_cannot_be_reached_is_told_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let refuses = folder.path().join("refuses");
    std::fs::write(&refuses, "#!/bin/sh\necho 'Permission denied (publickey).' >&2\nexit 255\n")
        .unwrap();
    std::fs::set_permissions(&refuses, std::fs::Permissions::from_mode(0o755)).unwrap();
    let hosts = |hosts: &str, program: &Path| {
        let mut command = launch(folder.path(), &data, "run", 2, &[]);
        command.args(["--hosts", hosts]).env("CPCR_SSH", program).output().unwrap()
    };
    let output = hosts("alpha,beta", &refuses);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.contains("Permission denied") && last.contains("restarts are used up"), "{said}");
    let output = hosts("alpha,beta,gamma", &refuses);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("3 hosts for 2 workers"), "{}", text(&output.stderr));
    let output = hosts("alpha,beta", &folder.path().join("nothing"));
    assert!(text(&output.stderr).contains("nothing: "), "{}", text(&output.stderr));
}

/// `srun cpcr worker --run URL`: Slurm's variables say the rest.
#[test]
fn slurm_says_who_and_where() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (dataset(folder.path()), folder.path().join("run"));
    // An address of this machine that nobody else listens on: the port is Slurm's users' too.
    let host = "127.77.70.70";
    let mut coordinator = Command::new(CPCR);
    coordinator.args(["coordinator", "--nodes", "2", "--backend", "gloo", "--config", "demo"]);
    coordinator.arg("--data").arg(&data).arg("--run").arg(&run);
    coordinator.arg(format!("--listen={host}:7070"));
    for pair in SMALL.iter().chain(&["train.iterations=12"]) {
        coordinator.args(["--set", pair]);
    }
    let mut coordinator =
        coordinator.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut address = String::new();
    BufReader::new(coordinator.stdout.as_mut().unwrap()).read_line(&mut address).unwrap();
    assert_eq!(address.trim(), format!("{host}:7070"));
    let task = |rank: &str| {
        let mut task = Command::new(CPCR);
        task.args(["worker", "--threads", "1", "--gpus", "0", "--run"]).arg(&run);
        task.arg("--logs").arg(folder.path().join("logs")).env_remove("JOB_COMPLETION_INDEX");
        task.env("SLURM_LAUNCH_NODE_IPADDR", host).env("SLURM_PROCID", rank);
        task.stderr(Stdio::piped()).spawn().unwrap()
    };
    for process in [task("0"), task("1"), coordinator] {
        succeed(&process.wait_with_output().unwrap());
    }
    assert_eq!(audited(&run)["steps"], 12);
}

/// SIGTERM of one worker's agent, as a cluster that evicts its pod: the others do without, and the run is not stopped.
#[test]
fn a_node_that_is_wanted_back_goes_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (dataset(folder.path()), folder.path().join("run"));
    let mut coordinator = Command::new(CPCR);
    coordinator.args(["coordinator", "--nodes", "1:2", "--backend", "gloo", "--config", "demo"]);
    coordinator.arg("--data").arg(&data).arg("--run").arg(&run);
    for pair in SMALL.iter().chain(&["train.iterations=400", "checkpoint.every=1000"]) {
        coordinator.args(["--set", pair]);
    }
    let mut coordinator =
        coordinator.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut address = String::new();
    BufReader::new(coordinator.stdout.as_mut().unwrap()).read_line(&mut address).unwrap();
    let worker = |node: &str| {
        let mut worker = Command::new(CPCR);
        worker.args(["worker", "--threads", "1", "--gpus", "0", "--node", node, "--run"]).arg(&run);
        worker.args(["--coordinator", address.trim()]).env("RUST_LOG", "info,cpcr::trainer=debug");
        worker.arg("--logs").arg(folder.path().join("logs")).stderr(Stdio::piped());
        worker.spawn().unwrap()
    };
    let (stays, goes) = (worker("0"), worker("1"));
    let log = folder.path().join("logs/trainer-1.jsonl");
    until("a step", || std::fs::read_to_string(&log).unwrap_or_default().contains("\"step\":5"));
    signal(i32::try_from(goes.id()).unwrap(), rustix::process::Signal::TERM);
    let gone = goes.wait_with_output().unwrap();
    assert_eq!(gone.status.code(), Some(75), "{}", text(&gone.stderr));
    assert!(coordinator.try_wait().unwrap().is_none(), "the run was to go on");
    for process in [stays, coordinator] {
        succeed(&process.wait_with_output().unwrap());
    }
    assert_eq!(audited(&run)["steps"], 400);
    let mut verdicts = std::fs::read_dir(run.join("interruptions")).unwrap().map(|entry| {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["cause"]["kind"].clone()
    });
    assert!(verdicts.any(|kind| kind == "given-back"));
}

#[test]
fn the_manifests_of_a_run_are_valid() {
    let folder = tempfile::tempdir().unwrap();
    let print = |extra: &[&str]| {
        let mut command = Command::new(LAUNCH);
        command.args(["--on", "k8s", "--config", "acdc-7", "--data", "s3://b/d"]).args(extra);
        command.output().unwrap()
    };
    let refused = print(&["--run", "here"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("--run here is not in a bucket"));
    let on_gpus = print(&["--run", "s3://b/r", "--nodes", "3:6", "--spares", "2"]);
    let on_cpus = print(&["--run", "gs://b/r", "--backend", "gloo", "--set", "train.lr=0.02"]);
    let mut files = Vec::new();
    for (name, output) in [("gpus.yaml", on_gpus), ("cpus.yaml", on_cpus)] {
        succeed(&output);
        files.push(folder.path().join(name));
        std::fs::write(files.last().unwrap(), output.stdout).unwrap();
    }
    assert!(std::fs::read_to_string(&files[1]).unwrap().contains("    lr = 0.02\n"));
    let Ok(python) = std::env::var("CPCR_PEER_PYTHON") else {
        skipped(
            "the_manifests_of_a_run_are_valid",
            "CPCR_PEER_PYTHON names no Python that reads YAML",
        );
        return;
    };
    let checked = Command::new(python).arg("scripts/test-k8s.py").args(&files).output().unwrap();
    assert!(checked.status.success(), "{}{}", text(&checked.stdout), text(&checked.stderr));
}
