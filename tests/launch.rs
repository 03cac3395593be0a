//! The whole, as a user starts it: `cpcr-launch` with its coordinator, agents, trainers and S3
//! server as real processes, small and short. Each test has a folder of its own.

#![allow(clippy::unwrap_used, clippy::panic)] // The lint's exception for tests stops at their helpers.

mod support;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use support::{
    CPCR, LAUNCH, Moto, NO_MOTO, SMALL, audited, checkpoint_file, dataset, launch, processes,
    s3_environment, signal, skipped, succeed, text, wait_for_a_step,
};

fn hash(run: &Path, step: u64, file: &str) -> String {
    hex::encode(Sha256::digest(std::fs::read(checkpoint_file(run, step, file)).unwrap()))
}

#[test]
fn a_run_killed_and_resumed_on_one_worker_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let run = |name: &str, set: &[&str]| launch(folder.path(), &data, name, 1, set);
    succeed(&run("whole", &["train.iterations=30"]).output().unwrap());

    // A checkpoint at 15, then SIGKILL some steps later: the launcher takes everything with it.
    succeed(&run("killed", &["train.iterations=15"]).output().unwrap());
    let endless = ["train.iterations=100000", "checkpoint.every=100000"];
    let mut child = run("killed", &endless).spawn().unwrap();
    wait_for_a_step(&mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    let output = run("killed", &["train.iterations=30"]).output().unwrap();
    succeed(&output);
    assert!(text(&output.stderr).contains("resumed at step 15"), "{}", text(&output.stderr));
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let whole = hash(&folder.path().join("whole"), 30, file);
        assert_eq!(whole, hash(&folder.path().join("killed"), 30, file), "{file}");
    }
    let report = audited(&folder.path().join("killed"));
    assert_eq!((&report["steps"], &report["lineages"]), (&30.into(), &3.into()), "{report}");
}

#[test]
fn a_stop_checkpoints_exits_75_and_the_same_command_goes_on_with_fewer_workers_too() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let many = ["train.iterations=100000", "checkpoint.every=100000"];
    // As a terminal's Ctrl-C does it: to every process of the group.
    let mut command = launch(folder.path(), &data, "run", 2, &many);
    let mut child = command.process_group(0).spawn().unwrap();
    wait_for_a_step(&mut child);
    let group = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    rustix::process::kill_process_group(group, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{}", text(&output.stderr));

    let listed = Command::new(CPCR)
        .args(["checkpoints", "verify", "--json"])
        .arg(folder.path().join("run"))
        .output()
        .unwrap();
    succeed(&listed);
    let rows: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let step = rows[0]["step"].as_u64().unwrap();
    assert!(step >= 1);

    let total = format!("train.iterations={}", step + 5);
    let output = launch(folder.path(), &data, "run", 1, &[&total]).output().unwrap();
    succeed(&output);
    assert!(text(&output.stderr).contains(&format!("resumed at step {step}")));
    let metrics = folder.path().join("run/report/metrics.json");
    let metrics: serde_json::Value =
        serde_json::from_slice(&std::fs::read(metrics).unwrap()).unwrap();
    let dice = metrics["val"]["mean_dice"].as_f64().unwrap();

    // `cpcr eval` finds the same on the same volumes.
    let out = folder.path().join("scores.csv");
    let evaluate = |arguments: &[&str]| {
        let mut command = Command::new(CPCR);
        command.current_dir(folder.path()).arg("eval").args(arguments).output().unwrap()
    };
    let output = evaluate(&["--run", "run", "--json", "--out", "scores.csv"]);
    succeed(&output);
    let scores: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(scores["step"].as_u64(), Some(step + 5));
    assert!((scores["summary"]["mean"]["dice"].as_f64().unwrap() - dice).abs() < 1e-9);
    assert!(std::fs::read_to_string(out).unwrap().starts_with("case,class,dice"));
    let checkpoint = format!("run/checkpoints/step-{:08}", step + 5);
    succeed(&evaluate(&["--checkpoint", &checkpoint, "--split", "test", "--spacing", "mm"]));
    assert_eq!(evaluate(&["--run", "run", "--step", "newest"]).status.code(), Some(2));
}

/// The records of a run's folder `name`, in the order of their names.
fn records(run: &Path, name: &str) -> Vec<serde_json::Value> {
    let Ok(entries) = std::fs::read_dir(run.join(name)) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path| serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    paths.into_iter().map(read).collect()
}

/// Kills one process of a run of up to two workers; the run must come through without going back. What it said,
/// and its verdicts.
fn survives_the_death_of(
    nodes: &str,
    victims: impl Fn(&Path, u32) -> Vec<i32>,
) -> (String, Vec<serde_json::Value>) {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let set = ["train.iterations=150", "checkpoint.every=50"];
    let mut child = launch(folder.path(), &data, "run", nodes, &set).spawn().unwrap();
    wait_for_a_step(&mut child);
    let victims = victims(folder.path(), child.id());
    assert!(!victims.is_empty());
    signal(victims[0], rustix::process::Signal::KILL);
    let output = child.wait_with_output().unwrap();
    succeed(&output);
    let told = text(&output.stderr);
    assert!(told.contains("starting it again") || told.contains("restart 1 of"), "{told}");
    // Whoever was left had the state: no step was taken twice, nor a checkpoint read.
    assert!(!told.contains("resumed at step"), "{told}");
    assert!(folder.path().join("run/checkpoints/step-00000150/manifest.json").is_file());
    let report = audited(&folder.path().join("run"));
    assert_eq!((&report["steps"], &report["samples"]), (&150.into(), &300.into()), "{report}");
    assert!(report["lineages"].as_u64() >= Some(2), "{report}");
    let left = processes(&folder.path().display().to_string());
    assert!(left.is_empty(), "left behind: {left:?}");
    for account in records(&folder.path().join("run"), "goodput") {
        let parts = account["parts_s"].as_object().unwrap().values();
        let sum: f64 = parts.map(|part| part.as_f64().unwrap()).sum();
        assert!((sum - account["wall_s"].as_f64().unwrap()).abs() < 1e-6, "{account}");
    }
    (told, records(&folder.path().join("run"), "interruptions"))
}

fn trainers(folder: &Path) -> Vec<i32> {
    processes(&format!("\"run\":\"{}", folder.join("run").display()))
}

#[test]
fn a_killed_trainer_costs_no_step_but_the_one_in_flight() {
    let (_, verdicts) = survives_the_death_of("2", |folder, _| trainers(folder));
    let [verdict] = &verdicts[..] else { panic!("{verdicts:?}") };
    let cause = &verdict["cause"];
    assert_eq!(
        (&cause["kind"], &cause["status"]),
        (&"trainer-killed".into(), &137.into()),
        "{verdict}"
    );
    assert!(cause["doing"].as_str().unwrap().starts_with("training, "), "{verdict}");
    let victims = verdict["victims"].as_array().unwrap();
    assert!(victims.len() == 1 && victims[0]["rank"] != cause["rank"], "{verdict}");
    assert!(verdict["next"][0].as_u64() > verdict["generation"].as_u64(), "{verdict}");
    assert!(verdict["step_s"].as_f64().is_some(), "{verdict}");
}

#[test]
fn where_one_is_enough_it_goes_on_alone_and_the_other_joins_again() {
    let (told, _) = survives_the_death_of("1:2", |folder, _| trainers(folder));
    assert!(told.contains(" joins"), "{told}");
}

/// Frozen, not dead: its connections stay open, and only its pulse is missing.
#[test]
fn a_frozen_trainer_is_found_and_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let set = ["train.iterations=100", "checkpoint.every=100", "recovery.target_s=4"];
    let mut child = launch(folder.path(), &data, "run", 2, &set).spawn().unwrap();
    wait_for_a_step(&mut child);
    signal(trainers(folder.path())[0], rustix::process::Signal::STOP);
    let output = child.wait_with_output().unwrap();
    succeed(&output);
    let told = text(&output.stderr);
    assert!(told.contains("its agent killed it") && !told.contains("resumed at step"), "{told}");
    assert_eq!(audited(&folder.path().join("run"))["samples"], 200);
    let verdicts = records(&folder.path().join("run"), "interruptions");
    assert_eq!(verdicts[0]["cause"]["kind"], "trainer-frozen", "{verdicts:?}");
    // Silence of 3 s, counted from a pulse that may be a second older than the last step of the others.
    assert!(verdicts[0]["detect_s"].as_f64() >= Some(2.0), "it was alive till then: {verdicts:?}");
}

#[test]
fn a_killed_agent_is_started_again() {
    let (_, verdicts) = survives_the_death_of("2", |folder, _| {
        processes(&format!("--node=1 --run={}", folder.join("run").display()))
    });
    let kind = verdicts[0]["cause"]["kind"].as_str().unwrap();
    assert!(["agent-lost", "agent-replaced"].contains(&kind), "{verdicts:?}");
    assert_eq!(verdicts[0]["cause"]["node"], 1, "{verdicts:?}");
}

#[test]
fn a_killed_coordinator_stops_nothing_and_the_next_takes_over() {
    let (told, verdicts) = survives_the_death_of("2", |_, launcher| {
        let parent = format!("PPid:\t{launcher}\n");
        let mut found = processes(" coordinator --listen");
        found.retain(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/status"))
                .is_ok_and(|s| s.contains(&parent))
        });
        found
    });
    assert!(told.contains("took over 2 workers in the midst of training"), "{told}");
    assert!(verdicts.is_empty(), "no generation was lost: {verdicts:?}");
}

/// Found by a campaign (seed 308): it ended the launcher, and at a takeover would have ended the run.
#[test]
fn a_coordinator_that_is_killed_before_it_says_anything_is_started_again() {
    // Where the launcher can be linked to: it looks for `cpcr` beside itself.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let beside = folder.path().join("cpcr-launch");
    std::fs::hard_link(LAUNCH, &beside).unwrap();
    let script = format!(
        "#!/bin/sh\nif [ \"$1\" = coordinator ] && mkdir \"$0.killed\" 2>/dev/null; then kill -9 $$; fi\nexec {CPCR} \"$@\"\n"
    );
    // By a process of its own: another test's, made meanwhile, would keep the file open and busy.
    let put = "printf '%s' \"$1\" > \"$0\" && chmod +x \"$0\"";
    let name = folder.path().join("cpcr");
    let made = Command::new("sh").args(["-c", put]).arg(&name).arg(script).status().unwrap();
    assert!(made.success());
    let data = dataset(folder.path());
    let wanted = launch(folder.path(), &data, "run", 1, &["train.iterations=3"]);
    let mut command = Command::new(&beside);
    command.current_dir(folder.path()).args(wanted.get_args());
    let output = command.output().unwrap();
    assert!(folder.path().join("cpcr.killed").is_dir());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn mistakes_are_told_in_one_line_with_status_2() {
    let folder = tempfile::tempdir().unwrap();
    let told = |arguments: &[&str], part: &str| {
        let output =
            Command::new(LAUNCH).current_dir(folder.path()).args(arguments).output().unwrap();
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(part) && error.trim_end().lines().count() == 1, "{error}");
    };
    told(&["--set", "train.iteration=5"], "iteration");
    told(&["--config", "no-such-preset"], "no-such-preset");
    told(&["--config", "acdc-7"], "--data");
    told(&["--config", "demo", "--data", "no/such/folder"], "no/such/folder");
    told(&["--backend", "nccl", "--nodes", "1000"], "libtorch can use");
    let synth = ["data", "synth", "--patients", "4", "--out", "data"];
    let made = Command::new(CPCR).current_dir(folder.path()).args(synth).output().unwrap();
    assert!(made.status.success(), "{}", text(&made.stderr));
    let more = ["--config", "demo", "--data", "data", "--set", "data.labelled=1000"];
    told(&more, "labelled training patients");
}

/// The last line of a run that must fail with `status`; nothing of a panic or backtrace in any.
fn last_line(output: &Output, status: i32) -> String {
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{told}");
    assert!(!told.contains("panicked") && !told.contains("backtrace"), "{told}");
    told.trim_end().lines().last().unwrap_or_default().to_owned()
}

#[test]
fn an_endpoint_that_is_not_there_is_told_in_seconds() {
    let folder = tempfile::tempdir().unwrap();
    // A port that was free a moment ago, and that nobody listens on.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let started = Instant::now();
    let output = launch(folder.path(), Path::new("s3://bucket/data"), "run", 1, &[])
        .envs(s3_environment(&format!("http://127.0.0.1:{port}")))
        .output()
        .unwrap();
    let line = last_line(&output, 1);
    assert!(line.contains("cannot reach s3://bucket/data"), "{line}");
    assert_eq!(text(&output.stderr).trim_end().lines().count(), 1);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn a_truncated_shard_ends_the_run_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let shard = std::fs::read_dir(data.join("shards"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "parquet"))
        .max()
        .unwrap();
    let length = std::fs::metadata(&shard).unwrap().len();
    std::fs::File::options().write(true).open(&shard).unwrap().set_len(length / 2).unwrap();
    let output = launch(folder.path(), &data, "run", 2, &["train.iterations=60"]).output().unwrap();
    let line = last_line(&output, 1);
    let name = shard.file_name().unwrap().to_str().unwrap();
    assert!(line.starts_with("failed") && line.contains(name), "{line}");
}

/// On a file system that holds two checkpoints, in a mount namespace of its own.
#[test]
fn a_full_disk_is_told_and_what_was_committed_stays() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let namespace = ["--user", "--map-root-user", "--mount"];
    let try_it = ["mount", "-t", "tmpfs", "tmpfs", "/mnt"];
    let able = Command::new("unshare").args(namespace).args(try_it).output();
    if !able.is_ok_and(|output| output.status.success()) {
        skipped("a_full_disk_is_told_and_what_was_committed_stays", "no user namespaces here");
        return;
    }
    let small = folder.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let whole = launch(folder.path(), &data, "small/run", 1, &["train.iterations=60"]);
    let script = "mount -t tmpfs -o size=3500k tmpfs \"$1\"; shift; \"$@\"; status=$?; \
                  find small/run/checkpoints -name manifest.json >&2; exit $status";
    let output = Command::new("unshare")
        .args(namespace)
        .args(["sh", "-c", script, "sh"])
        .arg(&small)
        .arg(whole.get_program())
        .args(whole.get_args())
        .current_dir(folder.path())
        .output()
        .unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    let failed = told.lines().find(|line| line.starts_with("failed")).unwrap_or_default();
    assert!(failed.contains("no space left") && !told.contains("panicked"), "{told}");
    assert!(told.contains("manifest.json"), "the checkpoints before that stay: {told}");
}

#[test]
fn a_run_lives_in_somebody_elses_s3_server() {
    let Some(moto) = Moto::start() else {
        skipped("a_run_lives_in_somebody_elses_s3_server", NO_MOTO);
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (Path::new("s3://bucket/data"), "s3://bucket/run");
    let environment = s3_environment(&moto.endpoint);
    let made = Command::new(CPCR)
        .args(["data", "synth", "--patients", "8", "--out", "s3://bucket/data"])
        .envs(environment.clone())
        .output()
        .unwrap();
    succeed(&made);
    let start = |nodes: u32, set: &[&str]| {
        let mut command = launch(folder.path(), data, run, nodes, set);
        command.envs(environment.clone());
        command
    };
    let endless = ["train.iterations=100000", "checkpoint.every=100000"];
    let mut child = start(2, &endless).spawn().unwrap();
    wait_for_a_step(&mut child);
    signal(i32::try_from(child.id()).unwrap(), rustix::process::Signal::TERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(75), "{}", text(&output.stderr));
    let listed = Command::new(CPCR)
        .args(["checkpoints", "verify", "--json", run])
        .envs(environment.clone())
        .output()
        .unwrap();
    succeed(&listed);
    let rows: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let step = rows[0]["step"].as_u64().unwrap();
    let output = start(3, &[&format!("train.iterations={}", step + 5)]).output().unwrap();
    succeed(&output);
    assert!(text(&output.stderr).contains(&format!("resumed at step {step}")));
}

/// What k8s/job.yaml starts: the coordinator is given the configuration, the workers find it in the
/// run, and nobody is anybody's child.
#[test]
fn a_coordinator_and_workers_started_apart_train_together() {
    let folder = tempfile::tempdir().unwrap();
    let data = dataset(folder.path());
    let run = folder.path().join("run");
    let state = folder.path().join("state");
    let coordinates = || {
        let mut coordinator = Command::new(CPCR);
        coordinator.args(["coordinator", "--nodes", "2", "--backend", "gloo", "--config", "demo"]);
        coordinator.arg("--data").arg(&data).arg("--run").arg(&run).arg("--state").arg(&state);
        for pair in SMALL.iter().chain(&["train.iterations=12"]) {
            coordinator.args(["--set", pair]);
        }
        coordinator
    };
    let mut coordinator = coordinates();
    let mut coordinator =
        coordinator.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut address = String::new();
    BufReader::new(coordinator.stdout.as_mut().unwrap()).read_line(&mut address).unwrap();
    let probe = |what: &str| {
        succeed(&Command::new(CPCR).args(["probe", what, "--state"]).arg(&state).output().unwrap());
    };
    probe("alive");
    let workers = |nodes: &[&str]| -> Vec<Child> {
        let worker = |node: &&str| {
            Command::new(CPCR)
                .args(["worker", "--coordinator", address.trim(), "--threads", "1", "--run"])
                .arg(&run)
                .args(["--patience-s", "5", "--logs"])
                .arg(folder.path().join("logs"))
                .env("JOB_COMPLETION_INDEX", node)
                // A host's stray variable changes no run that has its configuration.
                .env("CPCR__TRAIN__ITERATIONS", "3")
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        };
        nodes.iter().map(worker).collect()
    };
    for process in workers(&["0", "1"]).into_iter().chain([coordinator]) {
        succeed(&process.wait_with_output().unwrap());
    }
    probe("ready");
    // Whoever comes when all is done has nothing to do: a cluster starts a pod again that was lost at the end.
    succeed(&coordinates().output().unwrap());
    for late in workers(&["1"]) {
        succeed(&late.wait_with_output().unwrap());
    }
    assert!(run.join("checkpoints/step-00000012/manifest.json").is_file());
    assert!(run.join("report/metrics.json").is_file());
}
