//! What `cpcr doctor` finds out about this machine: libtorch, GPUs, shared memory, disk, cores.
//!
//! It reads files only (`/proc`, `/sys`, libtorch's `version.py`): it opens neither libtorch nor the
//! NVIDIA driver, so that it also answers where those are what is broken. A finding carries the way out.
//! It does not talk to storage itself: the caller probes the store and hands the outcome in.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The version that tch 0.24 is made for.
const LIBTORCH_VERSION: &str = "2.11.0";
/// CUDA 13 wants this driver or a newer one.
const DRIVER_MAJOR_MIN: u32 = 580;
/// Below this NCCL's and the loaders' shared-memory segments run out; Docker's default is 64 MiB.
const SHM_BYTES_MIN: u64 = 1 << 30;
/// Checkpoints and the demonstration's bucket fit into this.
const DISK_BYTES_MIN: u64 = 5 << 30;
/// A trainer of the paper's setting peaks below this on a CPU.
const MEMORY_BYTES_MIN: u64 = 4 << 30;

/// How a finding bears on a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be, or of no consequence.
    Ok,
    /// A run works, but slower or not at every size.
    Warn,
    /// A run cannot work.
    Fail,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at; stable, scripts may rely on it.
    pub name: &'static str,
    /// How it bears on a run.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it; none when all is well.
    pub way_out: Option<String>,
}

impl Finding {
    fn new(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), way_out: None }
    }

    fn bad(mut self, verdict: Verdict, way_out: impl Into<String>) -> Self {
        self.verdict = verdict;
        self.way_out = Some(way_out.into());
        self
    }
}

/// Everything that was found, in the order of looking.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// One entry for each thing looked at.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The worst of the verdicts.
    pub fn verdict(&self) -> Verdict {
        self.findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
    }

    /// The report for people: a line for each finding, an indented one for each way out.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let mark = match finding.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            text.push_str(&format!("{mark}  {:<14} {}\n", finding.name, finding.found));
            if let Some(way_out) = &finding.way_out {
                text.push_str(&format!("{:21}-> {way_out}\n", ""));
            }
        }
        text
    }
}

/// What the caller learnt by creating, reading and creating again one key in the store.
pub type StoreProbe<'a> = &'a dyn Fn(&str) -> Result<String, String>;

/// Looks at this machine, and at the store if there is one to look at.
pub fn doctor(store_url: Option<&str>, probe: StoreProbe<'_>) -> Report {
    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from);
    doctor_at(
        Path::new("/"),
        libtorch.as_deref().unwrap_or(Path::new(".libtorch")),
        store_url,
        probe,
    )
}

/// The same with the machine's root folder as an argument, so that tests can make a machine up.
fn doctor_at(
    root: &Path,
    libtorch: &Path,
    store_url: Option<&str>,
    probe: StoreProbe<'_>,
) -> Report {
    let driver = driver(root);
    let mut findings = vec![
        libtorch_finding(libtorch, driver.is_some()),
        driver_finding(driver.as_deref()),
        gpus_finding(root, driver.is_some()),
        space_finding(
            "shared memory",
            &root.join("dev/shm"),
            SHM_BYTES_MIN,
            "NCCL may run out of it: start the container with --shm-size=2g, or mount a memory volume at /dev/shm (k8s/job.yaml does)",
        ),
        space_finding(
            "disk",
            Path::new("."),
            DISK_BYTES_MIN,
            "checkpoints may not fit: start in a folder on a larger disk",
        ),
        cores_finding(root),
        memory_finding(root),
        huge_pages_finding(root),
    ];
    if let Some(url) = store_url {
        findings.push(match probe(url) {
            Ok(found) => Finding::new("store", format!("{url}: {found}")),
            Err(error) => Finding::new("store", format!("{url}: {error}")).bad(
                Verdict::Fail,
                "check the URL, the credentials (AWS_…, AZURE_…, GOOGLE_…) and that the bucket exists",
            ),
        });
    }
    Report { findings }
}

fn libtorch_finding(libtorch: &Path, has_driver: bool) -> Finding {
    const NAME: &str = "libtorch";
    let Some(version) = libtorch_version(libtorch) else {
        return Finding::new(NAME, format!("none at {}", libtorch.display())).bad(
            Verdict::Warn,
            "training needs it, a coordinator does not: run scripts/setup.sh, or set LIBTORCH",
        );
    };
    let kind = match (
        libtorch.join("lib/libtorch_cuda.so").exists(),
        // NCCL comes with the CUDA set only; libtorch_cuda.so itself is in either.
        libtorch.join("../nvidia/nccl/lib").exists(),
    ) {
        (true, true) => "CPU and CUDA",
        _ => "CPU only",
    };
    let finding = Finding::new(NAME, format!("{version}, {kind}, at {}", libtorch.display()));
    if version.split('+').next() != Some(LIBTORCH_VERSION) {
        finding.bad(
            Verdict::Fail,
            format!("{LIBTORCH_VERSION} is needed: unset LIBTORCH and run scripts/setup.sh"),
        )
    } else if has_driver && kind == "CPU only" {
        finding.bad(Verdict::Warn, "the GPUs of this machine stay unused: scripts/setup.sh --cuda")
    } else {
        finding
    }
}

/// The version that the files say: `build-version` in libtorch's own archives, `version.py` in PyPI's wheel.
fn libtorch_version(libtorch: &Path) -> Option<String> {
    if let Ok(version) = fs::read_to_string(libtorch.join("build-version")) {
        return Some(version.trim().to_owned());
    }
    let source = fs::read_to_string(libtorch.join("version.py")).ok()?;
    let value = source.lines().find_map(|line| line.strip_prefix("__version__ = "))?;
    Some(value.trim_matches(['\'', '"', ' ']).to_owned())
}

/// The NVIDIA kernel driver's version, such as `580.65.06`; none where there is no driver.
fn driver(root: &Path) -> Option<String> {
    let text = fs::read_to_string(root.join("proc/driver/nvidia/version")).ok()?;
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.split_whitespace().find(is_version).map(str::to_owned)
}

fn driver_finding(driver: Option<&str>) -> Finding {
    const NAME: &str = "NVIDIA driver";
    let Some(version) = driver else { return Finding::new(NAME, "none: training runs on the CPU") };
    let major: u32 = version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    let finding = Finding::new(NAME, version);
    if major < DRIVER_MAJOR_MIN {
        finding.bad(Verdict::Warn, format!("CUDA 13 needs {DRIVER_MAJOR_MIN} or newer: upgrade it, or train on the CPU with --backend gloo"))
    } else {
        finding
    }
}

fn gpus_finding(root: &Path, has_driver: bool) -> Finding {
    const NAME: &str = "GPUs";
    let mut models = Vec::new();
    if let Ok(folders) = fs::read_dir(root.join("proc/driver/nvidia/gpus")) {
        for folder in folders.flatten() {
            let text = fs::read_to_string(folder.path().join("information")).unwrap_or_default();
            let model = text.lines().find_map(|line| line.strip_prefix("Model:"));
            models.push(model.map_or("unknown", str::trim).to_owned());
        }
    }
    models.sort();
    match (models.is_empty(), has_driver) {
        (true, false) => Finding::new(NAME, "none"),
        (true, true) => Finding::new(NAME, "none, though the driver is loaded").bad(
            Verdict::Warn,
            "is the GPU handed to this container? (docker run --gpus all; nvidia.com/gpu in the pod's limits)",
        ),
        (false, _) => Finding::new(NAME, format!("{}: {}", models.len(), models.join(", "))),
    }
}

fn space_finding(name: &'static str, path: &Path, bytes_min: u64, way_out: &str) -> Finding {
    match rustix::fs::statvfs(path) {
        Ok(space) => {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            let total = space.f_blocks.saturating_mul(space.f_frsize);
            let finding = Finding::new(name, format!("{} free of {}", gib(free), gib(total)));
            if free < bytes_min {
                finding.bad(Verdict::Warn, format!("less than {}: {way_out}", gib(bytes_min)))
            } else {
                finding
            }
        }
        Err(error) => {
            Finding::new(name, format!("{}: {error}", path.display())).bad(Verdict::Warn, way_out)
        }
    }
}

fn cores_finding(root: &Path) -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let quota = cpu_quota(root);
    let found = match quota {
        Some(quota) => format!("{cores}, of which the control group grants {quota:.1}"),
        None => format!("{cores}, no quota"),
    };
    let finding = Finding::new("cores", found);
    if quota.is_some_and(|quota| quota < 1.0) {
        finding.bad(Verdict::Warn, "less than one core: raise the CPU limit of the container")
    } else {
        finding
    }
}

/// Cores that the control group grants (version 2 first, then 1); none when there is no limit.
fn cpu_quota(root: &Path) -> Option<f64> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let (quota_us, period_us) = match read("sys/fs/cgroup/cpu.max") {
        Some(both) => {
            let (quota_us, period_us) = both.trim().split_once(' ')?;
            (quota_us.to_owned(), period_us.to_owned())
        }
        None => (
            read("sys/fs/cgroup/cpu/cpu.cfs_quota_us")?,
            read("sys/fs/cgroup/cpu/cpu.cfs_period_us")?,
        ),
    };
    // `max` in version 2 and -1 in version 1 say: no limit.
    let quota_us: f64 = quota_us.trim().parse().ok().filter(|quota_us| *quota_us > 0.0)?;
    let period_us: f64 = period_us.trim().parse().ok().filter(|period_us| *period_us > 0.0)?;
    Some(quota_us / period_us)
}

fn memory_finding(root: &Path) -> Finding {
    const NAME: &str = "memory";
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let Some(available) = meminfo_bytes(&meminfo, "MemAvailable:") else {
        return Finding::new(NAME, "unknown: /proc/meminfo has no MemAvailable")
            .bad(Verdict::Warn, "is /proc mounted?");
    };
    let limit = ["sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| fs::read_to_string(root.join(path)).ok()?.trim().parse::<u64>().ok())
        // Version 1 writes a number near 2^63 for none.
        .filter(|limit| *limit < 1 << 60);
    let usable = limit.map_or(available, |limit| limit.min(available));
    let found = match limit {
        Some(limit) => {
            format!("{} available, the control group's limit is {}", gib(available), gib(limit))
        }
        None => format!("{} available, no limit", gib(available)),
    };
    let finding = Finding::new(NAME, found);
    if usable < MEMORY_BYTES_MIN {
        finding.bad(
            Verdict::Warn,
            "the paper's setting does not fit: fewer workers, or a smaller patch_size or batch",
        )
    } else {
        finding
    }
}

fn meminfo_bytes(meminfo: &str, key: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn huge_pages_finding(root: &Path) -> Finding {
    const NAME: &str = "huge pages";
    let Ok(text) = fs::read_to_string(root.join("sys/kernel/mm/transparent_hugepage/enabled"))
    else {
        return Finding::new(NAME, "the kernel has none");
    };
    // The mode in force stands in brackets: `always [madvise] never`.
    let mode = text.split(['[', ']']).nth(1).unwrap_or("unknown");
    let finding = Finding::new(NAME, format!("transparent: {mode}"));
    if mode == "never" {
        finding.bad(Verdict::Warn, "CPU steps are slower without: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)")
    } else {
        finding
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn look(root: &Path, store_url: Option<&str>, answer: Result<&str, &str>) -> Report {
        let answer = answer.map(str::to_owned).map_err(str::to_owned);
        doctor_at(root, &root.join("torch"), store_url, &|_| answer.clone())
    }

    fn finding<'a>(report: &'a Report, name: &str) -> &'a Finding {
        report.findings.iter().find(|finding| finding.name == name).unwrap()
    }

    const VERSION: (&str, &str) =
        ("torch/version.py", "from x import y\n__version__ = '2.11.0+cu130'\n");
    const DRIVER: (&str, &str) = (
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version:  gcc version 12.2.0\n",
    );

    #[test]
    fn a_bare_machine_lacks_libtorch_and_says_how_to_get_it() {
        let root = machine(&[]);
        let report = look(root.path(), None, Ok(""));
        let libtorch = finding(&report, "libtorch");
        assert_eq!(libtorch.verdict, Verdict::Warn);
        assert!(libtorch.way_out.as_ref().unwrap().contains("scripts/setup.sh"));
        assert_eq!(finding(&report, "GPUs").found, "none");
        assert_eq!(finding(&report, "NVIDIA driver").verdict, Verdict::Ok);
        assert!(report.findings.iter().all(|finding| finding.name != "store"));
    }

    #[test]
    fn a_gpu_machine_with_the_cpu_set_is_told_so() {
        let root = machine(&[
            VERSION,
            DRIVER,
            (
                "proc/driver/nvidia/gpus/0000:01:00.0/information",
                "Model: \t\t NVIDIA H100\nIRQ: 1\n",
            ),
            ("proc/driver/nvidia/gpus/0000:02:00.0/information", "Model: \t\t NVIDIA H100\n"),
        ]);
        let report = look(root.path(), None, Ok(""));
        assert_eq!(finding(&report, "NVIDIA driver").found, "580.65.06");
        assert_eq!(finding(&report, "GPUs").found, "2: NVIDIA H100, NVIDIA H100");
        assert!(finding(&report, "libtorch").way_out.as_ref().unwrap().contains("--cuda"));
    }

    #[test]
    fn another_libtorch_fails_and_an_old_driver_warns() {
        let old_driver = (
            "proc/driver/nvidia/version",
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat\n",
        );
        let root = machine(&[("torch/build-version", "2.10.0+cpu\n"), old_driver]);
        let report = look(root.path(), None, Ok(""));
        assert_eq!(finding(&report, "libtorch").verdict, Verdict::Fail);
        assert_eq!(finding(&report, "NVIDIA driver").verdict, Verdict::Warn);
        assert_eq!(report.verdict(), Verdict::Fail);
    }

    #[test]
    fn quotas_of_both_control_group_versions_are_read() {
        let quota = |files: &[(&str, &str)]| cpu_quota(machine(files).path());
        assert_eq!(quota(&[("sys/fs/cgroup/cpu.max", "150000 100000\n")]), Some(1.5));
        assert_eq!(quota(&[("sys/fs/cgroup/cpu.max", "max 100000\n")]), None);
        let old = |quota_us| {
            [
                ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota_us),
                ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
            ]
        };
        assert_eq!(quota(&old("200000\n")), Some(2.0));
        assert_eq!(quota(&old("-1\n")), None);
        assert_eq!(quota(&[("sys/fs/cgroup/cpu.max", "100 0")]), None);
        assert_eq!(quota(&[]), None);
    }

    #[test]
    fn little_memory_and_no_huge_pages_are_warned_of() {
        let root = machine(&[
            ("proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable:   16777216 kB\n"),
            ("sys/fs/cgroup/memory.max", "1073741824\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n"),
        ]);
        let report = look(root.path(), None, Ok(""));
        assert_eq!(
            finding(&report, "memory").found,
            "16.0 GiB available, the control group's limit is 1.0 GiB"
        );
        assert_eq!(finding(&report, "memory").verdict, Verdict::Warn);
        assert_eq!(finding(&report, "huge pages").verdict, Verdict::Warn);
        let roomy = machine(&[
            ("proc/meminfo", "MemAvailable:   16777216 kB\n"),
            ("sys/fs/cgroup/memory.max", "max\n"),
        ]);
        assert_eq!(finding(&look(roomy.path(), None, Ok("")), "memory").verdict, Verdict::Ok);
    }

    #[test]
    fn the_store_is_what_the_probe_says() {
        let root = machine(&[VERSION]);
        let good = look(root.path(), Some("s3://b/x"), Ok("create-if-absent holds"));
        assert_eq!(finding(&good, "store").found, "s3://b/x: create-if-absent holds");
        let bad = look(root.path(), Some("s3://b/x"), Err("access denied"));
        assert_eq!(bad.verdict(), Verdict::Fail);
        assert!(
            bad.text().contains("FAIL  store          s3://b/x: access denied\n"),
            "{}",
            bad.text()
        );
    }

    #[test]
    fn the_report_serialises_with_stable_names() {
        let report = Report { findings: vec![Finding::new("disk", "x").bad(Verdict::Warn, "y")] };
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(
            json,
            r#"{"findings":[{"name":"disk","verdict":"warn","found":"x","way_out":"y"}]}"#
        );
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let report = doctor(None, &|_| Ok(String::new()));
        assert!(report.findings.len() >= 8);
        assert!(report.text().lines().count() >= 8);
    }
}
