//! AWS profiles: what `~/.aws/credentials` and `~/.aws/config` add to the environment.
//!
//! The engine knows the environment, instance roles, web identities and containers, but no
//! profiles. Here one becomes settings of the lowest rank, so that the environment wins. Profiles
//! that need a conversation (SSO, assuming a role, a process) are refused by name, with the command
//! that turns them into variables: that conversation is the AWS tools' business.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;

/// Keys that mean a conversation, and what to call it.
const CONVERSATIONS: [(&str, &str); 5] = [
    ("sso_session", "SSO"),
    ("sso_start_url", "SSO"),
    ("credential_process", "a process"),
    ("role_arn", "assuming a role"),
    ("login_session", "a login session"),
];

/// A file's sections, each its keys and values.
type Sections = BTreeMap<String, BTreeMap<String, String>>;

/// Settings that the profile adds to `settings` (lower-case names; see `backend::settings`), or
/// why there can be none.
pub(super) fn settings(given: &[(String, String)]) -> Result<Vec<(String, String)>, String> {
    let find = |name: &str| {
        given.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    };
    let named = find("aws_profile").or_else(|| find("aws_default_profile"));
    let credentials = read(find("aws_shared_credentials_file"), "credentials")?;
    let config = read(find("aws_config_file"), "config")?;
    let name = named.unwrap_or("default");
    let profile = merged(name, &credentials, &config);
    let Some(profile) = profile else {
        return match named {
            None => Ok(Vec::new()),
            Some(name) => Err(format!(
                "AWS_PROFILE names '{name}', which is neither in ~/.aws/credentials nor in ~/.aws/config (aws configure list-profiles shows what is)"
            )),
        };
    };
    let mut added = Vec::new();
    let mut add = |name: &str, key: &str| {
        if let Some(value) = profile.get(key) {
            added.push((name.to_owned(), value.clone()));
        }
    };
    if !["aws_region", "aws_default_region", "region"].iter().any(|name| find(name).is_some()) {
        add("aws_region", "region");
    }
    let endpoints = ["aws_endpoint_url_s3", "aws_endpoint_url", "aws_endpoint"];
    if !endpoints.iter().any(|name| find(name).is_some()) {
        add("aws_endpoint_url", "endpoint_url");
    }
    // A pair is never mixed from two places, and a token belongs to its pair.
    let others = ["aws_access_key_id", "access_key_id", "aws_skip_signature"];
    let web_identity = named.is_none() && find("aws_web_identity_token_file").is_some();
    if web_identity || others.iter().any(|name| find(name).is_some()) {
        return Ok(added);
    }
    if profile.contains_key("aws_access_key_id") && profile.contains_key("aws_secret_access_key") {
        add("aws_access_key_id", "aws_access_key_id");
        add("aws_secret_access_key", "aws_secret_access_key");
        add("aws_session_token", "aws_session_token");
    } else if profile.contains_key("web_identity_token_file") {
        add("aws_web_identity_token_file", "web_identity_token_file");
        add("aws_role_arn", "role_arn");
        add("aws_role_session_name", "role_session_name");
    } else if let Some((_, how)) = CONVERSATIONS.iter().find(|(key, _)| profile.contains_key(*key))
    {
        return Err(format!(
            "the AWS profile '{name}' gets its credentials by {how}, which is not done here: run `eval \"$(aws configure export-credentials --profile {name} --format env)\"` first"
        ));
    }
    Ok(added)
}

/// The profile's keys from both files, those of the credentials file first; `None` if it is in neither.
fn merged(
    name: &str,
    credentials: &Sections,
    config: &Sections,
) -> Option<BTreeMap<String, String>> {
    let in_config = match name {
        "default" => config.get("default").or_else(|| config.get("profile default")),
        name => config.get(&format!("profile {name}")),
    };
    let in_credentials = credentials.get(name);
    if in_config.is_none() && in_credentials.is_none() {
        return None;
    }
    let mut keys = in_config.cloned().unwrap_or_default();
    keys.extend(in_credentials.cloned().unwrap_or_default());
    Some(keys)
}

/// The sections of a file under `~/.aws`, or of the one given instead; one that is not there has none.
fn read(given: Option<&str>, name: &str) -> Result<Sections, String> {
    let file = match (given, std::env::var_os("HOME")) {
        (Some(given), _) => PathBuf::from(given),
        (None, Some(home)) => PathBuf::from(home).join(".aws").join(name),
        (None, None) => return Ok(Sections::new()),
    };
    match std::fs::read_to_string(&file) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(Sections::new())
        }
        // A default that is not ours to read is no reason to fail; what was named is.
        Err(_) if given.is_none() => Ok(Sections::new()),
        Err(error) => Err(format!("cannot read {}: {error}", file.display())),
    }
}

/// AWS's dialect of INI: `[section]`, `key = value`, comments; nested values are left out.
fn parse(text: &str) -> Sections {
    let mut sections = Sections::new();
    let mut current: Option<String> = None;
    for line in text.lines() {
        let nested = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) || nested {
            continue;
        }
        if let Some(rest) = line.strip_prefix('[') {
            let name = rest.split(']').next().unwrap_or_default();
            let name = name.split_whitespace().collect::<Vec<_>>().join(" ").replace('"', "");
            sections.entry(name.clone()).or_default();
            current = Some(name);
        } else if let (Some(section), Some((key, value))) = (&current, line.split_once('=')) {
            let value = value.split(" #").next().unwrap_or_default().trim();
            let keys = sections.entry(section.clone()).or_default();
            keys.insert(key.trim().to_ascii_lowercase(), value.to_owned());
        }
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREDENTIALS: &str = "# mine\n[default]\naws_access_key_id = A\naws_secret_access_key=B\n\
         [lab]\naws_access_key_id = C # old\naws_secret_access_key = D\naws_session_token = E=\n";
    const CONFIG: &str = "[profile lab]\nregion = eu-north-1\nendpoint_url = http://lab:9000\n\
         s3 =\n  region = nested\n[profile \"sso\"]\nsso_session = x\nregion = eu-west-1\n\
         [profile role]\nrole_arn = arn:r\nsource_profile = lab\n\
         [profile pod]\nrole_arn = arn:p\nweb_identity_token_file = /t\n\
         [profile process]\ncredential_process = /bin/true\n";

    /// What the files above add to `given`.
    fn added(given: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let (credentials, config) =
            (folder.path().join("credentials"), folder.path().join("config"));
        std::fs::write(&credentials, CREDENTIALS).unwrap();
        std::fs::write(&config, CONFIG).unwrap();
        let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
        let mut all: Vec<_> = given.iter().copied().map(owned).collect();
        all.push(owned(("aws_shared_credentials_file", credentials.to_str().unwrap())));
        all.push(owned(("aws_config_file", config.to_str().unwrap())));
        settings(&all)
    }

    fn pairs(added: &[(String, String)]) -> Vec<(&str, &str)> {
        added.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    #[test]
    fn a_profile_fills_in_what_the_environment_leaves_open() {
        let default = added(&[]).unwrap();
        assert_eq!(pairs(&default), [("aws_access_key_id", "A"), ("aws_secret_access_key", "B")]);
        let lab = added(&[("aws_profile", "lab")]).unwrap();
        let all = [
            ("aws_region", "eu-north-1"),
            ("aws_endpoint_url", "http://lab:9000"),
            ("aws_access_key_id", "C"),
            ("aws_secret_access_key", "D"),
            ("aws_session_token", "E="),
        ];
        assert_eq!(pairs(&lab), all);
        assert_eq!(pairs(&added(&[("aws_default_profile", "lab")]).unwrap()), all);
        // The environment's pair is taken whole: no token of another pair beside it.
        let given = [("aws_profile", "lab"), ("aws_access_key_id", "X"), ("aws_region", "y")];
        assert_eq!(pairs(&added(&given).unwrap()), [("aws_endpoint_url", "http://lab:9000")]);
        let given = [("aws_profile", "lab"), ("aws_endpoint", "http://own")];
        assert!(!added(&given).unwrap().iter().any(|(key, _)| key == "aws_endpoint_url"));
        // A pod's role comes before a default profile, not before one that was named.
        assert_eq!(added(&[("aws_web_identity_token_file", "/t")]).unwrap(), []);
        let pod = added(&[("aws_profile", "pod")]).unwrap();
        let expected = [("aws_web_identity_token_file", "/t"), ("aws_role_arn", "arn:p")];
        assert_eq!(pairs(&pod), expected);
    }

    #[test]
    fn what_needs_a_conversation_or_is_not_there_is_refused_by_name() {
        for (name, how) in [("sso", "SSO"), ("role", "a role"), ("process", "a process")] {
            let error = added(&[("aws_profile", name)]).unwrap_err();
            assert!(error.contains(&format!("'{name}'")) && error.contains(how), "{error}");
            let way_out = format!("export-credentials --profile {name} --format env");
            assert!(error.contains(&way_out), "{error}");
            // With credentials from elsewhere there is nothing to refuse.
            added(&[("aws_profile", name), ("aws_access_key_id", "X")]).unwrap();
        }
        let error = added(&[("aws_profile", "nobody")]).unwrap_err();
        assert!(error.contains("'nobody'"), "{error}");
        let missing =
            [("aws_shared_credentials_file", "/nonexistent/a"), ("aws_config_file", "/b")];
        let missing = missing.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(settings(&missing).unwrap(), []);
    }
}
