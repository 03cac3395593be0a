//! Workers on other hosts, started over ssh (`cpcr-launch --hosts a,b,c,d`). Keys and users are ssh's own configuration.
//!
//! What is secret goes over the connection's input, never into an argument; the input stays open, and when it closes the
//! worker ends, so that none outlives its launcher.

use std::ffi::OsString;
use std::path::Path;

use zeroize::Zeroizing;

use crate::trust::{JoinToken, TOKEN_FILE_VARIABLE, TOKEN_VARIABLE};

/// Names the program to use instead of `ssh`.
pub(super) const SSH_VARIABLE: &str = "CPCR_SSH";
/// With what `ssh` ends when the connection fails or breaks.
pub(super) const SSH_FAILED: i32 = 255;
/// What a worker needs of the launcher's environment, beside the token: its store, its telemetry.
const PREFIXES: [&str; 6] = ["AWS_", "GOOGLE_", "AZURE_", "OTEL_", "RUST_LOG", "CPCR_OWN_S3"];

/// How a worker on another host finds what it needs of this one.
pub(super) struct Way<'a> {
    /// `cpcr` here: where it is not there too, the one in the other host's PATH counts.
    pub program: &'a Path,
    /// This host, as others reach it; none: as ssh comes from it.
    pub address: Option<&'a str>,
    /// The coordinator's.
    pub port: u16,
}

/// One word for a shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The arguments of `ssh` that start a worker.
pub(super) fn arguments(host: &str, way: &Way<'_>, worker: &[String]) -> Vec<String> {
    let words: Vec<_> = worker.iter().map(|word| quoted(word)).collect();
    // The first word of SSH_CONNECTION is this host, as the other one sees it.
    let script = format!(
        "unset {TOKEN_FILE_VARIABLE}; \
         while IFS= read -r line && [ -n \"$line\" ]; do export \"$line\"; done; \
         p={}; [ -x \"$p\" ] || p=cpcr; h={}; h=${{h:-${{SSH_CONNECTION%% *}}}}; \
         exec \"$p\" worker --while-stdin --coordinator=\"$h:{}\" {}",
        quoted(&way.program.display().to_string()),
        quoted(way.address.unwrap_or_default()),
        way.port,
        words.join(" ")
    );
    let options =
        ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"];
    let mut all = options.map(str::to_owned).to_vec();
    // The user's shell there may be any.
    all.extend([host.to_owned(), format!("exec sh -c {}", quoted(&script))]);
    all
}

/// What goes first into the input: a line for the token and for each variable of `environment` that a worker needs, and an
/// empty one.
pub(super) fn preamble(
    token: &JoinToken,
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Zeroizing<String> {
    let mut lines = Zeroizing::new(format!("{TOKEN_VARIABLE}={}\n", token.expose()));
    for (name, value) in environment {
        let Ok(name) = name.into_string() else { continue };
        let word = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !word || !PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        match value.into_string() {
            Ok(value) if !value.contains('\n') => {
                for part in [&name, "=", &value, "\n"] {
                    lines.push_str(part);
                }
            }
            _ => tracing::warn!("{name} is not one line of text: workers elsewhere do without it"),
        }
    }
    lines.push('\n');
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_arrive_as_they_were_whatever_is_in_them() {
        let odd = "it's $HOME; `date` \"x\"";
        for (address, expected) in [(None, "10.0.0.1"), (Some("login"), "login")] {
            let way = Way { program: Path::new("/no/such/cpcr"), address, port: 7 };
            let arguments = arguments("host", &way, &[odd.to_owned()]);
            assert_eq!(arguments[arguments.len() - 2], "host");
            let command = arguments.last().unwrap().replace("p=cpcr", "p=echo");
            let output = std::process::Command::new("sh")
                .args(["-c", &command])
                .env("SSH_CONNECTION", "10.0.0.1 5000 10.0.0.2 22")
                .stdin(std::process::Stdio::null())
                .output()
                .unwrap();
            let said = String::from_utf8(output.stdout).unwrap();
            assert_eq!(said, format!("worker --while-stdin --coordinator={expected}:7 {odd}\n"));
        }
    }

    #[test]
    fn only_what_a_worker_needs_is_sent() {
        let all = [
            ("AWS_REGION", "here"),
            ("HOME", "/root"),
            ("AWS_X", "a\nb"),
            ("AWS_X.Y", "z"),
            ("CPCR_JOIN_TOKEN_FILE", "/here"),
        ];
        let token = JoinToken::random().unwrap();
        let said = preamble(&token, all.into_iter().map(|(k, v)| (k.into(), v.into())));
        assert_eq!(*said, format!("CPCR_JOIN_TOKEN={}\nAWS_REGION=here\n\n", token.expose()));
    }
}
