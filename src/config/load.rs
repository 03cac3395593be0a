//! Reads the layers of a configuration into one [`RunConfig`].

use std::path::Path;

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};

use super::{ConfigError, RunConfig};

/// The presets built into the binary: name and commented text, as in `configs/`.
pub const PRESETS: [(&str, &str); 11] = [
    ("demo", include_str!("../../configs/demo.toml")),
    ("acdc-7", include_str!("../../configs/acdc-7.toml")),
    ("acdc-14", include_str!("../../configs/acdc-14.toml")),
    ("acdc-quick", include_str!("../../configs/acdc-quick.toml")),
    ("supervised", include_str!("../../configs/supervised.toml")),
    ("urpc", include_str!("../../configs/urpc.toml")),
    ("mcnet", include_str!("../../configs/mcnet.toml")),
    ("mean-teacher", include_str!("../../configs/mean-teacher.toml")),
    ("ua-mt", include_str!("../../configs/ua-mt.toml")),
    ("cps", include_str!("../../configs/cps.toml")),
    ("bcp", include_str!("../../configs/bcp.toml")),
];

/// Where the file layer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigSource {
    /// Defaults only.
    Defaults,
    /// `--config`: a preset's name or a file's path, as typed.
    Named(String),
    /// A TOML text that is already in memory (a run's own `config.toml`): no environment on top.
    Text(String),
}

/// The text of a preset, if there is one of that name.
#[must_use]
pub fn preset(name: &str) -> Option<&'static str> {
    PRESETS.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

/// Reads all layers and validates the result. `set` holds `KEY=VALUE` as typed.
///
/// # Errors
/// [`ConfigError`], naming the key or the file.
pub fn load(source: &ConfigSource, set: &[String]) -> Result<RunConfig, ConfigError> {
    let mut figment = Figment::from(Serialized::defaults(RunConfig::default()));
    figment = match source {
        ConfigSource::Defaults => figment,
        ConfigSource::Text(text) => figment.merge(Toml::string(&without_retired(text))),
        ConfigSource::Named(name) => figment.merge(Toml::string(&named(name)?)),
    };
    // A run's own configuration is complete: a variable of one host must not make that rank another.
    if !matches!(source, ConfigSource::Text(_)) {
        figment = figment.merge(Env::prefixed("CPCR__").split("__"));
    }
    for pair in set {
        figment = figment.merge(Toml::string(&assignment(pair)?));
    }
    let config: RunConfig =
        figment.extract().map_err(|error| ConfigError::Invalid(describe(&error)))?;
    config.validate()?;
    Ok(config)
}

/// Keys that runs of earlier releases have in their `config.toml`, and that mean nothing any more.
const RETIRED: [(&str, &str); 2] =
    [("recovery", "heartbeat_timeout_s"), ("recovery", "collective_timeout_s")];

/// A run's own text without [`RETIRED`] keys.
fn without_retired(text: &str) -> String {
    let Ok(mut table) = text.parse::<toml::Table>() else {
        return text.to_owned(); // whoever reads it says why
    };
    for (section, key) in RETIRED {
        if let Some(toml::Value::Table(section)) = table.get_mut(section) {
            section.remove(key);
        }
    }
    table.to_string()
}

/// A preset's text, or else a file's.
fn named(name: &str) -> Result<String, ConfigError> {
    if let Some(text) = preset(name) {
        return Ok(text.to_owned());
    }
    std::fs::read_to_string(Path::new(name)).map_err(|error| ConfigError::Unreadable {
        name: name.to_owned(),
        reason: format!("{error} (presets: {})", PRESETS.map(|(known, _)| known).join(", ")),
    })
}

/// `a.b=v` as a TOML text; a value that is not TOML is taken as a string.
fn assignment(pair: &str) -> Result<String, ConfigError> {
    let (key, value) = pair
        .split_once('=')
        .ok_or_else(|| ConfigError::Invalid(format!("--set {pair}: KEY=VALUE is wanted")))?;
    let (key, value) = (key.trim(), value.trim());
    let text = format!("{key} = {value}");
    if text.parse::<toml::Table>().is_ok() {
        return Ok(text);
    }
    let text = format!("{key} = {}", toml::Value::String(value.to_owned()));
    match text.parse::<toml::Table>() {
        Ok(_) => Ok(text),
        Err(_) => Err(ConfigError::Invalid(format!("--set {pair}: '{key}' is not a key"))),
    }
}

/// All of an error's causes in one line.
fn describe(error: &figment::Error) -> String {
    error.clone().into_iter().map(|cause| cause.to_string()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Method, Precision};

    #[test]
    fn a_run_of_an_earlier_release_keeps_its_configuration() {
        let text = toml::to_string(&RunConfig::default()).unwrap();
        let old =
            text.replace("target_s = 8", "heartbeat_timeout_s = 9\ncollective_timeout_s = 30");
        assert_ne!(text, old);
        assert_eq!(load(&ConfigSource::Text(old), &[]).unwrap(), RunConfig::default());
    }

    #[test]
    fn every_preset_loads() {
        for (name, _) in PRESETS {
            let config = load(&ConfigSource::Named(name.to_owned()), &[]).unwrap();
            assert_eq!(config.name, name);
        }
    }

    #[test]
    fn set_wins_over_the_preset_and_takes_bare_words() {
        let set =
            ["train.precision=bf16", "batch.labelled=3", "method=cpcr-focal"].map(str::to_owned);
        let config = load(&ConfigSource::Named("demo".to_owned()), &set).unwrap();
        assert_eq!(config.train.precision, Precision::Bf16);
        assert_eq!(config.batch.labelled, 3);
        assert_eq!(config.method, Method::CpcrFocal);
    }

    #[test]
    fn a_mistyped_key_is_named() {
        for pair in ["train.iteration=5", "trian.iterations=5"] {
            let error = load(&ConfigSource::Defaults, &[pair.to_owned()]).unwrap_err().to_string();
            assert!(error.contains("unknown field") && error.contains("tr"), "{error}");
            assert!(!error.contains('\n'));
        }
    }

    #[test]
    fn wrong_values_and_missing_files_are_named() {
        let error =
            |pair: &str| load(&ConfigSource::Defaults, &[pair.to_owned()]).unwrap_err().to_string();
        assert!(error("patch_size=100").contains("patch_size = 100"));
        assert!(error("checkpoint.keep_every=70").contains("a multiple of checkpoint.every, 500"));
        assert!(error("train.iterations=soon").contains("iterations"));
        assert!(error("nonsense").contains("KEY=VALUE"));
        let missing = load(&ConfigSource::Named("no/such.toml".to_owned()), &[]).unwrap_err();
        assert!(missing.to_string().contains("no/such.toml"));
    }
}
