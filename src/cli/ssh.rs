//! Workers on other hosts, started over ssh (`cpcr-launch --hosts a,b,c,d`). Keys, users and jump hosts are ssh's own
//! configuration.
//!
//! What is secret goes over the connection's input, never into an argument; the input stays open, and when it closes the
//! worker ends, so that none outlives its launcher.

use std::path::Path;

/// Names the program to use instead of `ssh`.
pub(super) const SSH_VARIABLE: &str = "CPCR_SSH";
/// With what `ssh` ends when the connection fails or breaks, or its own command cannot be started.
pub(super) const SSH_FAILED: i32 = 255;
/// What a worker needs of the launcher's environment.
const PREFIXES: [&str; 6] = ["CPCR_JOIN_TOKEN", "AWS_", "GOOGLE_", "AZURE_", "OTEL_", "RUST_LOG"];

/// One word for a shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The arguments of `ssh` that start a worker of the coordinator on `port` of this host. `program` is `cpcr` here: where it
/// is not there too, the one in the other host's PATH counts.
pub(super) fn arguments(host: &str, program: &Path, port: u16, worker: &[String]) -> Vec<String> {
    let words: Vec<_> = worker.iter().map(|word| quoted(word)).collect();
    // The first word of SSH_CONNECTION is this host, as the other one sees it.
    let script = format!(
        "while IFS= read -r line && [ -n \"$line\" ]; do export \"$line\"; done; \
         p={}; [ -x \"$p\" ] || p=cpcr; \
         exec \"$p\" worker --while-stdin --coordinator=\"${{SSH_CONNECTION%% *}}:{port}\" {}",
        quoted(&program.display().to_string()),
        words.join(" ")
    );
    let options =
        ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"];
    let mut all = options.map(str::to_owned).to_vec();
    // The user's shell there may be any.
    all.extend([host.to_owned(), format!("exec sh -c {}", quoted(&script))]);
    all
}

/// What goes first into the input: a line for each variable of `environment` that a worker needs, and an empty one.
pub(super) fn preamble(environment: impl Iterator<Item = (String, String)>) -> String {
    let needed = |name: &str| PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    let lines = environment
        .filter(|(name, value)| needed(name) && !value.contains('\n'))
        .map(|(name, value)| format!("{name}={value}\n"));
    lines.collect::<String>() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_arrive_as_they_were_whatever_is_in_them() {
        let odd = "it's $HOME; `date` \"x\"";
        let arguments = arguments("host", Path::new("/no/such/cpcr"), 7, &[odd.to_owned()]);
        assert_eq!(arguments[arguments.len() - 2], "host");
        let command = arguments.last().unwrap().replace("p=cpcr", "p=echo");
        let output = std::process::Command::new("sh")
            .args(["-c", &command])
            .env("SSH_CONNECTION", "10.0.0.1 5000 10.0.0.2 22")
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(said, format!("worker --while-stdin --coordinator=10.0.0.1:7 {odd}\n"));
    }

    #[test]
    fn only_what_a_worker_needs_is_sent() {
        let all = [
            ("AWS_REGION", "here"),
            ("HOME", "/root"),
            ("AWS_X", "a\nb"),
            ("CPCR_JOIN_TOKEN", "t"),
        ];
        let said = preamble(all.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert_eq!(said, "AWS_REGION=here\nCPCR_JOIN_TOKEN=t\n\n");
    }
}
