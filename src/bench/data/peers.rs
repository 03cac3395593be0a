//! Other people's loaders: the same slices in their formats, behind the same server.

use std::path::Path;
use std::time::Duration;

use super::{BATCH, BUCKET, Command, DataBenchError, DataOptions, Site, pools};
use crate::data::{Dataset, Split};

/// The peers' side, so that an installed binary has it too.
const SCRIPT: &str = include_str!("../../../benches/peers/data.py");
/// Their names there, and for people.
const PEERS: [(&str, &str); 3] =
    [("mds", "MosaicML Streaming"), ("wds", "WebDataset"), ("lit", "LitData")];
/// Worker processes of PyTorch's DataLoader; a peer's better figure is the one to look at.
const WORKERS: [u32; 2] = [0, 2];
/// Longest that writing a peer's format may take.
const WRITE_S_MAX: Duration = Duration::from_secs(600);

/// Writes the pool in each peer's format; the result is how each is started.
pub(super) async fn prepare(
    site: &Site,
    options: &DataOptions,
    python: &Path,
    progress: &dyn Fn(&str),
) -> Result<Vec<(String, Command)>, DataBenchError> {
    let script = site.folder.join("data.py");
    std::fs::write(&script, SCRIPT).map_err(DataBenchError::io("write the peers' script"))?;
    let raw = site.folder.join("raw.f32");
    let dataset = Dataset::open(std::sync::Arc::new(pools::open(site, "pool")?))?;
    write_raw(&dataset, &raw)?;
    let cache = site.folder.join("peers");
    std::fs::create_dir_all(&cache).map_err(DataBenchError::io("make a folder"))?;
    let words = |rest: &[&str]| -> Vec<String> {
        let head = [
            python.display().to_string(),
            "-W".into(),
            "ignore".into(),
            script.display().to_string(),
        ];
        head.into_iter().chain(rest.iter().map(|word| (*word).to_owned())).collect()
    };
    let mut commands = Vec::new();
    for (kind, name) in PEERS {
        progress(&format!("writing the pool for {name}"));
        let out = site.folder.join(kind);
        let (side, raw, out_text) =
            (options.side_px.to_string(), raw.display().to_string(), out.display().to_string());
        let line = words(&[
            "write", kind, "--raw", &raw, "--height", &side, "--width", &side, "--out", &out_text,
        ]);
        let written = site.cores.run(&line, &[], WRITE_S_MAX);
        let written = written.map_err(DataBenchError::io(format!("run {name}")))?;
        if !written.status.success() {
            let words = String::from_utf8_lossy(&written.stderr);
            let why = words.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("").to_owned();
            return Err(DataBenchError::Contender { who: name.to_owned(), why });
        }
        let shards = upload(site, kind, &out).await?;
        let (shards, batch) = (shards.to_string(), BATCH.to_string());
        for workers in WORKERS {
            let number = workers.to_string();
            let line = words(&[
                "read",
                kind,
                "--endpoint",
                &site.endpoint(),
                "--bucket",
                BUCKET,
                "--prefix",
                kind,
                "--shards",
                &shards,
                "--batch",
                &batch,
                "--workers",
                &number,
                "--cache",
                &cache.display().to_string(),
            ]);
            let who = format!("{name}, {workers} workers");
            commands.push((who, Command { task: None, endpoint: site.endpoint(), line }));
        }
    }
    Ok(commands)
}

/// Puts the files of a folder behind the server; how many there are.
async fn upload(site: &Site, kind: &str, folder: &Path) -> Result<usize, DataBenchError> {
    let store = pools::open(site, kind)?;
    let mut count = 0;
    for entry in std::fs::read_dir(folder).map_err(DataBenchError::io("list a folder"))? {
        let path = entry.map_err(DataBenchError::io("list a folder"))?.path();
        let bytes = std::fs::read(&path).map_err(DataBenchError::io("read a file"))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        store.put(&name, bytes.into()).await?;
        count += 1;
    }
    Ok(count)
}

/// Every slice of the pool, little-endian float32, in row order.
fn write_raw(dataset: &Dataset, raw: &Path) -> Result<(), DataBenchError> {
    let failed = |what: &str| DataBenchError::io(format!("{what} {}", raw.display()));
    let file = std::fs::File::create(raw).map_err(failed("create"))?;
    let mut file = std::io::BufWriter::new(file);
    for id in dataset.volumes(Split::Train) {
        for value in dataset.load_volume(id)?.slices {
            std::io::Write::write_all(&mut file, &value.to_le_bytes()).map_err(failed("write"))?;
        }
    }
    file.into_inner().map_err(|error| failed("write")(error.into_error()))?;
    Ok(())
}
